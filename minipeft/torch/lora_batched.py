"""Many adapters on one frozen model: every request of a batch has its own.

    pool = Pool(model, "all-linear", budget=2**30)
    pool.add("alice", inject.adapters_of(tuned, "alice"))
    with pool.serve(["alice", None, {"bob": 0.5, "carol": 0.5}]):
        model(ids)  # three rows

The host keeps every adapter. The device keeps those that were asked for last, as many
as the budget allows.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.kernels.checks import MAX_RANK
from minipeft.shapes import Float, Shaped
from minipeft.torch import inject, launches, operators
from minipeft.torch.adapted import Adapted, naming, one_input
from minipeft.torch.bottleneck import Bottleneck, Serial
from minipeft.torch.copies import Move, copied, nbytes_of
from minipeft.torch.deferred import Deferred
from minipeft.torch.dora import DoRA, DoRALinear
from minipeft.torch.hira import HiRA, HiRALinear
from minipeft.torch.ia3 import IA3, IA3Linear
from minipeft.torch.linear import (
    Form,
    Input,
    Lookup,
    Output,
    Product,
    Stacked,
    Stored,
    Weight,
    weight_view,
)
from minipeft.torch.lora import LoRA, LoRALinear
from minipeft.torch.miss import MiSS, MiSSLinear
from minipeft.torch.operands import check_indices, check_served, check_tensors
from minipeft.torch.targets import layers as layers_of
from minipeft.torch.targets import replace
from minipeft.torch.vera import VeRA, VeRALinear
from minipeft.values import check_integer, check_kind, check_number

Request = str | Mapping[str, float] | None
"""The adapter of a row by its name; several by their shares; none: the base alone."""

METHODS: dict[type[nn.Module], type[Adapted[Any]]] = {
    LoRA: LoRALinear,
    DoRA: DoRALinear,
    VeRA: VeRALinear,
    IA3: IA3Linear,
    HiRA: HiRALinear,
    MiSS: MiSSLinear,
    Bottleneck: Serial,
}
"""What can be served, and the layer that says how it acts."""


class Adapters(NamedTuple):
    """Low-rank updates of one layer, stacked; a lower rank is filled up with zeros.

    Attributes:
        A: (n, r, in_features).
        B: (n, out_features, r).
        scaling: (n,), in float32 or wider.
    """

    A: Float[Tensor, "n r in_features"]
    B: Float[Tensor, "n out_features r"]
    scaling: Float[Tensor, " n"]


def stack(updates: Sequence[Sequence[tuple[float, LoRA]]]) -> Adapters:
    r"""Stack updates of one layer, each a sum of adapters times their shares.

    A sum is one update of the summed rank, $\sum_i w_i s_i B_i A_i = s B A$, with the
    rows of all $A_i$ in A and the columns of all $w_i s_i / s\,B_i$ in B. For a single
    adapter s is $w_i s_i$, so that A and B keep their bits.

    Raises:
        InputError: if there is no update, or they are not of one layer and device.
    """
    check_kind("updates", updates, list, tuple)
    parts = [lora for update in updates for _, lora in update]
    forms = {(p.A.shape[1], p.B.shape[0], str(p.A.device)) for p in parts}
    if len(forms) != 1 or not all(updates):
        raise InputError(
            f"got adapters for {len(forms)} layers: {sorted(forms)}; stack at least "
            "one, and those of one layer on one device."
        )
    r = max(sum(len(lora.A) for _, lora in update) for update in updates)
    dtype = reduce(torch.promote_types, [p.A.dtype for p in parts])
    A = parts[0].A.new_zeros(len(updates), r, parts[0].A.shape[1], dtype=dtype)
    B = A.new_zeros(len(updates), parts[0].B.shape[0], r)
    scaling = []
    for i, update in enumerate(updates):
        single = len(update) == 1
        scaling.append(update[0][0] * update[0][1].scaling if single else 1.0)
        at = 0
        for share, lora in update:
            span = slice(at, at + len(lora.A))
            A[i, span] = lora.A.detach()
            B[i, :, span] = lora.B.detach() * (1.0 if single else share * lora.scaling)
            at = span.stop
    wide = torch.promote_types(dtype, torch.float32)
    return Adapters(A, B, torch.tensor(scaling, dtype=wide, device=A.device))


def forward(
    x: Shaped[Tensor, "..."],
    y: Output,
    adapters: Adapters,
    indices: Shaped[Tensor, " requests"],
) -> Output:
    r"""Add to the rows of each request its own update: $y_t + s_i B_i A_i x_t$.

    In the dtype of A and B, rounded once to that of y. On a GPU a few rows a request go
    through `operators.lora_batched`; more are a batched matrix product, for which the
    updates are gathered.

    Args:
        x: (requests, ..., in_features), or the same with the first axes flattened.
        y: the output of the frozen layer; not changed.
        adapters: from `stack`.
        indices: the update of each request, int32; -1 for none.

    Raises:
        InputError: if the rows of x cannot be dealt out evenly to the requests.

    Source: Punica (arXiv:2310.18547), section 4; S-LoRA (arXiv:2311.03285), section 5.
    """
    _check_batch(x, y, adapters, indices)
    A, B, scaling = adapters
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    each, left = divmod(len(rows), len(indices))
    if left:
        raise InputError(
            f"x has {len(rows)} rows for {len(indices)} requests; give each request as "
            "many rows as any other."
        )
    if rows.dtype == y.dtype and _for_kernels(rows, adapters, each):
        flat = y.reshape(len(rows), -1).contiguous()
        every = indices.repeat_interleave(each)
        return operators.lora_batched(rows, flat, list(adapters), every).view_as(y)
    # Rows without an adapter are computed too: to leave them out would wait for a GPU.
    chosen = indices.clamp(min=0)
    own = rows.view(len(indices), each, x.shape[-1]).to(A.dtype)
    h = scaling[chosen, None, None].to(A.dtype) * (own @ A[chosen].mT)
    base = y.reshape(len(indices), each, y.shape[-1])
    sums = (base + h @ B[chosen].mT).to(y.dtype)
    return torch.where(indices[:, None, None] < 0, base, sums).view_as(y)


def _check_batch(x: Tensor, y: Tensor, adapters: Adapters, indices: Tensor) -> None:
    check_kind("adapters", adapters, Adapters)
    thin = {"A": (adapters.A, "n r in_features"), "B": (adapters.B, "n out_features r")}
    rows = {"x": (x, "... in_features"), "y": (y, "... out_features")}
    check_tensors({**thin, "scaling": (adapters.scaling, "n"), **rows})
    check_indices("indices", indices)


def _for_kernels(rows: Tensor, adapters: Adapters, each: int) -> bool:
    A, B, scaling = adapters
    one = rows.dtype == A.dtype and scaling.dtype == torch.float32
    small = 0 < each <= launches.FEW and A.shape[1] <= MAX_RANK
    return one and small and launches.available(rows, A, B)


class Group(NamedTuple):
    """Rows of a batch with the same adapters of a method that `stack` cannot take."""

    layer: Adapted[Any]
    rows: Tensor


class Plan(NamedTuple):
    """What the rows of a batch are to a layer.

    Attributes:
        requests: how many there are.
        low_rank: the updates of those that have LoRA, and which one each has.
        groups: of the others.
    """

    requests: int
    low_rank: tuple[Adapters, Tensor] | None
    groups: tuple[Group, ...]


class BatchedLinear(Adapted[nn.Module]):
    r"""A frozen layer in which every request of a batch has adapters of its own.

    $y_t = x_t W^T + b + s_i (x_t A_i^T) B_i^T$ where request i has LoRA; with any other
    method what that method's own layer computes. The base is called once for all.
    """

    plan: Plan | None = None

    def forward(self, input: Input | None = None, *, x: Input | None = None) -> Output:
        """Call the base; its first axis must be that of the requests.

        Raises:
            InputError: if the batch has not as many rows as there are requests.
        """
        x = one_input(input, x)
        least = 1 if isinstance(self.view, Lookup) else 2
        if self.plan and (x.ndim < least or len(x) != self.plan.requests):
            raise InputError(
                f"x has shape {tuple(x.shape)} and {self.plan.requests} requests are "
                "served; give one row a request, in the first axis."
            )
        return super().forward(x)

    def adapt(self, product: Product) -> Output:
        """Return the output, each row with its own adapters."""
        y, plan = product.y, self.plan
        if plan is None:
            return y
        if plan.low_rank is not None:
            y = forward(product.x, y, *plan.low_rank)
        for layer, rows in plan.groups:
            own = layer.adapt(product.rows(rows, plan.requests))
            each = y[..., 0].numel() // plan.requests
            every = y.clone().view(plan.requests, each, y.shape[-1])
            every[rows] = own.reshape(len(rows), each, y.shape[-1])
            y = every.view_as(y)
        return y

    def train(self, mode: bool = True) -> "BatchedLinear":
        """Set the mode of the base; what is served is never dropped."""
        super().train(mode)
        self.training = False
        return self

    @property
    def weight(self) -> Stored:
        """The frozen weight; while requests are served, its dtype and shape alone."""
        if self.plan is None:
            return cast(Tensor, self.base.weight)
        form = self.view.form(self.base)
        like = torch.empty(form.shape, device="meta")
        return Deferred(self._refuse, self.view.turn(like).shape, form)

    def adapt_weight(self, W: Weight) -> Weight:
        """Refuse: each request would need a weight of its own."""
        return self._refuse()

    def delta(self) -> Weight:
        """Refuse, as `adapt_weight` does."""
        return self._refuse()

    @staticmethod
    def check_fits(form: Form, adapter: Any) -> None:
        """Refuse an adapter of another layer, or of a method that cannot be served."""
        _method(adapter).check_fits(form, adapter)

    def change(self, adapter: nn.Module, W: Weight) -> Weight:
        """Refuse, as `adapt_weight` does."""
        return self._refuse()

    def _refuse(self) -> Weight:
        raise InputError(
            "the rows of a batch have different adapters, so there is no one weight; "
            "take a model with one adapter to merge it or to read its weight."
        )


class Traffic(NamedTuple):
    """What has been asked for so far.

    Attributes:
        hits: adapters that a batch needed and the device held.
        loads: those that came from the host.
        moved: bytes of them.
        evictions: adapters that made room.
    """

    hits: int = 0
    loads: int = 0
    moved: int = 0
    evictions: int = 0


class Pool:
    """Adapters by name, on the host and some of them on the device, over one model.

    Args:
        model: its target layers are wrapped in place, and all of it is frozen;
            `inject.unload` puts them back.
        targets: as of `inject.inject`: every layer that some adapter may change.
        budget: bytes of adapters on the device; None: as many as there are.

    Raises:
        InputError: if a target matches nothing, or a layer that cannot be adapted or
            is offloaded; if the budget is no positive number.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str] | str = "all-linear",
        budget: int | None = None,
    ):
        if budget is not None:
            check_integer("budget", budget, 1)
        found = layers_of(model, targets)
        check_served(model, found)
        for name, layer in found.items():
            with naming(name):
                view = weight_view(layer)
                if isinstance(view, Stacked):
                    view.form(layer)
        self.layers = {n: BatchedLinear(m, None) for n, m in found.items()}
        inject.freeze(model)
        replace(model, {id(found[n]): self.layers[n] for n in found})
        self.model, self.budget, self.traffic = model, budget, Traffic()
        self.requests: tuple[dict[str, float], ...] = ()
        self.host: dict[str, dict[str, nn.Module]] = {}
        self.resident: dict[str, dict[str, nn.Module]] = {}  # the oldest use first
        self._pairs: dict[Any, nn.Module] = {}  # what VeRA shares: on the host
        self._placed: dict[tuple[nn.Module, str], nn.Module] = {}

    def add(self, name: str, adapters: Mapping[str, nn.Module]) -> None:
        """Keep another adapter on the host; also while requests are served.

        Args:
            name: what requests call it.
            adapters: by the names of the layers, such as `LoRAConfig(…).adapters(…)`
                or `inject.adapters_of` returns; copied, in the dtype that they have.

        Raises:
            InputError: if the name is taken; if there are none, or one does not fit its
                layer, is not finite, or is of a method that cannot be served.
        """
        check_kind("the name of an adapter", name, str)
        check_kind("adapters", adapters, Mapping)
        if not name:
            raise InputError("the name of an adapter is ''; give it a letter at least.")
        if name in self.host:
            raise InputError(f"there is an adapter {name!r}; remove it first.")
        if not adapters:
            raise InputError(f"adapter {name!r} is empty; give one for some layer.")
        for key, adapter in adapters.items():
            if key not in self.layers:
                raise InputError(
                    f"{key} is none of the layers that serve; choose from "
                    f"{', '.join(self.layers)}."
                )
            with naming(key):
                _check(self.layers[key], adapter)
        self.host[name] = {k: self._on_host(k, a) for k, a in adapters.items()}

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            InputError: for an unknown name, or one that a request of this batch uses.
        """
        self._check_known(name)
        self._check_free(name, "removing")
        self.evict(name)
        del self.host[name]
        held = [a for adapters in self.host.values() for a in adapters.values()]
        kept = {pair for adapter in held for pair in adapter.children()}
        self._pairs = {k: pair for k, pair in self._pairs.items() if pair in kept}
        self._placed = {k: pair for k, pair in self._placed.items() if k[0] in kept}

    def evict(self, name: str) -> None:
        """Free the device's copy of an adapter, if any; the host keeps its own.

        Raises:
            InputError: for an unknown name, or one that a request of this batch uses.
        """
        self._check_known(name)
        self._check_free(name, "evicting")
        self.resident.pop(name, None)

    @contextmanager
    def serve(self, requests: Sequence[Request]) -> Iterator["Pool"]:
        """Give row i of every batch the adapters of request i, until the block ends.

        Raises:
            InputError: if there is no request, or others are served; for an unknown
                name, a share that is not finite, adapters of two methods in a request;
                if those of the batch are more than the budget; if the model was
                unloaded or offloaded. Nothing changes then.
        """
        if self.requests:
            raise InputError(
                f"{len(self.requests)} requests are served already; use switch() to "
                "change one, or end their block first."
            )
        listed = isinstance(requests, Sequence) and not isinstance(requests, str)
        if not listed or not requests:
            raise InputError(f"requests is {requests!r}; give a list, one a row.")
        self._use(requests)
        try:
            yield self
        finally:
            self._use([])

    def switch(self, row: int, request: Request) -> None:
        """Give a row of the batch that is served other adapters, or other shares.

        Raises:
            InputError: if there is no such row; else as `serve`.
        """
        check_integer("row", row)
        if not 0 <= row < len(self.requests):
            raise InputError(
                f"row {row} is none of the {len(self.requests)} requests that are "
                "served; switch() works within serve()."
            )
        changed: list[Request] = list(self.requests)
        changed[row] = request
        self._use(changed)

    def nbytes(self, name: str) -> int:
        """Return the bytes of one adapter; a pair that VeRA shares is not counted."""
        self._check_known(name)
        return sum(map(nbytes_of, self.host[name].values()))

    @property
    def shared_bytes(self) -> int:
        """The bytes on the device of what adapters share: VeRA's pairs, each once."""
        return sum(map(nbytes_of, self._placed.values()))

    @property
    def stacked_bytes(self) -> int:
        """The bytes of the stacks of the batch that is served, copies of its LoRA."""
        plans = [layer.plan for layer in self.layers.values()]
        stacks = [p.low_rank[0] for p in plans if p and p.low_rank]
        return sum(t.nbytes for adapters in stacks for t in adapters)

    def _use(self, requests: Sequence[Request]) -> None:
        wanted = [self._shares(i, request) for i, request in enumerate(requests)]
        if wanted:
            self._check_held()
        names = dict.fromkeys(name for shares in wanted for name in shares)
        there = self._brought(names)
        plans = [
            self._plan(key, layer, wanted, there) if wanted else None
            for key, layer in self.layers.items()
        ]
        # Nothing raises from here on.
        for layer, plan in zip(self.layers.values(), plans, strict=True):
            layer.plan = plan
        new = [name for name in names if name not in self.resident]
        hits, loads, moved, evictions = self.traffic
        hits, loads = hits + len(names) - len(new), loads + len(new)
        moved += sum(map(self.nbytes, new))
        self.traffic = Traffic(hits, loads, moved, evictions)
        self.resident, self.requests = there, tuple(wanted)

    def _shares(self, row: int, request: Request) -> dict[str, float]:
        if request is None:
            return {}
        check_kind(f"request {row}", request, str, Mapping)
        shares = {request: 1.0} if isinstance(request, str) else dict(request)
        for name, share in shares.items():
            self._check_known(name)
            check_number(f"the share of {name!r} in request {row}", share)
        for key in self.layers:
            held = [self.host[n] for n in shares]
            kinds = sorted({type(h[key]).__name__ for h in held if key in h})
            if len(kinds) > 1:
                raise InputError(
                    f"request {row} adds up {' and '.join(kinds)} in {key}; choose "
                    "adapters of one method."
                )
        return shares

    def _brought(self, names: Collection[str]) -> dict[str, dict[str, nn.Module]]:
        """Return what the device holds with these; evict the longest unused first."""
        needed = sum(map(self.nbytes, names))
        if self.budget is not None and needed > self.budget:
            raise InputError(
                f"the adapters of this batch take {needed} bytes and the budget is "
                f"{self.budget}; serve fewer at once, or raise the budget."
            )
        others = [name for name in self.resident if name not in names]
        held = needed + sum(map(self.nbytes, others))
        while self.budget is not None and held > self.budget:
            held -= self.nbytes(others[0])
            del self.resident[others.pop(0)]
            self.traffic = self.traffic._replace(evictions=self.traffic.evictions + 1)
        there = {name: self.resident[name] for name in others}
        for name in names:
            found = self.resident.get(name)
            there[name] = self._on_device(name) if found is None else found
        return there

    def _plan(
        self,
        key: str,
        layer: BatchedLinear,
        wanted: Sequence[Mapping[str, float]],
        there: Mapping[str, Mapping[str, nn.Module]],
    ) -> Plan:
        rows: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for i, shares in enumerate(wanted):
            own = tuple((n, s) for n, s in shares.items() if key in self.host[n])
            if own:
                rows.setdefault(own, []).append(i)
        device = layer.view.form(layer.base).device
        updates: list[list[tuple[float, LoRA]]] = []
        indices, groups = [-1] * len(wanted), []
        for own, places in rows.items():
            found = [(share, there[name][key]) for name, share in own]
            if type(found[0][1]) is LoRA and layer.view.linear:
                for place in places:
                    indices[place] = len(updates)
                updates.append(cast(Any, found))
            else:
                at = torch.tensor(places, device=device)
                groups.append(Group(_acting(layer, found), at))
        chosen = torch.tensor(indices, dtype=torch.int32, device=device)
        low_rank = (stack(updates), chosen) if updates else None
        return Plan(len(wanted), low_rank, tuple(groups))

    def _on_host(self, key: str, adapter: nn.Module) -> nn.Module:
        # From pinned memory a copy to the device does not stop the host.
        layer = self.layers[key]
        form = layer.view.form(layer.base)
        pinned = form.device.type == "cuda"

        def move(t: Tensor) -> Tensor:
            own = t.detach().to("cpu", copy=True)
            return own.pin_memory() if pinned else own

        return copied(adapter, move, lambda pair: self._pair(pair, move))

    def _pair(self, pair: nn.Module, move: Move) -> nn.Module:
        numbers = getattr(pair, "drawn", (-1,))
        known = (numbers, next(pair.buffers()).dtype) if numbers[0] >= 0 else pair
        if known not in self._pairs:
            self._pairs[known] = copied(pair, move)
        return self._pairs[known]

    def _on_device(self, name: str) -> dict[str, nn.Module]:
        return {key: self._there(key, a) for key, a in self.host[name].items()}

    def _there(self, key: str, adapter: nn.Module) -> nn.Module:
        device = self.layers[key].view.form(self.layers[key].base).device

        def move(t: Tensor) -> Tensor:
            return t.to(device, copy=True, non_blocking=True)

        def placed(pair: nn.Module) -> nn.Module:
            at = (pair, str(device))
            if at not in self._placed:
                self._placed[at] = copied(pair, move)
            return self._placed[at]

        return copied(adapter, move, placed)

    def _check_held(self) -> None:
        check_served(self.model, self.layers)
        held = {id(module) for module in self.model.modules()}
        if any(id(layer) not in held for layer in self.layers.values()):
            raise InputError(
                "the model no longer holds this pool's layers; make another Pool of it."
            )

    def _check_known(self, name: str) -> None:
        if name not in self.host:
            choice = f"choose from {', '.join(self.host)}"
            choice = choice if self.host else "the pool holds none: add one first"
            raise InputError(f"there is no adapter {name!r}; {choice}.")

    def _check_free(self, name: str, doing: str) -> None:
        for i, shares in enumerate(self.requests):
            if name in shares:
                raise InputError(
                    f"request {i} uses adapter {name!r}; switch it before {doing} it."
                )


def _method(adapter: nn.Module) -> type[Adapted[Any]]:
    kind = type(adapter)
    if kind not in METHODS:
        raise InputError(
            f"a {kind.__name__} cannot be served on a base that others share; choose "
            f"{', '.join(k.__name__ for k in METHODS)} (`pissa.to_lora` makes PiSSA "
            "LoRA)."
        )
    return METHODS[kind]


def _check(layer: BatchedLinear, adapter: nn.Module) -> None:
    """Refuse what its own method would, and values that are not finite."""
    layer.check_fits(layer.view.form(layer.base), adapter)
    scaling: Any = getattr(adapter, "scaling", 1.0)
    check_number("scaling", scaling)
    if any(tensor.is_meta for tensor in adapter.parameters()):
        raise InputError("the adapter is on the meta device; load its values first.")
    _acting(layer, [(1.0, adapter)])
    for name, tensor in adapter.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} is not finite; repair the adapter first.")


def _acting(
    layer: BatchedLinear, found: Sequence[tuple[float, nn.Module]]
) -> Adapted[Any]:
    """Return the layer of a method in which these adapters are active."""
    acting = _method(found[0][1])(layer.base, None)
    for i, (_, adapter) in enumerate(found):
        acting.add(f"{i}", adapter)
    acting.activate({f"{i}": share for i, (share, _) in enumerate(found)})
    return acting
