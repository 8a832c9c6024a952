"""A frozen layer with named adapters: the part that all parametrizations share.

The file of a method defines two classes. The adapter is a module that is called with a
`Product`. The class derived from `Adapted` says how an adapter changes a weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from minipeft.errors import InputError
from minipeft.torch import loading
from minipeft.torch.deferred import Deferred
from minipeft.torch.linear import (
    Bias,
    Form,
    Input,
    Output,
    Product,
    Stored,
    Weight,
    check_shape,
    full_precision,
    has_forward,
    weight_view,
)
from minipeft.torch.operands import has_values
from minipeft.values import check_kind, check_number

Adapter = TypeVar("Adapter", bound=nn.Module)


class Adapted(nn.Module, ABC, Generic[Adapter]):
    """A frozen layer with named adapters, of which any weighted sum is active.

    `forward` calls the base layer. The base computes one product $x W^T + b$ inside
    that call, and only at this product the adapters or the merged weight enter. All
    other code of the call still runs: hooks, a forward set on the instance, casts,
    offloading, sharding.

    The base is never written to. `merge` stores $W'$ beside it, so `unmerge` is exact
    in every dtype, and a state dict saved while merged holds the base and the adapters
    unchanged. The cost: a merged layer holds its weight in memory twice.

    A method derives its own class and writes `check_fits` and `change`. A method whose
    adapters do more than add to the output overrides `adapt` and `adapt_weight`.

    Args:
        base: the layer to wrap; it is frozen.
        adapter: the trained part; None: there is none yet.
        name: of the adapter.

    Raises:
        InputError: if the layer cannot be adapted, or the adapter belongs to another
            layer.
    """

    merged_weight: Weight | None
    merged_bias: Bias | None

    def __init__(self, base: nn.Module, adapter: Adapter | None, name: str = "default"):
        super().__init__()
        check_kind("base", base, nn.Module)
        self.view = weight_view(base)
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.hold(None, None)
        loading.watch(self)
        self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        self.base = base
        if adapter is not None:
            self.add(name, adapter)
            self.activate({name: 1.0})
        base.requires_grad_(False)
        self.train(base.training)

    # --- what a method writes ---------------------------------------------------------

    @staticmethod
    @abstractmethod
    def check_fits(form: Form, adapter: Any) -> None:
        """Refuse an adapter of another layer; torch would broadcast its tensors."""

    @abstractmethod
    def change(self, adapter: Adapter, W: Weight) -> Weight:
        """Return what one adapter adds to W, in float32 or wider."""

    def adapt(self, product: Product) -> Output:
        """Return the output: y plus the change of each adapter times its share."""
        total = product.y
        for share, adapter in self.shares():
            change = adapter(product)
            total = total + (change if share == 1 else share * change)
        return total.to(product.y.dtype)

    def adapt_weight(self, W: Weight) -> Weight:
        """Return $W'$, in float32 or wider."""
        return W + self._delta(W)

    def adapt_bias(self, bias: Bias) -> Bias:
        """Return the bias that belongs to $W'$; most adapters do not change it."""
        return bias

    # --- what all methods share -------------------------------------------------------

    def forward(self, input: Input | None = None, *, x: Input | None = None) -> Output:
        """Call the base, with the active adapters or with the merged weight.

        Args:
            input: as `nn.Linear` and `nn.Embedding` name it.
            x: the same, as `Conv1D` names it.

        Raises:
            InputError: if not one of the two is given, `torch.fx` traces the layer, or
                the base does not multiply by its weight.
        """
        products: list[Product] = []
        base: Any = self._modules["base"]  # `__getattr__` would take ten times as long
        with _Within(self, base, products):
            y = self.view.call(base, one_input(input, x))
        if not products:
            weight_view(base)  # raises if something else now computes its weight
            raise InputError(
                f"this {type(base).__name__} did not multiply by its weight as it "
                "stands, so no adapter could act; restore the forward of its class, or "
                "leave the layer out of the targets."
            )
        return y

    def compute(self, product: Product) -> Output:
        """Return the product of the base, adapted or merged."""
        if self._buffers["merged_weight"] is None:
            return self.adapt(product)
        return product.compute(W=self.merged_weight, bias=self.merged_bias)

    @property
    def W(self) -> Weight:
        """The frozen weight, `(out_features, in_features)`."""
        return self.view.read(self.view.held(self.base))

    @property
    def weight(self) -> Stored:
        """The effective weight, laid out as the base stores W; computed when used.

        Some code reads `layer.weight` and does not call the layer, for example
        `nn.MultiheadAttention`. Such code gets the adapted weight with its gradients.
        The dtype, shape and device of the weight are known without computing it.
        Writing to it is refused, and what is written to its `detach()` or to a view of
        it is lost: write to `layer.base.weight`.
        """
        if self.merged_weight is not None:
            return self.view.turn(self.merged_weight)
        if torch.compiler.is_compiling():
            return self.view.turn(self.merged())
        # The base's weight is read now: after `unload` the base holds another weight.
        compute = partial(self._effective, self.view.held(self.base))
        form, trained = self.view.form(self.base), self.adapters.parameters()
        like = torch.empty(form.shape, dtype=form.dtype, device="meta")
        shape = self.view.turn(like).shape
        wanted = any(p.requires_grad for p in trained)
        return Deferred(compute, shape, form, wanted)

    @property
    def bias(self) -> Bias | None:
        """The effective bias."""
        bias = cast(Tensor | None, getattr(self.base, "bias", None))
        return None if bias is None else self.adapt_bias(bias)

    def merged(self) -> Weight:
        """Return $W'$, the weight of the plain layer with the same output.

        $W'$ is rounded once, to the dtype of W, also under autocast.
        """
        return self._merged(self.W)

    def delta(self) -> Weight:
        """Return the active update, $W' - W$, in float32 or wider."""
        self._check_fits()
        W = self.W
        with full_precision(W.device):
            return self._delta(W)

    def merge(self) -> "Adapted[Adapter]":
        """Compute with $W'$ from now on; a second merge starts from the base again.

        Raises:
            InputError: if the weights are offloaded or sharded, or computed by
                something that was added to the layer after the adapters; if a finite
                value would become infinite or NaN.
        """
        check_here(self.base)
        weight_view(self.base)  # raises if something else now computes its weight
        with torch.inference_mode(False), torch.no_grad():
            W, own = self.W, getattr(self.base, "bias", None)
            if own is not None:
                check_shape("bias", own, len(W))
            merged, bias = self._merged(W).detach(), self.bias
            new_bias = None if bias is own else cast(Tensor, bias).detach()
            check_finite("the weight", W, merged)
            if new_bias is not None:
                check_finite("the bias", cast(Tensor, own), new_bias)
            # Stored as the base stores W, so that an unloaded layer rounds alike.
            stored = self.view.turn(merged).contiguous()
            self.hold(self.view.turn(stored), new_bias)
        return self

    def unmerge(self) -> "Adapted[Adapter]":
        """Compute with the base and the adapters again; the base has not changed."""
        self.hold(None, None)
        return self

    def hold(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Hold what is merged, outside the state dict; None: the layer is not merged.

        Args:
            weight: the merged weight, or stack of weights.
            bias: the merged bias, or None for the base's.
        """
        for name, tensor in (("merged_weight", weight), ("merged_bias", bias)):
            # Without a tensor the name is not marked: accelerate would ask for its
            # device.
            self.register_buffer(name, tensor, persistent=tensor is None)

    def unload(self) -> nn.Module:
        """Return a plain layer: with $W'$ if merged, else the base as it was before.

        Hooks of the base stay.

        Raises:
            InputError: if hooks or a forward were set on this layer itself; if it is
                merged, and the base is offloaded or sharded.
        """
        check_no_hooks(self)
        check_plain(self)
        if self.merged_weight is None:
            return self.base
        plain = self.view.plain(self.base, self.merged_weight)
        if self.merged_bias is not None:
            plain.bias = nn.Parameter(self.merged_bias, requires_grad=False)
        return plain

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold another adapter; the new adapter is inactive until `activate`.

        Raises:
            InputError: if the name is taken, or cannot be part of a state dict's key;
                if the adapter belongs to another layer.
        """
        self.check_new(name)
        self.check_fits(self.view.form(self.base), adapter)
        self.adapters[name] = adapter.train(self.training)

    def check_new(self, name: str) -> None:
        """Refuse a name that no new adapter can have."""
        check_kind("name", name, str)
        if not name or "." in name or hasattr(self.adapters, name):
            taken = f", other than {_listed(self.adapters)}" if self.adapters else ""
            raise InputError(
                f"the adapter name {name!r} cannot be used here; choose one without a "
                f"dot{taken}."
            )

    def remove(self, name: str) -> None:
        """Remove an adapter from the layer."""
        self._check_known(name)
        self.activate({n: share for n, share in self.active.items() if n != name})
        del self.adapters[name]

    def activate(self, shares: Mapping[str, float]) -> None:
        """Use the named adapters, each times its share; no name means the base alone.

        Raises:
            InputError: for a name that the layer does not hold.
        """
        for name, share in shares.items():
            self._check_known(name)
            check_number(f"the share of {name!r} in shares", share)
        before, self.active = self.active, dict(shares)
        try:
            _merge_again(self)
        except InputError:
            self.active = before
            raise

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what is trained here, active or not."""
        return list(self.adapters.parameters())

    def check_load(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        """Refuse tensors that are not finite, or that a merged layer cannot merge.

        Args:
            state: of `load_state_dict`.
            prefix: of the layer's names in the state.
            assign: whether the tensors replace those of the layer.
        """
        at = f"{prefix}adapters."
        loading.check_values(self.adapters, state, at, assign=assign)
        if self.merged_weight is not None:
            with naming(prefix.rstrip(".")):
                loading.twin(self, state, prefix, assign).merge()

    def shares(self) -> list[tuple[float, Adapter]]:
        """Return the active adapters as pairs (share, adapter)."""
        held = cast(nn.Module, self._modules["adapters"])._modules
        return [(s, cast(Adapter, held[n])) for n, s in self.active.items()]

    def _delta(self, W: Weight) -> Weight:
        total = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
        for share, adapter in self.shares():
            total = total + share * self.change(adapter, W)
        return total

    def _check_fits(self) -> None:
        # A program can exchange the tensors of an adapter after it was added.
        for _, adapter in self.shares():
            self.check_fits(self.view.form(self.base), adapter)

    def _merged(self, W: Weight) -> Weight:
        self._check_fits()
        with full_precision(W.device):
            return self.adapt_weight(W).to(W.dtype)

    def _effective(self, held: Any) -> Stored:
        return self.view.turn(self._merged(self.view.read(held)))

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            choice = (
                f"choose from {_listed(self.adapters)}"
                if self.adapters
                else "the layer holds none at all: add one first"
            )
            raise InputError(f"there is no adapter {name!r}; {choice}.")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base, except names that programs set anywhere."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_") or hasattr(type(self), name):
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set an attribute that would hide one of the base."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and name not in self.__dict__ and not name.startswith("_"):
            own = hasattr(type(self), name) and name not in ("weight", "bias", "W")
            if not own and name not in self._buffers and hasattr(base, name):
                raise InputError(
                    f"{name} belongs to the layer that is wrapped; set it on "
                    "`layer.base`, and merge again if it was merged."
                )
        super().__setattr__(name, value)


class _Within(TorchFunctionMode):
    """A call of the base in which the adapted layer computes the base's one product.

    The base is called, because offloading and sharding bring the weight in only during
    a call. A second way to compute the layer would also lose the code around the
    product.
    """

    CASTS = frozenset(
        {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half}
        | {Tensor.bfloat16, Tensor.detach, Tensor.contiguous}
    )

    def __init__(self, layer: Adapted[Any], base: Any, products: list[Product]):
        super().__init__()
        self.layer, self.base, self.products = layer, base, products
        self.casts: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        layer, base, kwargs = self.layer, self.base, kwargs or {}
        view = layer.view
        if view.is_product(base, function, args) or self._takes_a_cast(function, args):
            product = Product(view, base, args, kwargs, layer.training)
            self.products.append(product)
            return layer.compute(product)
        out = function(*args, **kwargs)
        if function in self.CASTS and args[0] is view.held(base):
            self.casts.append(out)
        return out

    def _takes_a_cast(self, function: Any, args: Any) -> bool:
        view = self.layer.view
        if not self.casts or function is not view.function:
            return False
        return any(args[view.places[1]] is cast for cast in self.casts)


def mixed(
    v: Tensor,
    shares: Sequence[tuple[float, Adapter]],
    changed: Callable[[Adapter], Tensor],
) -> Tensor:
    r"""Return $v + \sum_i s_i (f_i(v) - v)$ for adapters $f_i$ with shares $s_i$."""
    if not shares:
        return v
    if [share for share, _ in shares] == [1]:
        return changed(shares[0][1])
    total = (1 - sum(share for share, _ in shares)) * v
    for share, adapter in shares:
        total = total + share * changed(adapter)
    return total


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Let nothing train but adapters and virtual tokens, of whatever kind they are."""
    kept = {
        id(parameter)
        for module in model.modules()
        for parameter in getattr(module, "own_parameters", list)()
    }
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


@contextmanager
def training_as_before(model: nn.Module) -> Iterator[None]:
    """Where an error comes out, let what required a gradient require one again."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        raise


def one_input(input: Input | None, x: Input | None) -> Input:
    """Return the input of a layer, by whichever name it came; refuse two, or none."""
    given = input if x is None else x
    if given is None or (input is not None and x is not None):
        raise InputError("an adapted layer takes one input; give it first, by no name.")
    check_no_proxy(given)
    return given


def check_no_proxy(operand: Any) -> None:
    """Refuse to be traced by `torch.fx`, which would not see an adapter."""
    if isinstance(operand, Proxy):
        raise InputError(
            "torch.fx records calls of a Linear as a whole, and an adapter acts inside "
            "it; use torch.export.export(model, args, strict=False)."
        )


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name, if it has one, in front of the message of an error."""
    try:
        yield
    except InputError as error:
        where = f"{layer}: " if layer else ""
        raise InputError(f"{where}{error}") from None


def _merge_again(layer: Any) -> None:
    # New values or another choice of adapters make the merged weight out of date.
    if layer.merged_weight is not None:
        layer.merge()


def _before_load(layer: Any, state: object, prefix: str, *rest: Any) -> None:
    vars(layer)["_loading"] = (prefix.rstrip("."), rest[-1])


def _after_load(layer: Any, keys: object) -> None:
    # As torch does with tensors that do not fit: what fits is loaded, and the rest is
    # named at the end. An error here would leave the layers after this one as before.
    name, errors = vars(layer).pop("_loading")
    try:
        with naming(name):
            _merge_again(layer)
    except InputError as error:
        layer.unmerge()
        errors.append(f"{error} (The layer is unmerged now, with the new values.)")


def check_finite(name: str, before: Tensor, merged: Tensor) -> None:
    """Refuse a merge that turns a finite value into an infinite one or NaN."""
    if not has_values(merged) or bool(merged.isfinite().all()):
        return
    lost = torch.nonzero(before.isfinite() & ~merged.isfinite())
    if len(lost):
        at = tuple(lost[0].tolist())
        raise InputError(
            f"merging would turn {name} at {list(at)} from {before[at].item():.6g} "
            f"into {merged[at].item()} in {merged.dtype}; repair the adapter if its "
            "tensors or its share are not finite, else convert the layer to a wider "
            "dtype or leave it unmerged."
        )


def check_no_hooks(layer: nn.Module) -> None:
    """Refuse to put a layer away together with hooks that a program registered."""
    hooks = [hook for name in loading.HOOKS for hook in getattr(layer, name).values()]
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise InputError(
            f"{name} is a hook of the adapted layer and would be lost with it; remove "
            "it by its handle before unloading, and register it on `layer.base` or on "
            "the plain layer, where hooks stay."
        )

    # accelerate sets a forward on each module, and the base then has one as well.
    over = vars(layer).get("_hf_hook") and vars(layer.base).get("_hf_hook")
    if has_forward(layer) and not over:
        raise InputError(
            "a forward was set on the adapted layer and would be lost with it; delete "
            "it before unloading (accelerate: remove_hook_from_submodules), and set it "
            "on `layer.base` or on the plain layer, where it stays."
        )


def check_plain(layer: Any) -> None:
    """Refuse to make a plain layer of a merged one if its base lies elsewhere."""
    if layer.merged_weight is not None:
        check_here(layer.base)
        layer.view.check_plain(layer.base)


def check_here(base: nn.Module) -> None:
    """Refuse to merge a weight that is offloaded or sharded."""
    for module in base.modules():
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None:
                _check_here(module, held)


def _check_here(base: nn.Module, weight: Tensor) -> None:
    if weight.is_meta and has_forward(base):
        raise InputError(
            "the weight is offloaded and comes in for a call alone; bring the model "
            "back first (accelerate: remove_hook_from_submodules)."
        )
    if hasattr(weight, "placements"):
        raise InputError(
            "the weight is sharded over several processes; gather the model first "
            "(FSDP2: unshard())."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
