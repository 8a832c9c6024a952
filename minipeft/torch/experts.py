"""LoRA on the experts of a model: stacks of weights, as in transformers 5."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from minipeft.errors import InputError
from minipeft.shapes import Shaped
from minipeft.torch.adapted import (
    Adapted,
    check_finite,
    check_here,
    check_no_hooks,
    check_no_proxy,
    check_plain,
)
from minipeft.torch.deferred import METADATA
from minipeft.torch.linear import (
    Form,
    Input,
    Output,
    Stacked,
    check_shape,
    full_precision,
    weight_view,
)
from minipeft.torch.operands import check_tensors
from minipeft.torch.stack import Stack
from minipeft.values import check_kind, check_number

Weights = Shaped[Tensor, "experts _ _"]  # stored as W, or as the transpose of W
MatricesA = Shaped[Tensor, "experts r in_features"]
MatricesB = Shaped[Tensor, "experts out_features r"]


class Experts(nn.Module):
    """A plain module of experts: $y = W_e x + b_e$ for a token with expert e.

    Args:
        W: the weights.
        bias: one for each expert, or None.

    Raises:
        InputError: if the shapes of W and bias contradict each other.
    """

    is_transposed = False

    def __init__(self, W: Weights, bias: Shaped[Tensor, "..."] | None = None):
        super().__init__()
        shapes = {"W": (W, "experts out_features in_features")}
        check_tensors({**shapes, "bias": (bias, "? experts out_features")})
        self.W = nn.Parameter(W)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Input, chosen: Shaped[Tensor, "..."]) -> Output:
        """Apply the experts one after another.

        Raises:
            InputError: unless `chosen` holds one existing expert for each token.
        """
        W = (self.W, "experts out_features in_features")
        check_tensors({"W": W, "bias": (self.bias, "? experts out_features")})
        experts, rows = len(self.W), self.W.shape[1]
        check_shape("chosen", chosen, *x.shape[:-1])
        wrong = chosen[(chosen < 0) | (chosen >= experts)]
        if len(wrong):
            raise InputError(
                f"expert {int(wrong[0])} is chosen; choose 0 to {experts - 1}, for the "
                f"stack holds {experts}."
            )
        y = None
        for e in range(experts):
            bias = None if self.bias is None else self.bias[e]
            found = torch.where(chosen == e)
            part = linear(x[found], self.W[e], bias)
            if y is None:  # in the dtype of the products, also under autocast
                y = part.new_zeros(*x.shape[:-1], rows)
            y[found] = part
        return cast(Tensor, y)


class StackLoRA(nn.Module):
    """The updates of one stack: scaling * B A, with one A and one B per expert."""

    def __init__(self, A: MatricesA, B: MatricesB, scaling: float):
        super().__init__()
        shapes = {"A": (A, "experts r in_features")}
        check_tensors({**shapes, "B": (B, "experts out_features r")})
        check_number("scaling", scaling)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling = scaling

    def forward(self, stack: Stack, share: float, turned: bool) -> Stack:
        """Return the stack and its factors, laid out as the stack is stored."""
        s = share * self.scaling
        if turned:
            return stack.added(self.A.mT, s * self.B.mT)
        return stack.added(s * self.B, self.A)

    def delta(self) -> Shaped[Tensor, "experts out_features in_features"]:
        r"""Return the updates, $s B_e A_e$, in float32 or wider."""
        shapes = {"A": (self.A, "experts r in_features")}
        check_tensors({**shapes, "B": (self.B, "experts out_features r")})
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(wide) @ self.A.to(wide))


class ExpertsLoRA(nn.ModuleDict):
    """The updates of the stacks of a module, or of some, by the names of the stacks."""

    def forward(self, name: str, stack: Stack, share: float, turned: bool) -> Stack:
        """Return one stack together with its factors, if it has some."""
        changed: Stack = self[name](stack, share, turned) if name in self else stack
        return changed


class LoRAExperts(Adapted[ExpertsLoRA]):
    """Frozen experts and their updates: each computes $W_e x + b_e + s B_e (A_e x)$.

    The module's own forward runs. When it reads a stack, it gets a `Stack`: the weights
    together with the thin factors, up to the product (`stack.py`).

    Source: LoRA (arXiv:2106.09685), equation 3, for each expert.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """Call the module, with the active adapters or with the merged stacks.

        Raises:
            InputError: if `torch.fx` traces the module, something now computes a stack,
                or the module does not use a stack by torch's functions.
        """
        # Within a compiled graph torch loses its function modes where a graph breaks,
        # as it does at a `Stack`; so a compiler calls the experts as they are.
        call = _uncompiled if torch.compiler.is_compiling() else LoRAExperts._call
        y: Output = call(self, args, kwargs)
        return y

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Output:
        given = [*args, *kwargs.values()]
        for operand in given:
            check_no_proxy(operand)
        mode = _WithStacks(self)
        with mode:
            y = self.base(*args, **kwargs)
        missed = sorted(set(self.names) - mode.met)
        empty = any(isinstance(g, Tensor) and not g.numel() for g in given)
        if missed and not empty:
            self._check_stored(missed)
            raise InputError(
                f"this {type(self.base).__name__} did not use {', '.join(missed)} by "
                "torch's functions, so no adapter could act; set its "
                "experts_implementation to 'eager'."
            )
        return cast(Tensor, y)

    @property
    def W(self) -> Any:
        """The adapted stack of this name, if the module has one: no one weight."""
        return self.stack("W") if "W" in self.names else self._view.form(self.base)

    @property
    def names(self) -> list[str]:
        """The names of the stacks, those too that something has replaced."""
        held = cast(Iterable[ExpertsLoRA], self.adapters.values())
        adapted = [name for adapter in held for name in adapter]
        return list(dict.fromkeys([*self._view.names(self.base), *adapted]))

    def stack(self, name: str) -> Any:
        """Return a stack as the module reads it: adapted or merged."""
        held = getattr(self.base, name)
        if self.merged_weight is not None:
            return self._buffers[f"merged_{name}"]
        stack = held if isinstance(held, Stack) else Stack(held)
        for share, adapter in self._shares_of(name):
            stack = adapter(name, stack, share, self._view.turned)
        return stack

    def merged_stacks(self) -> dict[str, Weights]:
        """Return the stacks of a plain module with the same output, as it stores them.

        Each is rounded once, to the dtype of the stack that it replaces.
        """
        return {name: self._merged_stack(name) for name in self.names}

    def merge(self) -> "LoRAExperts":
        """Compute with the merged stacks from now on.

        Raises:
            InputError: as `Adapted.merge` does.
        """
        check_here(self.base)
        self._check_stored(self.names)
        with torch.inference_mode(False), torch.no_grad():
            merged = self.merged_stacks()
        self.unmerge()
        for name, stack in merged.items():
            self.register_buffer(f"merged_{name}", stack, persistent=False)
            self.hold(stack, None)
        return self

    def unmerge(self) -> "LoRAExperts":
        """Compute with the base and the adapters again; the base has not changed."""
        super().unmerge()
        for name in self.names:
            if f"merged_{name}" in self._buffers:
                delattr(self, f"merged_{name}")
        return self

    def unload(self) -> nn.Module:
        """Return plain experts: with the merged stacks if merged, else the base.

        Raises:
            InputError: as `Adapted.unload` does.
        """
        check_no_hooks(self)
        check_plain(self)
        if self.merged_weight is None:
            return self.base
        merged = {name: self._buffers[f"merged_{name}"] for name in self.names}
        return self._view.plain(self.base, merged)

    def add(self, name: str, adapter: ExpertsLoRA) -> None:
        """Hold another adapter; the new adapter is inactive until `activate`.

        Raises:
            InputError: if the name cannot be used, or the adapter does not fit.
        """
        self.check_new(name)
        check_kind("adapter", adapter, ExpertsLoRA)
        if not adapter or not set(adapter) <= set(self.names):
            raise InputError(
                f"the adapter is of {', '.join(adapter)}; these experts hold "
                f"{', '.join(self.names)}."
            )
        for key, part in adapter.items():
            check_fits(*self._view.one(self.base, key), cast(StackLoRA, part))
        self.adapters[name] = adapter.train(self.training)

    @staticmethod
    def check_fits(form: Form, adapter: Any) -> None:
        """Refuse: an adapter of experts changes stacks and not a single weight."""
        raise InputError("an adapter of experts fits no single weight.")

    def change(self, adapter: Any, W: Input) -> Any:
        """Refuse: the module has several stacks; see `merged_stacks`."""
        raise InputError("experts hold several weights; call merged_stacks().")

    @property
    def _view(self) -> Stacked:
        return cast(Stacked, self.view)

    def _check_stored(self, names: Iterable[str]) -> None:
        stored = self._view.names(self.base)
        for name in names:
            if name not in stored:
                raise InputError(
                    f"{name} of this {type(self.base).__name__} was a parameter when "
                    "it was adapted, and now something computes it (a "
                    "parametrization, pruning); make it permanent first."
                )

    def _shares_of(self, name: str) -> list[tuple[float, ExpertsLoRA]]:
        found = [(share, a) for share, a in self.shares() if name in a]
        for _, adapter in found:
            check_fits(*self._view.one(self.base, name), cast(StackLoRA, adapter[name]))
        return found

    def _merged_stack(self, name: str) -> Weights:
        held = getattr(self.base, name)
        W = held.whole() if isinstance(held, Stack) else held
        with full_precision(W.device):
            total = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
            for share, adapter in self._shares_of(name):
                delta = cast(StackLoRA, adapter[name]).delta()
                total = total + share * (delta.mT if self._view.turned else delta)
            merged = (W + total).to(W.dtype).detach()
        check_finite(name, W, merged)
        return merged

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base; a stack comes with its update."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name in self.__dict__["view"].names(base):
            return self.stack(name)
        return super().__getattr__(name)


class _WithStacks(TorchFunctionMode):
    """A call of the experts; every stack that the call reads includes its update."""

    def __init__(self, layer: LoRAExperts):
        super().__init__()
        self.layer, self.names = layer, layer.names
        self.met: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in METADATA:
            base = self.layer.base
            held = {id(getattr(base, name)): name for name in self.names}
            args = [self._changed(held, a) for a in args]
            kwargs = {k: self._changed(held, a) for k, a in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))

    def _changed(self, held: Mapping[int, str], operand: Any) -> Any:
        if type(operand) in (list, tuple):  # such as the operands of `torch.cat`
            return type(operand)(self._changed(held, one) for one in operand)
        name = held.get(id(operand))
        if name is None:
            return operand
        self.met.add(name)
        return self.layer.stack(name)


@_disable_dynamo
def _uncompiled(
    layer: LoRAExperts, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Output:
    return layer._call(args, kwargs)


def init(
    generator: torch.Generator | None,
    layer: nn.Module,
    start: Callable[[torch.Generator | None, Form], tuple[Tensor, Tensor, float]],
) -> ExpertsLoRA:
    """Start every expert as LoRA starts: A random, B zero.

    Args:
        generator: the source of A, on the CPU; the experts draw one after another.
        layer: the module of experts.
        start: the function that returns A, B and the scaling for one weight; its
            arguments are the generator and the form of the weight.
    """
    view = cast(Stacked, weight_view(layer))
    parts = {}
    for name in view.names(layer):
        experts, form = view.one(layer, name)
        ones = [start(generator, form) for _ in range(experts)]
        A = torch.stack([one[0] for one in ones]).detach()
        B = torch.stack([one[1] for one in ones]).detach()
        parts[name] = StackLoRA(A, B, ones[0][2]).to(form.device, form.wide)
    return ExpertsLoRA(parts)


def check_fits(experts: int, form: Form, part: StackLoRA) -> None:
    """Refuse matrices of another stack; torch would broadcast a single expert."""
    r = part.A.shape[1] if part.A.ndim == 3 else 0
    if r < 1:
        raise InputError("r is 0; give A at least one row and B at least one column.")
    check_shape("A", part.A, experts, r, form.in_features)
    check_shape("B", part.B, experts, form.out_features, r)


def experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that hold stacks of weights, each once."""
    check_kind("model", model, nn.Module)
    return {n: m for n, m in model.named_modules() if _is_stacked(m)}


def _is_stacked(module: nn.Module) -> bool:
    try:
        return isinstance(weight_view(module), Stacked)
    except InputError:
        return False
