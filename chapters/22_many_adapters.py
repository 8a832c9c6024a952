# %% [markdown]
# # Many adapters at once
#
# A thousand users have tuned a thousand adapters of one model. Merged, they are a thousand models. Unmerged, they are one model and a thousand small files, and one batch can hold requests for many of them. This chapter serves such batches, checks that each row gets what it would
# get alone, and counts what a thousand tenants cost.

# %%
import copy
import statistics
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from minipeft.lab import plots, timing
from minipeft.lab.chapter import start
from minipeft.lab.memory import LLAMA_7B, Adapter, adapter_parameters
from minipeft.torch import inject
from minipeft.torch.ia3 import IA3
from minipeft.torch.lora import LoRA, LoRAConfig
from minipeft.torch.lora_batched import Pool
from minipeft.torch.targets import layers

chapter = start("22_many_adapters", steps=200, model="tiny")

# %% [markdown]
# ## The problem
#
# Llama 2 of 7 billion parameters takes {=f"{2 * LLAMA_7B.parameters / 1e9:.1f}"=} GB in 16 bits, a LoRA of rank 16 on all its linear layers {=f"{adapter_bytes / 1e6:.0f}"=} MB:

# %%
whole_bytes = 2 * LLAMA_7B.parameters
adapter_bytes = 2 * adapter_parameters(LLAMA_7B, Adapter(r=16))
TENANTS = 1000
print(f"{TENANTS} merged models:  {TENANTS * whole_bytes / 1e12:8.2f} TB")
print(
    f"{TENANTS} adapters, one base: {(TENANTS * adapter_bytes + whole_bytes) / 1e12:5.2f} TB"
)
assert whole_bytes > 100 * adapter_bytes

# %% [markdown]
# The host's memory holds all adapters, and a GPU some of them. Three questions remain. Is a row of a mixed batch what it would be alone? How often is the adapter that a request needs on the GPU already? And when is merging better after all?
#
# ## The formula
#
# Row $t$ of the batch belongs to request $i$. The frozen product is one for all rows; the update is the row's own [@chen2023; @sheng2023]:
#
# $$ y_t = x_t W^T + b + s_i\,(x_t A_i^T)\,B_i^T. $$
#
# Adapters of different rank are stacked in one array, and filled up with zeros. A request for several adapters with weights $w_j$ is one adapter of a higher rank:
#
# $$ \sum_j w_j s_j B_j A_j = \begin{pmatrix} w_1 s_1 B_1 & w_2 s_2 B_2 & \cdots \end{pmatrix} \begin{pmatrix} A_1 \\ A_2 \\ \vdots \end{pmatrix}. $$
#
# How often is an adapter on the GPU already? Let tenant $i$ of $N$ send a share $p_i$ of the requests, and let the GPU hold the $C$ adapters that were used last. An adapter is still there if it was used within the last $T$ requests, and $T$ is about the same for all adapters. So [@che2002]
#
# $$ \sum_i \left(1 - e^{-p_i T}\right) = C $$
#
# gives $T$, and then
#
# $$ h = \sum_i p_i \left(1 - e^{-p_i T}\right) $$
#
# is the share of requests that find their adapter. Where all tenants are equal, $h = C/N$. Where they follow Zipf's law, $p_i \propto 1/i$, it is more.
#
# ## The code
#
# Two adapters with weights are one adapter:
#
# @source minipeft.reference.lora.weighted_sum
# @source minipeft.torch.lora_batched.stack
#
# Each request gets its own:
#
# @source minipeft.reference.lora_batched.forward
# @source minipeft.torch.lora_batched.forward
#
# @source minipeft.reference.lora_batched.check_fits
#
# Any other method goes through its own layer, once for all rows that share an adapter:
#
# @source minipeft.torch.lora_batched.BatchedLinear.adapt
#
# The pool keeps each adapter on the host, and on the device those that the budget allows:
#
# @source minipeft.torch.lora_batched.Pool.serve
#
# @source minipeft.torch.lora_batched.Pool.switch
#
# ## The proof
#
# On small integers no sum is rounded, so each row must have the bits that it has alone. Two ranks, a weighted sum, another method and a row without any adapter:

# %%
rng = np.random.default_rng(0)


def integers(*shape):
    """Small whole numbers: every order of a sum gives the same bits."""
    return torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float32))


base = nn.Linear(6, 5)
base.weight, base.bias = nn.Parameter(integers(5, 6)), nn.Parameter(integers(5))
W, bias = base.weight.detach(), base.bias.detach()
small = Pool(nn.Sequential(base), ["0"])
ranks = {"ann": 1, "bob": 3}
held = {name: LoRA(integers(r, 6), integers(5, r), 0.5) for name, r in ranks.items()}
held["cid"] = IA3(integers(5), "output")
for name, adapter in held.items():
    small.add(name, {"0": adapter})
x = integers(5, 2, 6)


def update(name):
    """s B A, as one matrix."""
    return held[name].scaling * (held[name].B @ held[name].A).detach()


alone = [
    x[0] @ (W + update("ann")).T + bias,
    x[1] @ W.T + bias,
    x[2] @ (W + update("bob")).T + bias,
    held["cid"].l.detach() * (x[3] @ W.T + bias),
    x[4] @ (W + 2 * update("ann") - update("bob")).T + bias,
]
requests = ["ann", None, "bob", "cid", {"ann": 2.0, "bob": -1.0}]
with torch.no_grad(), small.serve(requests):
    together = small.layers["0"](x)
    small.switch(0, "bob")  # while serving: the next batch has another tenant in row 0
    switched = small.layers["0"](x)
assert torch.equal(together, torch.stack(alone))
assert torch.equal(switched[0], x[0] @ (W + update("bob")).T + bias)
assert torch.equal(switched[1:], together[1:])
print("each of five rows has the bits that it has alone")

# %% [markdown]
# And on the model of this chapter, with adapters of ranks 2 to 16 on all linear layers, one tenant a row. The loop is one model with the same adapters, which switches between them.

# %%
loaded = chapter.load()
places = chapter.places(loaded.model)
NAMES = [f"tenant {i}" for i in range(8)]
RANKS = (2, 4, 8, 16)
loop_model = copy.deepcopy(loaded.model).eval()
served_model = copy.deepcopy(loaded.model).eval()
pool = Pool(served_model, places.linears)
generator = torch.Generator().manual_seed(0)
found = {}
for i, name in enumerate(NAMES):
    config = LoRAConfig(RANKS[i % 4], 2 * RANKS[i % 4])
    tuned = inject.inject(
        copy.deepcopy(loaded.model), config, places.linears, name, generator
    )
    with torch.no_grad():
        for adapter in inject.adapters_of(tuned, name).values():
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=generator) / 20)
    found[name] = inject.adapters_of(tuned, name)
    pool.add(name, found[name])
    if i == 0:
        inject.inject(loop_model, config, places.linears, name, generator)
    else:
        inject.add(loop_model, config, name, generator)
    inject.load_adapter_state_dict(
        loop_model, inject.adapter_state_dict(tuned, name), name
    )
device = loaded.model.device
ids = torch.randint(5, 200, (len(NAMES), 12), generator=generator).to(device)


def one_by_one():
    """Switch to each tenant's adapter and compute its row."""
    rows = []
    for i, name in enumerate(NAMES):
        inject.activate(loop_model, name)
        rows.append(loop_model(ids[i : i + 1, :length]).logits)
    return torch.cat(rows)


length = 12
with torch.no_grad():
    expected = one_by_one()
    with pool.serve(NAMES):
        off = (served_model(ids).logits - expected).abs().max().item()
    with pool.serve([*NAMES[1:], NAMES[0]]):
        exchanged = (served_model(ids).logits - expected).abs().max().item()
print(f"mixed batch against the loop: logits differ by {off:.1e} at most")
print(f"with the tenants exchanged:   logits differ by {exchanged:.1e}")
chapter.claim(
    "a row of the mixed batch is what its tenant gets alone, up to rounding",
    off < 1e-4 * exchanged,
    control="the same batch, each row with its neighbour's adapter",
)

# %% [markdown]
# Rounding is all that differs: a matrix product of eight rows adds in another order than one of a single row. The tests derive how far that can go, and compare every method with its own layer.
#
# ## The experiment: a thousand tenants
#
# Requests come at random. Tenant $i$ of {=TENANTS=} sends a share proportional to $1/i$; in the control all send the same. The pool holds adapters of ranks 1, 2 and 4 on two layers of the model, for batches of 16 requests.

# %%
targets = list(layers(loaded.model, places.linears))[:2]
thousand = Pool(copy.deepcopy(loaded.model), targets)
forms = {
    key: layer.view.form(layer.base).shape for key, layer in thousand.layers.items()
}
rank_of = {f"t{i}": (1, 2, 4)[i % 3] for i in range(TENANTS)}
for name, r in rank_of.items():
    thousand.add(
        name,
        {
            key: LoRA(torch.zeros(r, k), torch.zeros(d, r), 1.0)
            for key, (d, k) in forms.items()
        },
    )
bytes_of = {name: thousand.nbytes(name) for name in rank_of}
everything = sum(bytes_of.values())
per_rank = {r: bytes_of[f"t{i}"] for i, r in enumerate((1, 2, 4))}
assert per_rank[4] == 4 * per_rank[1] == 4 * 4 * sum(d + k for d, k in forms.values())
print(
    f"an adapter takes {per_rank[1]:,}, {per_rank[2]:,} or {per_rank[4]:,} bytes, by its rank"
)

zipf = 1 / np.arange(1, TENANTS + 1)
LOADS = {
    "Zipf": zipf / zipf.sum(),
    "every tenant alike": np.full(TENANTS, 1 / TENANTS),
}
BATCH, SHARE = 16, 0.1
thousand.budget = int(SHARE * everything)


def trace(load, requests):
    """Draw the tenants of so many requests."""
    return np.random.default_rng(1).choice(TENANTS, requests, p=LOADS[load])


print(f"{'load':20s} hit rate   loads   bytes moved")
hits = {}
for load in LOADS:
    before, counted = thousand.traffic, 0
    batches = trace(load, chapter.steps * BATCH).reshape(-1, BATCH)
    for tenants in batches:
        names = [f"t{i}" for i in tenants]
        counted += sum(bytes_of[n] for n in {*names} - {*thousand.resident})
        with thousand.serve(names):
            pass
    seen = [a - b for a, b in zip(thousand.traffic, before, strict=True)]
    hits[load] = seen[0] / (seen[0] + seen[1])
    assert seen[2] == counted  # what the pool says it moved
    assert sum(bytes_of[n] for n in thousand.resident) <= thousand.budget
    print(f"{load:20s} {hits[load]:8.0%}   {seen[1]:5d}   {seen[2]:11,d}")
chapter.claim(
    f"with room for a tenth of the bytes, skewed load finds over {0.4:.0%} of its adapters there",
    hits["Zipf"] > 0.4,
    control=f"equal tenants, who find {hits['every tenant alike']:.0%}",
)
assert hits["every tenant alike"] < 2 * SHARE

# %% [markdown]
# The first requests under Zipf's law find an empty device, and a batch asks for each adapter once, however many of its rows want it. The formula leaves both out. To compare with it, the same rule of the last use runs on single requests, with adapters of one size, after a warm-up:


# %%
def last_used(tenants, places, warm):
    """Return the hit rate of a cache that keeps what was used last."""
    cache, found = OrderedDict(), 0
    for number, tenant in enumerate(tenants.tolist()):
        if tenant in cache:
            cache.move_to_end(tenant)
            found += number >= warm
        else:
            cache[tenant] = None
            if len(cache) > places:
                cache.popitem(last=False)
    return found / (len(tenants) - warm)


def predicted(load, places):
    """Solve the formula's first equation for T by halving, and return h."""
    p, low, high = LOADS[load], 0.0, 1e7
    for _ in range(80):
        T = (low + high) / 2
        low, high = (T, high) if (1 - np.exp(-p * T)).sum() < places else (low, T)
    return float((p * (1 - np.exp(-p * T))).sum())


SIZES = (10, 30, 100, 200, 400, 700)
REQUESTS = 30_000
simulated = {
    load: [last_used(trace(load, REQUESTS), c, REQUESTS // 3) for c in SIZES]
    for load in LOADS
}
formula = {load: [predicted(load, c) for c in SIZES] for load in LOADS}
worst = max(np.abs(np.subtract(simulated[n], formula[n])).max() for n in LOADS)
sampling = 0.5 / np.sqrt(2 / 3 * REQUESTS)
print(f"formula and simulation differ by {worst:.3f} at most")
print(f"(with independent hits, one standard error would be {sampling:.4f} at most)")
chapter.claim(
    "the formula gives the simulated hit rate to 0.015",
    worst < 0.015,
    control=f"the share of adapters held, C/N, which is off by {max(np.subtract(formula['Zipf'], np.array(SIZES) / TENANTS)):.2f}",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x=f"adapters on the device, of {TENANTS}", y="requests that find theirs there"
)
lines = np.unique(np.geomspace(2, 999, 60).astype(int))
for color, load, label, at in zip(
    plots.PALETTE,
    LOADS,
    ("Zipf's law", "every tenant alike"),
    ((30, 0.62), (560, 0.38)),
    strict=False,
):
    ax.plot(lines, [predicted(load, c) for c in lines], color=color)
    ax.plot(SIZES, simulated[load], "o", color=color)
    ax.text(*at, label, color=color, weight="bold", ha="center")
ax.text(700, 0.06, "dots: simulated\nlines: the formula", color=plots.INK, ha="center")
ax.set(xlim=(0, 1000), ylim=(0, 1))
ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
chapter.show(
    figure,
    "hits",
    alt=f"Share of requests that find their adapter on the device against the number of adapters held there. With equal tenants a straight line from none to all; with Zipf's law a curve above it, steep at first: at {100 / TENANTS:.0%} of the adapters {predicted('Zipf', 100):.0%} instead of {predicted('every tenant alike', 100):.0%}. Simulated dots lie on both.",
    caption=f"With {100 / TENANTS:.0%} of the adapters on the device, {predicted('Zipf', 100):.0%} of the requests find theirs under Zipf's law, and {predicted('every tenant alike', 100):.0%} where all tenants are alike.",
)

# %% [markdown]
# ## What a token costs, measured on a CPU
#
# Eight tenants want one token each. The ways to serve them: the base alone, without any adapter, as the least that a step can cost; one mixed batch; the loop; merging each adapter in turn; and copying the weights of a merged model for each. All start from memory: nothing is read from a disk.

# %%
states = []
for name in NAMES:
    inject.activate(loop_model, name)
    merged_model = inject.unload(inject.merge(copy.deepcopy(loop_model)))
    states.append(copy.deepcopy(merged_model.state_dict()))
plain = copy.deepcopy(loaded.model).eval()
copied_bytes = sum(p.nbytes for p in plain.parameters())
length = 1


def mixed():
    return served_model(ids[:, :1]).logits


def merged():
    rows = []
    for i, name in enumerate(NAMES):
        inject.activate(inject.unmerge(loop_model), name)
        rows.append(inject.merge(loop_model)(ids[i : i + 1, :1]).logits)
    inject.unmerge(loop_model)
    return torch.cat(rows)


def copied():
    rows = []
    for i, state in enumerate(states):
        plain.load_state_dict(state)
        rows.append(plain(ids[i : i + 1, :1]).logits)
    return torch.cat(rows)


WAYS = {
    "base alone": lambda: loaded.model(ids[:, :1]).logits,
    "mixed batch": mixed,
    "loop": one_by_one,
    "merge each": merged,
    "copy a merged model each": copied,
}
seconds = {way: [] for way in WAYS}
with torch.no_grad(), pool.serve(NAMES):
    answers = {way: run() for way, run in WAYS.items()}
    for _ in range(7):
        for way, run in WAYS.items():
            seconds[way].append(timing.cost(chapter.device, run))
scale = answers["loop"].abs().max()
for way in ("mixed batch", "merge each", "copy a merged model each"):
    assert (answers[way] - answers["loop"]).abs().max() < 1e-3 * scale
median = {way: statistics.median(values) for way, values in seconds.items()}
print("eight tenants, a token each      median ms   (lowest to highest of 7)")
for way, values in seconds.items():
    print(
        f"{way:28s} {1e3 * median[way]:12.1f}   ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})"
    )
chapter.claim(
    "one mixed batch costs less than half of the loop",
    2 * median["mixed batch"] < median["loop"],
    control="the same eight rows by the same adapters, one after another",
)
chapter.claim(
    "merging for a single token costs more than leaving the adapter unmerged",
    median["merge each"] > median["loop"],
    control="the loop, which does not merge",
)

# %% [markdown]
# The mixed batch took {=f"{median['mixed batch'] / median['base alone']:.1f}"=} times the base alone here, and the loop {=f"{median['loop'] / median['base alone']:.1f}"=} times. These ratios are those of a small model, in which calling a layer from Python can take a good part of the time; no cell separates the two. Copying a whole
# model of {=copied_bytes / 1e6:.1f=} MB for each tenant took only {=f"{median['copy a merged model each'] / median['loop']:.1f}"=} times as long as the loop. At 7 billion parameters the bytes are {=f"{whole_bytes / copied_bytes:,.0f}"=} times as many; the next section counts them.
#
# ## What a token costs, predicted for a GPU
#
# A GPU that generates one token a request waits for memory (see [chapter 18](18_gpu_four_bits.md)). So we count bytes, for the 7-billion model in 16 bits on an A100: {=A100 / 1e9:.0f=} GB a second from its memory, {=PCIE / 1e9:.1f=} from the host [@nvidia2020]. Nothing here is measured: the bytes give the least time of a step, and so the most tokens a second, if a model is copied whole before it is read. The keys and values of the context are left out; the whole embedding is counted, {=f"{2 * LLAMA_7B.vocabulary * LLAMA_7B.width / whole_bytes:.1%}"=} of the base's bytes, though a step reads few of its rows. The 32 requests of a batch come from
# $D$ different tenants:

# %%
A100, PCIE = 1555e9, 31.5e9
ROWS = 32
D = np.arange(1, ROWS + 1)
steps = {
    "one mixed batch": (whole_bytes + D * adapter_bytes) / A100,
    "loop over the tenants": D * (whole_bytes + adapter_bytes) / A100,
    "load a merged model each": D * whole_bytes * (1 / PCIE + 1 / A100),
}
speeds = {way: ROWS / time for way, time in steps.items()}
print("tokens a second, at most          1 tenant   8 tenants   32 tenants")
for way, speed in speeds.items():
    print(f"{way:30s} {speed[0]:11.0f} {speed[7]:11.0f} {speed[31]:12.1f}")
kept = speeds["one mixed batch"][-1] / (ROWS * A100 / whole_bytes)
chapter.claim(
    "with 32 tenants in a batch of 32, the bytes leave over 80 % of the base's speed",
    kept > 0.8,
    control="the base without adapters",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="different tenants in a batch of 32",
    y="tokens a second, at most",
    size=(6.4, 3.8),
)
ax.axhline(ROWS * A100 / whole_bytes, color=plots.INK, linestyle="--", linewidth=1)
ax.text(1.05, 1.1 * ROWS * A100 / whole_bytes, "the base alone", color=plots.INK)
for color, (way, speed), at in zip(
    plots.PALETTE, speeds.items(), ((12, 0.6), (3.2, 1.25), (1.6, 1.3)), strict=False
):
    ax.plot(D, speed, color=color)
    x_at, lift = at
    ax.text(x_at, lift * np.interp(x_at, D, speed), way, color=color, weight="bold")
ax.set(xscale="log", yscale="log", xlim=(1, 32), ylim=(1, 9000))
ax.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
ax.minorticks_off()
chapter.show(
    figure,
    "tokens",
    alt=f"Tokens a second against the number of different tenants in a batch of {ROWS}, on logarithmic axes. The mixed batch stays just below the dashed line of the base alone, and has {kept:.0%} of it at the right; the loop falls as one over the number of tenants; loading a merged model each begins {speeds['loop over the tenants'][0] / speeds['load a merged model each'][0]:.0f} times lower and falls as fast.",
    caption=f"A mixed batch of {ROWS} tenants keeps {kept:.0%} of the base's speed. The loop keeps 1/{ROWS}, and loading merged models {speeds['load a merged model each'][-1] / speeds['loop over the tenants'][-1]:.0%} of that.",
)

# %% [markdown]
# How much has to be loaded depends on what the device holds. Let 40 GB be free for the tenants, beside the base. An A100 of 80 GB has so much; the one of the last figure has 40 GB in all. That is room for {=fit_adapters=} adapters, or for {=fit_models=} merged models:

# %%
ROOM = 40e9
fit_adapters, fit_models = int(ROOM // adapter_bytes), int(ROOM // whole_bytes)
missed = {
    "adapters": (1 - predicted("Zipf", fit_adapters)) * adapter_bytes,
    "merged models": (1 - predicted("Zipf", fit_models)) * whole_bytes,
}
for kind, moved in missed.items():
    print(
        f"{kind:14s} {moved / 1e6:9.1f} MB a request from the host, {1e3 * moved / PCIE:6.1f} ms"
    )
ratio = missed["merged models"] / missed["adapters"]
chapter.claim(
    "under Zipf's law merged models move over a thousand times the bytes of adapters",
    ratio > 1000,
    control="adapters in the same 40 GB, by the same formula",
)

# %% [markdown]
# **When to merge.** Where one tenant fills all batches, merging reads and writes the linear layers once, and afterwards a step reads no adapter:

# %%
weights = 2 * LLAMA_7B.linear_parameters
even = (2 * weights + adapter_bytes) / adapter_bytes
chapter.quantity(
    "Llama 7B in 16 bits, LoRA r = 16 on all linear layers: steps after which a merge has paid",
    even,
    "steps",
    0,
)
gain = adapter_bytes / (whole_bytes + adapter_bytes)
print(f"from then on it saves {gain:.2%} of the bytes of each step")
assert gain < 0.01

# %% [markdown]
# The gain is small because the adapter is. What a real unmerged layer costs besides is more launches, which a count of bytes does not see.
#
# ## What goes wrong in practice
#
# - **A row for another row.** A server that pads, sorts or drops finished requests must keep its list of adapters in the same order. Nothing fails otherwise: rows get another tenant's answer. The pool refuses a batch whose number of rows is not the number of requests; beam search, which repeats rows, is
#   refused like that.
# - **Padding to the largest rank.** Where each place on the device is as large as the highest rank allowed, an adapter of rank 8 beside one of rank 256 takes 32 times its bytes. Our pool stores adapters as they are and pads only the stack of the batch.
# - **An adapter that is removed while it is used.** The next step would read memory that is free, or belongs to another tenant. The pool refuses and names the request.
# - **Methods that change the base.** PiSSA and LoftQ train on a base of their own, so their adapters do not fit the original one. PiSSA's difference from the original weight is a LoRA of twice the rank (see [its chapter](11_pissa.md)), and that can be served.
# - **DoRA costs more than LoRA.** Its norms depend on the frozen weight and on the adapter. Our layer computes them again in each pass; a server would keep them.
#
# ## Exercises
#
# 1. *A sum of two adapters.* Add a second copy of ann's adapter under another name, and ask for both in one row, with the weights $w$ and $1 - w$. What must this row give?

# %% tags=["solution"]
small.add("ann again", {"0": held["ann"]})
with torch.no_grad(), small.serve([{"ann": 0.25, "ann again": 0.75}]):
    half = small.layers["0"](x[:1])
assert torch.equal(half[0], alone[0])
print("the adapter itself")

# %% [markdown]
# 2. *More skew.* Under $p_i \propto 1/i^2$, what does the formula say for ten adapters of a thousand?

# %% tags=["solution"]
steep = 1 / np.arange(1, TENANTS + 1) ** 2
LOADS["steep"] = steep / steep.sum()
print(f"{predicted('steep', 10):.0%}, against {predicted('Zipf', 10):.0%}")
assert predicted("steep", 10) > 2 * predicted("Zipf", 10)

# %% [markdown]
# 3. *Four bits.* The base in 4.5 bits a weight makes a step shorter, but adapters stay in 16 bits. Which share of a step's bytes are adapters then, with 32 tenants?

# %% tags=["solution"]
four = LLAMA_7B.linear_parameters * 4.5 / 8 + 2 * (
    LLAMA_7B.parameters - LLAMA_7B.linear_parameters
)
shares = [
    ROWS * adapter_bytes / (b + ROWS * adapter_bytes) for b in (whole_bytes, four)
]
print(f"{shares[1]:.0%} instead of {shares[0]:.0%}")
assert shares[1] > 2 * shares[0]

# %% [markdown]
# ## References
#
# The kernels for rows with different adapters are those of Punica [@chen2023]; S-LoRA [@sheng2023] serves thousands of adapters from host memory and pages them. The formula for the hit rate is by Che, Tung and Wang [@che2002].
