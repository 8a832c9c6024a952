# %% [markdown]
# # AdamW, and its state in eight bits
#
# The optimizer keeps two numbers for every weight it trains. In float32 these take eight bytes, beside the four bytes of
# the weight itself. This chapter writes AdamW, compares it with torch's, and stores its two numbers in two bytes instead of eight. Where
# the gradients of a block are of similar size, the steps of its weights keep about their length. After 400 steps with constant gradients, weights with much smaller gradients than their neighbours take steps up to thirty times too long.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import plots, train
from minipeft.lab.chapter import start
from minipeft.reference import adamw
from minipeft.torch.adamw import AdamW

chapter = start("04_adamw", steps=25, model="tiny")

# %% [markdown]
# ## The problem
#
# Plain gradient descent takes large steps where gradients are large. Adam [@kingma2014] divides each weight's step by the
# size of its own recent gradients, so that all weights move at about the same speed. For this it keeps two running means for each weight: $m$, of the gradient,
# and $v$, of its square.

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
# | symbol | what it is | usual value |
# |---|---|---|
# | $\beta_1$, $\beta_2$ | how slowly the running means change: $m$ looks back about $1/(1-\beta_1)$ steps, $v$ about $1/(1-\beta_2)$ | 0.9, 0.999 |
# | $\eta$ | the learning rate: how far a weight moves in a step | found by trial |
# | $\lambda$ | the weight decay: each step takes the share $\eta\lambda$ of a weight away | 0 to 0.1 |
# | $\epsilon$ | a small constant that keeps the denominator from being zero | $10^{-8}$ |
#
# Both means start at zero and are too small at first; dividing by $1 - \beta^t$ corrects that. The *W* in the name stands for weight decay
# [@loshchilov2017], the first factor: each weight shrinks by the same share, whatever its gradients. Adam without W adds $\lambda W$ to $g$ instead, and then
# divides it by $\sqrt v$ along with the rest.
#
# In eight bits [@dettmers2021], $m$ and $v$ are quantized like weights to the
# [dynamic map](03_double_quant.md): 256 values over seven powers of ten. We use blocks of 256, as the authors' library bitsandbytes does now, with one float32 scale each; the paper
# has blocks of 2,048. $m$ takes the signed map. $v$ is never negative and
# takes the unsigned map, which has a finer grid in place of the sign. A step decodes the two, computes in float32, and encodes them again.
#
# ## The code
#
# @source minipeft.reference.adamw.step
# @source minipeft.torch.adamw.following
#
# The step uses the new $m$ and $v$ *before* they are encoded, so that their rounding affects later steps only. Tensors of fewer than 4,096 values, such as biases and norms, keep 32 bits.
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
# **It computes what `torch.optim.AdamW` computes.** The cell runs both on the same gradients. The last bits depend on whether the processor multiplies and adds with
# one rounding or with two: torch's fast kernels round once, NumPy twice. With `ATEN_CPU_CAPABILITY=default` torch rounds twice as well, and the moments agree
# in every bit; a test checks this in a process of its own. With the fast kernels they differ by no more than the roundings allow:

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
# **It can be interrupted.** $k$ steps give the same bits as $j$ steps, saving, loading, and $k - j$ more steps, in weights and
# states, at 32 and at 8 bits. And **a weight without a gradient only decays**: zero has a code, so an $m$ of zero stays zero.


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
# ## The experiment: the same training with a quarter of the state
#
# All of `tiny` learns the *Devil's Dictionary*, every weight, with 32 and with 8 bits.

# %%
base = chapter.load()
batches, held_out = (
    chapter.task.training(base.tokenizer),
    chapter.task.held_out(base.tokenizer),
)
made = {}


def optimizer(name, bits, of_embeddings):
    """What the training loop calls to build its optimizer, which is kept by name."""

    def build(model, config):
        table = model.get_input_embeddings().weight
        groups = [
            {"params": [p for p in model.parameters() if p is not table], "bits": bits},
            {"params": [table], "bits": of_embeddings},
        ]
        made[name] = AdamW(groups, lr=config.lr, weight_decay=0.0)
        return made[name]

    return build


def state_bytes(optimizer):
    """The bytes of an optimizer's state."""
    states = [s for s in optimizer.state.values()]
    return sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))


BITS = {
    "32 bits": (32, 32),
    "8 bits": (8, 8),
    "8 bits, embeddings 32": (8, 32),
}
before = train.loss(base.model, held_out)
chapter.quantity(chapter.before, before, "nats per token")
histories = {}
for name, bits in BITS.items():
    model = copy.deepcopy(base.model).requires_grad_(True)
    setting = train.TrainConfig(
        chapter.steps, lr=2e-3, warmup=4, optimizer=optimizer(name, *bits)
    )
    histories[name] = train.train(model, batches, setting, held_out, chapter.kept())
    final = histories[name].validation[-1][1]
    size = state_bytes(made[name]) / 1e6
    print(f"{name:21s} loss {final:.4f}, state {size:.2f} MB")
final = {name: history.validation[-1][1] for name, history in histories.items()}
gap = final["8 bits"] - final["32 bits"]
gained = before - final["32 bits"]
shrunk = state_bytes(made["32 bits"]) / state_bytes(made["8 bits"])
print(f"{shrunk:.2f} times smaller; the losses differ by {gap:+.4f}")
chapter.claim(
    "8 bits take less than 1 / 3.5 of the state", shrunk > 3.5, control="32 bits"
)
chapter.claim(
    f"with 8 bits the loss after {chapter.steps} steps differs by under 2 % of the gain",
    abs(gap) < 0.02 * gained,
    control="the same training with 32 bits",
)

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="training loss (nats per token)", size=(6.4, 3.2))
ax.plot(
    histories["32 bits"].losses,
    color=plots.PALETTE[2],
    linewidth=6,
    alpha=0.35,
    label="32 bits",
)
ax.plot(
    histories["8 bits"].losses, color=plots.PALETTE[0], linewidth=1.4, label="8 bits"
)
ax.legend()
apart = np.abs(np.subtract(histories["32 bits"].losses, histories["8 bits"].losses))
chapter.show(
    figure,
    "losses",
    alt="Training loss over the steps: with 32-bit states a broad pale band, with 8-bit states a thin line that runs inside it.",
    caption=f"With a state {shrunk:.1f} times smaller, training takes the same course: the losses of the two runs differ by at most {apart.max():.3f} nats in any step.",
)

# %% [markdown]
# The state shrinks {=f"{shrunk:.1f}"=} times, a little less than $8 / 2.03$ because small tensors keep their 32 bits. The losses on held-out text
# differ by {=f"{abs(gap):.4f}"=} nats, where training gains {=f"{gained:.2f}"=}. Here the embedding table has 8-bit states too; in the paper the embedding layer keeps 32 bits, as the only one [@dettmers2021, section 2.3]. With 32 bits for it the loss is
# {=f"{final['8 bits, embeddings 32']:.4f}"=} instead of {=f"{final['8 bits']:.4f}"=}. One learning rate, one seed, a small model and {=chapter.steps=} steps: that does not show that nothing is lost. The next experiment looks for
# damage on purpose.
#
# ## The experiment: which weights suffer?
#
# With Adam every weight moves at the same speed, whatever the size of its gradients. Take a block of 256 weights with constant gradients, spread evenly on a logarithmic scale from
# the largest down to a millionth of it. With 32 bits each weight moves by $\eta$ in each step. And with 8 bits?

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
LARGE = 0.01
quiet = SIZES > LARGE
print(
    f"8 bits, gradients above {LARGE:g}: {speed[8][quiet].min():.2f} to {speed[8][quiet].max():.2f}"
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
    alt=f"Step length against relative gradient, both axes logarithmic. The line of 32 bits is flat at {speed[32].mean():.0f}. The line of 8 bits stays near it, within {speed[8][quiet].min():.2f} to {speed[8][quiet].max():.2f}, for gradients above {LARGE:g} of the largest, jumps up below {cliff:.0e} of it, to {speed[8].max():.0f} at most, and goes up and down further left.",
    caption=f"With 8-bit states, weights whose gradient is below {cliff:.0e} of the largest in their block take steps up to {speed[8].max():.0f} times too long in the last step.",
)

# %% [markdown]
# For gradients above a hundredth of the largest, the steps are {=f"{speed[8][quiet].min():.2f}"=} to {=f"{speed[8][quiet].max():.2f}"=} times the right length. But $v$ is a *square*: its seven powers of ten are only three and a half powers of ten of the gradient. If a gradient is
# less than {=f"{cliff:.0e}"=} of the largest in its block, its $v$ is rounded to zero. In the next step only the newest gradient contributes to the root:
# $\sqrt{(1 - \beta_2)\, g^2} = {=f"{np.sqrt(1e-3):.3f}"=}\,|g|$, which is divided by $\sqrt{1 - \beta_2^t}$, {=f"{np.sqrt(1 - 0.999**400):.2f}"=} in step 400. So this step is about {=f"{np.sqrt((1 - 0.999**400) / 1e-3):.0f}"=} times too long, and one after thousands of steps
# $1/{=f"{np.sqrt(1e-3):.3f}"=} \approx$ {=f"{1 / np.sqrt(1e-3):.0f}"=} times. The coarse grid of $m$ for such small values changes that by factors from {=f"{speed[8][SIZES <= cliff].min() / np.sqrt((1 - 0.999**400) / 1e-3):.1f}"=} to {=f"{speed[8].max() / np.sqrt((1 - 0.999**400) / 1e-3):.1f}"=}.
# Embeddings are at risk where a block reaches from one row into the next, as in `tiny`: there rows of rare words share a scale with rows of frequent ones. The paper has an embedding layer of its own, against the uneven gradients of rare and frequent words, and its states keep 32 bits [@dettmers2021, section 2.3]; the authors' library calls it `StableEmbedding`. Smaller blocks help too, because fewer weights share a scale.
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
# - **A gradient that stops.** The worst case of the experiment above: $v$ has been rounded to zero, $m$ has not, and then the gradient is exactly 0. Only $\epsilon = 10^{-8}$ is
#   left in the denominator. With the usual settings, a learning rate of 0.001 and ten steps of training, one step changes a weight by {=f"{leap:.1f}"=}.
# - **Zero without a code.** The table look-up of bitsandbytes on a CPU ([last chapter](03_double_quant.md)) turns an exact zero into a small positive number. A weight without gradients then
#   has an $m$ above zero, and drifts. But then a $v$ cannot be zero either, so the first fault of this list cannot happen: one error hides the other.
# - **Loading casts.** `torch.optim.Optimizer.load_state_dict` converts every state but the step count to the dtype of the parameter: byte codes become floats, float32 scales of a
#   bfloat16 model lose 16 bits. The optimizers of bitsandbytes keep a list of the states that must not be converted, in [optimizer.py](https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py). Our optimizer loads codes and scales without this conversion, and a law compares $k$ steps with $j + (k - j)$.
# - **Square roots that are off by one bit.** IEEE 754 asks for correctly rounded square roots. Of 100,000 float32 roots that torch computes on this processor,
#   {=f"{off:.0%}"=} differ in the last bit. That does not matter for training, but it matters for comparing bits. So our torch column takes the root in float64 and rounds it.
# - **A map with too many values** made 8-bit Adam [end in NaN](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/227); the [last chapter](03_double_quant.md) rebuilds it.
# - **Decay in two places.** `torch.optim.Adam` adds `weight_decay` to the gradient; bitsandbytes' `Adam` decays the weight, as AdamW does. The two have one name and are different optimizers.
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

smallest = dynamic_map(False)[1] / 2  # below half the first value: rounded to zero
around = np.array([1, 1.01 * smallest, 0.99 * smallest], np.float32)
coded = blockwise.dequantize(blockwise.quantize(around, dynamic_map(False), 256))
print(f"the root survives down to {smallest:.1e} of the largest gradient,")
print(f"v itself, its square, to {np.sqrt(smallest):.1e}; measured {cliff:.1e}")
assert coded[1] > 0 == coded[2]
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
