# %% [markdown]
# # Prefix tuning: keys and values that nobody wrote
#
# Put a good instruction before a text and a language model behaves differently. No weight has changed; the
# attention of every layer has met some more keys and values. Prefix tuning [@li2021] asks: if only
# keys and values matter, why should they come from words? It trains them directly.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import models, plots, text, timing, train, tuning
from minipeft.lab.chapter import start
from minipeft.reference import attention, prefix
from minipeft.reference.attention import Head
from minipeft.torch.inject import trainable_parameters
from minipeft.torch.prefix import PrefixConfig, PrefixModel

chapter = start("14_prefix", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Every method so far changes weights, if only by a thin product. Sometimes one may not touch them: one model serves many tasks at
# once, and each request of a batch brings its own. An adapter that lives in the *activations* can differ from row to row of
# a batch, for nothing is multiplied into a shared matrix.
#
# ## The formula
#
# One head of attention mixes values by how well their keys fit a query:
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
# First the head itself, with its gradient by hand. The line to look at is $S$: through a softmax, a share can only grow at the
# expense of the others, so each gets its own gradient minus the mean of all.
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
# For a whole model of transformers there is a door made for this: `past_key_values`, the cache of a text that was read already. The prefix enters as such a
# cache. So no layer is changed, and the model inside is at any time the model that was given.
#
# @source minipeft.torch.prefix.PrefixModel
#
# ### The network that is thrown away
#
# Trained directly, keys and values are sensitive to the learning rate, the authors found, and they trained a small network instead whose *output* is the
# prefix. After training it is run once more, its output kept, and the network dropped. It costs nothing afterwards, and it can be many times as large as what it makes.
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
# Without the network, the start is random numbers, or better, as below, real words.
#
# @source minipeft.reference.prefix.init
#
# ## The proof
#
# *A prefix made of a text is that text.* Take the keys and values that three real tokens have, call them a prefix, and the rest of the text cannot tell:

# %%
rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((3, 7, 4)).astype(np.float32)
whole = attention.forward(Head(Q, K, V, attention.causal(7, 7)))
rest = Head(Q[3:], K[3:], V[3:], attention.causal(4, 4))
attached = prefix.forward(rest, prefix.Prefix(K[:3], V[:3]))
assert attached.tobytes() == whole[3:].tobytes()
print("seven tokens, or three of prefix and four of text: the same bits")

# %% [markdown]
# *Nothing merges.* Split the softmax into the share $\lambda$ that goes to the prefix, and the rest [@he2021]:
#
# $$ Y = (1 - \lambda)\,\mathrm{attend}(Q, K, V) + \lambda\,\mathrm{attend}(Q, P_K, P_V), \qquad
# \lambda = \frac{\sum_{i \in P} e^{q \cdot k_i / \sqrt d}}{\sum_{i \in P} e^{q \cdot k_i/ \sqrt d} + \sum_{i \in K} e^{q \cdot k_i/ \sqrt d}}. $$
#
# The prefix is a *gated* addition, and the gate depends on the query and on the text. A merged weight would be a matrix that multiplies every token alike. There is none: one head, one virtual
# token, two queries.
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
print("as a gated sum:", blended.round(4).tolist())
print("as attention:  ", prefix.forward(head, opposite).round(4).tolist())
assert gates[0] < 0.01
assert gates[1] > 0.99

# %% [markdown]
# ## The experiment
#
# `tiny` and the *Devil's Dictionary*: ten virtual tokens, three ways to begin: from $N(0, 1)$, from the keys and values of ten words of Bierce, and through the
# network. The learning rate of each is the best of a few that were tried; the network wants one fifteen times smaller.

# %%
base = models.load(chapter.model, chapter.device)
tokenizer = base.tokenizer
task = tuning.dictionary(tokenizer)
N = 10
words = text.encode(tokenizer, ["".join(task.pairs[7])])[:N].tolist()
untouched = {k: v.clone() for k, v in base.model.state_dict().items()}
WAYS = {
    "random": (PrefixConfig(N), 0.15),
    "from words": (PrefixConfig(tokens=words), 0.15),
    "network": (PrefixConfig(N, hidden=64), 1e-2),
}
without = train.loss(base.model, task.held_out)
hard = train.loss(PrefixModel(base.model, PrefixConfig(tokens=words)), task.held_out)
print(f"no prefix {without:.3f}, ten words as a prefix, untrained {hard:.3f}")
tuned = {}
for name, (config, lr) in WAYS.items():
    torch.manual_seed(0)
    model = PrefixModel(base.model, config)
    run = tuned[name] = tuning.tune(model, task, chapter.steps, lr)
    print(
        f"{name:11s} {run.trained:7,} trained, {run.before:.3f} before, {run.after:.3f} after"
    )
assert all(run.after < run.before for run in tuned.values())
assert all(torch.equal(base.model.state_dict()[k], v) for k, v in untouched.items())

# %% tags=["fold"]
figure = tuning.curves(tuned, without, "no prefix")
chapter.show(
    figure,
    "starts",
    alt="Validation loss of a prefix of ten virtual tokens over the steps: begun from random numbers it starts far above the model without a prefix and ends below; begun from real words, or through the network, it starts level with it and falls at once.",
)

# %% [markdown]
# From random keys the model first loses {=f"{tuned['random'].before - without:.2f}"=} nats: ten loud strangers talk into every head. From real words it starts at
# {=f"{tuned['from words'].before:.3f}"=}, near the {=f"{without:.3f}"=} of no prefix, and ends at {=f"{tuned['from words'].after:.3f}"=} against {=f"{tuned['random'].after:.3f}"=} from random numbers and
# {=f"{tuned['network'].after:.3f}"=} through the network. The network trains {=f"{tuned['network'].trained / tuned['random'].trained:.1f}"=} times as many numbers to make the same prefix. Then it goes:

# %%
model = tuned["network"].model
ids = task.held_out[0]["input_ids"]
before = model(ids).logits.detach()
model.drop_network()
assert torch.equal(model(ids).logits.detach(), before)
print(
    f"network dropped: {sum(p.numel() for p in trainable_parameters(model)):,} numbers are left, and no logit has changed"
)

# %% [markdown]
# Where does the attention go? In each layer, the share $\lambda$ that the queries of a held-out text give to the prefix, head by head.

# %%
model = tuned["from words"].model
one = ids[:8]
eager = copy.deepcopy(base.model)
eager.set_attn_implementation("eager")
watched = PrefixModel(eager, PrefixConfig(N))
watched.P = model.P
with torch.no_grad():
    cache = watched._cache(len(one))
    seen = watched._seen(one, None)
    shares = eager(
        one, attention_mask=seen, past_key_values=cache, output_attentions=True
    ).attentions
gate = torch.stack([layer[..., :N].sum(-1).mean((0, 2)) for layer in shares]).numpy()
for number, row in enumerate(gate):
    print(f"layer {number}:", " ".join(f"{share:.0%}" for share in row))
assert np.all((gate > 0) & (gate < 1))
figure = plots.heat_map(
    100 * gate,
    [f"layer {i}" for i in range(len(gate))],
    [f"head {i}" for i in range(gate.shape[1])],
    scale="% of attention",
)
chapter.show(
    figure,
    "gate",
    alt="A heat map of the share of attention that goes to the prefix, by layer and head: it differs widely from head to head.",
)

# %% [markdown]
# ## What it costs
#
# A prefix of $n$ tokens trains $2 \cdot n \cdot L \cdot d_{kv}$ numbers, with $L$ layers and key-value heads of $d_{kv}$ numbers in all, and it stays: every forward pass attends to $n$ more keys, every request
# keeps them in its cache, and a context that ends at some length has $n$ fewer places for text.

# %%
c = base.model.config
d_kv = c.num_key_value_heads * c.head_dim
assert tuned["random"].trained == 2 * N * c.num_hidden_layers * d_kv
print(f"2 x {N} x {c.num_hidden_layers} x {d_kv} = {tuned['random'].trained:,} numbers")
print(
    f"Llama 3.2 3B, 50 tokens: {2 * 50 * 28 * 1024:,} numbers, {2 * 50 * 28 * 1024 * 2 / 1e6:.1f} MB a request in 16 bits"
)
assert 2 * 50 * 28 * 1024 == 2_867_200  # the count that peft's own benchmark reports
ids = task.held_out[0]["input_ids"][:16]
cost = {}
for n in (0, 10, 50, 100):
    model = PrefixModel(base.model, PrefixConfig(n)) if n else base.model
    with torch.no_grad():
        model(ids)
        runs = []
        for _ in range(5):
            runs.append(timing.cost(chapter.device, model, ids))
    cost[n] = float(np.median(runs))
for n, seconds in cost.items():
    print(
        f"{n:3d} virtual tokens before {ids.shape[1]}: {1000 * seconds:5.1f} ms, x {seconds / cost[0]:.2f}"
    )

# %% [markdown]
# A merged LoRA costs nothing here. In return, a batch may hold as many prefixes as it has rows.
#
# ## What goes wrong in practice
#
# - **The mask.** The prefix must be visible to every query. A causal mask built over prefix *and* text as if both were text hides virtual tokens from one another, which is harmless, but aligned at the wrong end it hides
#   the prefix or shows the future. Here the mask is the text's own, and ones stand before it.
# - **Positions.** With rotary embeddings the cached keys are already turned. The text begins at position $n$, and whoever begins it at 0 has changed the distance to every virtual token.
# - **Gradient checkpointing switches the cache off**, and with it the prefix, in a library that says so only in a log: the run goes on and trains nothing. Here it is an error.
# - **A random start is an attack** on the model, as the figure shows. Real words are better, and so are smaller numbers.
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
