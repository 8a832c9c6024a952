# %% [markdown]
# # Prefix tuning: keys and values that no text has
#
# Put a good instruction before a text and a language model behaves differently. No weight has changed; the
# attention of every layer has some more keys and values. If a text acts through its keys and values alone, these
# need not come from words. Prefix tuning [@li2021] trains them directly.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import plots, text, timing, train, tuning
from minipeft.lab.chapter import start
from minipeft.reference import attention, prefix
from minipeft.reference.attention import Head
from minipeft.torch.inject import trainable_parameters
from minipeft.torch.prefix import PrefixConfig, PrefixModel

chapter = start("14_prefix", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Most methods so far change what a weight computes. Merged, such an adapter serves one task. Unmerged, it can serve another task in each row of a batch, but then every layer must pick the adapter of
# each row ([chapter 22](22_many_adapters.md) does this). Keys and values belong to a row of the batch anyhow: each request brings its own. So if a task lives in keys and values, one frozen model serves many tasks at
# once, and no layer changes.
#
# ## The formula
#
# One head of attention mixes values by how well their keys fit a query. With the queries as the rows of $Q$, the keys as those of $K$, the values as those of $V$, and $d$ features in a key, the output is
#
# $$ Y = \mathrm{softmax}\!\Big(\frac{Q K^T}{\sqrt d}\Big) V. $$
#
# A prefix of $n$ *virtual tokens* is $n$ more rows, trained, in front of those that the text has brought:
#
# $$ K' = \begin{bmatrix} P_K \\ K \end{bmatrix}, \qquad V' = \begin{bmatrix} P_V \\ V \end{bmatrix}, $$
#
# for every head of every layer. Every query may look at all of it.
#
# ## The code
#
# First the head itself, with its gradient by hand. In `backward`, look at the line that computes `S`, the gradient of the scores. The weights of a query sum to 1, so one can only grow at the
# expense of the others. Therefore each score gets the gradient of its own weight minus the weighted mean of all, times its weight.
#
# @source minipeft.reference.attention.Head
#
# @source minipeft.reference.attention.weights
# @source minipeft.torch.attention.weights
#
# @source minipeft.reference.attention.forward
# @source minipeft.torch.attention.forward
#
# @source minipeft.reference.attention.backward
#
# @source minipeft.reference.attention.causal
# @source minipeft.torch.attention.causal
#
# @source minipeft.reference.attention.check_fits
#
# The prefix attaches to it, and its gradient is a slice of the head's, summed over the batch:
#
# @source minipeft.reference.prefix.Prefix
#
# @source minipeft.reference.prefix.attach
# @source minipeft.torch.prefix.attach
#
# @source minipeft.reference.prefix.forward
# @source minipeft.torch.prefix.forward
#
# @source minipeft.reference.prefix.backward
#
# A whole model of transformers takes keys and values from outside as `past_key_values`: the cache of a text that was read already. The prefix enters as such a
# cache. So no layer is changed, and `model` inside is at any time the model that was given.
#
# @source minipeft.torch.prefix.PrefixModel
#
# ### The network that is thrown away
#
# The authors found that training keys and values directly is sensitive to the learning rate and to the start. So they trained a network whose *output* is the
# prefix. After training this network is run once more, its output kept, and the network dropped. It costs nothing afterwards, even if it has many times as many numbers as the prefix.
#
# @source minipeft.reference.prefix.Reparametrization
#
# @source minipeft.reference.prefix.init_reparametrized
#
# @source minipeft.reference.prefix.expand
# @source minipeft.torch.prefix.Reparametrization
#
# @source minipeft.reference.prefix.expand_backward
#
# Without the network, the start is random numbers, or better, as below, real text.
#
# @source minipeft.reference.prefix.init
#
# ## The proof
#
# *A prefix made of a text is that text.* Take the keys and values of three real tokens as a prefix, and the outputs of the four tokens behind them stay the same, bit for bit:

# %%
rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((3, 7, 4)).astype(np.float32)
whole = attention.forward(Head(Q, K, V, attention.causal(7, 7)))
rest = Head(Q[3:], K[3:], V[3:], attention.causal(4, 4))
attached = prefix.forward(rest, prefix.Prefix(K[:3], V[:3]))
assert attached.tobytes() == whole[3:].tobytes()
print("seven tokens, or three of prefix and four of text: the same bits")

# %% [markdown]
# *Nothing merges.* Write $\mathrm{attend}(Q, K, V)$ for the formula above. Split the softmax into the share $\lambda$ that goes to the prefix, and the rest [@he2021]. For a query $q$ and keys $k_i$ of the prefix $P$ and of the text $K$:
#
# $$ Y = (1 - \lambda)\,\mathrm{attend}(Q, K, V) + \lambda\,\mathrm{attend}(Q, P_K, P_V), \qquad
# \lambda = \frac{\sum_{i \in P} e^{q \cdot k_i / \sqrt d}}{\sum_{i \in P} e^{q \cdot k_i/ \sqrt d} + \sum_{i \in K} e^{q \cdot k_i/ \sqrt d}}. $$
#
# The prefix is a *gated* addition, and the gate $\lambda$ depends on the query and on the text. A merged weight would multiply every token by the same matrix, whatever the text. The prefix does not act like that. Here is one head with one virtual
# token and two queries: one query gives it less than 1 % of its attention, the other more than 99 %.
#
# @source minipeft.reference.prefix.gate
# @source minipeft.torch.prefix.gate

# %%
key = np.array([[1.0, 0.0]], np.float32)
opposite = prefix.Prefix(-key, np.array([[0.0, 1.0]], np.float32))
queries = np.array([[5.0, 0.0], [-5.0, 0.0]], np.float32)
head = Head(queries, key, key)
gates = prefix.gate(head, opposite)
print("gate of the first query", f"{gates[0]:.4f}", " of the second", f"{gates[1]:.4f}")
blended = (1 - gates[:, None]) * attention.forward(head) + gates[:, None] * opposite.V
attended = prefix.forward(head, opposite)
for way, outputs in (("a gated sum", blended), ("attention", attended)):
    print(f"as {way:12s}", " ".join(f"{y:.4f}" for y in outputs.flat))
assert np.abs(blended - attended).max() < 2.0**-20
assert gates[0] < 0.01
assert gates[1] > 0.99

# %% [markdown]
# ## The experiment
#
# `tiny` and the *Devil's Dictionary*: ten virtual tokens, three ways to begin: from $N(0, 1)$, from the keys and values of ten tokens of Bierce, and through the
# network. Each tries learning rates, two to a decade, until the best one has a worse one on both sides.

# %%
base = chapter.load()
tokenizer = base.tokenizer
lesson = tuning.lesson(chapter.task, tokenizer, kept=chapter.kept)
N = 10
first = text.encode(tokenizer, ["".join(pair) for pair in lesson.pairs[7:27]])[
    :N
].tolist()
untouched = {k: v.clone() for k, v in base.model.state_dict().items()}
WAYS = {
    "random": (PrefixConfig(N), (0.1, 0.3, 1.0)),
    "from text": (PrefixConfig(tokens=first), (0.03, 0.1, 0.3, 1.0)),
    "network": (PrefixConfig(N, hidden=64), (3e-3, 1e-2, 3e-2)),
}
without = train.loss(base.model, lesson.held_out)
chapter.quantity(chapter.before, without, "nats per token")
tuned, rates = {}, {}
for name, (config, tried) in WAYS.items():
    runs = {}
    for lr in tried:
        torch.manual_seed(0)
        model = PrefixModel(base.model, config)
        runs[lr] = tuning.tune(model, lesson, chapter.steps, lr)
    rates[name] = chapter.best(name, {lr: run.after for lr, run in runs.items()})
    tuned[name] = runs[rates[name]]
chapter.quantity(
    f"{chapter.model}, prefix of 10: trained numbers", tuned["random"].trained, "", 0
)
for name, run in tuned.items():
    print(
        f"{name:11s} {run.trained:7,} trained, {run.before:.3f} before, {run.after:.3f} after"
    )
chapter.claim(
    "every start ends below the base",
    max(run.after for run in tuned.values()) < without,
    control="the base without a prefix",
)
chapter.claim(
    "training is worth more than the text",
    tuned["from text"].after < tuned["from text"].before,
    control="the same ten tokens as a prefix, untrained",
)
assert all(torch.equal(base.model.state_dict()[k], v) for k, v in untouched.items())

# %% [markdown]
# How large are real keys and values, beside numbers from $N(0, 1)$? And is it their size that makes the random start bad? The control gives random keys and values, layer by layer, the standard deviations of real ones.

# %%
with torch.no_grad():
    torch.manual_seed(0)
    scaled = PrefixModel(base.model, PrefixConfig(N))
    own = PrefixModel(base.model, PrefixConfig(tokens=first)).P
    sizes = own.std(dim=(2, 3, 4), keepdim=True)
    scaled.P.mul_(sizes)
    matched = train.loss(scaled, lesson.held_out)
for part, row in (("keys", sizes[:, 0]), ("values", sizes[:, 1])):
    deviations = ", ".join(f"{s:.2f}" for s in row.flatten().tolist())
    print(f"standard deviation of real {part}, by layer: {deviations}")
print(
    f"random, deviation 1: {tuned['random'].before:.3f}, deviations as above: {matched:.3f}"
)
lost = tuned["random"].before - without

# %% tags=["fold"]
figure = tuning.curves(tuned, without, "no prefix")
chapter.show(
    figure,
    "starts",
    alt=f"Validation loss of a prefix of {N} virtual tokens over the steps. The curve that begins from random numbers starts above the dashed line of the model without a prefix and crosses it; those that begin from real text and through the network start at the dashed line and fall from the first steps on.",
    caption=f"Random keys and values cost {lost:.2f} nats before the first step. At the end the three starts lie at {min(r.after for r in tuned.values()):.2f} to {max(r.after for r in tuned.values()):.2f} nats, below the {without:.2f} of no prefix.",
)

# %% [markdown]
# With random keys and values of deviation 1 the model first loses {=f"{lost:.2f}"=} nats; with random ones of the deviations that real ones have, {=f"{matched - without:.2f}"=}: their size is not the reason. From real text it starts at
# {=f"{tuned['from text'].before:.3f}"=}, {=f"{abs(tuned['from text'].before - without):.3f}"=} from the {=f"{without:.3f}"=} of no prefix, and ends at {=f"{tuned['from text'].after:.3f}"=}, against {=f"{tuned['random'].after:.3f}"=} from random numbers and
# {=f"{tuned['network'].after:.3f}"=} through the network. The best rates are {=f"{rates['from text']:g}"=}, {=f"{rates['random']:g}"=} and {=f"{rates['network']:g}"=}. The network trains {=f"{tuned['network'].trained / tuned['random'].trained:.1f}"=} times as many numbers to make a prefix of the same size. After training it is dropped:

# %%
model = tuned["network"].model
ids = lesson.held_out[0]["input_ids"].to(base.model.device)
logits = model(ids).logits.detach()
model.drop_network()
assert torch.equal(model(ids).logits.detach(), logits)
print(
    f"network dropped: {sum(p.numel() for p in trainable_parameters(model)):,} numbers are left, and no logit has changed"
)

# %% [markdown]
# Where does the attention go? Here is the share $\lambda$ that each head gives to the prefix, averaged over the tokens of eight held-out definitions. The control is a head that looks at all keys alike: it would give the prefix its share of the keys.

# %%
one = ids[:8]
real = lesson.held_out[0]["attention_mask"][:8].to(one.device).bool()
eager = copy.deepcopy(base.model)
eager.set_attn_implementation("eager")
watched = PrefixModel(eager, PrefixConfig(N))
watched.P = tuned["from text"].model.P
with torch.no_grad():
    call, _ = watched.ahead({"input_ids": one})
    shares = eager(**call, output_attentions=True).attentions
to_prefix = torch.stack([layer[..., :N].sum(-1).movedim(1, -1) for layer in shares])
gate = (
    to_prefix[:, real].mean(1).cpu().float().numpy()
)  # layers, heads: over real tokens
place = torch.arange(1, one.shape[1] + 1, device=one.device).expand_as(one)
alike = float((N / (N + place))[real].mean())
print(f"a head that looks at all keys alike would give {alike:.0%}")
for number, row in enumerate(gate):
    print(f"layer {number}:", " ".join(f"{share:.0%}" for share in row))
figure = plots.heat_map(
    100 * gate,
    [f"layer {i}" for i in range(len(gate))],
    [f"head {i}" for i in range(gate.shape[1])],
    scale="% of attention",
    form="{:.0f}",
)
chapter.show(
    figure,
    "gate",
    alt="A heat map, from zero, of the share of attention that goes to the prefix, by layer and head, with the percentage in each cell.",
    caption=f"The prefix gets between {gate.min():.0%} and {gate.max():.0%} of a head's attention. A head that looks at all keys alike would give it {alike:.0%}: {int((gate > alike).sum())} of {gate.size} heads give more.",
)

# %% [markdown]
# ## What it costs
#
# A prefix of $n$ tokens trains $2 \cdot n \cdot L \cdot d_{kv}$ numbers, with $L$ layers and key-value heads of $d_{kv}$ numbers in all. It stays: every forward pass attends to $n$ more keys, every request
# keeps them in its cache, and a context that ends at some length has $n$ fewer places for text. The times below are medians of twenty turns in which all lengths take part. The model without a prefix is timed twice; what the two differ by is noise.

# %%
P = tuned["random"].model.P
d_kv = P[0, 0].numel() // N
assert tuned["random"].trained == 2 * N * len(P) * d_kv
print(f"2 x {N} x {len(P)} x {d_kv} = {tuned['random'].trained:,} numbers")
print(
    f"Llama 3.2 3B, 50 tokens: {2 * 50 * 28 * 1024:,} numbers, {2 * 50 * 28 * 1024 * 2 / 1e6:.1f} MB a request in 16 bits"
)
assert 2 * 50 * 28 * 1024 == 2_867_200  # the count that peft's own benchmark reports
ids = ids[:16]
timed = {"none": base.model, "none, again": base.model}
timed |= {
    f"{n} tokens": PrefixModel(base.model, PrefixConfig(n)) for n in (10, 50, 100)
}
runs = {name: [] for name in timed}
with torch.no_grad():
    for _ in range(20):
        for name, model in timed.items():
            runs[name].append(timing.cost(chapter.device, model, ids))
cost = {name: float(np.median(seconds)) for name, seconds in runs.items()}
print(f"{ids.shape[1]} tokens of text, prefix:")
for name, seconds in cost.items():
    print(f"{name:11s} {1000 * seconds:5.1f} ms, x {seconds / cost['none']:.2f}")

# %% [markdown]
# A merged LoRA costs nothing here. In return, each row of a batch may bring a prefix of its own.
#
# ## What goes wrong in practice
#
# - **The mask.** The prefix must be visible to every query. A causal mask that is aligned at the first key instead of the last hides every query's own token. Here the mask is the text's own, and ones stand before it.
# - **Positions.** With rotary embeddings the cached keys are already turned. The text begins at position $n$. If it begins at 0, its distance to every virtual token is wrong.
# - **Gradient checkpointing switches the cache off**, and with it the prefix. transformers 5.23 says so in its log only, and then stops at a mask that is too long, an error that does not name the cause. Here the error names it.
# - **A random start.** From $N(0, 1)$ the model above lost {=f"{lost:.2f}"=} nats before training, and from random numbers of the size of real keys and values {=f"{matched - without:.2f}"=}. From real text it lost {=f"{tuned['from text'].before - without:.3f}"=}.
# - **The network was saved, or not dropped.** What is worth keeping are its outputs: peft folds it in when it saves, so a loaded prefix cannot be trained on through the network.
#
# ## Exercises
#
# 1. With queries of zero every key gets the same share. What does a prefix of $n$ tokens do to a text of $m$, and how large is $\lambda$?

# %% tags=["solution"]
n, m = 5, 3
K, V = rng.integers(-4, 5, (2, m, 2)).astype(np.float32)
P = prefix.Prefix(*rng.integers(-4, 5, (2, n, 2)).astype(np.float32))
head = Head(np.zeros((1, 2), np.float32), K, V)
print("gate", prefix.gate(head, P), "=", n, "/", n + m)
assert prefix.gate(head, P)[0] == n / (n + m)
assert np.array_equal(prefix.forward(head, P)[0], np.concatenate([P.V, V]).mean(0))

# %% [markdown]
# 2. Longer texts dilute a prefix. For random keys, how does $\lambda$ fall with the number of tokens that the text has?

# %% tags=["solution"]
P = prefix.Prefix(*rng.standard_normal((2, 10, 16)).astype(np.float32))
for m in (10, 100, 1000):
    Q, K, V = rng.standard_normal((3, m, 16)).astype(np.float32)
    share = prefix.gate(Head(Q, K, V), P).mean()
    print(f"{m:5d} tokens of text: {share:.3f}, by counting {10 / (10 + m):.3f}")
assert share < 0.02

# %% [markdown]
# 3. The values of a prefix enter linearly, its keys do not. Show that twice the values add twice as much, with the keys as they are.

# %% tags=["solution"]
Q, K, V = rng.standard_normal((3, 6, 4))
P_K, P_V = rng.standard_normal((2, 3, 4))
head = Head(Q, K, V)
outputs = [prefix.forward(head, prefix.Prefix(P_K, t * P_V)) for t in (0.0, 1.0, 2.0)]
difference = (outputs[2] - outputs[1]) - (outputs[1] - outputs[0])
print(f"second difference {np.abs(difference).max():.1e}")
assert np.abs(difference).max() < 2.0**-40

# %% [markdown]
# ## References
#
# Prefix tuning is by Li and Liang [@li2021]. That a prefix is a gated addition, and a cousin of the [bottleneck adapter](13_bottleneck.md), was shown by He and others [@he2021]. Attention is from
# Vaswani and others [@vaswani2017].
