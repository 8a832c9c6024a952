# %% [markdown]
# # Prompt tuning: words that are not in the vocabulary
#
# Prompt tuning [@lester2021] trains a few vectors and nothing else. They stand in
# front of the embedded text as if a tokenizer had put them there. No word of the vocabulary needs to have
# such a vector: it is a *soft* prompt. How many numbers it trains does not depend on the number of layers.

# %%

import numpy as np
import torch

from minipeft.lab import plots, text, timing, train, tuning
from minipeft.lab.chapter import start
from minipeft.reference import prompt
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel

chapter = start("15_prompt", steps=24, model="tiny")

# %% [markdown]
# ## The problem
#
# A good instruction in front of a text can replace training. But an instruction in words is found by trying, and it can only be made of words. The model itself computes with vectors: its first
# layer looks each token up in a table $E$. Most vectors are not in that table, and any of them could stand in front of a text.
#
# ## The formula
#
# Let $d$ be the width of the model. For an embedded text $X$ of shape (tokens, $d$) and $n$ trained vectors $P$ of shape ($n$, $d$):
#
# $$ X' = \begin{bmatrix} P \\ X \end{bmatrix}. $$
#
# The model stays frozen. $P$ starts as a copy of the embeddings of real tokens, so at first it *is* a prompt in words. Then gradient descent moves it to vectors that belong to no word.
#
# ## The code
#
# @source minipeft.reference.prompt.Prompt
#
# @source minipeft.reference.prompt.init
# @source minipeft.torch.prompt.init
#
# @source minipeft.reference.prompt.forward
# @source minipeft.torch.prompt.forward
#
# @source minipeft.reference.prompt.backward
#
# In torch the prompt goes in through `inputs_embeds`. Two things are easily overlooked there: the mask must let the text see the prompt, and the prompt has no labels: a virtual token has no right answer to predict.
#
# @source minipeft.torch.prompt.PromptModel
#
# The random start is there to compare with.
#
# @source minipeft.reference.prompt.init_random
#
# ## The proof
#
# *A prompt of real tokens is that text*, bit for bit. The gradient of the prompt is a sum over the batch. The tests check it over the rationals, and compare the columns as bytes.

# %%
rng = np.random.default_rng(0)
E = rng.standard_normal((9, 3)).astype(np.float32)
words, story = np.array([4, 0, 7]), np.array([[1, 2], [8, 8]])
soft = prompt.forward(E[story], prompt.init(E, words))
hard = E[np.concatenate([np.tile(words, (2, 1)), story], axis=1)]
assert soft.tobytes() == hard.tobytes()
grads = prompt.backward(np.ones_like(soft), prompt.init(E, words))
print("gradient of the prompt, for a batch of two:", grads.P[0])
assert (grads.P == 2).all()

# %% [markdown]
# *Nothing merges.* A weight $W$ acts on each token by itself: row $i$ of $X W^T$ does not depend on row $j$ of $X$. A prompt acts on a token only through
# attention, by an amount that depends on that token's query ([chapter 14](14_prefix.md) writes this out as a gate). There is no matrix that one could add to $W$ instead.
#
# ## The experiment: where to begin
#
# `tiny` and the *Devil's Dictionary*; ten vectors of {=width=} numbers. They begin as ten tokens of Bierce's text (words and parts of words), as ten tokens drawn from the vocabulary, or at random in $(-\tfrac12, \tfrac12)$. Each start tries learning rates, two to a
# decade, until the best one has a worse one on both sides.

# %%
base = chapter.load()
tokenizer = base.tokenizer
lesson = tuning.lesson(chapter.task, tokenizer, kept=chapter.kept)
N = 10
table = base.model.get_input_embeddings().weight.detach()
width = table.shape[1]
bierce = text.encode(tokenizer, ["".join(pair) for pair in lesson.pairs[7:27]])[
    :N
].tolist()
drawn = torch.randint(3, len(table), (N,), generator=torch.Generator().manual_seed(0))
STARTS = {
    "words of Bierce": PromptConfig(tokens=bierce),
    "any tokens": PromptConfig(tokens=drawn.tolist()),
    "random numbers": PromptConfig(N),
}


def best_run(name, make, start, steps, checks=1):
    """Try rates from 10^(start/2) on; return the run at the best one."""
    runs = tuning.sweep(make, lesson, steps, start, checks)
    return runs[chapter.best(name, {rate: run.after for rate, run in runs.items()})]


without = train.loss(base.model, lesson.held_out)
chapter.quantity(chapter.before, without, "nats per token")
print(f"the entries of the table have a standard deviation of {table.std():.2f}")
tuned = {}
for name, config in STARTS.items():

    def begin(config=config):
        return PromptModel(base.model, config)

    first = -1 if name == "random numbers" else -2
    tuned[name] = best_run(name, begin, first, chapter.steps, checks=3)
for name, run in tuned.items():
    print(f"{name:16s} {run.before:.3f} before, {run.after:.3f} after")
assert all(run.trained == N * width for run in tuned.values())
ends = [run.after for run in tuned.values()]
chapter.claim(
    "every start ends below the base", max(ends) < without, control="no prompt"
)
chapter.claim(
    "training is worth more than the words",
    tuned["words of Bierce"].after < tuned["words of Bierce"].before,
    control="the same ten words, untrained",
)

# %% tags=["fold"]
figure = tuning.curves(tuned, without, "no prompt")
chapter.show(
    figure,
    "starts",
    alt=f"Validation loss of three soft prompts of {N} vectors over the steps, begun from words of the task, from any tokens, and from random numbers; the dashed line is the model without a prompt.",
    caption=f"Three starts, each at its best rate, begin at {min(r.before for r in tuned.values()):.2f} to {max(r.before for r in tuned.values()):.2f} nats and end at {min(ends):.2f} to {max(ends):.2f}; the model without a prompt has {without:.2f}.",
)

# %% [markdown]
# Without a prompt the model has {=f"{without:.3f}"=} nats. With ten tokens of Bierce's text in front, untrained, {=f"{tuned['words of Bierce'].before:.3f}"=}; after {=chapter.steps=} steps {=f"{tuned['words of Bierce'].after:.3f}"=}, with {=f"{N * width:,}"=} trained
# numbers. So the untrained tokens change little, and the training of them more. From any tokens: {=f"{tuned['any tokens'].after:.3f}"=}. From random numbers: {=f"{tuned['random numbers'].after:.3f}"=}, having begun at {=f"{tuned['random numbers'].before:.3f}"=}.
# The three ends lie {=f"{max(ends) - min(ends):.3f}"=} nats apart. This is one seed; in [chapter 17](17_side_by_side.md) the seeds of prompt tuning, which differ in the starting words and in the order of the examples, lie further apart than those of any other method. The paper sees a clear difference between starts for its small models, and none for its largest.
#
# What has the prompt become? For each vector, the token whose embedding has the largest cosine with it:


# %%
def nearest(P):
    """The token nearest to each vector, and the cosine."""
    unit = torch.nn.functional.normalize
    cosine = unit(P.detach(), dim=1) @ unit(table.to(P.dtype), dim=1).T
    best = cosine.max(dim=1)
    return [tokenizer.decode([i]) for i in best.indices.tolist()], best.values


for name in ("words of Bierce", "random numbers"):
    tokens, cosine = nearest(tuned[name].model.P)
    print(f"{name}:", " | ".join(tokens))
    print("   cosines", " ".join(f"{c:.2f}" for c in cosine))
moved = (tuned["words of Bierce"].model.P.detach() - table[bierce]).norm(dim=1) / table[
    bierce
].norm(dim=1)
print(
    f"moved from their words by {moved.min():.0%} to {moved.max():.0%} of their length"
)

# %% [markdown]
# The nearest words do not explain the prompt: exercise 2 puts them in its place and measures what is lost.
#
# ## The experiment: length
#
# The paper finds that more than twenty tokens help little, and that the size of the model matters more: prompts catch up with fine-tuning at ten billion parameters. `tiny` has one million, so here the
# method should be at its weakest. The control is a [prefix](14_prefix.md) made of the same tokens, in half of the steps for both.

# %%
LENGTHS = (1, 5, 20)
long = text.encode(tokenizer, ["".join(pair) for pair in lesson.pairs[7:27]]).tolist()
MADE = {
    "prompt": (PromptModel, PromptConfig, -2),
    "prefix": (PrefixModel, PrefixConfig, -1),
}
results, numbers = {}, {}
for kind, (model_of, config_of, first) in MADE.items():
    results[kind], numbers[kind] = {}, {}
    for n in LENGTHS:

        def make(n=n, model_of=model_of, config_of=config_of):
            return model_of(base.model, config_of(tokens=long[:n]))

        run = best_run(f"a {kind} of {n}", make, first, max(1, chapter.steps // 2))
        results[kind][n], numbers[kind][n] = run.after, run.trained
for kind in results:
    for n in LENGTHS:
        print(
            f"{kind} of {n:2d}: {numbers[kind][n]:6,} numbers, {results[kind][n]:.3f}"
        )
chapter.claim(
    "a prompt learns less",
    all(results["prompt"][n] > results["prefix"][n] for n in LENGTHS),
    control="a prefix of the same length, at its own best rate",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="trained numbers", y="loss on held-out definitions", size=(6.4, 3.2)
)
for color, kind in zip(plots.PALETTE, results, strict=False):
    x, y = [*numbers[kind].values()], [*results[kind].values()]
    ax.plot(x, y, "o-", color=color, label=kind)
    for n, at in zip(LENGTHS, zip(x, y, strict=True), strict=True):
        right = kind == "prompt"  # the names of the other curve stand left of it
        ax.annotate(
            f"n = {n}",
            at,
            (4, 5) if right else (-4, -11),
            textcoords="offset points",
            ha="left" if right else "right",
            color=plots.INK,
            fontsize=8,
        )
ax.axhline(without, color=plots.INK, linestyle="--", linewidth=1)
ax.text(
    max(numbers["prefix"].values()),
    without,
    "nothing trained",
    ha="right",
    va="bottom",
    color=plots.INK,
)
ax.set(xscale="log", ylim=(None, without + 0.02))
ax.legend(loc="lower left")
chapter.show(
    figure,
    "length",
    alt=f"Loss on held-out definitions against the number of trained numbers, for prompts and for prefixes of {min(LENGTHS)} to {max(LENGTHS)} tokens. The curve of the prefixes lies below that of the prompts.",
    caption=f"In {chapter.steps // 2} steps a prompt of {max(LENGTHS)} tokens gains {without - results['prompt'][20]:.2f} nats with {numbers['prompt'][20]:,} numbers, a prefix of as many tokens {without - results['prefix'][20]:.2f} with {numbers['prefix'][20]:,}.",
)

# %% [markdown]
# ## What it costs
#
# A prompt has $n \cdot d$ numbers to train and keep. With ten tokens that is {=f"{N * width:,}"=} here, fewer than the 2,048 of [IA3](10_ia3.md) and the 5,120 of a [prefix](14_prefix.md) of ten; with twenty it is more than IA3's. But $n$ more tokens are computed in every layer, for every request unless their keys and values are kept,
# and the context has $n$ places fewer for text. Beside a short text a long prompt is most of what is computed, so there the price is highest. The times are medians of nine turns in which all take part.

# %%
ids = lesson.held_out[0]["input_ids"][:16].to(base.model.device)
timed = {"nothing": base.model}
timed |= {
    f"prompt, {n}": PromptModel(base.model, PromptConfig(n)) for n in (10, 50, 100)
}
timed["prefix, 100"] = PrefixModel(base.model, PrefixConfig(100))
runs = {name: [] for name in timed}
with torch.no_grad():
    for _ in range(9):
        for name, model in timed.items():
            runs[name].append(timing.cost(chapter.device, model, ids))
cost = {name: float(np.median(seconds)) for name, seconds in runs.items()}
print(f"before {ids.shape[1]} tokens of text:")
for name, seconds in cost.items():
    print(f"{name:12s} x {seconds / cost['nothing']:.2f}")
print(f"T5 XXL of 11 billion, 100 tokens of 4,096: {100 * 4096:,} numbers")
chapter.claim(
    "a prompt of 100 costs time", cost["prompt, 100"] > cost["nothing"], "no prompt"
)
chapter.claim(
    "a prefix of 100 costs less",
    cost["prefix, 100"] < cost["prompt, 100"],
    control="a prompt of 100",
)

# %% [markdown]
# A prefix of 100 tokens takes {=f"{cost['prefix, 100'] / cost['nothing']:.2f}"=} times as long as no prefix, a prompt of 100 {=f"{cost['prompt, 100'] / cost['nothing']:.2f}"=} times: the keys and values of a prefix are there already, while a prompt is computed through every layer again.
#
# ## What goes wrong in practice
#
# - **A view instead of a copy.** `E[tokens]` copies in torch and NumPy; `E[3:8]` does not. A prompt that shares memory with the table trains the table.
# - **Labels for virtual tokens.** The first $n$ predictions are those of the virtual tokens. Without ignored labels in front, labels and predictions differ in number. A loss that cuts off the longer end compares each prediction with the token $n$ places too far.
# - **Padding on the left.** It stands between the prompt and the text. If it takes positions too, there is a gap between the two, as wide as the padding. Positions must count the visible tokens alone.
# - **The wrong model.** A prompt is $n$ vectors in one model's embedding space. In another model of the same width it loads without an error, and does not work.
# - **The mean instead of the sum** over a batch: the gradient of the prompt is divided by the batch size once too often. Adam's step does not depend on the size of the gradient and hides this; plain gradient descent does not.
#
# ## Exercises
#
# 1. How many numbers does a soft prompt of 200 tokens need for Llama 3.2 3B, whose width is 3,072? peft's benchmark reports 614,400.

# %% tags=["solution"]
print(f"{200 * 3072:,}")
assert 200 * 3072 == 614_400

# %% [markdown]
# 2. Is a trained prompt worth more than its nearest words? Put the nearest words in its place.

# %% tags=["solution"]
model = tuned["words of Bierce"].model
unit = torch.nn.functional.normalize
P = model.P.detach()
ids = (unit(P, dim=1) @ unit(table.to(P.dtype), dim=1).T).argmax(dim=1)
as_words = train.loss(
    PromptModel(base.model, PromptConfig(tokens=ids.tolist())), lesson.held_out
)
print(
    f"trained {tuned['words of Bierce'].after:.3f}, as its nearest words {as_words:.3f}"
)
chapter.claim(
    "the trained prompt is better",
    as_words > tuned["words of Bierce"].after,
    control="its nearest words",
)

# %% [markdown]
# 3. Does the order matter? Reverse the trained prompt.

# %% tags=["solution"]
with torch.no_grad():
    model.P.copy_(model.P.flip(0))
reversed_loss = train.loss(model, lesson.held_out)
print(f"in order {tuned['words of Bierce'].after:.3f}, reversed {reversed_loss:.3f}")
gained = without - tuned["words of Bierce"].after
chapter.claim(
    "the order is worth less than half of what training gained",
    abs(reversed_loss - tuned["words of Bierce"].after) < gained / 2,
    control="the gain of the same prompt over none",
)

# %% [markdown]
# ## References
#
# Prompt tuning is by Lester, Al-Rfou and Constant [@lester2021]; prefix tuning by Li and Liang [@li2021].
