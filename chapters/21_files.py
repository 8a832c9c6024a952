# %% [markdown]
# # Files: what an adapter will do elsewhere
#
# The program that trains an adapter writes it as two files: a configuration and the matrices. Another program that reads them may compute with another scale, or not apply the adapter at all. A merged model leaves as one file, and nobody can see what was merged into it. This chapter asks two questions of files: *what will this adapter do there?* and *is this model really base + adapter?*

# %%
import atexit
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import safetensors.torch
import torch

from minipeft.interop import (
    fixing,
    inspecting,
    loaders,
    parts,
    peft_folder,
    peft_format,
)
from minipeft.interop.audit import EXACT, WRONG, audit
from minipeft.interop.bound import allowed
from minipeft.interop.mistakes import MISTAKES
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import exact, merged
from minipeft.lab import models, plots
from minipeft.lab.chapter import start
from minipeft.torch import blockwise

chapter = start("21_files", steps=1, model=None)

# %% [markdown]
# ## The problem
#
# A weight of the base is $W$, the adapter brings $A$, $B$ and numbers from which the scale follows: `lora_alpha`, `r`, `use_rslora`, and patterns that give some layers other values. The matrices look the same under every scale. So a program that does not read one of these numbers loads the file, prints no warning, and computes with another scale.
#
# Here is such an adapter, for the small model of this book: rank-stabilized, with ranks and alphas that differ from layer to layer.

# %%
folder = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, folder)
base = open_tensors(models.TINY)
draw = torch.Generator().manual_seed(0)
tensors = {}
for name, about in base.about.items():
    if name.endswith("_proj.weight"):
        r = 8 if ".mlp." in name else 4
        key = f"base_model.model.{name.removesuffix('.weight')}"
        A = torch.randn(r, about.shape[1], generator=draw) / about.shape[1] ** 0.5
        B = torch.randn(about.shape[0], r, generator=draw) * 0.01
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
config = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 12,
    "use_rslora": True,
    "rank_pattern": {r".*\.mlp\..*": 8},
    "alpha_pattern": {"q_proj": 7},
    "target_modules": sorted({name.split(".")[-3] for name in tensors}),
}
peft_folder.write(folder / "adapter", peft_folder.Contents(config, tensors))
adapter = peft_format.read(folder / "adapter")
print(f"{len(adapter.updates)} updates, scales", end=" ")
print(*sorted({f"{update.scaling:.3f}" for update in adapter.updates.values()}))

# %% [markdown]
# ## The formula: one rounding
#
# A merged weight is $W + s\,BA$ [@hu2021]. We call a merge right if this sum is computed in float32 and rounded once to the dtype of the file. Bytes can be compared with that definition: a file has these bits, or it has not. Another program may add in another order. So a file may differ from the right merge by as much as another order of the sums can cause [@higham2002]; this is the *bound*. A larger difference is a mistake.
#
# The size of an update is its Frobenius norm, the root of the sum of its squared entries. It needs no product as large as a weight, because $\lVert BA\rVert^2 = \operatorname{tr}\big((B^TB)(AA^T)\big)$, the trace of a product of two $r \times r$ matrices.
#
# ## The code
#
# Which settings hold for one layer, as peft reads them:
#
# @source minipeft.reference.adapter_files.settings
#
# The matrices must have the rank that the settings say, the update is turned where the base stores its weight as (in, out), and the file's bias of $B$ is scaled like the update:
#
# @source minipeft.reference.adapter_files.scaling
#
# @source minipeft.reference.adapter_files.merge
#
# A GGUF has one alpha for all layers, and llama.cpp computes the scale from it. Where alpha is 0, it multiplies by the user's share alone, so $B$ can hold the scale:
#
# @source minipeft.reference.adapter_files.gguf_scaling
#
# A head that shares its weight with the embedding needs a weight of its own first. Merged into the weight that both share, the update would be in the embedding too:
#
# @source minipeft.reference.lora.merge_tied
#
# The merge, a block of rows at a time:
#
# @source minipeft.interop.update.merged
#
# The judgement of one tensor:
#
# @source minipeft.interop.audit.judge
#
# ## The proof: a right merge passes
#
# Our merge is exact by definition. The control adds in another order: it splits the rank in two halves and adds one after the other.


# %%
def save(name, change):
    """Write a model whose adapted weights went through `change`; open it."""
    changed = {
        n: change(base.read(n), adapter.updates[n])
        if n in adapter.updates
        else base.read(n)
        for n in base.about
    }
    path = folder / f"{name}.safetensors"
    safetensors.torch.save_file({n: t.contiguous() for n, t in changed.items()}, path)
    return open_tensors(path)


def in_halves(W, update):
    """The same merge, summed in another order."""
    half = update.r // 2
    total = W.float()
    for part in (slice(half, None), slice(half)):
        total = total + update.scaling * (update.B[:, part] @ update.A[part])
    return total.to(W.dtype)


def verdicts(found):
    """Count the verdicts over the adapted weights."""
    findings = [f for f in audit(base, adapter, found) if f.adapted]
    return {
        v: sum(f.verdict == v for f in findings) for v in {f.verdict for f in findings}
    }


ours, halves = (
    verdicts(save(name, change))
    for name, change in (("right", merged), ("halves", in_halves))
)
print("our merge:       ", ours)
print("another order:   ", halves)
assert ours == {EXACT: len(adapter.updates)}
assert WRONG not in halves

# %% [markdown]
# ## The experiment: five ways to break it
#
# Each is an easy mistake to make in a converter. The audit gets the file and is not told what was done to it. It applies each mistake of its list to the base and takes the one whose result is nearest to the file. It names this mistake only if the mistake explains more than it leaves: if the file is less than half as far from the mistake's result as from the right merge. Else the audit says "unexplained". The five are on its list. The *unexplained* part below is the distance from the mistake that is named to the file, relative to the size of the update.


# %%
def through_four_bits(W):
    """What NF4 leaves of a weight."""
    return blockwise.dequantize(blockwise.quantize(W.float()), W.dtype)


BROKEN = {
    "not applied": lambda W, u: W.clone(),
    "applied twice": lambda W, u: merged(merged(W, u), u),
    "1/r for 1/√r, or the reverse": lambda W, u: merged(
        W, replace(u, rank_stabilized=False)
    ),
    "merged into dequantized NF4": lambda W, u: merged(through_four_bits(W), u),
    "rounded to bfloat16": lambda W, u: merged(W, u).bfloat16().to(W.dtype),
}
named = {}
for number, (name, change) in enumerate(BROKEN.items()):
    findings = [
        f for f in audit(base, adapter, save(f"broken{number}", change)) if f.adapted
    ]
    named[name] = {f.mistake for f in findings}
    worst = max(f.residual for f in findings)
    print(f"{name}:")
    print(f"  named: {', '.join(sorted(named[name]))}; unexplained {worst:.1g}")
chapter.claim(
    "the audit names each of five mistakes, in every adapted weight",
    all(named[name] == {name} for name in BROKEN),
    control="the right merge and the same merge in another order: no mistake is found",
)

# %% [markdown]
# How far is each file from the right merge? The right merge is computed in float64 here, and distances are given in units of the bound: another order of the sums can move a weight by 1 at most. Each dot stands for one adapted matrix, at the distance of its farthest weight. The control is the right merge in another order.

# %%
MAKERS = {}  # two mistakes that differ in the base's scales have one name
for mistake in MISTAKES:
    MAKERS.setdefault(mistake.name, []).append(mistake.make)
MERGES = {"right, in another order": in_halves, **BROKEN}
off, unexplained = ({name: [] for name in MERGES} for _ in range(2))
for name, change in MERGES.items():
    for tensor, update in adapter.updates.items():
        W = base.read(tensor)
        wanted = exact(W, update, torch.float64)
        bound = allowed(W, update, wanted)
        made = [make(W, update).double() for make in MAKERS.get(name, [])]
        away = [
            float(((change(W, update).double() - target).abs() / bound).max())
            for target in (wanted, *made)
        ]
        off[name].append(away[0])
        unexplained[name] += [min(away[1:])] if made else []
print("farthest weight, in bounds      from the right merge   from the mistake named")
for name in MERGES:
    least, most = min(off[name]), max(off[name])
    named_off = f"{max(unexplained[name]):g} at most" if unexplained[name] else ""
    print(f"{name:30s}   {least:9.2g} to {most:7.2g}   {named_off}")
    assert most <= 1 if name not in BROKEN else least > 1
    assert max(unexplained[name], default=0) <= 1
least_off = min(min(off[name]) for name in BROKEN)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="farthest weight of a matrix, in units of the bound", size=(6.4, 3.3)
)
ZERO = 1e-3
for row, name in enumerate(MERGES):
    color = plots.PALETTE[0] if name in BROKEN else plots.PALETTE[2]
    ax.plot(off[name], [row] * len(off[name]), "o", color=color, alpha=0.5)
    at = [max(value, ZERO) for value in unexplained[name]]
    ax.plot(at, [row] * len(at), "o", color=plots.PALETTE[1], fillstyle="none")
for color, style, label in (
    (plots.PALETTE[0], "full", "from the right merge"),
    (plots.PALETTE[1], "none", "from the mistake that the audit names"),
):
    ax.plot([], [], "o", color=color, fillstyle=style, label=label)
ax.axvline(1, color=plots.INK, linewidth=1, linestyle="--")
ax.text(1.5, -0.75, "beyond any order of sums", color=plots.INK, va="center")
ax.set(xscale="log", xlim=(ZERO / 2, 10 * max(map(max, off.values()))))
ax.set_xticks([ZERO, 1e-2, 1, 1e2, 1e4, 1e6], ["0", "0.01", "1", "100", "10⁴", "10⁶"])
ax.minorticks_off()
ax.set_yticks(range(len(MERGES)), list(MERGES))
ax.set_ylim(len(MERGES) - 0.4, -1.2)
plots.legend_below(figure, columns=2)
chapter.show(
    figure,
    "mistakes",
    alt="Six rows of dots on a logarithmic axis, one dot for each adapted matrix: how far its farthest weight is from the right merge, in units of the bound. The dots of the right merge in another order lie left of a dashed line, which is the bound; those of five mistakes lie right of it. Open dots at zero say how far each file is from the mistake that the audit names.",
    caption=f"Another order of the sums moves no weight farther than {max(off['right, in another order']):.2f} of the bound; each of the five mistakes moves at least one weight of every matrix by {least_off:,.0f} times the bound or more. The distance from the mistake that the audit names is {max(max(unexplained[name]) for name in BROKEN):g} at most.",
)

# %% [markdown]
# ### What eight programs make of the file
#
# Now the adapter's own two files. Each program computes its scale from some of the numbers in the configuration. The rules were read in the programs' sources or in threads about them, and stand in one file, with the place where they were read. Where no source was read for a feature, the answer is "not known".

# %%
contents = parts.read(folder / "adapter")
for loader in loaders.LOADERS.values():
    said = f"{loader.name}: {loaders.judge(loader, contents).sentence}"
    print(fill(said, 88, subsequent_indent="  "))

# %% [markdown]
# A scale that is folded into $B$ cannot be lost. `minipeft inspect --fix` writes $B' = s B$ and $\alpha = r$, fills smaller ranks up with zeros, and needs no pattern:

# %%
fixing.fix(contents, folder / "fixed")
fixed = parts.read(folder / "fixed")
before, after = (
    [n for n, loader in loaders.LOADERS.items() if not loaders.judge(loader, one).lost]
    for one in (contents, fixed)
)
print("exact before:", ", ".join(before))
print("exact after: ", ", ".join(after))
rewritten = peft_format.read(folder / "fixed")
merge = {n: merged(base.read(n), rewritten.updates[n]) for n in rewritten.updates}
path = folder / "fixed.safetensors"
safetensors.torch.save_file({**{n: base.read(n) for n in base.about}, **merge}, path)
same = verdicts(open_tensors(path))
print("the rewritten adapter, audited against the first:", same)
assert WRONG not in same
assert set(before) < set(after)

# %% [markdown]
# ## What goes wrong in practice
#
# - **A server ignores `use_rslora`** ([vLLM 6909](https://github.com/vllm-project/vllm/pull/6909), mended there in 2024): every update is divided by $\sqrt r$ once too often.
# - **A converter writes `lora_alpha` alone.** llama.cpp's file format has no place for patterns, and its converter does not read them.
# - **Mixed ranks get the rank of the first layer as alpha** ([diffusers 14409](https://github.com/huggingface/diffusers/pull/14409), mended there in 2026), where a file has no alphas: most layers of a published adapter were loaded with a quarter of their scale.
# - **An adapter with magnitudes is refused**: vLLM, SGLang and llama.cpp say so. A refusal is the better outcome: merge first.
# - **Another base.** If more than half of the weights that the adapter leaves alone differ from the base's, or if some differ and every weight that the adapter changes is unexplained, `minipeft audit` reports one mistake, "wrong base", and no other.
# - **A damaged number is still a number.** The format safetensors has no checksum, so a flipped bit in the data loads as another weight. minipeft writes the SHA-256 of tensors, names and its own metadata into the metadata, as `minipeft.sha256`, and refuses a file that differs from it (a note under a key of yours changes nothing); safetensors and peft read the file as any other. A file that peft wrote has none, and `minipeft inspect` says which is the case. `adapter_config.json` is not covered, because people edit it.
#
# ## Exercises
#
# 1. Merge with the alpha of another layer. Does the audit name it, and what does it say about the layers whose alpha is right?

# %% tags=["solution"]
found = save("alpha", lambda W, u: merged(W, replace(u, alpha=12.0)))
findings = [f for f in audit(base, adapter, found) if f.adapted]
wrong = [f for f in findings if f.verdict == WRONG]
print(len(wrong), "wrong:", {f.mistake for f in wrong})
assert {f.mistake for f in wrong} == {"another layer's alpha"}
assert all("q_proj" in f.tensor for f in wrong)

# %% [markdown]
# 2. Compute the norm of one update with the product $BA$ and without it. How many multiplications do the products of matrices need each time?

# %% tags=["solution"]
update = adapter.updates["model.layers.0.mlp.up_proj.weight"]
formed = float((update.scaling * update.B.double() @ update.A.double()).norm())
traced = inspecting.delta_norm(update.A, update.B, update.scaling)
rows, columns, r = len(update.B), update.A.shape[1], update.r
print(f"{formed:.6f} with {rows * columns * r:,} multiplications")
print(f"{traced:.6f} with {(rows + columns + 1) * r * r:,}")
assert abs(formed - traced) < 2.0**-40 * formed

# %% [markdown]
# ## References
#
# The update is LoRA's [@hu2021], its rank-stabilized scale is from [@kalajdzievski2023], and the bounds are Higham's [@higham2002].
