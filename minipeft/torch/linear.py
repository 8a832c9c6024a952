"""The frozen layers that adapters wrap: how a layer stores W, and its one product.

The reference writes W `(out_features, in_features)` and x `(..., in_features)`. Torch's
layers store W in several ways. A `WeightView` translates one of them into the
reference's terms, so each method is written once for all kinds of layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial, singledispatch
from itertools import product
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear
from torch.nn.utils import parametrize

from minipeft.errors import InputError
from minipeft.shapes import Shaped
from minipeft.torch.operands import has_values

Weight = Shaped[Tensor, "out_features in_features"]
Stored = Shaped[Tensor, "_ _"]  # W, or its transpose
Bias = Shaped[Tensor, " out_features"]
Input = Shaped[Tensor, "..."]  # indices where the layer is an embedding
Output = Shaped[Tensor, "... out_features"]

HOOKED = ("_forward", "_backward", "_is_full_backward")  # where torch keeps hooks
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """The shape, dtype and device of W; a 4-bit weight need not be decoded for them."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, W: Weight) -> "Form":
        """Return the form of a weight."""
        out_features, in_features = W.shape
        return cls(out_features, in_features, W.dtype, W.device)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of W."""
        return self.out_features, self.in_features

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the trained tensors, wide enough for small steps."""
        return torch.promote_types(self.dtype, torch.float32)


class WeightView:
    """How a layer stores W and multiplies by W; this class describes `nn.Linear`.

    The layer calls `function` to multiply. `places` are the positions of x, W and the
    bias among the arguments of `function`.
    """

    function: Callable[..., Any] = staticmethod(linear)
    places = (0, 1, 2)
    linear = True  # whether the layer multiplies x by one matrix

    def call(self, layer: nn.Module, x: Input) -> Output:
        """Call the layer, with its hooks."""
        return cast(Tensor, layer(x))

    def form(self, layer: Any) -> Form:
        """Return the shape, dtype and device of W."""
        return Form.of(self.turn(layer.weight))

    def held(self, layer: Any) -> Any:
        """Return the tensor that the layer passes to `function` as its weight."""
        return layer.weight

    def is_product(self, layer: Any, function: Any, args: Sequence[Any]) -> bool:
        """Tell whether this call, made by the layer, multiplies by W."""
        at = self.places[1]
        called = function is self.function and len(args) > at
        return called and args[at] is self.held(layer)

    def read(self, held: Any) -> Weight:
        """Return W, from the tensor that `function` received as the weight."""
        return self.turn(held)

    def turn(self, weight: Stored) -> Stored:
        """Turn the stored weight into W, or W into the stored weight."""
        return weight

    def project(self, layer: Any, x: Input, A: Weight, p: float) -> Output:
        """Return $x A^T$ in the dtype of A; drop each entry of x with chance p."""
        # A frozen A has no use for x, so that torch's own product keeps nothing of it.
        wider = A.requires_grad and x.dtype.itemsize < A.dtype.itemsize
        if wider and not p and _eager(x):
            return cast(Tensor, _Widened.apply(x, A))  # type: ignore[no-untyped-call]
        x = x.to(A.dtype)
        return linear(dropout(x, p) if p else x, A)

    def check_plain(self, layer: Any) -> None:
        """Refuse if `plain` would lose a part of the layer."""

    def plain(self, layer: Any, W: Weight) -> nn.Module:
        """Return the plain layer whose weight is W."""
        weight = self.turn(W).contiguous()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return cast(nn.Module, layer)


class Respelled(WeightView):
    """A subclass of `nn.Linear` with a forward of its own that computes the same.

    `computes_as_linear` has tested that. When called, the layer runs the forward of
    `nn.Linear`, in which the adapters find the product. Not offered: a forward set on
    the instance.
    """

    def call(self, layer: nn.Module, x: Input) -> Output:
        """Call the layer with the forward of its parent class."""
        if has_forward(layer):
            return cast(Tensor, layer(x))
        before = {n: f for n, f in vars(layer).items() if n == "forward"}
        vars(layer)["forward"] = partial(nn.Linear.forward, cast(nn.Linear, layer))
        try:
            return cast(Tensor, layer(x))
        finally:
            del vars(layer)["forward"]
            vars(layer).update(before)


class Transposed(WeightView):
    """GPT-2's `Conv1D`: a linear layer that stores the transpose of W."""

    function: Callable[..., Any] = staticmethod(torch.addmm)
    places = (1, 2, 0)

    def turn(self, weight: Stored) -> Stored:
        """Transpose."""
        return weight.T


class Lookup(Transposed):
    """`nn.Embedding`: x is an index for a one-hot vector; row i is column i of W."""

    function = staticmethod(embedding)
    linear = False
    places = (0, 1, -1)

    def project(self, layer: Any, x: Input, A: Weight, p: float) -> Output:
        """Look up the columns of A; dropout drops whole tokens, as x has one entry."""
        h = embedding(x, A.T, layer.padding_idx)
        return h * dropout(torch.ones_like(h[..., :1]), p) if p else h


class Stacked(WeightView):
    """A module that holds stacks of weights and multiplies by them in its own way.

    Args:
        turned: whether a stack is `(experts, in_features, out_features)`.
    """

    linear = False

    def __init__(self, turned: bool):
        self.turned = turned

    def names(self, layer: Any) -> list[str]:
        """Return the names of the stacks."""
        return [n for n, p in layer._parameters.items() if p is not None and p.ndim > 2]

    def form(self, layer: Any) -> Form:
        """Refuse: the module has several matrices."""
        raise InputError(
            f"{type(layer).__name__} holds stacks of weights, one an expert, which "
            "LoRA alone adapts; choose LoRAConfig, or leave it out of the targets."
        )

    def held(self, layer: Any) -> Any:
        """Refuse, as `form` does."""
        return self.form(layer)

    def one(self, layer: Any, name: str) -> tuple[int, Form]:
        """Return the number of experts in a stack and the form of one weight."""
        stack = getattr(layer, name)
        with torch._C.DisableTorchFunctionSubclass():
            experts, rows, columns = stack.shape
            if self.turned:
                rows, columns = columns, rows
            return experts, Form(rows, columns, stack.dtype, stack.device)

    def plain(self, layer: Any, W: Any) -> nn.Module:
        """Return a module with the stacks of the mapping W in place of its own."""
        for name, stack in W.items():
            layer._parameters[name] = nn.Parameter(stack, requires_grad=False)
        return cast(nn.Module, layer)


class Product:
    """The product $y = x W^T + b$ of a layer, at the moment when the layer computes it.

    The operands are those that the layer multiplies: after its hooks and casts, and
    after a program has brought an offloaded weight in. Adapters are called with a
    Product.

    Args:
        view: of the layer.
        layer: the frozen one.
        args: the positional arguments of the function that the layer called.
        kwargs: the keyword arguments of that function.
        training: whether `project` drops entries.
    """

    def __init__(
        self,
        view: WeightView,
        layer: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        training: bool = False,
    ):
        self.view, self.layer, self.training = view, layer, training
        self.args, self.kwargs = list(args), dict(kwargs)
        at, _, at_bias = view.places
        self.x: Input = args[at]
        given = len(args) > at_bias >= 0
        self.bias: Bias | None = args[at_bias] if given else kwargs.get("bias")
        self.form = view.form(layer)
        if self.bias is not None:
            check_shape("bias", self.bias, self.form.out_features)
        self._y: Output | None = None

    @property
    def y(self) -> Output:
        """The output of the frozen layer."""
        if self._y is None:
            self._y = self.compute()
        return self._y

    @property
    def W(self) -> Weight:
        """The frozen weight."""
        return self.view.read(self.args[self.view.places[1]])

    def project(self, A: Weight, p: float = 0.0) -> Output:
        """Return $x A^T$ in the dtype of A; in training, first drop entries of x."""
        return self.view.project(self.layer, self.x, A, p if self.training else 0.0)

    def adds(self, A: Shaped[Tensor, "r in_features"], p: float = 0.0) -> bool:
        """Tell whether `added` can compute here what `project` and a sum would."""
        plain = type(self.view).project is WeightView.project
        dropped = p and self.training
        sharded = hasattr(self.x, "placements")
        trained = A.requires_grad and not sharded
        return plain and not dropped and trained and _eager(self.x)

    def added(
        self,
        A: Shaped[Tensor, "r in_features"],
        B: Shaped[Tensor, "out_features r"],
        scaling: float,
        dtype: torch.dtype,
    ) -> Output:
        """Return $y + s (x A^T) B^T$, computed in the dtype of A and rounded once."""
        added = _Added.apply(self.y, self.x, A, B, scaling, dtype)  # type: ignore[no-untyped-call]
        return cast(Tensor, added)

    def rows(self, index: Tensor, of: int) -> "Product":
        """Return the product of some rows of a batch; its y is not computed again.

        Args:
            index: of the rows.
            of: how many rows the batch has; each may be several rows of x.
        """
        args = list(self.args)
        args[self.view.places[0]] = taken(self.x, index, of)
        part = Product(self.view, self.layer, args, self.kwargs, self.training)
        part._y = taken(self.y, index, of)
        return part

    def compute(
        self, x: Input | None = None, W: Weight | None = None, bias: Bias | None = None
    ) -> Output:
        """Compute the frozen product; given operands replace those of the layer."""
        args, (at, at_weight, at_bias) = list(self.args), self.view.places
        if x is not None:
            args[at] = x
        if W is not None:
            held = args[at_weight]
            W = W.to(held.dtype) if isinstance(held, Tensor) else W
            args[at_weight] = self.view.turn(W)
        if bias is not None:
            args[at_bias] = bias
        return cast(Tensor, self.view.function(*args, **self.kwargs))


def taken(rows: Shaped[Tensor, "..."], index: Tensor, of: int) -> Output:
    """Return some rows of a batch of `of`, whose positions may be rows themselves."""
    return rows.reshape(of, len(rows) // of, *rows.shape[1:])[index].flatten(0, 1)


class _Widened(torch.autograd.Function):
    """$x A^T$ in the dtype of A; backward keeps x in the dtype in which x came.

    Without this function autograd would keep x in the wider dtype of A: over a base of
    16 bits a copy of twice the size, once for each layer that reads the same x. In
    forward mode `transformed` leads around this function.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, A: Tensor) -> Tensor:
        return linear(x.to(A.dtype), A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        grad_x = (grad_h @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, _rows(grad_h).T @ _rows(x).to(A.dtype)


class _Added(torch.autograd.Function):
    r"""$y + s (x A^T) B^T$ in one node of the graph, rounded once.

    The same bits as autograd's. Its backward passes the gradient of y on as it is;
    autograd would widen it to the dtype of the sum and narrow it again. As `_Widened`
    does, it keeps x in its own dtype, and is left out in forward mode.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, A, B, s, to = operands
        h = s * linear(_in(x, A.dtype), A)
        change = linear(h, B)
        ctx.save_for_backward(x, A, B, h)
        ctx.s, ctx.dtype = s, y.dtype
        wide = torch.promote_types(y.dtype, change.dtype) == change.dtype
        return _in(change.add_(y) if wide else y + change, to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        of_y, of_x, of_A, of_B, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a derivative of this derivative goes through h
            h = ctx.s * linear(_in(x, A.dtype), A)
        G = _in(grad, A.dtype)
        grad_h = ctx.s * (G @ B)
        return (
            _in(grad, ctx.dtype) if of_y else None,
            _in(grad_h @ A, x.dtype) if of_x else None,
            _rows(grad_h).T @ _in(_rows(x), A.dtype) if of_A else None,
            _rows(G).T @ _rows(h) if of_B else None,
            None,
            None,
        )


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` of the same dtype is a call of the dispatcher, as dear as a small product.
    return x if x.dtype == dtype else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return (x if x.dim() > 1 else x[None]).flatten(0, -2)


def transformed() -> bool:
    """Tell whether a compiler, a tracer, `vmap` or forward mode runs the code.

    These know only torch's own operations, and decide themselves what to keep.
    """
    tracing = torch._C._get_tracing_state() is not None
    return (
        torch.compiler.is_compiling()
        or tracing
        or under_torch_func()
        or in_forward_mode()
    )


def in_forward_mode() -> bool:
    """Tell whether the code runs in a `dual_level` of forward-mode differentiation.

    Torch has no public name for this. Where it lacks the private one, torch itself
    refuses forward mode through the functions that are written for backward mode.
    """
    return bool(getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0)


def under_torch_func() -> bool:
    """Tell whether `torch.func` transforms the code; true if torch cannot say.

    Torch has no public name for this. Where it lacks the private one, all code is taken
    for transformed: the results are the same, and more memory is used.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or bool(active())


def _eager(x: Tensor) -> bool:
    # Under autocast, autocast chooses the dtype of the product.
    return not transformed() and not autocast(x.device)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Run the code without autocast: merging must not round intermediate results."""
    if autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast(device: torch.device) -> bool:
    """Tell whether autocast chooses the dtype of products on this device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def as_autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the operands in the dtype that autocast chooses for a product.

    It knows torch's own products, not the kernels; it leaves float64 alone.
    """
    if not autocast(x.device) or x.dtype == torch.float64:
        return x, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def check_shape(name: str, operand: Shaped[Tensor, "..."], *shape: int) -> None:
    """Refuse an operand of another layer; torch would broadcast it."""
    if operand.shape != shape:
        raise InputError(
            f"{name} has shape {tuple(operand.shape)}; for this weight it must be "
            f"{shape}."
        )


def rows_of(operand: Shaped[Tensor, "..."]) -> int:
    """Return the length of the first axis; 1 for a number, which fits no layer."""
    return len(operand) if operand.dim() else 1


def frozen(W: Weight, bias: Bias | None = None) -> nn.Linear:
    """Return a frozen `nn.Linear` that uses this weight and bias without copying them.

    Raises:
        InputError: if the bias is not as long as W has rows.
    """
    out_features, in_features = W.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(W, requires_grad=False)
    if bias is not None:
        check_shape("bias", bias, out_features)
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def has_forward(layer: nn.Module) -> bool:
    """Tell whether a forward was set on the instance.

    accelerate leaves the class's own there when it removes its hook.
    """
    set_on = vars(layer).get("forward")
    own = getattr(set_on, "__func__", None) is type(layer).forward
    return set_on is not None and not (own and set_on.__self__ is layer)


def hooked_as(layer: nn.Module, other: nn.Module) -> nn.Module:
    """Give another layer the hooks of this one; their handles still remove them."""
    kept = {name: of for name, of in vars(layer).items() if name.startswith(HOOKED)}
    vars(other).update(kept)
    return other


def without_hooks(layer: nn.Module) -> nn.Module:
    """Take the hooks off a shallow copy, whose original keeps them."""
    hooks = {n: of for n, of in vars(layer).items() if n.startswith(HOOKED)}
    empty = {n: type(of)() if isinstance(of, dict) else None for n, of in hooks.items()}
    vars(layer).update(empty)
    return layer


def check_no_forward(layer: nn.Module, other: str) -> None:
    """Refuse a forward of the instance, which another layer would not run."""
    if has_forward(layer):
        raise InputError(
            f"a forward was set on this {type(layer).__name__}, and {other} would not "
            "run it; delete it first (accelerate: remove_hook_from_submodules), and "
            "set it again afterwards."
        )


def check_values(layer: nn.Module) -> None:
    """Refuse to quantize a layer that is elsewhere, or not finite."""
    for name, weight in ((n, p) for n, p in layer._parameters.items() if p is not None):
        if not has_values(weight):
            where = "on the device meta" if weight.is_meta else "in a FakeTensorMode"
            raise InputError(
                f"the {name} is {where}, and has no values to quantize; load "
                "it first, or bring it back if it is offloaded."
            )
        if hasattr(weight, "placements"):
            raise InputError(
                f"the {name} is sharded over processes; quantize the model first, then "
                "distribute it."
            )
        if not torch.isfinite(weight).all():
            raise InputError(f"the {name} is not finite; repair it first.")


@singledispatch
def weight_view(layer: nn.Module) -> WeightView:
    """Return how this layer stores its weight; other modules may register theirs.

    Raises:
        InputError: for a layer that no adapter can wrap and merge exactly.
    """
    # Recognized by its name: to import transformers for one class takes seconds.
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        _check_weight(layer)
        return Transposed()
    stacked = of_experts(layer)
    if stacked is not None:
        return stacked
    raise InputError(
        f"{type(layer).__name__} has no weight matrix that an adapter could change; "
        "choose linear layers, Conv1D or embeddings."
    )


@weight_view.register
def _(layer: nn.Linear) -> WeightView:
    _check_weight(layer)
    if type(layer).forward is nn.Linear.forward:
        return WeightView()
    if not computes_as_linear(layer):
        _check_forward(layer, nn.Linear)
    return Respelled()


@weight_view.register
def _(layer: nn.Embedding) -> WeightView:
    _check_weight(layer)
    _check_forward(layer, nn.Embedding)
    if layer.max_norm is not None:
        raise InputError(
            f"the embedding has max_norm {layer.max_norm}, which rewrites its frozen "
            "weight in every forward pass; set max_norm to None."
        )
    return Lookup()


def of_experts(layer: nn.Module) -> WeightView | None:
    """Return the view of a module of experts; None for another module.

    A module of experts holds stacks (parameters of three axes), and it has
    `is_transposed`, or a `num_experts` that is the number of matrices of a stack.

    Raises:
        InputError: if the module does not say how its stacks are laid out, or a stack
            holds no floats.
    """
    stacks = [p for p in layer._parameters.values() if p is not None and p.ndim == 3]
    experts = getattr(layer, "num_experts", None)
    turned = getattr(layer, "is_transposed", None)
    if not stacks or (turned is None and stacks[0].shape[0] != experts):
        return None
    if turned is None:
        raise InputError(
            f"{type(layer).__name__} does not say whether its stacks are (experts, "
            "out_features, in_features); set `is_transposed` on it, False if they are "
            "and True if the last two axes are exchanged, or leave it out."
        )
    if any(stack.dtype not in FLOATS for stack in stacks):
        raise InputError(
            f"{type(layer).__name__} holds weights of dtype {stacks[0].dtype}, to "
            "which no update can be added; convert them to 16 bits or more."
        )
    return Stacked(bool(turned))


def computes_as_linear(layer: nn.Linear) -> bool:
    """Tell by numbers whether a subclass computes the same as `nn.Linear`.

    The forward runs on a CPU with a small weight and bias of whole numbers, so the
    order of a sum changes no bit. It runs on a vector, a matrix and a batch, with
    training on and off, in each dtype that a layer may have. A layer that holds more
    than a weight and a bias is not tried, because its other state may change the
    result.
    """
    state = {**layer._parameters, **layer._buffers, **layer._modules}
    if set(state) != {"weight", "bias"}:
        return False
    for dtype in (torch.float32, torch.bfloat16):
        probe = copy(layer)
        probe.in_features, probe.out_features = 3, 5
        weight = torch.arange(-7.0, 8.0, device="cpu").reshape(5, 3)
        bias = None if layer.bias is None else torch.arange(5.0, device="cpu")
        probe._parameters = {"weight": nn.Parameter(weight.to(dtype), False)}
        probe._parameters["bias"] = (
            None if bias is None else nn.Parameter(bias.to(dtype))
        )
        for lead, training in product(((), (4,), (2, 3)), (False, True)):
            n = 3 * prod(lead)
            x = (torch.arange(n, device="cpu") % 7 - 2.0).to(dtype).reshape(*lead, 3)
            if not _same(probe.train(training), x):
                return False
    return True


def _same(probe: nn.Linear, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            y = type(probe).forward(probe, x)
    except Exception:  # any error means: not the same as nn.Linear
        return False
    expected = linear(x, probe.weight.detach(), probe.bias)
    return isinstance(y, Tensor) and y.dtype == x.dtype and torch.equal(y, expected)


def weight_of(layer: nn.Module) -> Weight:
    """Return W, however the layer stores it; a 4-bit weight is decoded."""
    view = weight_view(layer)
    return view.read(view.held(layer))


def _check_weight(layer: nn.Module) -> None:
    kind, weight = type(layer).__name__, layer._parameters.get("weight")
    if parametrize.is_parametrized(layer) or not isinstance(weight, nn.Parameter):
        raise InputError(
            f"the weight of this {kind} is no parameter: something computes it before "
            "each pass (a parametrization, weight_norm, pruning); make it permanent "
            "first, or leave the layer out of the targets."
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise InputError(
            f"this {kind} has no weight yet: call the model once, then inject."
        )
    if weight.dtype not in FLOATS:
        raise InputError(
            f"the weight of this {kind} has dtype {weight.dtype}, in which no update "
            "can be added; convert it to one of 16 bits or more."
        )


def _check_forward(layer: nn.Module, kind: type[nn.Module]) -> None:
    if type(layer).forward is not kind.forward:
        raise InputError(
            f"{type(layer).__name__} is a {kind.__name__} with a forward of its own, "
            "which a merged weight would not reproduce; leave it out of the targets."
        )
