"""The contents of an adapter: method, scales, sizes, layers without effect, misfits.

The norm of s B A needs no matrix of the size of a weight: |BA|² is the trace of
(BᵀB)(AAᵀ), a product of two r × r matrices.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import hypot, nan, sqrt

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import fingerprint, peft_stacks
from minipeft.interop.apart import Stacked, named_as, stacked
from minipeft.interop.fingerprint import BASE, Fingerprint
from minipeft.interop.loaders import LOADERS, Judgement, judge
from minipeft.interop.parts import MAGNITUDE, A, B, Parts
from minipeft.interop.peft_experts import turned_from_file
from minipeft.interop.peft_folder import SUM
from minipeft.interop.peft_format import plain
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import Tensors

WIDE = torch.float64


@dataclass(frozen=True)
class Layer:
    """One update.

    Args:
        module: its path in the model.
        r: its rank.
        scaling: the factor of B A.
        norm: Frobenius norm of the change of the weight; NaN if it needs the base.
        share: norm / norm of the base's weight; NaN without the base.
        dead: whether B = 0, so that the layer changes nothing.
    """

    module: str
    r: int
    scaling: float
    norm: float
    share: float
    dead: bool


@dataclass(frozen=True)
class Inspection:
    """The contents of a folder, and the judgements of the loaders.

    Args:
        method: LoRA, rsLoRA, DoRA, or peft's name of another.
        layers: one for each pair A, B.
        not_finite: tensors that hold NaN or infinity.
        incomplete: modules without their A or their B.
        matched: modules that the base has, in the right shape; None without a base.
        unmatched: modules that the base does not have, or has in another shape.
        missing: names in the configuration that the file does not hold.
        others: tensors that belong to no pair.
        base: a line about the base.
        other_base: whether the file names another base than the one given.
        checksum: whether the file has one, which was compared.
        loaders: a judgement for each.
    """

    method: str
    layers: tuple[Layer, ...]
    not_finite: tuple[str, ...]
    incomplete: tuple[str, ...]
    matched: int | None
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    others: tuple[str, ...]
    base: str
    loaders: tuple[Judgement, ...] = field(default=())
    other_base: bool = False
    checksum: bool = False

    @property
    def unfit(self) -> str:
        """The reason why the adapter does not belong to the base, or ""."""
        if self.unmatched:
            count = len(self.unmatched) + (self.matched or 0)
            return f"{len(self.unmatched)} of {count} modules do not fit this base"
        return "the file was made for another base" if self.other_base else ""


def inspect(
    contents: Parts,
    base: Tensors | None = None,
    step: Callable[[str], None] = lambda name: None,
    architecture: str = "",
) -> Inspection:
    """Read every tensor of an adapter once, and the weights that it changes.

    Args:
        contents: of the adapter's folder.
        base: the model of the adapter, if given.
        step: is called with each module, for progress.
        architecture: transformers' class of the base; "" where it is not known.
    """
    if base is not None and contents.config.get("target_parameters"):
        base = stacked(base)
    whole = contents.modules.keys() - contents.incomplete
    fits = _fits(contents, base) if base else {}
    layers = []
    for module in contents.modules:
        if module in whole:
            layers.append(_layer(contents, module, base, fits.get(module)))
            step(module)
    line, other = about_base(contents, base)
    return Inspection(
        method(contents),
        tuple(layers),
        tuple(contents.not_finite()),
        contents.incomplete,
        None if base is None else sum(name is not None for name in fits.values()),
        tuple(m for m, name in fits.items() if name is None),
        tuple(missing(contents, base)),
        contents.others,
        line,
        tuple(judge(x, contents, architecture) for x in LOADERS.values()),
        other,
        SUM in contents.file.metadata,
    )


def method(contents: Parts) -> str:
    """Return the usual name of the method."""
    c = contents.config
    if c.get("peft_type") != "LORA":
        return str(c.get("peft_type"))
    parts = {part for module in contents.modules.values() for part in module}
    name = "DoRA" if MAGNITUDE in parts else "LoRA"
    return f"{name} with rsLoRA's scale" if c.get("use_rslora") else name


def _layer(
    contents: Parts, module: str, base: Tensors | None, weight: str | None
) -> Layer:
    down, up = contents.tensor(module, A), contents.tensor(module, B)
    assert down is not None
    assert up is not None
    W, called = None, ""
    if base is not None and weight is not None:
        W = base.read(weight)
        called = weight if W.ndim == 3 else ""
        W = W if called else _rows(W, contents, module)
    unclear = contents.is_unclear(module) and not called
    s = nan if unclear else contents.scaling(module, called)
    r = contents.rank(module, called)
    magnitude = contents.tensor(module, MAGNITUDE)
    if r != len(down):
        experts = len(down) // r
        pairs = zip(*turned_from_file(down, up, experts), strict=True)
        norm = hypot(*(delta_norm(one, other, s) for one, other in pairs))
    elif magnitude is None:
        norm = delta_norm(down, up, s)
    else:
        norm = nan if W is None else dora_norm(W, down, up, s, magnitude)
    share = nan if W is None else norm / float(W.norm(dtype=WIDE))
    dead = not bool(up.count_nonzero())
    return Layer(module, r, s, norm, share, dead)


def delta_norm(down: Tensor, up: Tensor, scaling: float) -> float:
    r"""Return $|s BA| = |s| \sqrt{\operatorname{tr}((B^T B)(A A^T))}$, in float64.

    Args:
        down: A, (r, in_features).
        up: B, (out_features, r).
        scaling: s.
    """
    left, right = up.to(WIDE).flatten(1), down.to(WIDE).flatten(1)
    square = ((left.T @ left) * (right @ right.T)).sum()
    return abs(scaling) * sqrt(max(float(square), 0.0)) if square == square else nan


def dora_norm(
    W: Tensor, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor
) -> float:
    r"""Return $|m V / |V| - W|$ with $V = W + s BA$, without forming $BA$.

    Row by row: $|V|^2 = |w|^2 + 2 s\,(WA^T)\cdot B + s^2\, B (AA^T) B^T$.

    Args:
        W: (out_features, in_features), of the base.
        down: A, (r, in_features).
        up: B, (out_features, r).
        scaling: s.
        magnitude: m, (out_features,).
    """
    left, right, wide = scaling * up.to(WIDE), down.to(WIDE), W.to(WIDE)
    own = (wide * wide).sum(dim=1)
    cross = ((wide @ right.T) * left).sum(dim=1)
    square = own + 2 * cross + ((left @ (right @ right.T)) * left).sum(dim=1)
    length = square.clamp(min=0).sqrt()
    m = torch.where(length == 0, 0, magnitude.reshape(-1).to(WIDE))
    along = (own + cross) / torch.where(length == 0, 1, length)
    return float((m * m - 2 * m * along + own).sum().clamp(min=0).sqrt())


def _rows(W: Tensor, contents: Parts, module: str) -> Tensor:
    flipped = contents.embedding(module) or contents.config.get("fan_in_fan_out")
    return W.T if flipped else W


def _fits(contents: Parts, base: Tensors) -> dict[str, str | None]:
    """Return {whole module: the base's name of its weight, or None}."""
    found: dict[str, str | None] = _stacks_of(contents, base)
    for module, parts in contents.modules.items():
        if A not in parts or B not in parts or module in found:
            continue
        name = counterpart(f"{module}.weight", base.about)
        if name is not None:
            up, down = (contents.file.about[parts[part]].shape for part in (B, A))
            shape = (up[0], *down[1:])
            flipped = contents.embedding(module) or contents.config.get(
                "fan_in_fan_out"
            )
            wanted = shape[::-1] if flipped else shape
            name = name if base.about[name].shape == wanted else None
        found[module] = name
    return found


def _stacks_of(contents: Parts, base: Tensors) -> dict[str, str | None]:
    """Return {pair of a stack of experts: the base's name of the stack, or None}."""
    levels: dict[str, dict[str, str]] = {}
    for module, parts in contents.modules.items():
        owner, level = peft_stacks.owner(module)
        if {A, B} <= parts.keys() and peft_stacks.parameters(owner, contents.config):
            levels.setdefault(owner, {})[level] = module
    found: dict[str, str | None] = {}
    for owner, modules in levels.items():
        about = contents.file.about
        shapes = {
            level: (about[parts[A]].shape, about[parts[B]].shape)
            for level, parts in (
                (level, contents.modules[module]) for level, module in modules.items()
            )
        }
        try:
            lone = base.stacks if isinstance(base, Stacked) else ()
            places = peft_stacks.places(
                owner, shapes, contents.config, base.about, lone
            )
        except InputError:
            found |= dict.fromkeys(modules.values())
        else:
            found |= {modules[level]: place.name for level, place in places.items()}
    return found


def missing(contents: Parts, base: Tensors | None) -> Iterator[str]:
    """Yield the names in `target_modules` that the file does not hold.

    With a base: each of its modules that is a target. Without: each target that no
    module of the file ends with.
    """
    targets = contents.config.get("target_modules") or []
    held = [*contents.modules]
    if base is None:
        for target in targets if isinstance(targets, list) else []:
            if not any(_ends(module, target) for module in held):
                yield target
        return
    known = {counterpart(f"{module}.weight", base.about) for module in held}
    for name in base.about:
        module = name.removesuffix(".weight")
        if module != name and name not in known and targeted(module, contents.config):
            yield module


def targeted(module: str, config: Mapping[str, object]) -> bool:
    """Return whether peft would adapt a module of this name."""
    targets, spared = config.get("target_modules"), config.get("exclude_modules")
    if targets == "all-linear" or not _named(module, targets):
        return False  # no file says which modules are linear
    layers = config.get("layers_to_transform")
    number = re.search(r"\.(\d+)\.", f".{module}")
    chosen = [layers] if isinstance(layers, int) else layers
    if isinstance(chosen, list) and (not number or int(number[1]) not in chosen):
        return False
    return not _named(module, spared)


def _named(module: str, names: object) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return isinstance(names, list) and any(_ends(module, name) for name in names)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def about_base(contents: Parts, base: Tensors | None) -> tuple[str, bool]:
    """Return a line about the base, and whether the one given is another.

    A file without a fingerprint cannot tell.
    """
    text = contents.file.metadata.get(BASE)
    if text is None:
        named = contents.config.get("base_model_name_or_path")
        line = "no fingerprint in the file, so another base of the same shapes is not "
        said = f"names {named!r}" if named else "names no base"
        return f"{line}noticed; the configuration {said}", False
    saved = Fingerprint.from_json(text)
    if base is None:
        return f"made for the base {saved.whole[:12]}", False
    own = fingerprint.of_files(named_as(saved.tensors, base))
    brought = [plain(name) for name in contents.others]
    first = fingerprint.difference(saved, own, brought)
    if first is None:
        return f"made for this base, {saved.whole[:12]}", False
    made = f"made for the base {saved.whole[:12]}"
    return f"{made}, and this is another: {first} here", True
