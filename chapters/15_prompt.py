# %% [markdown]
# # Prompt tuning: words that are not in the vocabulary
#
# The smallest method of this book trains a handful of vectors and nothing else. They stand in
# front of the embedded text as if a tokenizer had put them there. No word of the vocabulary needs to have
# such a vector: it is a *soft* prompt [@lester2021].

# %%

import numpy as np
import torch

from minipeft.lab import models, plots, text, timing, train, tuning
from minipeft.lab.chapter import start
from minipeft.reference import prompt
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel

chapter = start("15_prompt", steps=30, model="tiny")

# %% [markdown]
# ## The problem
#
# A good instruction in front of a text can replace training. But a prompt in words is found by trying, and it can only say what words say. The model never sees words: its first
# layer looks each token up in a table $E$ and goes on with vectors. Between the vectors of the table there is room.
#
# ## The formula
#
# For an embedded text $X$ of shape (tokens, $d$) and $n$ trained vectors $P$ of shape ($n$, $d$):
#
# $$ X' = \begin{bmatrix} P \\ X \end{bmatrix}. $$
#
# That is all. The model, frozen, does the rest. $P$ starts as a copy of the embeddings of real tokens; so at first it *is* a prompt in words, and then gradient descent moves it where no word is.
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
# In torch the prompt goes in through `inputs_embeds`. Two things are easily overlooked there: the prompt must be visible to the mask, and it has no labels. A label for a
# virtual token would train the model to predict words that nobody has written.
#
# @source minipeft.torch.prompt.PromptModel
#
# The random start is there to compare with.
#
# @source minipeft.reference.prompt.init_random
#
# ## The proof
#
# *A prompt of real tokens is that text*, bit for bit, and what follows is copies and sums: the tests prove the gradient over the rationals and compare the columns as bytes.

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
# *Nothing merges.* A weight $W$ acts on each token by itself: row $i$ of $X W^T$ knows nothing of row $j$. A prompt acts on a token only through
# attention, by an amount that depends on what the token asks for ([chapter 14](14_prefix.md) writes this out as a gate). There is no matrix that one could add to $W$.
# The prompt can be stored, sent, and put in front. It cannot disappear.
#
# ## The experiment: where to begin
#
# `tiny` and the *Devil's Dictionary*; ten vectors of {=width=} numbers. They begin as ten words of Bierce, as ten tokens drawn from the vocabulary, or at random in $(-\tfrac12, \tfrac12)$.

# %%
base = models.load(chapter.model, chapter.device)
tokenizer = base.tokenizer
task = tuning.dictionary(tokenizer)
N = 10
table = base.model.get_input_embeddings().weight.detach()
width = table.shape[1]
bierce = text.encode(tokenizer, ["".join(task.pairs[7])])[:N].tolist()
drawn = torch.randint(3, len(table), (N,), generator=torch.Generator().manual_seed(0))
STARTS = {
    "words of Bierce": PromptConfig(tokens=bierce),
    "any tokens": PromptConfig(tokens=drawn.tolist()),
    "random numbers": PromptConfig(N),
}
without = train.loss(base.model, task.held_out)
print(
    f"no prompt: {without:.3f}; entries of the table have a deviation of {table.std():.2f}"
)
tuned = {}
for name, config in STARTS.items():
    model = PromptModel(base.model, config)
    run = tuned[name] = tuning.tune(model, task, chapter.steps, lr=5e-2)
    print(f"{name:16s} {run.before:.3f} before, {run.after:.3f} after")
assert all(run.after < run.before for run in tuned.values())
assert all(run.trained == N * width for run in tuned.values())
ends = [run.after for run in tuned.values()]

# %% tags=["fold"]
figure = tuning.curves(tuned, without, "no prompt")
chapter.show(
    figure,
    "starts",
    alt="Validation loss of three soft prompts of ten vectors over the steps, begun from words of the task, from any tokens, and from random numbers; the dashed line is the model without a prompt.",
)

# %% [markdown]
# Without a prompt the model has {=f"{without:.3f}"=} nats. With ten words of Bierce in front, untrained, {=f"{tuned['words of Bierce'].before:.3f}"=}; after {=chapter.steps=} steps {=f"{tuned['words of Bierce'].after:.3f}"=}, with {=f"{N * width:,}"=} trained
# numbers. From any tokens: {=f"{tuned['any tokens'].after:.3f}"=}. From random numbers: {=f"{tuned['random numbers'].after:.3f}"=}, having begun at {=f"{tuned['random numbers'].before:.3f}"=}.
# On this model the start hardly matters: the three ends are within {=f"{max(ends) - min(ends):.3f}"=} nats. The paper sees a clear difference for its small models, and none for its largest.
#
# What has the prompt become? For each vector, the token whose embedding has the largest cosine with it:


# %%
def nearest(P):
    """The token nearest to each vector, and the cosine."""
    unit = torch.nn.functional.normalize
    cosine = unit(P.detach(), dim=1) @ unit(table, dim=1).T
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
assert moved.min() > 0

# %% [markdown]
# The nearest word is no translation. A soft prompt works by what the layers make of it, and a vector between words may do what no word near it does.
#
# ## The experiment: length
#
# The paper finds that more than twenty tokens help little, and that the size of the model matters far more: prompts catch up with fine-tuning at ten billion parameters. `tiny` has one million. So expect the
# method at its weakest here, beside a [prefix](14_prefix.md) of the same length.

# %%
LENGTHS = (1, 5, 20)
long = text.encode(tokenizer, ["".join(pair) for pair in task.pairs[7:12]]).tolist()
results = {"prompt": {}, "prefix": {}}
numbers = {"prompt": {}, "prefix": {}}
for n in LENGTHS:
    made = {
        "prompt": (PromptModel(base.model, PromptConfig(tokens=long[:n])), 5e-2),
        "prefix": (PrefixModel(base.model, PrefixConfig(tokens=long[:n])), 0.15),
    }
    for kind, (model, lr) in made.items():
        run = tuning.tune(model, task, max(1, chapter.steps // 2), lr, checks=1)
        results[kind][n], numbers[kind][n] = run.after, run.trained
for kind in results:
    for n in LENGTHS:
        print(
            f"{kind} of {n:2d}: {numbers[kind][n]:6,} numbers, {results[kind][n]:.3f}"
        )

# %% tags=["fold"]
figure, ax = plots.axes(
    x="trained numbers", y="validation loss (nats per token)", size=(6.4, 3.2)
)
for color, kind in zip(plots.PALETTE, results, strict=False):
    x, y = [*numbers[kind].values()], [*results[kind].values()]
    ax.plot(x, y, "o-", color=color, label=kind)
    for n, at in zip(LENGTHS, zip(x, y, strict=True), strict=True):
        ax.annotate(
            f"n = {n}", at, (4, 5), textcoords="offset points", color=color, fontsize=8
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
ax.set_xscale("log")
ax.legend()
chapter.show(
    figure,
    "length",
    alt="Validation loss against the number of trained numbers for prompts and prefixes of one, five and twenty tokens.",
)

# %% [markdown]
# ## What it costs
#
# $n \cdot d$ numbers to train and keep: the smallest file of the book. But $n$ tokens to compute, in every layer, for every request. Attention is quadratic in the length, so the price is paid most where
# texts are short and prompts long, and the context has $n$ places fewer.

# %%
ids = task.held_out[0]["input_ids"][:16]
cost = {}
for n in (0, 10, 50, 100):
    model = PromptModel(base.model, PromptConfig(n)) if n else base.model
    with torch.no_grad():
        model(ids)
        runs = []
        for _ in range(5):
            runs.append(timing.cost(chapter.device, model, ids))
    cost[n] = float(np.median(runs))
for n, seconds in cost.items():
    print(f"{n:3d} virtual tokens before {ids.shape[1]}: x {seconds / cost[0]:.2f}")
print(f"T5 XXL of 11 billion, 100 tokens of 4,096: {100 * 4096:,} numbers")
assert cost[100] > cost[0]

# %% [markdown]
# A prefix of the same length is cheaper to run: its keys and values are there already, while a prompt is pushed through every layer again.
#
# ## What goes wrong in practice
#
# - **A view instead of a copy.** `E[tokens]` copies in torch and NumPy; `E[3:8]` does not. A prompt that shares memory with the table trains the table.
# - **Labels for virtual tokens.** Without the ignored labels in front, the labels are shifted against the text by $n$, and the loss is that of nonsense. It still falls.
# - **Padding on the left.** The prompt must stand before the *text*, not before the padding, if positions count from the first visible token.
# - **The wrong model.** A prompt is $n$ vectors in one model's embedding space. In another of the same width it loads without a word of complaint.
# - **The mean instead of the sum** over a batch: the effective learning rate then depends on the batch size.
#
# ## Exercises
#
# 1. How many numbers does a soft prompt of 200 tokens need for Llama 3.2 3B, whose width is 3,072? peft's benchmark reports 614,400.

# %% tags=["solution"]
print(f"{200 * 3072:,}")
assert 200 * 3072 == 614_400

# %% [markdown]
# 2. Is a trained prompt worth more than its nearest words? Put the words in its place.

# %% tags=["solution"]
model = tuned["words of Bierce"].model
unit = torch.nn.functional.normalize
ids = (unit(model.P.detach(), dim=1) @ unit(table, dim=1).T).argmax(dim=1)
as_words = train.loss(
    PromptModel(base.model, PromptConfig(tokens=ids.tolist())), task.held_out
)
print(
    f"trained {tuned['words of Bierce'].after:.3f}, as its nearest words {as_words:.3f}"
)
assert as_words > tuned["words of Bierce"].after

# %% [markdown]
# 3. Does the order matter? Reverse the trained prompt.

# %% tags=["solution"]
with torch.no_grad():
    model.P.copy_(model.P.flip(0))
reversed_loss = train.loss(model, task.held_out)
print(f"in order {tuned['words of Bierce'].after:.3f}, reversed {reversed_loss:.3f}")
assert reversed_loss != tuned["words of Bierce"].after

# %% [markdown]
# ## References
#
# Prompt tuning is by Lester, Al-Rfou and Constant [@lester2021]; prefix tuning by Li and Liang [@li2021].
