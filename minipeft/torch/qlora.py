"""QLoRA's base: a frozen linear layer that stores its weight in a few bits."""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function_unary

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch import blockwise, double_quant, launches, loading, operators, saving
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.bins import MEMORY
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF4
from minipeft.torch.deferred import Deferred
from minipeft.torch.double_quant import Nested
from minipeft.torch.experts import experts
from minipeft.torch.linear import (
    Bias,
    Form,
    Input,
    Output,
    Stacked,
    Transposed,
    Weight,
    WeightView,
    as_autocast,
    check_no_forward,
    check_shape,
    check_values,
    frozen,
    hooked_as,
    transformed,
    weight_view,
    without_hooks,
)
from minipeft.torch.lora import LoRALinear
from minipeft.torch.operands import (
    check_float_dtype,
    check_tensor,
    check_tensors,
)
from minipeft.torch.stack import Coded, Stack
from minipeft.torch.targets import (
    all_linear,
    check_names,
    chosen,
    outside_adapters,
    replace,
    tied,
)
from minipeft.values import check_kind, check_sizes

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)
REMEDY = (
    "the model holds weights in a few bits, which from_pretrained cannot read; save "
    "the original and quantize it after loading, or save model.state_dict()."
)


class QuantizedLinear(nn.Module):
    r"""A frozen linear layer, $y = x \hat W^T + b$, that stores $\hat W$ in a few bits.

    Forward decodes the weight to the dtype of x, and backward decodes it again. Between
    the two, no tensor of W's size belongs to the layer. Only x gets a gradient.

    Args:
        q: the quantized weight, `(out_features, in_features)`.
        bias: as in `nn.Linear`.
        dtype: of `weight`, for code that reads `weight`; `.to(dtype)` changes it.

    Raises:
        InputError: if a part of q does not fit; on `load_state_dict`, if a scale is not
            finite. A pass reads the scales on a CPU alone: elsewhere it would wait.

    Source: QLoRA (arXiv:2305.14314), equation 5.
    """

    packed: Tensor
    original: type[nn.Module] | None = None  # a Conv1D, for the plain layer

    def __init__(
        self,
        q: Blockwise | Nested,
        bias: Bias | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        double_quant.check_stored(q)
        check_sizes("shape of q", q.shape, 2)
        check_float_dtype(dtype)
        if bias is not None:
            check_tensor("bias", bias)
            check_shape("bias", bias, q.shape[0])
        self.out_features: int = q.shape[0]
        self.in_features: int = q.shape[1]
        parts = {field.name: getattr(q, field.name) for field in fields(q)}
        self.kind: Callable[..., Blockwise | Nested] = type(q)
        self.tensors = [k for k, v in parts.items() if isinstance(v, Tensor)]
        self.constants = {k: v for k, v in parts.items() if k not in self.tensors}
        self.dtype = dtype
        for name in self.tensors:
            # A copy: loading a state dict writes into it and must not change NF4.
            self.register_buffer(name, parts[name].clone())
        self.ready: launches.Ready | None = None
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        loading.watch(self)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        codebook: Float[Tensor, " codes"] = NF4,
        blocksize: int = 64,
        nested_blocksize: int | None = None,
    ) -> "QuantizedLinear":
        """Quantize the weight of an `nn.Linear` or a Conv1D, which does not change.

        With `nested_blocksize` (256) the scales are quantized too.
        """
        W = weight_view(layer).turn(cast(Tensor, layer.weight))
        q: Blockwise | Nested = _coded(W, codebook, blocksize)
        if nested_blocksize is not None:
            q = double_quant.nest(cast(Blockwise, q), nested_blocksize)
        return cls(q, cast(Any, layer.bias), W.dtype).in_place_of(layer)

    def in_place_of(self, layer: nn.Module) -> "QuantizedLinear":
        """Take over the mode and the hooks of a layer, and remember a Conv1D."""
        conv1d = isinstance(weight_view(layer), Transposed)
        self.original = type(layer) if conv1d else None
        hooked_as(layer, self)
        return self.train(layer.training)

    @property
    def q(self) -> Blockwise | Nested:
        """The quantized weight."""
        tensors = {name: getattr(self, name) for name in self.tensors}
        return self.kind(**tensors, **self.constants)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return cast(Tensor, self.codebook).device

    @property
    def weight(self) -> Weight:
        r"""$\hat W$, decoded when used; to read its dtype or shape decodes nothing."""
        if torch.compiler.is_compiling():
            return self.dequantize(self.dtype)
        form = weight_view(self).form(self)
        return Deferred(lambda: self.dequantize(form.dtype), form.shape, form)

    def dequantize(self, dtype: torch.dtype) -> Weight:
        r"""Return $\hat W$ in this dtype."""
        q = self.q
        nested = isinstance(q, Nested)
        if self.runs_kernels(dtype):
            decode = operators.dequantize_nested if nested else operators.dequantize
            return cast(Tensor, decode(*operators.parts(q), dtype))
        if isinstance(q, Nested):
            return double_quant.dequantize(q, dtype)
        return blockwise.dequantize(q, dtype)

    def decoded(self, dtype: torch.dtype) -> Weight:
        r"""Return $\hat W$; on a CPU this thread's next layer overwrites the memory.

        While a graph is recorded the memory is new: the graph may keep the weight.
        """
        q = self.q
        if torch.is_grad_enabled() or not blockwise.decodes_in_slices(q):
            return self.dequantize(dtype)
        coded = double_quant.unnest(q) if isinstance(q, Nested) else q
        blockwise.check_parts(coded)
        return blockwise.decode_to(MEMORY.weight(q.shape, dtype), coded)

    def forward(
        self, input: Shaped[Tensor, "... in_features"], bias: Bias | None = None
    ) -> Shaped[Tensor, "... out_features"]:
        """Apply the layer, with another bias where one is given.

        Raises:
            InputError: if `torch.fx` traces this layer alone.
        """
        if isinstance(input, Proxy) and input.tracer.root is self:
            raise InputError(
                "torch.fx records a call of a quantized layer by its name in a model; "
                "trace a module that holds the layer, such as nn.Sequential(layer)."
            )
        return quantized_linear(input, self, self.bias if bias is None else bias)

    def check_load(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        """Refuse scales and codes' values that are not finite.

        A pass on a GPU does not read them, so that the host need not wait; this does.

        Args:
            state: of `load_state_dict`.
            prefix: of the layer's names in the state.
            assign: whether the tensors replace those of the layer.
        """
        loading.check_values(self, state, prefix, self.tensors, assign)

    def runs_kernels(self, dtype: torch.dtype) -> bool:
        """Tell whether a GPU kernel can decode the weight to this dtype."""
        if self.device.type not in launches.GPUS:
            return False
        weight, _ = operators.parts(self.q)
        return launches.available(*weight) and launches.decodes(weight[-1], dtype)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "QuantizedLinear":
        # `.to(dtype)` must not cast scales and codebook: 16 bits would round them.
        exact = {n: b for n, b in self._buffers.items() if b is not None}
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.ready = None  # would keep what lies on the old device
        self.dtype = fn(probe).dtype
        for name, tensor in exact.items():
            if not tensor.is_meta:
                setattr(self, name, tensor.to(self.device))
        return self

    def extra_repr(self) -> str:
        """Say what `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codes={len(self.q.codebook)}, "
            f"blocksize={self.constants['blocksize']}, scales={type(self.q).__name__}"
        )


def _coded(W: Weight, codebook: Float[Tensor, " codes"], blocksize: int) -> Blockwise:
    W = W.detach().contiguous()  # a Conv1D's weight is a view
    if not (launches.available(W) and launches.decodes(codebook, W.dtype)):
        return blockwise.quantize(W, codebook, blocksize)
    values = codebook.to(W.device)
    packed, absmax = operators.quantize(W, values, blocksize)
    return Blockwise(packed, absmax, values, blocksize, tuple(W.shape))


def quantized_linear(
    x: Input, weight: QuantizedLinear | Weight, bias: Bias | None = None
) -> Output:
    r"""Return $x \hat W^T + b$; if another weight is given, multiply by that weight.

    Like torch's own functions, this function calls torch's function modes. Through them
    an adapter finds the product of the layer.
    """
    if has_torch_function_unary(x):
        y: Output = handle_torch_function(quantized_linear, (x,), x, weight, bias)
        return y
    if not isinstance(weight, Tensor) and transformed():
        weight = weight.dequantize(x.dtype)
    if isinstance(weight, Tensor):
        return linear(x, weight.to(x.dtype), bias)
    x, bias = as_autocast(x, bias)
    if (on_gpu := operators.on_kernels(x, weight, bias)) is not None:
        return on_gpu
    return cast(Tensor, _Frozen.apply(x, weight.decoded, bias))  # type: ignore[no-untyped-call]


class _Frozen(torch.autograd.Function):
    """A linear layer that decodes its weight in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[torch.dtype], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        ctx.weight = weight
        return linear(x, weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return grad_y @ ctx.weight(grad_y.dtype), None, None


class _Quantized(WeightView):
    """The view of `QuantizedLinear`; a merged weight is stored decoded."""

    function = staticmethod(quantized_linear)

    def form(self, layer: Any) -> Form:
        rows, columns = layer.out_features, layer.in_features
        return Form(rows, columns, layer.dtype, layer.device)

    def held(self, layer: Any) -> Any:
        return layer

    def is_product(self, layer: Any, function: Any, args: Sequence[Any]) -> bool:
        if torch.compiler.is_compiling() and function is linear:
            # A compiler calls function modes only for torch's own functions.
            return args[1].shape == self.form(layer).shape
        return super().is_product(layer, function, args)

    def read(self, held: Any) -> Weight:
        if isinstance(held, Tensor):
            return held
        return cast(Tensor, held.dequantize(held.dtype))

    def check_plain(self, layer: Any) -> None:
        check_no_forward(layer, "the plain layer")

    def plain(self, layer: Any, W: Weight) -> nn.Module:
        merged = _as_before(layer, W)
        merged.bias = layer.bias
        return hooked_as(layer, merged.train(layer.training))


def _as_before(layer: Any, W: Weight) -> Any:
    # A Conv1D adds its bias in another order, so a last bit of its output may change.
    if layer.original is None:
        return frozen(W.contiguous())
    with torch.device("meta"):  # draws no random numbers
        conv1d = layer.original(layer.out_features, layer.in_features)
    conv1d.weight = nn.Parameter(W.T.contiguous(), requires_grad=False)
    return conv1d


@weight_view.register
def _(layer: QuantizedLinear) -> WeightView:
    return _Quantized()


class QuantizedExperts(nn.Module):
    """A module of experts that stores each expert's weights in a few bits.

    The module's own forward runs, and reads quantized stacks. Where the module takes
    one expert at a time or runs of tokens (`eager`, `grouped_mm`), each product decodes
    the weight of one expert and keeps nothing; `batched_mm` decodes the whole stack.

    Args:
        base: the module; this class stores a copy of the module without the stacks.
        stacks: a quantized layer for each expert, by the names of the stacks.
    """

    adapted_whole = True  # the layers inside it are parts of what is adapted

    def __init__(self, base: nn.Module, stacks: Mapping[str, Sequence[nn.Module]]):
        super().__init__()
        check_kind("base", base, nn.Module)
        check_kind("stacks", stacks, Mapping)
        check_no_forward(base, "the quantized experts")
        hooked_as(base, self)
        bare = without_hooks(copy(base))
        kept = {n: p for n, p in base._parameters.items() if n not in stacks}
        bare._parameters = kept
        self.stacks = nn.ModuleDict({n: nn.ModuleList(m) for n, m in stacks.items()})
        self.turned = bool(getattr(base, "is_transposed", False))
        self.base = bare.requires_grad_(False)
        self.train(base.training)

    @classmethod
    def from_experts(
        cls,
        layer: nn.Module,
        codebook: Float[Tensor, " codes"] = NF4,
        blocksize: int = 64,
        nested_blocksize: int | None = None,
    ) -> "QuantizedExperts":
        """Quantize the weight of every expert; the given module does not change."""
        view, stacks = cast(Stacked, weight_view(layer)), {}
        for name in view.names(layer):
            weights = getattr(layer, name).detach()
            turned = weights.mT if view.turned else weights
            stacks[name] = [
                QuantizedLinear.from_linear(
                    frozen(W), codebook, blocksize, nested_blocksize
                )
                for W in turned
            ]
        return cls(layer, stacks)

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """Call the module; during the call its stacks are the quantized ones."""
        stacks = {name: self.stack(name) for name in self.stacks}
        vars(self.base).update(stacks)
        try:
            return cast(Tensor, self.base(*args, **kwargs))
        finally:
            for name in stacks:
                vars(self.base).pop(name, None)

    def stack(self, name: str) -> Stack:
        """Return a stack in the form in which the module reads it."""
        layers = list(cast(nn.ModuleList, self.stacks[name]))
        first = cast(QuantizedLinear, layers[0])
        shape = (len(layers), first.out_features, first.in_features)
        shape = (shape[0], shape[2], shape[1]) if self.turned else shape
        return Stack(Coded(layers, self.turned, False, first.dtype), (), shape)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, or the stack of the running call."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name.startswith("_") or "base" not in modules:
                raise
            if name in modules["stacks"]:
                held = vars(modules["base"]).get(name)
                return self.stack(name) if held is None else held
            return getattr(modules["base"], name)


class _QuantizedStacks(Stacked):
    """The view of `QuantizedExperts`; merged stacks are stored decoded."""

    def check_plain(self, layer: Any) -> None:
        check_no_forward(layer, "plain experts")

    def names(self, layer: Any) -> list[str]:
        return list(layer.stacks)

    def plain(self, layer: Any, W: Any) -> nn.Module:
        return hooked_as(layer, super().plain(copy(layer.base), W))


QUANTIZED = (QuantizedLinear, QuantizedExperts)


@weight_view.register
def _(layer: QuantizedExperts) -> WeightView:
    return _QuantizedStacks(layer.turned)


def quantize_linears(
    model: Model,
    skip: Sequence[str] = (),
    codebook: Float[Tensor, " codes"] = NF4,
    blocksize: int = 64,
    nested_blocksize: int | None = 256,
) -> Model:
    """Replace linear layers and experts by quantized layers; other layers stay.

    Linear layers are `nn.Linear`, subclasses that compute the same, and `Conv1D`. They
    keep their hooks. Each expert is quantized separately. Output heads, routers and
    layers that share their weight stay, as with the target `"all-linear"`. A layer that
    is used in several places is quantized once and stays one layer. What stays is
    logged with its bytes; `unquantized` lists it.

    Args:
        model: changed in place and returned; not yet adapted.
        skip: full names, last parts of names, or patterns of layers to leave alone.
        codebook: of the weights.
        blocksize: weights that share a scale.
        nested_blocksize: scales that share a nested scale; None: scales of 32 bits.

    Raises:
        InputError: if the model has no such layer, a name in `skip` matches none, the
            model has adapters, a forward was set on a layer, or a weight is not
            finite; then nothing is changed.
    """
    _check_codec(codebook, blocksize, nested_blocksize)
    found = _to_quantize(model, skip)
    hyper = (codebook, blocksize, nested_blocksize)
    done: dict[int, nn.Module] = {}
    for name, layer in found.items():
        if id(layer) not in done:
            with naming(name):
                done[id(layer)] = _quantized(layer, *hyper)
            replace(model, {id(layer): done[id(layer)]})
    _say_what_stays(model)
    saving.refuse(model, REMEDY)
    loading.watch(model)
    return model


def _check_codec(
    codebook: Float[Tensor, " codes"], blocksize: int, nested_blocksize: int | None
) -> None:
    check_tensors({"codebook": (codebook, "codes")})
    blockwise.check_blocksize(blocksize)
    if nested_blocksize is not None:
        with naming("nested_blocksize"):
            blockwise.check_blocksize(nested_blocksize)


def _quantized(
    layer: Any,
    codebook: Float[Tensor, " codes"],
    blocksize: int,
    nested_blocksize: int | None,
) -> nn.Module:
    view, hyper = weight_view(layer), (codebook, blocksize, nested_blocksize)
    if isinstance(view, Stacked):
        return QuantizedExperts.from_experts(layer, *hyper)
    return QuantizedLinear.from_linear(layer, *hyper)


def unquantized(model: nn.Module) -> dict[str, int]:
    """Return the matrices of a model that are not quantized, with their bytes."""
    check_kind("model", model, nn.Module)
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


def _say_what_stays(model: nn.Module) -> None:
    left = unquantized(model)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    most = sum(left.values()) > total / 2
    largest = sorted(left, key=left.__getitem__, reverse=True)[:4]
    logger.log(
        logging.WARNING if most else logging.INFO,
        "%d bytes in %d weights stay unquantized, the largest: %s",
        sum(left.values()),
        len(left),
        ", ".join(f"{name} ({left[name]} bytes)" for name in largest) or "none",
    )


def prepare(model: Model) -> Model:
    """Freeze a model with 4-bit layers and convert its other parameters to 32 bits.

    Parameters that are stored in 16 bits and not quantized (norms, embeddings, biases,
    the output layer) become float32, as in peft's `prepare_model_for_kbit_training`.
    Activations are then float32 too; under `torch.autocast` the products use 16 bits.
    Unlike peft's function, this one does not change gradient checkpointing.

    Args:
        model: changed in place and returned; not yet adapted.

    Raises:
        InputError: if no layer is quantized, or the model has adapters or virtual
            tokens.
    """
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if hasattr(type(module), "own_parameters"):  # virtual tokens have them too
            where = name or type(module).__name__
            raise InputError(f"{where} trains parameters; prepare first, then adapt.")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        raise InputError("no layer is quantized; call quantize_linears(model) first.")
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    for layer in layers:
        layer.dtype = torch.float32
    return model


def quantizable(layer: nn.Module) -> bool:
    """Tell whether a layer is an `nn.Linear`, or GPT-2's Conv1D, itself."""
    conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    return type(layer) is nn.Linear or conv1d


def _to_quantize(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    check_kind("model", model, nn.Module)
    check_names("skip", skip)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise InputError(f"{name} has adapters; quantize first, then inject.")
        if any(map(nn.parameter.is_lazy, module._parameters.values())):
            raise InputError(f"{name} has no weight yet: call the model once first.")
    named = dict(outside_adapters(model))
    wanted = {**all_linear(model), **experts(model)}
    choices = {n: m for n, m in named.items() if _is_plain(m)}
    done = {n: m for n, m in named.items() if isinstance(m, QUANTIZED)}
    with naming("skip"):
        left = {id(named[name]) for name in chosen({**choices, **done}, skip)}
    left |= {id(named[name]) for name in tied(model) if name}
    found = {n: m for n, m in choices.items() if n in wanted and id(m) not in left}
    if not found:
        raise InputError(_why_none(done, choices))
    for name, layer in found.items():
        with naming(name):
            check_no_forward(layer, "a quantized one")
            check_values(layer)
    return found


def _why_none(done: Mapping[str, nn.Module], choices: Mapping[str, nn.Module]) -> str:
    if done:
        return (
            f"the model is quantized already ({', '.join(list(done)[:4])}), and the "
            "rest is skipped, a head, a router or tied; give the original model."
        )
    if choices:
        return (
            "every layer is skipped, a head, a router or tied ("
            f"{', '.join(list(choices)[:4])}); "
            "leave one of them out of `skip`, or give another model."
        )
    return "the model has no linear layer to quantize inside it; give another one."


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module holds weights that are not quantized yet."""
    try:
        view = weight_view(module)
    except InputError:
        return False
    few = isinstance(module, QUANTIZED)
    return not few and (view.linear or isinstance(view, Stacked))


def merge(layer: LoRALinear) -> nn.Linear:
    r"""Return the plain layer of $\hat W + s B A$: the function that was trained.

    Its weight is no longer quantized and has the dtype of the base. (To merge into the
    original W, load W, inject the adapter and merge there. That avoids the rounding of
    $\hat W$, but the adapter was trained on $\hat W$.)

    Args:
        layer: LoRA on a `QuantizedLinear`; this layer does not change.

    Raises:
        InputError: if the base is not quantized.
    """
    check_kind("layer", layer, LoRALinear)
    base = layer.base
    if not isinstance(base, QuantizedLinear):
        raise InputError(f"the base is a {type(base).__name__}; call its own merge().")
    with torch.no_grad():
        plain = frozen(layer.merged())
    plain.bias = base.bias  # type: ignore[assignment]
    return plain


def requantize(layer: LoRALinear) -> QuantizedLinear:
    r"""Return the layer of $q(\hat W + s B A)$, in as many bits as its base.

    Small updates are lost: see `reference.qlora.requantize`.

    Args:
        layer: LoRA on a `QuantizedLinear`; this layer does not change.

    Raises:
        InputError: if the base is not quantized.
    """
    plain, q = merge(layer), cast(QuantizedLinear, layer.base).q
    nested = q.nested_blocksize if isinstance(q, Nested) else None
    return QuantizedLinear.from_linear(plain, q.codebook, q.blocksize, nested)
