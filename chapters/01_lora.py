# %% [markdown]
# # LoRA: train a thin product
#
# A weight matrix of a large model has millions of entries. LoRA [@hu2021] describes with far fewer numbers what
# fine-tuning *changes* about it: by two thin matrices whose product is added to the frozen weight.
# This chapter goes from its formula to a trained model, and asks what the frozen weights contribute.

# %%
import copy

import numpy as np
import torch
from matplotlib.patches import Rectangle

from minipeft.lab import models, plots, task, text, train
from minipeft.lab.chapter import start
from minipeft.reference import linear, lora
from minipeft.torch.inject import inject, merge, trainable_parameters, unmerge
from minipeft.torch.linear import weight_of
from minipeft.torch.lora import LoRAConfig, LoRALinear

chapter = start("01_lora", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Training every weight keeps a gradient and two optimizer states for every weight ([chapter 0](00_why.md) counts them). If most numbers stayed
# frozen, most of that memory would not be needed. But which few should be trained? LoRA does not choose among the entries of a weight. It changes
# all of them, by a matrix that few numbers describe.
#
# ## The formula
#
# Freeze $W$, of shape (out, in). Train $A$ of shape $(r, \text{in})$ and $B$ of shape $(\text{out}, r)$, with a rank $r$ much smaller
# than either side (4 to 64 are usual), and compute
#
# $$ y = x W^T + s\,(x A^T) B^T, \qquad s = \frac{\alpha}{r}. $$
#
# The update of the weight is $\Delta W = s\,B A$, a matrix as large as $W$. Training never forms it. $A$ starts random and $B$ at zero, so that
# training begins exactly at the base model.
#
# The numerator $\alpha$ of the scaling $s$ is a constant that is chosen before training and not trained. Usual values are $\alpha = r$ and
# $\alpha = 2r$, so $s$ is 1 or 2. The paper divides by $r$ so that a change of $r$ needs less of a new search for hyperparameters, such as the learning rate. Whether the division
# does that depends on the optimizer: [the chapter on rsLoRA](07_rslora.md) measures it.
#
# When training is done, $W + \Delta W$ can be stored as an ordinary weight. The adapter is then *merged*, and the layer costs what it cost before.

# %% tags=["fold"]
figure, ax = plots.axes(size=(6.4, 2.5))
ax.set(xlim=(0, 13), ylim=(0, 5), aspect="equal")
ax.axis("off")
grey, blue, green = plots.FAINT, plots.PALETTE[0], plots.PALETTE[1]
for x, y, w, h, color, label in [
    (0.5, 0.5, 4, 4, grey, "$W$\nfrozen"),
    (6.0, 0.5, 0.7, 4, blue, "$B$"),
    (7.2, 3.8, 4, 0.7, green, "$A$"),
]:
    ax.add_patch(Rectangle((x, y), w, h, color=color))
    ax.text(
        x + w / 2,
        y + h / 2,
        label,
        ha="center",
        va="center",
        color="white" if color != grey else plots.INK,
    )
ax.text(5.2, 2.5, "+ s", ha="center", va="center", fontsize=13, color=plots.INK)
for x, y, label in [
    (2.5, 0.1, "in"),
    (0.25, 2.5, "out"),
    (6.35, 0.1, "r"),
    (9.2, 3.4, "in"),
    (11.5, 4.15, "r"),
]:
    ax.text(x, y, label, ha="center", va="center", fontsize=9, color=plots.INK)
chapter.show(
    figure,
    "shapes",
    alt="A large grey square named W, frozen, with sides out and in; then plus s; then a tall thin blue rectangle B with sides out and r, and a wide flat green rectangle A with sides r and in.",
    caption="LoRA adds a product of two thin matrices to a frozen weight: r (out + in) trained numbers beside out × in frozen ones.",
)

# %% [markdown]
# ## The code
#
# The reference is the formula. `scaling` also has the variant of rsLoRA, which divides by $\sqrt r$: it has a chapter of
# its own.
#
# @source minipeft.reference.lora.LoRA
#
# @source minipeft.reference.lora.scaling
#
# @source minipeft.reference.lora.init
# @source minipeft.torch.lora.init
#
# @source minipeft.reference.lora.forward
# @source minipeft.torch.lora.LoRALinear
#
# The backward pass by hand shows what is saved: the gradients of $A$ and $B$ need $x$ and the $r$ numbers $x A^T$, and
# nothing needs a matrix of the shape of $W$ but $W$ itself.
#
# @source minipeft.reference.lora.backward
#
# @source minipeft.reference.lora.delta
#
# @source minipeft.reference.lora.merge
#
# ??? note "The two checks"
#     @source minipeft.reference.lora.check_rank
#
#     @source minipeft.reference.lora.check_fits
#
# ## The proof
#
# "Merging is exact" is a statement about real numbers, and floats are rounded. But the reference uses only
# `+`, `*` and `@`, so it also runs on fractions, which are never rounded:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    values = [
        Fraction(int(n), int(d))
        for n, d in zip(
            rng.integers(-9, 10, shape).flat,
            rng.integers(1, 9, shape).flat,
            strict=True,
        )
    ]
    return np.array(values, dtype=object).reshape(shape)


x, W, A, B = fractions(3, 5), fractions(4, 5), fractions(2, 5), fractions(4, 2)
adapter = lora.LoRA(A, B, Fraction(16, 6))
adapted = lora.forward(x, W, adapter)
merged = linear.forward(x, lora.merge(W, adapter))
print("adapted[0]:", *adapted[0])
print("merged[0]: ", *merged[0])
assert (adapted == merged).all()

# %% [markdown]
# Equal, with `==`. In continuous integration the tests do this for 200 drawn layers. That is not a proof for all layers, but it is strong evidence: both sides are polynomials in
# the entries, and two different polynomials seldom agree at a random point. [The notation page](../notation.md#what-a-property-test-shows) says what
# the word *proof* stands for in this book.
#
# Gradients are checked the same way. The tests take a loss that is linear in the output $y$. Then it is linear in $A$ alone and in $B$ alone, so a difference quotient equals the derivative. In floats, small
# integers with a power-of-two scaling make every partial sum exact in any order. On such numbers NumPy, torch and the CUDA kernel, which the tests run on
# a CPU, must agree bit for bit, and do.
#
# ## The experiment
#
# `tiny`, the model of this book, has read five novels of Jane Austen. Now it is trained on Ambrose Bierce's
# *Devil's Dictionary*: on {=len(chapter.task.train)=} definitions, of which each step sees eight. It is judged on
# {=len(chapter.task.validation)=} others, which no chapter of this book trains on, by the loss in nats for each token.
#
# How much does LoRA of rank 8 on every linear layer reach of what training all weights reaches? And how much of that comes from the frozen weights?
# Four contenders see the same batches in the same order. Two start from `tiny`, and two, as a control, from a model of the same shape
# with random weights:
#
# 1. **full fine-tuning** of every weight;
# 2. **LoRA** of rank 8;
# 3. **full training of random weights**;
# 4. **LoRA on random weights**.
#
# A method can lose only because its learning rate is bad, so each of the four gets three rates, and the best of them counts.

# %%
base = chapter.load()
tokenizer = base.tokenizer
batches, held_out = chapter.task.training(tokenizer), chapter.task.held_out(tokenizer)
places = chapter.places(base.model)


def contender(trained, low_rank):
    """A fresh model: with the weights of the base or random ones, adapted or not."""
    model = copy.deepcopy(base.model) if trained else models.random_like(base.model)
    return (
        inject(model, LoRAConfig(r=8, alpha=16), places.linears) if low_rank else model
    )


def run(model, lr, points):
    """Train what is trainable; return the history, judged at some points."""
    torch.manual_seed(0)
    config = train.TrainConfig(
        chapter.steps,
        lr=lr,
        warmup=chapter.steps // 10,
        validate_every=max(1, chapter.steps // points),
    )
    return train.train(model, batches, config, held_out, chapter.kept())


CONTENDERS = {
    "full fine-tuning": (True, False, (1e-3, 2e-3, 4e-3)),
    "LoRA, r = 8": (True, True, (4e-3, 8e-3, 16e-3)),
    "full training of random weights": (False, False, (1e-3, 3e-3, 9e-3)),
    "LoRA on random weights": (False, True, (4e-3, 8e-3, 32e-3)),
}
start_loss = train.loss(base.model, held_out)
chapter.quantity(chapter.before, start_loss, "nats per token")
histories, made = {}, {}
for name, (trained, low_rank, rates) in CONTENDERS.items():
    tried = {}
    for rate in rates:
        model = contender(trained, low_rank)
        tried[rate] = run(model, rate, points=4 if rate == rates[1] else 1), model
    losses = {rate: history.validation[-1][1] for rate, (history, _) in tried.items()}
    print(f"{name}:", ", ".join(f"{v:.3f} at {rate:g}" for rate, v in losses.items()))
    histories[name], made[name] = tried[chapter.best(name, losses)]

# %% [markdown]
# Two more controls are needed. Suppose a model predicts the same probabilities at every position: the frequencies of the tokens in the training definitions. What is its loss? And LoRA leaves the table of tokens as it is: `tiny` has one table, which turns tokens into numbers and the last numbers into tokens. What does LoRA on random weights reach if that table is trained as well?


# %%
def predicted_tokens(examples):
    """Every token that the loss is taken on."""
    labels = [batch["labels"][:, 1:].flatten() for batch in examples]
    return torch.cat([part[part >= 0] for part in labels])  # -100: not predicted


size = (50, task.LENGTH)
seen = predicted_tokens(text.example_batches(tokenizer, chapter.task.train, size))
counts = torch.bincount(seen, minlength=len(tokenizer)).double() + 1  # none at zero
frequencies = counts / counts.sum()
unigram = float(-frequencies[predicted_tokens(held_out)].log().mean())
print(f"token frequencies of the {len(seen):,} training tokens: {unigram:.3f}")
print(f"all {len(tokenizer):,} tokens equally likely: {np.log(len(tokenizer)):.3f}")

opened = contender(trained=False, low_rank=True)
opened.get_input_embeddings().weight.requires_grad_(True)  # the output table as well
with_table = run(opened, 8e-3, points=1).validation[-1][1]
print(f"LoRA on random weights, token table trained as well: {with_table:.3f}")

# %%
last = {name: history.validation[-1][1] for name, history in histories.items()}
count = {
    name: sum(p.numel() for p in trainable_parameters(contender(True, low_rank)))
    for name, low_rank in (("full fine-tuning", False), ("LoRA, r = 8", True))
}
gain = {name: start_loss - last[name] for name in count}
share = gain["LoRA, r = 8"] / gain["full fine-tuning"]
for name, n in count.items():
    print(f"{name:17s} trains {n:9,} parameters, gains {gain[name]:.3f} nats")
trained_share = count["LoRA, r = 8"] / count["full fine-tuning"]
run_of = f"{chapter.model}, {chapter.steps} steps"
for name, loss in (*last.items(), ("token frequencies alone", unigram)):
    chapter.quantity(f"{run_of}, {name}: loss", loss, "nats per token")
chapter.quantity(f"{run_of}, LoRA, r = 8: trained", 100 * trained_share, "%", 1)
chapter.quantity(f"{run_of}, LoRA, r = 8: of the full gain", 100 * share, "%", 0)
chapter.claim(
    "LoRA trains less than an eighth of the parameters",
    count["LoRA, r = 8"] < count["full fine-tuning"] / 8,
    control="full fine-tuning",
)
chapter.claim(
    f"LoRA reaches {share:.0%} of the gain of full fine-tuning, not all of it",
    0.8 < share < 1,
    control="full fine-tuning on the same batches, both at their best rate",
)
from_random = last["full training of random weights"]
chapter.claim(
    f"{chapter.steps} steps from random weights end below the token frequencies, and above tiny",
    start_loss < from_random < unigram,
    control="tiny before training, and token frequencies alone",
)
chapter.claim(
    "LoRA on random weights does not learn even the token frequencies",
    unigram < last["LoRA on random weights"],
    control="token frequencies alone",
)
chapter.claim(
    "the frozen table is what holds it back",
    with_table < unigram,
    control="the same weights and LoRA, at one rate, with the table trained as well",
)

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="held-out loss (nats per token)")
at_random = train.loss(contender(trained=False, low_rank=False), held_out)
for (name, history), color in zip(histories.items(), plots.PALETTE, strict=False):
    first = start_loss if CONTENDERS[name][0] else at_random
    steps, losses = zip((0, first), *history.validation, strict=True)
    ax.plot(steps, losses, "o-", color=color, markersize=4, label=name)
    ax.annotate(
        f"{losses[-1]:.2f}",
        (steps[-1], losses[-1]),
        xytext=(5, 6 if name == "LoRA, r = 8" else -8),
        textcoords="offset points",
        color=color,
    )
ax.axhline(unigram, color=plots.INK, linewidth=0.8, linestyle="--")
label = f"token frequencies alone: {unigram:.2f}"
ax.text(0, unigram - 0.07, label, va="top", color=plots.INK)
ax.set(ylim=(3.4, 8.0), xlim=(-1, chapter.steps * 1.1))
ax.legend(loc="upper center", ncols=2, fontsize=9)
chapter.show(
    figure,
    "loss",
    alt=f"Loss on held-out definitions over the steps of training. Full fine-tuning and LoRA start at {start_loss:.2f} and fall, LoRA a little less. Full training of random weights starts at {at_random:.2f}, falls fast, and ends just below a dashed line for token frequencies. LoRA on random weights falls a little and ends {last['LoRA on random weights'] - unigram:.2f} nats above that line.",
    caption=f"After {chapter.steps} steps LoRA, which trains {count['LoRA, r = 8'] / count['full fine-tuning']:.1%} of the parameters, has {share:.0%} of the gain of full fine-tuning. On random weights full training ends at {from_random:.2f}, just below the loss of bare token frequencies ({unigram:.2f}), and LoRA at {last['LoRA on random weights']:.2f}, above it.",
)

# %% [markdown]
# LoRA trains {=f"{100 * count['LoRA, r = 8'] / count['full fine-tuning']:.1f}"=} % of the parameters (the
# share falls as a model gets wider: in [chapter 0](00_why.md) it is 2.4 % at eight times the rank) and reaches {=f"{100 * share:.0f}"=} % of the gain of full fine-tuning.
#
# What do the frozen weights contribute? On random weights LoRA ends at {=f"{last['LoRA on random weights']:.2f}"=}. It has not even reached the loss of the token
# frequencies, {=f"{unigram:.2f}"=}. The reason is the random table, which stays frozen: with the table trained as well, it ends at {=f"{with_table:.2f}"=}. Full training of the *same* random weights
# trains the table too and ends at {=f"{from_random:.2f}"=}. Both lie at most {=f"{unigram - min(with_table, from_random):.2f}"=} nats below the token frequencies. {=chapter.steps=} steps on {=8 * chapter.steps=} definitions are too few to learn the language from random weights, with an adapter or without.
#
# So the figure shows two things. From random weights ({=f"{at_random:.2f}"=}) to the fine-tuned model ({=f"{last['full fine-tuning']:.2f}"=}) the loss falls, and {=f"{(at_random - start_loss) / (at_random - last['full fine-tuning']):.0%}"=} of this fall was the work of
# pretraining. And rank 8 is enough for
# {=f"{100 * share:.0f}"=} % of what {=chapter.steps=} steps of training all weights add. It does not show *how* the update works, nor that LoRA would keep up in a longer run.
#
# And the definitions? The prompts are words whose definitions no run was trained on.

# %%
adapted = made["LoRA, r = 8"]
for seed, (prompt, _) in enumerate(chapter.task.validation[5:50:9]):
    sampling = text.Sampling(tokens=36, temperature=0.7, top_k=20, seed=seed)
    print(prompt)
    for name, model in (("before", base.model), ("after ", adapted)):
        answer = text.generate(model, tokenizer, prompt, sampling)
        print(f"  {name}:", " ".join(answer.split()))

# %% [markdown]
# Neither text makes sense: this is what {=f"{count['full fine-tuning'] / 1e6:.2f}"=} million parameters can do. But before training the answers sound like people in a novel, who say *I*
# and *you*; afterwards most begin like a definition, with *a* or *an* and something like a noun.
#
# ## Merging the trained layer
#
# Now the trained adapter is added to the weight, and removed again. The layer keeps the old weight beside the merged one. That costs memory while the
# layer is merged, and it makes unmerging exact: the same bits come back.

# %%
layer = next(m for m in adapted.modules() if isinstance(m, LoRALinear))
weight = weight_of(layer.base).clone()
tokens = held_out[0]["input_ids"].to(base.device)
with torch.no_grad():
    separate = adapted(tokens).logits
    merge(adapted)
    joined = adapted(tokens).logits
    changed = (layer.merged_weight != weight).float().mean().item()
    unmerge(adapted)
    again = adapted(tokens).logits
print(f"merging changed {changed:.0%} of the first layer's weights")
print(
    f"largest difference of a logit: {(separate - joined).abs().max():.1e}, logits up to {separate.abs().max():.1f}"
)
assert torch.equal(weight_of(layer.base), weight)
assert torch.equal(again, separate)
print("unmerged: every weight and every logit as before, bit for bit")

# %% [markdown]
# ## Models with experts
#
# In some models each token uses only a part of the weights. A *router* chooses a few *experts* for each token, and only these compute. `transformers` usually keeps the weights of all
# experts of a layer in two tensors of shape (experts, out, in), one for the gate and the way up and one for the way down; some models, such as gpt-oss, exchange out and in. Each expert gets an $A$ and a $B$ of its own, so $A$ is (experts, r, in) and $B$ is (experts, out, r). A token with the
# expert $e$ gets
#
# $$y = W_e x + b_e + s\,B_e (A_e x)$$
#
# @source minipeft.reference.experts.ExpertsLoRA
#
# @source minipeft.reference.experts.init
#
# @source minipeft.reference.experts.forward
# @source minipeft.torch.experts.StackLoRA
#
# An expert that no token has chosen gets a gradient of zero; where several tokens have chosen one, their gradients add up:
#
# @source minipeft.reference.experts.backward
#
# @source minipeft.reference.experts.delta
#
# @source minipeft.reference.experts.merge
#
# ??? note "The checks"
#     @source minipeft.reference.experts.check_fits
#
#     @source minipeft.reference.experts.check_tokens
#
# In torch the module of experts is called as it is. Inside, it takes the weight of one expert after another, or multiplies many tokens by the weights of their experts at once. Wherever it uses a weight, the two thin
# matrices of the expert are applied as well, and the update of a whole stack is never formed. The target is the name of the module. Routers are no target of `"all-linear"`, and neither are experts: their adapters
# together would be many times as large as all the others.
#
# How much of a model lies in its experts? The count needs no memory, because the model is built without its weights:

# %%
from transformers import MixtralConfig, MixtralForCausalLM

from minipeft.torch.qlora import quantize_linears, unquantized

with torch.device("meta"):
    mixtral = MixtralForCausalLM(MixtralConfig())
everything = sum(p.numel() for p in mixtral.parameters())
in_experts = sum(p.numel() for n, p in mixtral.named_parameters() if p.dim() == 3)
print(f"Mixtral 8x7B: {everything / 1e9:.1f} billion parameters")
print(f"in experts:   {in_experts / 1e9:.1f} billion, {in_experts / everything:.0%}")

sizes = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
torch.manual_seed(0)
small = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
print("\na small one; left as it was:")
for name, size in unquantized(quantize_linears(small)).items():
    print(f"  {name:30s} {size:6d} bytes")

ids = torch.arange(24).reshape(2, 12)
plain = small(ids).logits
inject(small, LoRAConfig(r=3, alpha=6), ["experts", "*attn.q*"])
assert torch.equal(small(ids).logits, plain)
optimizer = torch.optim.SGD(trainable_parameters(small), lr=1.0)
for _ in range(3):
    loss_of_experts = small(ids, labels=ids).loss
    optimizer.zero_grad()
    loss_of_experts.backward()
    optimizer.step()
trained = small(ids).logits
merge(small)
moved, apart = (trained - plain).abs().max(), (small(ids).logits - trained).abs().max()
unmerge(small)
print(f"\nafter three steps a logit has moved by {moved:.0e}")
print(f"merged and unmerged differ by {apart:.0e}")
assert torch.equal(small(ids).logits, trained)
assert apart < moved / 100

# %% [markdown]
# {=f"{in_experts / everything:.0%}"=} of Mixtral's weights lie in its experts: who quantizes only linear layers leaves that much in 16 bits. `quantize_linears` quantizes each
# expert for itself, and `unquantized` lists the matrices that it leaves: the embeddings, the head and the routers.
#
# Files differ here. peft stores one $A$ of shape (experts · r, in), in which the $r$ rows of an expert lie together, and one $B$ of shape (out, r · experts), in which the columns of an expert lie apart, one in each group of experts. A loader that reads both in one
# order mixes the experts without an error, because the sizes are the same; the golden vectors of `experts_merge` have a case for it.
#
# ## What goes wrong in practice
#
# - **The scaling.** `scale = alpha` instead of `alpha / r` is $r$ times too much
#   ([mlx-vlm 841](https://github.com/Blaizzy/mlx-vlm/issues/841)). Libraries whose default is `alpha = r` have a scaling of exactly 1, and a merge
#   that leaves it out, as peft's did for a bias, passes their tests ([peft 2489](https://github.com/huggingface/peft/pull/2489)). The laws of LoRA are tested here with scalings other than 0 and 1.
# - **Which is A?** Two conventions are in use: $A$ as (r, in) with $B$ as (out, r), and $A$ as (in, r) with $B$ as (r, out). [litgpt](https://github.com/Lightning-AI/litgpt/blob/main/litgpt/lora.py) draws the second and
#   computes with the first. On a square layer a loader that goes by shapes takes one for the other without an error, and gets the transpose of the update. So the tests draw layers that are not square.
# - **Merge and unmerge by addition and subtraction** loses bits, in bfloat16 many. [The chapter on merging](16_merging.md) measures the drift over 1,000
#   cycles. Keep the old weight instead.
# - **An adapter that was silently not applied**, because a name did not match. Here a target that matches nothing is an error:

# %%
from minipeft.errors import InputError

try:
    inject(copy.deepcopy(base.model), LoRAConfig(r=8, alpha=16), ["query_proj"])
except InputError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# 1. GPT-3 has 96 layers of width 12,288. How many parameters has LoRA of rank 8 on the query and value projections? The paper's table 4 says 37.7 million.

# %% tags=["solution"]
parameters = 96 * 2 * 8 * (12288 + 12288)
print(f"{parameters / 1e6:.1f} million")
assert round(parameters / 1e6, 1) == 37.7

# %% [markdown]
# 2. $B$ starts at zero. What would happen if $A$ did too? Compute both gradients with the reference.

# %% tags=["solution"]
x, W, G = (rng.standard_normal(shape) for shape in ((3, 5), (4, 5), (3, 4)))
zeros = lora.LoRA(np.zeros((2, 5)), np.zeros((4, 2)), 2.0)
usual = lora.LoRA(rng.standard_normal((2, 5)), np.zeros((4, 2)), 2.0)
for name, start_at in (("both zero", zeros), ("B zero", usual)):
    gradients = lora.backward(G, x, W, start_at)
    print(
        f"{name:9s}: |gradient of A| {np.abs(gradients.A).sum():.2f}, |gradient of B| {np.abs(gradients.B).sum():.2f}"
    )
assert not lora.backward(G, x, W, zeros).B.any()  # it could never begin

# %% [markdown]
# 3. The update has rank at most $r$. Show that the trained update of the first layer has rank 8, from its singular values.

# %% tags=["solution"]
update = layer.delta().detach().cpu().double().numpy()
values = np.linalg.svd(update, compute_uv=False)
print("singular values:", " ".join(f"{v:.3g}" for v in values[:10]))
assert np.linalg.matrix_rank(update, tol=values[0] * 1e-5) == 8

# %% [markdown]
# ## References
#
# LoRA is by Hu and others [@hu2021]. Kalajdzievski argues for a scaling of $\alpha/\sqrt r$ [@kalajdzievski2023]. Biderman and others measured how much LoRA learns
# and forgets beside full fine-tuning on large models [@biderman2024].
