# %% [markdown]
# # How much the adapter leans on the base
#
# A LoRA adapts a frozen layer: the base gives $Wx$, the adapter adds $s\,BAx$. How much does the one output tell about the other? Zhang and others bound this *mutual information* from above and report that it falls as the rank and the base grow: the adapter leans less on the base [@zhang2025]. This chapter
# measures bounds with named estimators, over rank, data and size of the base, and compares the direction. It does not rebuild their measure: the numbers here are ours.

# %%
import json
import math
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minipeft.lab import (
    information,
    models,
    plots,
    pretrain,
    results,
    task,
    text,
    train,
)
from minipeft.lab.chapter import start
from minipeft.lab.files import write_atomic
from minipeft.lab.places import block_of
from minipeft.torch.inject import adapted, inject
from minipeft.torch.linear import weight_of
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.targets import layers

chapter = start("30_leaning_on_the_base", steps=24, model="tiny")
ESTIMATES = ("Gaussian", "CLUB", "variational")

# %% [markdown]
# ## The problem
#
# The mutual information of two random vectors,
#
# $$ I(U; V) = \mathbb{E}_{p(u,v)} \log \frac{p(v|u)}{p(v)} , $$
#
# is zero if they are independent, and larger the more the one says about the other; in nats, like a loss. Let $x$ be what reaches a layer at one token, $U = Wx$ and $V = s\,BAx$. Neither has any randomness of its own. Where $W$ has as many outputs as inputs or more, $U$ determines $x$ and so $V$. If $x$ has a density, $I(U; V)$ is then *infinite*, whatever the adapter has learned.
# This is known of deterministic networks with continuous inputs [@goldfeld2019]; the remedy is to add noise of a stated size. We measure $I(U; V + \sigma\varepsilon)$ with Gaussian $\varepsilon$ and two sizes:
#
# - **of bf16**: $\sigma$ is $2^{-8}$ of the root mean square of $U$; a $U$ with more numbers than $x$ is first turned into as many as $x$ has. Rounding a number to bf16 changes it by at most this share of its size, so where $U$ is kept in bf16, less than $\sigma$ is lost in the root mean square.
# - **a tenth**: $\sigma$ is a tenth of the size of $V$ itself, in the directions that $B$ can reach. The size of the adapter's output then cancels.
#
# ## The three estimators
#
# - **Gaussian**: with canonical correlations $\rho_i$, $-\frac12 \sum_i \log(1 - \rho_i^2)$. Exact if $U$ and $V$ are Gaussian together; for other distributions an approximation and no bound.
# - **CLUB** [@cheng2020]: $\mathbb{E}_{p(u,v)} \log q(v|u) - \mathbb{E}_{p(u)p(v)} \log q(v|u)$, above $I$ if $q$ is the true conditional density. Our $q$ is Gaussian and linear in $u$.
# - **variational** [@poole2019]: $\mathbb{E}_x\, KL(p(v|x) \,\Vert\, r(v))$. It bounds $I(X; V) \ge I(U; V)$ for every $r$, and needs no knowledge of $U$: $p(v|x)$ is the noise, which we know. Our $r$ is Gaussian.
#
# CLUB and the variational bound are fitted on one half of the definitions and judged on the other.
#
# @source minipeft.lab.information.gaussian
# @source minipeft.lab.information.club
# @source minipeft.lab.information.variational
#
# ## The proof
#
# On Gaussians all three are known. If $V = \rho U + \sqrt{1 - \rho^2}\,\varepsilon$ in each of $k$ coordinates, then $I = -\frac k2 \log(1 - \rho^2)$, which the Gaussian value and the variational bound reach, since $U$ is all that $V$ depends on. CLUB is $k \rho^2 / (1 - \rho^2)$: twice $I$ for small $\rho$, and far above it near 1, where it grows like one over the variance of the noise and $I$ like its logarithm.

# %%
torch.manual_seed(0)
checked = {}
for rho in (0.1, 0.5, 0.9, 0.999):
    u, noise = torch.randn(2, 40_000, 4, dtype=torch.float64)
    clean = rho * u
    v = clean + (1 - rho**2) ** 0.5 * noise
    exact = -2 * math.log(1 - rho**2)
    wide = 4 * rho**2 / (1 - rho**2)
    checked[rho] = [
        information.gaussian(u, v) / exact,
        information.club((u[::2], v[::2]), (u[1::2], v[1::2])) / wide,
        information.variational(clean[::2], clean[1::2], 1 - rho**2) / exact,
    ]
    print(
        f"rho = {rho:5g}: I = {exact:6.3f}, CLUB of Gaussians {wide:8.3f}; estimated / known:",
        " ".join(
            f"{name} {q:.3f}" for name, q in zip(ESTIMATES, checked[rho], strict=True)
        ),
    )
assert all(abs(q - 1) < 0.05 for rho in (0.5, 0.9, 0.999) for q in checked[rho])

# %% [markdown]
# ## The setting
#
# `tiny` learns *The Devil's Dictionary* with LoRA and $\alpha = 16$ on every linear layer, each definition seen once, at the rate {=f"{RATE:g}"=}, the best at every rank in [chapter 29](29_rank_laws.md). The usual run has rank 8 and {=SEEN=} definitions. The outputs are those of all linear layers in the first and the last block, at the tokens of {=DEFINITIONS=} definitions. Only the part of $V$
# in the directions of $B$ is compared: the rest is noise that nothing depends on. The control at each rank is an adapter with *random* $A$ and $B$, each update as large as the trained one.
#
# Layers are of two kinds. Where there are as many outputs as inputs or more, $U$ determines $V$. Where there are fewer, $U$ has lost a part of the input.

# %%
base = chapter.load()
tokenizer = base.tokenizer
places = chapter.places(base.model)
entries = chapter.task.train
BLOCKS = sorted({block_of(name) for name in layers(base.model, places.linears)})
EXAMINED = [
    name
    for name in layers(base.model, places.linears)
    if block_of(name) in (BLOCKS[0], BLOCKS[-1])
]
LOSES = [
    out < into
    for out, into in (weight_of(layers(base.model, [n])[n]).shape for n in EXAMINED)
]
del base
ALPHA, RATE, ROWS, SEEN = 16, 0.01, 8, 384
RANKS, COUNTS = [1, 4, 16, 64], [24, 96, SEEN, 744]
WIDTHS, STEPS = [16, 32, 64], 400
NOISES = {"of bf16": 2.0**-8, "a tenth": 0.1}


def base_of(width):
    """The chapter's model, or one that is pretrained here, in fewer steps than `tiny`."""
    if width is None:
        return chapter.load().model
    folder = pretrain.base(pretrain.sized(width, STEPS))
    return models.load(str(folder), chapter.device, chapter.dtype).model


def trained(r, seen, width, seed):
    """A model whose adapters have seen so many definitions, each once."""
    model = base_of(width)
    torch.manual_seed(seed)
    inject(model, LoRAConfig(r, ALPHA), places.linears)
    steps = min(seen, len(entries)) // ROWS
    batches = text.examples(tokenizer, entries, (ROWS, 64), seed)
    config = train.TrainConfig(steps, RATE, warmup=steps // 10)
    train.train(model, batches, config, checkpoint=chapter.kept())
    return model


def at_random(model, seed):
    """The control: random A and B, each update as large as the trained one."""
    torch.manual_seed(seed)
    for layer in adapted(model).values():
        lora = layer.adapters["default"]
        size = (lora.B @ lora.A).norm()
        lora.A.data.normal_()
        lora.B.data.normal_()
        lora.B.data *= size / (lora.B @ lora.A).norm()
    return model


# %%
def inputs(model, pairs):
    """What reaches each examined layer: the tokens of these examples, (n, in)."""
    kept, now = {name: [] for name in EXAMINED}, {}

    def hook(name):
        return lambda _, args: kept[name].append(args[0][now["mask"]])

    here = adapted(model)
    handles = [here[n].register_forward_pre_hook(hook(n)) for n in EXAMINED]
    with torch.no_grad():
        for batch in text.example_batches(tokenizer, pairs, (25, 64)):
            batch = {name: given.to(chapter.device) for name, given in batch.items()}
            now["mask"] = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def outputs(layer, x):
    """U, the base's output, and V, the adapter's, in the directions that it can use."""
    lora = layer.adapters["default"]
    W = weight_of(layer.base)
    if W.shape[0] > W.shape[1]:
        W = torch.linalg.qr(W).R
    R = torch.linalg.qr(lora.B).R  # M = QR: Q turns, so R keeps all that M tells
    u, v = x @ W.T, lora.scaling * x @ lora.A.T @ R.T
    return u.detach().cpu(), v.detach().cpu()  # the noise is drawn there


def lean(model, definitions):
    """For each noise, the three estimates of each examined layer, in nats."""
    half = min(definitions, len(entries)) // 2
    halves = entries[:half], entries[half : 2 * half]
    first, second = (inputs(model, pairs) for pairs in halves)
    found = {noise: [] for noise in NOISES}
    for name in EXAMINED:
        layer = adapted(model)[name]
        (u, v), (a, b) = outputs(layer, first[name]), outputs(layer, second[name])
        sizes = {"of bf16": u.square().mean(), "a tenth": v.var(0).mean()}
        for noise, share in NOISES.items():
            variance = float(share**2 * sizes[noise])
            generator = torch.Generator().manual_seed(0)
            blurred = [
                w + variance**0.5 * torch.randn(w.shape, generator=generator)
                for w in (v, b)
            ]
            found[noise].append(
                [
                    round(estimate, 4)
                    for estimate in (
                        information.gaussian(torch.cat([u, a]), torch.cat(blurred)),
                        information.club((u, blurred[0]), (a, blurred[1])),
                        information.variational(v, b, variance),
                    )
                ]
            )
    return found


# %%
SEEDS, DEFINITIONS = [0, 1, 2], 160
SETTINGS = {
    **{f"r = {r}": (r, SEEN, None) for r in RANKS},
    **{f"{n} definitions": (8, n, None) for n in COUNTS},
    **{f"width {w}": (8, SEEN, w) for w in WIDTHS},
}


def in_full(name):
    """Train with each seed and measure; at the ranks, measure the control too."""
    began = time.perf_counter()
    runs, control = [], []
    for seed in SEEDS:
        model = trained(*SETTINGS[name], seed)
        runs.append(lean(model, DEFINITIONS))
        if name.startswith("r ="):
            control.append(lean(at_random(model, seed), DEFINITIONS))
    seconds = time.perf_counter() - began
    return {"runs": runs, "control": control, "seconds": seconds}


as_in_the_book = chapter.before == task.BEFORE and chapter.targets is None
COMMITTED = Path(__file__).with_name("results") / f"{chapter.name}.json"
PLACE = COMMITTED if as_in_the_book else chapter.out / "full.json"
if chapter.full:
    partial = chapter.out / "settings.json"  # what an interrupted run goes on from
    done = json.loads(partial.read_text()) if partial.exists() else {}
    for name in SETTINGS:
        if name not in done:
            done[name] = in_full(name)
            write_atomic(partial, json.dumps(done).encode())
            print(name, round(done[name]["seconds"], 1), flush=True)
    values = {"settings": {name: done[name] for name in SETTINGS}}
    seconds = sum(one["seconds"] for one in done.values())
    result = results.record(chapter, SEEDS, seconds, values)
    write_atomic(PLACE, (json.dumps(result) + "\n").encode())
    partial.unlink()

# %% [markdown]
# ## Over the rank
#
# The long run, with noise of the size of bf16's rounding. A value is in nats for each token and layer: the mean over three seeds, ± half the distance between the smallest and the largest.

# %%
full = chapter.read_full(PLACE if PLACE.exists() else COMMITTED)
points = full["settings"]
assert list(points) == list(SETTINGS)
DETERMINED, LOST = False, True
BF16, TENTH = NOISES


def value(name, estimate, noise=BF16, kind=None, what="runs"):
    """An estimate of each seed: the mean over the layers of a kind, or over all."""
    column = ESTIMATES.index(estimate)
    return [
        statistics.mean(
            layer[column]
            for layer, loses in zip(run[noise], LOSES, strict=True)
            if kind is None or loses == kind
        )
        for run in points[name][what]
    ]


def row(name, kind):
    """The three estimates, and the Gaussian one of the random control."""
    cells = [results.spread(value(name, e, kind=kind), 1) for e in ESTIMATES]
    control = value(name, "Gaussian", kind=kind, what="control")
    return [name, *cells, results.spread(control, 1)]


HEAD = ["", *ESTIMATES, "Gaussian, random adapter"]
tables = {
    kind: results.table([HEAD, *(row(f"r = {r}", kind) for r in RANKS)])
    for kind in (DETERMINED, LOST)
}
above = [
    statistics.mean(value(f"r = {r}", "CLUB", kind=DETERMINED))
    / statistics.mean(value(f"r = {r}", "Gaussian", kind=DETERMINED))
    for r in RANKS
]
print(results.origin(full))

# %% tags=["fold"]
figure = Figure(figsize=(6.4, 3.8), layout="constrained")
for ax, share in zip(figure.subplots(1, 2), (False, True), strict=True):
    lines = [
        ("variational", "runs", "variational bound"),
        ("Gaussian", "runs", "Gaussian value"),
        ("Gaussian", "control", "Gaussian value, random adapter"),
    ]
    for color, (estimate, what, label) in zip(plots.PALETTE, lines, strict=False):
        over = [r if share else 1 for r in RANKS]
        each = [value(f"r = {r}", estimate, what=what) for r in RANKS]
        each = [[v / k for v in values] for values, k in zip(each, over, strict=True)]
        means = [statistics.mean(values) for values in each]
        style = "o--" if what == "control" else "o-"
        ax.plot(RANKS, means, style, color=color, markersize=4, label=label)
        low, high = [min(v) for v in each], [max(v) for v in each]
        ax.fill_between(RANKS, low, high, color=color, alpha=0.25, linewidth=0)
    ax.set(xscale="log", xlabel="rank", ylim=(0, None))
    ax.set_xticks(RANKS, [str(r) for r in RANKS])
    ax.minorticks_off()
    ax.set_ylabel("nats a direction" if share else "nats a layer")
figure.axes[0].legend(fontsize=8)
first, last = f"r = {RANKS[0]}", f"r = {RANKS[-1]}"
ends = {n: statistics.mean(value(n, "Gaussian")) for n in (first, last)}
chapter.show(
    figure,
    "rank",
    alt="Two panels over the rank. Left, nats a layer: the variational bound, the Gaussian value and that of a random adapter all rise with the rank. Right, the same divided by the rank: all fall.",
    caption=f"From rank {RANKS[0]} to rank {RANKS[-1]} the Gaussian value rises from {ends[first]:.1f} to {ends[last]:.1f} nats a layer, and falls from {ends[first] / RANKS[0]:.1f} to {ends[last] / RANKS[-1]:.1f} nats for each direction of the adapter. Bands: three seeds.",
)

# %% [markdown]
# Where $U$ determines $V$:
#
# {=tables[DETERMINED]=}
#
# Where $U$ has lost a part of the input:
#
# {=tables[LOST]=}
#
# Every estimate but one rises with the rank: an adapter of more directions has more to tell, and so more about the base. For each direction the values fall (right panel), and those of the random adapter too: more directions share one update.
#
# Where $U$ determines $V$, the Gaussian value and the variational bound agree, as they must: all that $V$ says about the input it says about $U$. CLUB is {=f"{above[-1]:,.0f}"=} times as large there at rank {=RANKS[-1]=}, and {=f"{above[0]:,.0f}"=} times at rank {=RANKS[0]=}. It is a valid bound and says little: with so little noise the density $q(v|u)$ is so narrow that a wrong pair is unlikely beyond measure. Where $U$ has lost a part of the input, CLUB is at most about
# {=f"{max(statistics.mean(value(f'r = {r}', 'CLUB', kind=LOST)) / statistics.mean(value(f'r = {r}', 'Gaussian', kind=LOST)) for r in RANKS):.0f}"=} times the Gaussian value, and on average still above the variational bound, which knows nothing of $U$.
#
# The control says how much of this is the adapter's doing. A random adapter of rank {=RANKS[0]=} tells about as much as a trained one. At rank {=RANKS[-1]=} a random one tells *more*, {=f"{statistics.mean(value(last, 'Gaussian', what='control')):.0f}"=} nats a layer against {=f"{ends[last]:.0f}"=}: training has put most of the update into few directions ([chapter 27](27_learns_less.md) counts them).
#
# ## Over data and size
#
# The other two axes, and both sizes of the noise. Each cell goes from the smallest to the largest value of the axis: rank {=RANKS[0]=} to {=RANKS[-1]=}, {=COUNTS[0]=} to {=COUNTS[-1]=} definitions, width {=WIDTHS[0]=} to {=WIDTHS[-1]=}. An arrow says that every seed moves this way; a dash, that they disagree. The last row divides the first by the rank.

# %%
AXES = {
    "rank": [f"r = {r}" for r in RANKS],
    "definitions": [f"{n} definitions" for n in COUNTS],
    "width of the base": [f"width {w}" for w in WIDTHS],
}


def moves(axis, estimate, noise, each=False):
    """Both ends of an axis, of each seed, and the way that all seeds move."""
    names = AXES[axis][0], AXES[axis][-1]
    per = (RANKS[0], RANKS[-1]) if each else (1, 1)
    low, high = (
        [v / k for v in value(n, estimate, noise)]
        for n, k in zip(names, per, strict=True)
    )
    ways = {b > a for a, b in zip(low, high, strict=True)}
    return (
        low,
        high,
        ("mixed" if len(ways) > 1 else "rises" if True in ways else "falls"),
    )


ARROWS = {"rises": "↑", "falls": "↓", "mixed": "–"}
columns = [(e, n) for n in NOISES for e in ESTIMATES]
rows = [["", *(f"{e}, {n}" for e, n in columns)]]
found = {}
for axis, each in [*((axis, False) for axis in AXES), ("rank", True)]:
    label = f"{axis}, a direction" if each else axis
    cells = []
    for estimate, noise in columns:
        low, high, way = moves(axis, estimate, noise, each)
        found[label, estimate, noise] = way
        a, b = statistics.mean(low), statistics.mean(high)
        digits = 0 if max(a, b) > 1000 else 1
        cells.append(f"{a:,.{digits}f} → {b:,.{digits}f} {ARROWS[way]}")
    rows.append([label, *cells])
directions = results.table(rows)

# %% [markdown]
# {=directions=}
#
# The published direction is that the bound falls with the rank and with the size of the base. What the paper finds over the data we have not seen; it takes the bound for a scaling law of data too.
#
# - **Rank.** The Gaussian value and the variational bound rise, with every seed and both noises: the claim **did not replicate**. It holds for each direction: there the value is divided by the rank, which grows faster.
# - **Data.** It depends on the noise. With that of bf16 all three rise; measured against the size of $V$ itself, the Gaussian value and the variational bound fall from the smallest to the largest value, though from {=COUNTS[2]=} to {=COUNTS[3]=} definitions they rise. Training on more data makes $V$ larger, and that alone lifts it out of a fixed noise. With the size of $V$ cancelled, the Gaussian value falls by {=f"{statistics.mean(value(AXES['definitions'][0], 'Gaussian', TENTH)) - statistics.mean(value(AXES['definitions'][-1], 'Gaussian', TENTH)):.1f}"=} nats of {=f"{statistics.mean(value(AXES['definitions'][0], 'Gaussian', TENTH)):.0f}"=}.
# - **Size of the base.** All rise, with every seed and both noises: **did not replicate**. The bases here were pretrained for {=STEPS=} steps only.
#
# CLUB over the rank moves in opposite ways under the two noises, and in the layers where $U$ has lost a part of the input it rises. With the noise of bf16 it is hundreds of times larger or more where $U$ determines $V$, so the average is that of these layers.
#
# So the sign of such a law depends on what is divided by what, and on the noise. A measure of how much an adapter leans on its base needs both to be stated.
#
# ## The claims, checked
#
# The claims on the long run were written after its results were seen. They describe this run and predict nothing.

# %%
if as_in_the_book:
    BOTH = ("Gaussian", "variational")
    chapter.claim(
        "over the rank the Gaussian value and the variational bound rise, with every seed and both noises",
        all(found["rank", e, n] == "rises" for e in BOTH for n in NOISES),
        control=f"rank {RANKS[0]} with the same seed",
    )
    chapter.claim(
        "for each direction of the adapter they fall",
        all(found["rank, a direction", e, n] == "falls" for e in BOTH for n in NOISES),
        control=f"rank {RANKS[0]} with the same seed",
    )
    chapter.claim(
        "over the data they rise with the noise of bf16 and fall with a tenth of V",
        all(
            (found["definitions", e, BF16], found["definitions", e, TENTH])
            == ("rises", "falls")
            for e in BOTH
        ),
        control=f"{COUNTS[0]} definitions with the same seed",
    )
    assert all(
        later > earlier
        for e in BOTH
        for earlier, later in zip(
            *(value(f"{n} definitions", e, TENTH) for n in COUNTS[2:]), strict=True
        )
    )
    chapter.claim(
        "over the size of the base they rise",
        all(found["width of the base", e, n] == "rises" for e in BOTH for n in NOISES),
        control=f"width {WIDTHS[0]} with the same seed",
    )
    drawn = [value(f"r = {r}", "Gaussian", what="control") for r in RANKS]
    assert min(drawn[0]) / RANKS[0] > max(drawn[-1]) / RANKS[-1]
    chapter.claim(
        "at the largest rank a random adapter tells more than a trained one",
        min(value(last, "Gaussian", what="control")) > max(value(last, "Gaussian")),
        control="random A and B, each update as large as the trained one",
    )

# %% [markdown]
# ## This build
#
# The short setting repeats two ranks with {=chapter.steps=} steps and two seeds.

# %%
QUICK, FEW = (1, 16), 100
short = {
    r: [
        lean(trained(r, ROWS * chapter.steps, None, seed), FEW)[BF16] for seed in (0, 1)
    ]
    for r in QUICK
}
quick = {
    (r, e): [statistics.mean(layer[k] for layer in run) for run in runs]
    for r, runs in short.items()
    for k, e in enumerate(ESTIMATES)
}
for (r, estimate), values in quick.items():
    print(f"r = {r:2d}, {estimate:11s}: {results.spread(values, 1)} nats a layer")
for estimate in ("Gaussian", "variational"):
    low, high = (quick[r, estimate] for r in QUICK)
    chapter.claim(
        f"{estimate}: more nats a layer at the larger rank, fewer for each direction",
        max(low) < min(high) and min(low) / QUICK[0] > max(high) / QUICK[1],
        control=f"rank {QUICK[0]}, seeds 0 and 1",
    )

# %% [markdown]
# ## What this does not show
#
# - **The published measure.** We have its abstract and its direction, and not its formula. A measure on other outputs, or with another normalization, may fall where ours rise.
# - **A causal statement.** Mutual information is symmetric. That $V$ tells much about $U$ says that both read the same input, whether or not the adapter "uses" the base.
# - **Exact values.** The Gaussian value is no bound, and CLUB is one only if its $q$ is right. Half of {=DEFINITIONS=} definitions are few samples for 128 directions.
# - **Large models.** The largest base has 0.92 million parameters; the authors measured models of 3 and 8 billion.
#
# ## What goes wrong in practice
#
# - **Mutual information without noise.** Of continuous inputs it is infinite where $U$ determines $V$, and an estimator returns a finite number all the same: it depends on the number of samples and on rounding.
# - **A loose bound read as a value.** CLUB grew to hundreds of thousands of nats where the true value is below {=math.ceil(max(value(last, 'variational', kind=DETERMINED)))=}.
# - **No control.** Without the random adapter one would credit training with what any matrix does.
#
# ## Exercises
#
# 1. Halve the noise. By how much does the Gaussian value of $k$ strong directions rise?

# %% tags=["solution"]
u, noise = torch.randn(2, 20_000, 4, dtype=torch.float64)
values = [information.gaussian(u, u + sigma * noise) for sigma in (0.02, 0.01)]
print(f"by {values[1] - values[0]:.3f} nats; 4 log 2 = {4 * math.log(2):.3f}")
assert abs(values[1] - values[0] - 4 * math.log(2)) < 0.01

# %% [markdown]
# 2. Why does CLUB rise by a factor of four there?

# %% tags=["solution"]
bounds = [
    information.club((u[::2], w[::2]), (u[1::2], w[1::2]))
    for w in (u + sigma * noise for sigma in (0.02, 0.01))
]
print(f"{bounds[1] / bounds[0]:.2f}: it is the signal's variance over the noise's")
assert round(bounds[1] / bounds[0]) == 4

# %% [markdown]
# ## References
#
# The claim is by Zhang and others [@zhang2025]; CLUB by Cheng and others [@cheng2020]; the variational bound is in Poole and others [@poole2019]; that the mutual information of deterministic networks is infinite is discussed by Goldfeld and others [@goldfeld2019]. The entropy of a Gaussian is a theorem of Cover and Thomas's book [@cover2006].
