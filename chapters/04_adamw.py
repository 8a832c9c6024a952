# %% [markdown]
# # AdamW, and its state in eight bits
#
# The optimizer remembers two numbers for every weight it trains. In float32 that is eight bytes beside the four of
# the weight itself: when people run out of memory, this is often where it went. Here we write AdamW, prove that it is
# torch's, and store its memory in two bytes instead of eight. Most weights never notice. Some do, and we shall see which.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, train
from minipeft.lab.chapter import start
from minipeft.reference import adamw
from minipeft.torch.adamw import AdamW

chapter = start("04_adamw", steps=25, model="tiny")

# %% [markdown]
# ## The problem
#
# Plain gradient descent takes large steps where gradients are large. Adam [@kingma2014] divides each weight's step by the
# size of its own recent gradients, so that every weight moves about as fast. For this it keeps two running means: $m$, of the gradient,
# and $v$, of its square. Both are as large as the model.

# %%
PARAMETERS = 7e9
for what, size in {
    "weights, 16 bits": 2,
    "m and v, 32 bits": 8,
    "m and v, 8 bits": 2 + 8 / 256,
}.items():
    print(f"7 billion parameters, {what:17s}: {PARAMETERS * size / 1e9:5.1f} GB")

# %% [markdown]
# ## The formula
#
# With gradient $g$, at step $t = 1, 2, \dots$
#
# $$ m \leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, $$
# $$ W \leftarrow (1 - \eta\lambda)\, W \;-\; \frac{\eta}{1 - \beta_1^t} \cdot \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}. $$
#
# Both means start at zero and are too small at first; the divisions by $1 - \beta^t$ repair that. The *W* in the name
# [@loshchilov2017] is the first factor: weights decay at a rate of their own, instead of through a term in $g$ that would then be divided by $\sqrt v$.
#
# In eight bits [@dettmers2021], $m$ and $v$ are quantized like weights, in blocks of 256 with one float32 scale each, to the
# [dynamic map](03_double_quant.md): 256 values over seven decades. $m$ takes the signed map; $v$ is never negative and
# takes the unsigned one, which spends the sign bit on a finer grid. A step decodes, computes in float32, and encodes.
#
# ## The code
#
# @source minipeft.reference.adamw.step
# @source minipeft.torch.adamw.following
#
# The weight sees $m$ and $v$ *before* they are encoded: each step is as good as the memory of the last ones. Small tensors, biases and norms, keep 32 bits.
#
# @source minipeft.reference.adamw.init
# @source minipeft.torch.adamw.init
#
# A weight may have 16 bits. The states and the arithmetic keep 32, and only the new weight is rounded back.
#
# @source minipeft.reference.adamw.wide
# @source minipeft.torch.adamw.wide
#
# @source minipeft.reference.adamw.check_fits
#
# Decoding, encoding, and what a file holds:
#
# @source minipeft.reference.adamw.decode
#
# @source minipeft.reference.adamw.encode
#
# @source minipeft.reference.adamw.to_arrays
#
# @source minipeft.reference.adamw.from_arrays
#
# In torch it is an optimizer like any other, with groups, schedules and `state_dict`.
#
# @source minipeft.torch.adamw.AdamW
#
# ## The proof
#
# **It is torch's.** Run both on the same gradients. The bits of the moments depend on whether the processor multiplies and adds in
# one rounding: torch's fast kernels do, NumPy does not. Without it (`ATEN_CPU_CAPABILITY=default`) the moments agree
# in every bit, which a test checks in a process of its own. With it, they differ by no more than the roundings allow:

# %%
rng = np.random.default_rng(0)
W = rng.standard_normal((64, 128)).astype(np.float32)
GRADS = (
    rng.standard_normal((20, 64, 128)) * 10 ** rng.uniform(-4, 1, (64, 128))
).astype(np.float32)


def run(optimizer, parameter, grads):
    """Step along given gradients."""
    for grad in grads:
        parameter.grad = torch.from_numpy(grad)
        optimizer.step()
    return parameter.detach().numpy()


p = torch.nn.Parameter(torch.from_numpy(W.copy()))
theirs = run(torch.optim.AdamW([p]), p, GRADS)
p = torch.nn.Parameter(torch.from_numpy(W.copy()))
ours = run(AdamW([p]), p, GRADS)
expected, state = W, adamw.init(W)
for grad in GRADS:
    expected, state = adamw.step(expected, grad, state, adamw.AdamW())
print("torch column = reference, bit for bit:", np.array_equal(ours, expected))
print(
    f"largest difference from torch.optim.AdamW after 20 steps: {np.abs(ours - theirs).max():.1e}"
)
assert np.array_equal(ours, expected)
assert np.abs(ours - theirs).max() < 1e-6

# %% [markdown]
# **It can be interrupted.** $k$ steps are the same as $j$ steps, saving, loading, and $k - j$ steps, in every bit of weights and
# states, at 32 and at 8 bits. And **what has no gradient only decays**: zero has a code, so a zero stays a zero.


# %%
def train_numpy(W, state, grads):
    """Step along given gradients, in NumPy."""
    for grad in grads:
        W, state = adamw.step(W, grad, state, adamw.AdamW())
    return W, state


whole, _ = train_numpy(W, adamw.init(W, bits=8), GRADS)
part, state = train_numpy(W, adamw.init(W, bits=8), GRADS[:7])
resumed, _ = train_numpy(part, adamw.from_arrays(adamw.to_arrays(state)), GRADS[7:])
assert np.array_equal(whole, resumed)
arrays = adamw.to_arrays(state)
per_parameter = sum(a.nbytes for k, a in arrays.items() if k != "t") / W.size
print({k: (str(a.dtype), a.shape) for k, a in arrays.items()})
print(f"{per_parameter} bytes of state a parameter")
assert per_parameter == 2 + 8 / 256

# %% [markdown]
# ## The experiment: the same training in a quarter of the memory
#
# All of `tiny` learns the *Devil's Dictionary*, every weight, with 32 and with 8 bits.

# %%
base = models.load(chapter.model, chapter.device)
pairs = {
    split: [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]
    for split in ("train", "validation")
}
batches = text.examples(base.tokenizer, pairs["train"], (6, 64), seed=0)
held_out = text.example_batches(base.tokenizer, pairs["validation"], (25, 64))
made = {}


def optimizer(bits):
    """What the training loop calls to build its optimizer; the last one is kept."""

    def build(model, config):
        made[bits] = AdamW(
            model.parameters(), lr=config.lr, weight_decay=0.0, bits=bits
        )
        return made[bits]

    return build


def state_bytes(optimizer):
    """What the optimizer remembers."""
    states = [s for s in optimizer.state.values()]
    return sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))


histories = {}
for bits in (32, 8):
    model = copy.deepcopy(base.model).requires_grad_(True)
    setting = train.TrainConfig(
        chapter.steps, lr=1e-3, warmup=4, optimizer=optimizer(bits)
    )
    histories[bits] = train.train(model, batches, setting, held_out)
    final = histories[bits].validation[-1][1]
    print(
        f"{bits:2d} bits: validation loss {final:.4f}, state {state_bytes(made[bits]) / 1e6:.2f} MB"
    )
gap = abs(histories[8].validation[-1][1] - histories[32].validation[-1][1])
shrunk = state_bytes(made[32]) / state_bytes(made[8])
print(f"{shrunk:.2f} times smaller; the losses differ by {gap:.4f}")
assert shrunk > 3.5

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="training loss (nats per token)", size=(6.4, 3.2))
ax.plot(
    histories[32].losses,
    color=plots.PALETTE[2],
    linewidth=6,
    alpha=0.35,
    label="32 bits",
)
ax.plot(histories[8].losses, color=plots.PALETTE[0], linewidth=1.4, label="8 bits")
ax.legend()
chapter.show(
    figure,
    "losses",
    alt="Training loss with 32-bit states as a broad pale band, and with 8-bit states as a thin line that stays inside it from the first step to the last.",
)

# %% [markdown]
# The state shrinks {=f"{shrunk:.1f}"=} times, a little less than $8 / 2.03$ because small tensors keep their 32 bits, and the losses on held-out text
# differ by {=f"{gap:.3f}"=} nats. On a model this small, in so few steps, that is no proof that nothing is lost. So let us look for what *is* lost.
#
# ## The experiment: who pays?
#
# Adam promises every weight the same speed, whatever the size of its gradients. Take a block of 256 weights whose gradients are constant, and spread from
# 1 down to a millionth of the largest. With 32 bits each weight moves by $\eta$ in each step. With 8 bits?

# %%
SIZES = np.geomspace(1e-6, 1, 256).astype(np.float32)
config = adamw.AdamW(lr=1.0, weight_decay=0.0, eps=1e-12)
speed = {}
for bits in (32, 8):
    position, state = (
        np.zeros(4096, np.float32),
        adamw.init(np.zeros(4096, np.float32), bits),
    )
    for _ in range(400):
        before = position
        position, state = adamw.step(before, np.tile(SIZES, 16), state, config)
    speed[bits] = np.abs(position - before)[:256]
cliff = SIZES[speed[8] > 1.5].max()
print(
    f"32 bits: every weight moves {speed[32].min():.3f} to {speed[32].max():.3f} times the learning rate"
)
print(
    f"8 bits: up to {speed[8].max():.1f} times, for gradients below {cliff:.1e} of the largest"
)
quiet = SIZES > 0.01
print(
    f"8 bits, gradients above 0.01: {speed[8][quiet].min():.2f} to {speed[8][quiet].max():.2f}"
)
assert speed[8].max() > 20
assert np.abs(speed[32] - 1).max() < 0.01

# %% tags=["fold"]
figure, ax = plots.axes(
    x="gradient / largest gradient of its block",
    y="step / learning rate",
    size=(6.4, 3.4),
)
ax.plot(SIZES, speed[32], color=plots.PALETTE[2], linewidth=4, alpha=0.5)
ax.plot(SIZES, speed[8], color=plots.PALETTE[0])
ax.set(xscale="log", yscale="log", ylim=(0.3, 70))
ax.set_yticks([1, 10, 30], ["1", "10", "30"])
ax.minorticks_off()
ax.text(0.3, 1.4, "32 bits", color=plots.PALETTE[2], weight="bold")
ax.text(1.2e-6, 40, "8 bits", color=plots.PALETTE[0], weight="bold")
chapter.show(
    figure,
    "speed",
    alt="Step size against relative gradient. With 32 bits a flat line at one. With 8 bits it is flat for the larger gradients, then jumps to about thirty where the second moment rounds to zero, and stays wrong below.",
)

# %% [markdown]
# The larger gradients are served well. But $v$ is a *square*: over seven decades of $v$ there are only three and a half decades of gradient. A weight whose gradient is
# less than {=f"{cliff:.0e}"=} of the largest in its block has its $v$ rounded to zero, and in the next step only the newest gradient stands under the root:
# $\sqrt{(1 - \beta_2)\, g^2} = {=f"{np.sqrt(1e-3):.3f}"=}\,|g|$. Its steps are $1/{=f"{np.sqrt(1e-3):.3f}"=} \approx$ {=f"{1 / np.sqrt(1e-3):.0f}"=} times too long, give or take the coarse grid of $m$ down there.
# That is why embeddings, where rows of rare words sit beside those of frequent ones, are left in 32 bits, and why blocks are small.
#
# ## What goes wrong in practice

# %% tags=["hide"]
block = np.full(4096, 1e-4, np.float32)
block[::256] = 1.0
position, state = np.zeros(4096, np.float32), adamw.init(block, 8)
for k in range(11):
    before = position
    grad = block if k < 10 else np.where(block == 1, block, np.float32(0))
    position, state = adamw.step(before, grad, state, adamw.AdamW(weight_decay=0.0))
leap = np.abs(position - before).max()
values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
off = (values.sqrt() != values.double().sqrt().float()).float().mean().item()

# %% [markdown]
# - **A gradient that stops.** The worst case of the experiment above: $v$ has rounded to zero, $m$ has not, and then the gradient is exactly 0. Nothing but $\epsilon = 10^{-8}$ is
#   left in the denominator. With the usual settings, a learning rate of 0.001 and ten steps of training, a weight leaps by {=f"{leap:.1f}"=} in one step.
# - **Zero without a code.** The table look-up of bitsandbytes on a CPU ([last chapter](03_double_quant.md)) turns an exact zero into a small positive number. A weight without gradients then
#   has a little $m$ and drifts. As the $v$ of the last item cannot become zero either, it is spared that leap: one error hides another.
# - **Loading casts.** `torch.optim.Optimizer.load_state_dict` converts all it loads to the dtype of the parameter: byte codes become floats, float32 scales of a
#   bfloat16 model lose 16 bits. Resuming 8-bit optimizers was [broken](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/782) for a while. Ours passes it by, and a law compares $k$ steps with $j + (k - j)$.
# - **A root that is not a root.** IEEE 754 asks for correctly rounded square roots. Of 100,000 float32 roots that torch computes on this processor,
#   {=f"{off:.0%}"=} are off by the last bit. For training it means nothing; to compare bits it means everything, and so our torch column takes the root in float64 there and rounds.
# - **A map with a hole** made 8-bit Adam [end in NaN](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/227).
# - **Decay in the wrong place.** `torch.optim.Adam` adds `weight_decay` to the gradient; bitsandbytes' `Adam` decays the weight, as AdamW does. Same name, other optimizer.
#
# ## Exercises
#
# 1. *How far in one step?* Show that from zero moments and without decay, the first step moves every weight by almost exactly $\eta$, whatever its gradient.

# %% tags=["solution"]
grad = (10.0 ** rng.uniform(-3, 3, 1000)).astype(np.float32)
moved, _ = adamw.step(
    np.zeros(1000, np.float32),
    grad,
    adamw.init(np.zeros(1000, np.float32)),
    adamw.AdamW(weight_decay=0.0),
)
print(f"{np.abs(moved).min():.6f} to {np.abs(moved).max():.6f}")
assert np.ptp(np.abs(moved)) < 1e-7

# %% [markdown]
# 2. *Store the root.* If not $v$ but $\sqrt v$ were coded in eight bits, at which relative gradient would the steps go wrong?

# %% tags=["solution"]
from minipeft.reference import blockwise
from minipeft.reference.codebook import dynamic_map

coded = blockwise.dequantize(blockwise.quantize(SIZES, dynamic_map(False), 256))
smallest = SIZES[coded > 0].min()
print(
    f"the root survives down to {smallest:.1e} of the largest, v itself to {cliff:.1e}"
)
assert smallest < cliff / 100

# %% [markdown]
# 3. *Adam without W.* Put the decay into the gradient instead, $g + \lambda W$, and train two weights of 1 with gradients of constant size 0.001 and 10 and alternating sign. Which decays?


# %% tags=["solution"]
def decay(inside):
    """What is left of two weights after 300 steps."""
    W = np.ones(2, np.float32)
    state = adamw.init(W)
    settings = adamw.AdamW(lr=0.01, weight_decay=0.0 if inside else 0.1)
    for k in range(300):
        grad = np.array([0.001, 10], np.float32) * np.float32((-1) ** k)
        grad = grad + np.float32(0.1) * W if inside else grad
        W, state = adamw.step(W, grad, state, settings)
    return W


print(
    "decay in the gradient:", decay(True).round(3), " decoupled:", decay(False).round(3)
)
assert np.ptp(decay(False)) < 0.05 < np.ptp(decay(True))

# %% [markdown]
# ## References
#
# Adam is by Kingma and Ba [@kingma2014], decoupled decay by Loshchilov and Hutter [@loshchilov2017], and eight bits by Dettmers and
# others [@dettmers2021].
