"""The torch column's DoRA: its norm, its error bounds, and the memory of LoRA."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import dora as reference
from minipeft.reference import lora as reference_lora
from minipeft.torch import dora, lora
from minipeft.torch.adapted import Adapted
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import activate, add, inject
from minipeft.torch.linear import Product, WeightView, frozen
from minipeft.torch.lora import LoRAConfig
from tests.agreement.on_torch import module, run
from tests.bounds import assert_both_within, counted, roundings
from tests.parametrizations import ROWS
from tests.tolerance import assert_bits, assert_sums, assert_within, gamma

DORA = next(row for row in ROWS if row.name == "dora")


@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "other devices"])
@given(data=st.data())
def test_values_and_gradients_agree_within_a_bound(data, looks):
    case = DORA.case(data, "gaussians")  # the case draws its norm; DoRA computes it
    wide = [np.float64(v) for v in (case.x, case.base, case.grad_y)]
    x, W, G = wide
    d = case.adapter
    A, B, m = (np.float64(v) for v in (d.A, d.B, d.magnitude))
    bias = np.zeros(len(W)) if case.bias is None else np.float64(case.bias)
    exact = reference.DoRA(A, B, d.scaling, m)
    norm = reference.row_norm(W, exact.lora)
    size = reference_lora.LoRA(abs(A), abs(B), abs(d.scaling))
    condition = reference.squared_row_norm(abs(W), size) / norm**2
    terms = case.counted()
    square = reference.squared_row_norm(terms.base, terms.adapter.lora)
    # Besides both formulas: a root, a quotient, and the bias added to z and subtracted.
    n = roundings(terms.forward()) + roundings(square) + 4
    assume(np.all(gamma(n) * condition < 0.5))  # a larger condition leaves no bound
    size = reference.DoRA(size.A, size.B, size.scaling, abs(m) * condition)
    # The base adds its bias before the gain, and the layer subtracts it again.
    extra = (1 + abs(m / norm)) * abs(bias)
    allowed = reference._forward(abs(x), abs(W), size, extra, norm)
    with mock.patch.object(dora, "_looks", return_value=looks):
        y, *found = run(module(case), case)
    exactly = reference.forward(x, W, exact, bias)
    assert_within(y, exactly, 2 * gamma(n) * allowed)
    n = max(map(roundings, terms.backward())) + roundings(square) + 4
    bounds = [*reference._backward(abs(G), abs(x), abs(W), size, norm)]
    # The layer computes z from the output as (y - b) / g where g is 1/16 or more: each
    # of y and y - b errs by a rounding of the bias, times 16, and z - b by one more.
    per_row = abs(G).reshape(-1, len(W)).sum(axis=0)
    bounds[3] = bounds[3] * condition + per_row * 2 * (16 + 1) * abs(bias) / norm
    grads = reference.backward(G, x, W, exact)
    for ours, theirs, allowed in zip(found, grads, bounds, strict=True):
        assert_within(ours, theirs, 2 * gamma(n) * allowed)


def _train_a_little(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Adapted):
                for p in layer.adapters.parameters():
                    p += 0.1 * torch.randn(p.shape, generator=generator)


def _kept(model, x):
    """Return the bytes that autograd keeps for the backward pass, without weights."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(saved):
        storage = saved.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = model(x)  # y stays alive, so that no storage is freed
    del y
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_what_lora_keeps(dtype):
    x = torch.randn(64, 256, dtype=dtype)
    stacks = []
    for config in (LoRAConfig(r=4, alpha=8), DoRAConfig(r=4, alpha=8)):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).to(dtype)
        stacks.append(inject(model, config, [str(i) for i in range(6)]))
    ours, theirs = _kept(stacks[1], x), _kept(stacks[0], x)
    # DoRA also keeps the outputs that the next layer does not keep: in float32 the last
    # output, in 16 bits all of them, because the next layer keeps a float32 copy. It
    # also keeps a few numbers for each row.
    outputs = 1 if dtype == torch.float32 else 6
    assert ours <= theirs + outputs * x.nbytes + 6 * 4 * 256 * 4
    weights = sum(p.nbytes for p in stacks[0].parameters())
    if dtype == torch.float32:
        assert weights + ours <= 1.05 * (weights + theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_the_cpu_a_step_keeps_one_output_more_a_layer_and_never_looks(dtype):
    """On the device `meta` tensors have no values, so a look at them fails."""
    x, kept = torch.randn(64, 256, dtype=dtype, device="meta"), []
    for config in (LoRAConfig(r=4, alpha=8), DoRAConfig(r=4, alpha=8)):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))).to(dtype)
        model = inject(model, config, [str(i) for i in range(6)]).to("meta")
        kept.append(_kept(model, x))
        model(x).sum().backward()
    assert kept[0] < kept[1] <= kept[0] + 6 * (x.nbytes + 4 * 256 * 4)


def test_the_norm_never_forms_the_update():
    # 2,048 rows of W + s B A would take 8 MB; the largest tensor is a block of these
    # rows.
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                largest = max(largest, out.numel())
            return out

    W = torch.randn(2048, 1024)
    new = lora.init(None, 1024, 2048, 4, 8)
    with Watch():
        dora.row_norm(W, new)
    assert 0 < largest <= dora.ROWS * 1024


def test_shares_interpolate_between_the_base_and_the_adapter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5))
    W = model[0].weight.detach().clone()
    inject(model, DoRAConfig(r=2, alpha=4), ["0"])
    add(model, DoRAConfig(r=3, alpha=5), "other")
    _train_a_little(model)
    merged = {}
    for name in ("default", "other"):
        activate(model, name)
        merged[name] = model[0].merged().detach()
    activate(model, {"default": 0.5, "other": -2.0})
    expected = W + 0.5 * (merged["default"] - W) - 2 * (merged["other"] - W)
    ours = model[0].merged().detach().numpy()
    base, one, other = (counted(V.numpy()) for V in (W, *merged.values()))
    formula = base + (one - base) * 0.5 + (other - base) * 2
    assert_both_within(ours, expected.numpy(), formula, formula)
    activate(model, {})
    assert_bits(model[0].merged().detach().numpy(), W.numpy())


def rows_of_length_two(rows, columns):
    """Return integers whose rows have length 2: four entries of 1 or -1."""
    W = torch.zeros(rows, columns)
    for row in W:
        row[torch.randperm(columns)[:4]] = torch.randint(0, 2, (4,)) * 2.0 - 1
    return W


def reversing(W, r):
    """Return an adapter that reverses r rows of W and trains lengths of 1, 2 or 4.

    Sums of integers, norms of 2 and gains of 1/2, 1 and 2 are exact in floats.
    """
    update = lora.LoRA(-W[:r], torch.eye(len(W), r).to(W), 2.0)
    return dora.DoRA(update, 2.0 ** torch.randint(0, 3, (len(W),)).to(W))


def test_several_adapters_merge_to_the_same_bits():
    torch.manual_seed(0)
    W = rows_of_length_two(5, 9)
    layer = dora.DoRALinear(frozen(W, torch.arange(-2.0, 3.0)), reversing(W, 2))
    layer.add("other", reversing(W, 3))
    layer.activate({"default": 0.5, "other": -2.0})
    x = torch.randint(-8, 9, (4, 9)).float()
    y = layer(x).detach().numpy()
    layer.merge()
    assert_sums(layer(x).detach().numpy(), y)


def test_the_sum_of_several_adapters_is_rounded_once():
    torch.manual_seed(0)
    base = nn.Linear(48, 32).bfloat16()
    adapters = [dora.init(None, base.weight, 4, 8.0) for _ in range(2)]
    for adapter in adapters:
        nn.init.normal_(adapter.B)
    layer, x = dora.DoRALinear(base, adapters[0]), torch.randn(7, 48).bfloat16()
    layer.add("other", adapters[1])
    layer.activate({"default": 0.5, "other": -2.0})
    product = Product(WeightView(), base, [x, base.weight, base.bias], {})
    one, other = (adapter(product, torch.float32) for adapter in adapters)
    assert one.dtype == other.dtype == torch.float32
    exact = 2.5 * product.y.float() + 0.5 * one - 2.0 * other
    assert torch.equal(layer(x), exact.bfloat16())


def test_dropout_spares_the_base_and_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    inject(model, DoRAConfig(r=2, alpha=4, dropout=0.5), ["0"])
    x = torch.randn(5, 8)
    base = model[0].base(x)
    assert torch.equal(model.train()(x), base)  # B is zero, so dropout changes nothing
    _train_a_little(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("r", [0, 5])
def test_a_rank_out_of_range_is_refused_and_the_layer_named(r):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=rf"^0: r is {r}; choose 1 to 4"):
        inject(model, DoRAConfig(r=r, alpha=4), ["0"])
    assert isinstance(model[0], nn.Linear)


CHANGED = {
    "output": (lambda _, y: y.add_(1), r"^the model changes the output .* in place"),
    "magnitude": (
        lambda layer, _: layer.adapters["default"].magnitude.mul_(2),
        r"^the magnitude or the bias .* was changed between forward and backward, .*; "
        "take the optimizer's step, or load weights, after backward",
    ),
    "bias": (lambda layer, _: layer.base.bias.mul_(2), r"^the magnitude or the bias"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_changed_before_backward_is_named(what):
    change, sentence = CHANGED[what]
    model = inject(nn.Sequential(nn.Linear(6, 5)), DoRAConfig(2, 4), ["0"])
    y = model(torch.ones(3, 6))
    with torch.no_grad():
        change(model[0], y)
    with pytest.raises(InputError, match=sentence):
        y.sum().backward()
