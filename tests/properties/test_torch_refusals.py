"""A layer refuses parts of another layer, and layers that are not linear."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

from minipeft.errors import InputError
from minipeft.torch import dora, experts, ia3, linear, lora, prefix, vera
from minipeft.torch.dora import DoRA, DoRALinear
from minipeft.torch.ia3 import IA3, IA3Config
from minipeft.torch.inject import adapted, inject, merge, unload
from minipeft.torch.linear import frozen
from minipeft.torch.lora import LoRA, LoRAConfig, LoRALinear
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.vera import Projections, VeRA
from tests.agreement.on_torch import CONFIGS
from tests.agreement.test_dora import reversing, rows_of_length_two
from tests.operands import annotations_off
from tests.tolerance import assert_sums, assert_within, gamma

IN, OUT, R = 6, 5, 2


def make_pair():
    return Projections(0, R, IN, OUT)


def make_vera(d, b):
    return VeRA(d, b, make_pair())


def network():
    return prefix.Reparametrization(2, 3, 6, 10)


def with_part(module, name, part):
    """Return the module with another tensor in place of one of its own."""
    (dict(module.named_parameters()) | dict(module.named_buffers()))[name].data = part
    return module


ROWS = CONFIGS | {
    "ia3": IA3Config(),
    "ia3 input": IA3Config(["0"]),
    "pissa": PiSSAConfig(R, 4.0),
}
DAMAGES = {
    "one row": lambda part: part[:1],
    "one too many": lambda part: torch.cat([part, part[:1]]),
    "one column": lambda part: part[..., :1] if part.dim() > 1 else part[None, :1],
    "transposed": lambda part: part.T if part.dim() > 1 else part[:, None],
    "one axis": lambda part: part.flatten()[:1] if part.dim() > 1 else part[None],
    "a number": lambda part: part.flatten()[0],
}


def base():
    return frozen(torch.ones(OUT, IN), torch.ones(OUT))


def new_adapter(row):
    torch.manual_seed(0)
    return ROWS[row].adapters({"0": frozen(torch.randn(OUT, IN), torch.ones(OUT))})["0"]


def floats(adapter):
    """Return the parameters of an adapter, and the tensors that stay as they are."""
    parts = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    return {name: part for name, part in parts.items() if part.is_floating_point()}


def cases():
    """Yield the parts to damage; r is free where a single matrix has that axis."""
    for row in ROWS:
        parts = floats(new_adapter(row))
        for name, part in parts.items():
            free = ("one row", "one too many") if len(parts) < part.dim() else ()
            for damage, change in DAMAGES.items():
                if damage not in free and change(part).shape != part.shape:
                    yield row, name, damage


each_case = pytest.mark.parametrize(("row", "name", "damage"), list(cases()))


def damaged(row, name, damage):
    """Return a correct layer of the row, and then exchange a part of its adapter."""
    adapter = new_adapter(row)
    layer = ROWS[row].wrapper(base(), adapter)
    part = floats(adapter)[name]
    part.data = DAMAGES[damage](part.detach()).clone()
    return layer, adapter


@each_case
def test_a_part_of_another_layer_is_refused_in_every_way_in(row, name, damage):
    layer, adapter = damaged(row, name, damage)
    for attempt in (
        lambda: layer(torch.ones(3, IN)),
        layer.merged,
        layer.merge,
        layer.delta,
        lambda: layer.add("other", adapter),
        lambda: type(layer)(base(), adapter),
    ):
        with (
            annotations_off(),
            pytest.raises(InputError, match=r"has shape \(.*it must be \("),
        ):
            attempt()


@pytest.mark.parametrize(
    "attempt",
    [
        lambda W, wrong: dora.row_norm(W, wrong),
        lambda W, wrong: dora.merge(W, DoRA(wrong, torch.ones(OUT))),
        lambda W, wrong: dora.over_norm(torch.ones(OUT), torch.ones(1)),
        lambda W, wrong: vera.delta(make_vera(torch.ones(1), torch.ones(OUT)), IN),
        lambda W, wrong: frozen(W, torch.ones(1)),
        lambda W, wrong: DoRA(LoRA(torch.ones(R, IN), W[:, :R], 2.0), torch.ones(1)),
        lambda W, wrong: lora.delta(with_part(wrong, "B", torch.ones(OUT))),
        lambda W, wrong: vera.init(with_part(make_pair(), "B", torch.ones(1, R)), OUT),
        lambda W, wrong: prefix.expand(with_part(network(), "down.bias", W[0, :1])),
        lambda W, wrong: prefix.expand(with_part(network(), "up.weight", W)),
    ],
)
def test_functions_refuse_what_is_not_their_layer_s(attempt):
    wrong = LoRA(torch.ones(R, IN), torch.ones(1, R), 2.0)
    with annotations_off(), pytest.raises(InputError, match=r"has shape \(.*must be"):
        attempt(torch.ones(OUT, IN), wrong)


def test_a_bias_that_would_broadcast_is_refused():
    layer = LoRALinear(base(), new_adapter("lora"))
    layer.base.bias = nn.Parameter(torch.ones(1))
    for attempt in (lambda: layer(torch.ones(3, IN)), layer.merge):
        with pytest.raises(InputError, match=r"bias has shape \(1,\)"):
            attempt()
    q = QuantizedLinear.from_linear(base(), blocksize=2).q
    with annotations_off(), pytest.raises(InputError, match=r"bias has shape \(1,\)"):
        QuantizedLinear(q, torch.ones(1))


def some_experts():
    A, B = torch.ones(3, R, IN), torch.ones(3, OUT, R)
    base = experts.Experts(torch.ones(3, OUT, IN), torch.ones(3, OUT))
    update = experts.ExpertsLoRA({"W": experts.StackLoRA(A, B, 2.0)})
    return experts.LoRAExperts(base, update)


@pytest.mark.parametrize(
    "damage", ["one row", "one too many", "one column", "a number"]
)
@pytest.mark.parametrize(
    "name", ["adapters.default.W.A", "adapters.default.W.B", "base.bias"]
)
def test_a_part_of_other_experts_is_refused_in_every_way_in(name, damage):
    layer, x = some_experts(), torch.ones(4, IN)
    part = dict(layer.named_parameters())[name]
    part.data = DAMAGES[damage](part.detach()).clone()
    attempts = [lambda: layer(x, torch.tensor([0, 1, 2, 1]))]
    if "adapters" in name:
        attempts += [layer.merge, layer.merged_stacks]
    for attempt in attempts:
        with annotations_off(), pytest.raises(InputError, match=r"has shape \(|r is 0"):
            attempt()


@pytest.mark.parametrize("side", ["inside", True])
def test_a_side_that_no_layer_has_is_refused(side):
    with annotations_off(), pytest.raises(InputError, match=f"side is {side!r}"):
        IA3(torch.ones(OUT), side)
    assert ia3.init(OUT).side == "output"


@pytest.mark.parametrize(("alpha", "r"), [(4.0, 0), (4.0, -1), (float("nan"), 2)])
def test_a_scaling_that_is_no_number_is_refused(alpha, r):
    with pytest.raises(InputError, match=r"r is|alpha is"):
        lora.scaling(alpha, r)


# --- layers whose weight is something else -------------------------------------------


def float8():
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), False)
    return layer


def removed_by_a_new_style():
    return parametrizations.spectral_norm(nn.Linear(IN, OUT)).eval()


SOMETHING_ELSE = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)),
    "spectral_norm": removed_by_a_new_style,
    "spectral_norm of old": lambda: utils.spectral_norm(nn.Linear(IN, OUT)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(IN, OUT), "weight", 0.5),
    "pruned embedding": lambda: prune.l1_unstructured(
        nn.Embedding(IN, OUT), "weight", 0.5
    ),
    "lazy": lambda: nn.LazyLinear(OUT),
    "float8": float8,
}
SENTENCES = {"lazy": "has no weight yet", "float8": "dtype torch.float8_e4m3fn"}


@pytest.mark.parametrize("kind", list(SOMETHING_ELSE))
def test_a_layer_whose_weight_is_something_else_is_refused_at_once(kind):
    model = nn.ModuleDict({"up": nn.Linear(IN, IN), "down": SOMETHING_ELSE[kind]()})
    sentence = SENTENCES.get(kind, "is no parameter: something computes it")
    with pytest.raises(InputError, match=f"^down: .*{sentence}"):
        inject(model, LoRAConfig(2, 4.0), ["up", "down"])
    assert not adapted(model)
    assert all(p.requires_grad for p in model["up"].parameters())


@pytest.mark.parametrize("change", [parametrizations.weight_norm, prune.identity])
def test_a_weight_that_something_computes_since_is_not_merged(change):
    model = inject(nn.Sequential(nn.Linear(IN, OUT)), LoRAConfig(2, 4.0), ["0"])
    change(model[0].base, "weight")
    with pytest.raises(InputError, match="is no parameter: something computes it"):
        merge(model)
    assert model[0].merged_weight is None


def test_a_pass_says_that_something_computes_the_weight_since():
    model = inject(nn.Sequential(nn.Linear(IN, OUT)), LoRAConfig(2, 4.0), ["0"])
    parametrizations.weight_norm(model[0].base)
    with pytest.raises(InputError, match="is no parameter: something computes it"):
        model(torch.ones(1, IN))


def test_a_bias_that_something_computes_is_not_scaled():
    model = nn.Sequential(prune.identity(nn.Linear(IN, OUT), "bias"))
    with pytest.raises(
        InputError, match=r"^0: the bias of this Linear is no parameter"
    ):
        inject(model, IA3Config(), ["0"])
    assert not adapted(model)
    inject(model, IA3Config(["0"]), ["0"])  # leaves the bias alone
    assert unload(merge(model))(torch.ones(1, IN)).shape == (1, OUT)


def test_what_an_initializer_would_write_to_a_computed_weight_is_refused():
    model = inject(nn.Sequential(nn.Linear(IN, OUT)), LoRAConfig(2, 4.0), ["0"])
    with pytest.raises(InputError, match="what is written to it would be lost"):
        nn.init.normal_(model[0].weight)


def test_a_view_of_a_layer_is_known_before_it_is_wrapped():
    with pytest.raises(InputError, match="Conv2d has no weight matrix"):
        linear.weight_of(nn.Conv2d(1, 1, 1))


# --- gradients of gradients ----------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [1.0, 2.0**-6])
def test_second_derivatives_of_dora_are_those_of_its_formula(bias, gain, monkeypatch):
    """With a gain below 1/16 the layer stores z by columns. All sums are exact."""
    torch.manual_seed(0)
    W = rows_of_length_two(OUT, IN).double()
    b = torch.arange(-2.0, OUT - 2, dtype=torch.float64) if bias else None
    x = torch.randint(-3, 4, (3, IN)).double()
    adapter = reversing(W, R)
    with torch.no_grad():
        adapter.magnitude[1:3] *= gain
    layer = DoRALinear(frozen(W, b), adapter)
    parts = list(layer.adapters.parameters())
    directions = [torch.randint_like(p, -2, 3) for p in parts]

    def second():
        loss = (layer(x) ** 3).sum()
        first = torch.autograd.grad(loss, parts, create_graph=True)
        slope = sum((a * v).sum() for a, v in zip(first, directions, strict=True))
        return torch.autograd.grad(slope, parts)

    ours = second()
    monkeypatch.setattr(dora, "_rescale", plainly)
    for mine, right in zip(ours, second(), strict=True):
        assert torch.any(right != 0)
        assert_sums(mine.numpy(), right.numpy())


def test_second_derivatives_of_dora_are_finite_where_a_row_is_zero():
    W = torch.ones(OUT, IN)
    W[1] = 0
    layer = DoRALinear(frozen(W), new_adapter("dora"))
    parts = list(layer.adapters.parameters())
    loss = (layer(torch.ones(3, IN)) ** 3).sum()
    first = torch.autograd.grad(loss, parts, create_graph=True)
    second = torch.autograd.grad(sum(slope.sum() for slope in first), parts)
    assert all(torch.isfinite(slope).all() for slope in [*first, *second])


def plainly(z, magnitude, norm, bias, dtype):
    return dora._rescaled(z, dora.over_norm(magnitude, norm), bias).to(dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_holds_the_norm_of_dora_constant_as_backward_does():
    layer = DoRALinear(base().double(), new_adapter("dora").double())
    torch.manual_seed(0)
    start = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    along = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    x = torch.randn(3, IN, dtype=torch.float64)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradient = torch.func.grad(loss)(start)
    _, forward = torch.func.jvp(loss, (start,), (along,))
    products = torch.cat([(gradient[n] * along[n]).flatten() for n in start])
    # A float64 has 2**29 times the resolution of a float32, so the few hundred
    # roundings on both sides are less than one of a float32.
    bound = gamma(1) * float(products.abs().sum())
    assert_within(float(forward), float(products.sum()), bound)
