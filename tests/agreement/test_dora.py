"""The torch column's DoRA: the reference's bits, its bounds, and LoRA's memory."""

import subprocess
import sys

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
from minipeft.torch.dora import DoRA, DoRAConfig, DoRALinear
from minipeft.torch.inject import activate, add, inject, merge, unload, unmerge
from minipeft.torch.linear import Adapted
from minipeft.torch.lora import LoRAConfig
from tests.agreement.llama import TEXT, llama
from tests.strategies import POWERS_OF_TWO, gaussian_layers, seeds
from tests.tolerance import assert_bits, assert_within, gamma


def tensor(array):
    return torch.from_numpy(np.array(array))


def dora_layer(W, bias, d):
    base = nn.Linear(*W.T.shape, bias=bias is not None)
    with torch.no_grad():
        base.weight.copy_(tensor(W))
        if bias is not None:
            base.bias.copy_(tensor(bias))
    update = lora.LoRA(tensor(d.A), tensor(d.B), d.scaling)
    return DoRALinear(base, DoRA(update, tensor(d.magnitude)))


@st.composite
def exact_layers(draw):
    """Whole numbers, and rows of W + s B A of length 2, 4, 8 or 0: nothing rounds."""
    rng = np.random.default_rng(draw(seeds))
    k, d = draw(st.sampled_from([(4, 3), (5, 8), (7, 4), (6, 6)]))
    r, s = draw(st.integers(1, 3)), draw(st.sampled_from(POWERS_OF_TWO))
    lead = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))

    def draw_integers(*shape):
        return rng.integers(-8, 9, shape).astype(np.float32)

    V = np.zeros((d, k), np.float32)
    for row in V:
        places = rng.permutation(k)[:4]
        row[places] = rng.choice([-1, 1], 4) * rng.choice([0, 1, 2, 4])
    A, B = draw_integers(r, k), draw_integers(d, r)
    W = V - np.float32(s) * (B @ A)
    # Zero among them, and gains far below 1.
    magnitude = draw_integers(d) * rng.choice([1, 2.0**-6], d).astype(np.float32)
    bias = draw(st.sampled_from([None, draw_integers(d)]))
    adapter = reference.DoRA(A, B, s, magnitude)
    return draw_integers(*lead, k), W, bias, adapter, draw_integers(*lead, d)


@given(exact_layers())
def test_the_layer_and_its_merged_weight_agree_bit_for_bit(case):
    x, W, bias, d, _ = case
    layer = dora_layer(W, bias, d)
    expected = reference.forward(x, W, d, bias)
    # Plus zero: which zero a sum of zeros is, depends on its order.
    assert_bits(layer(tensor(x)).detach().numpy() + 0, expected + 0)
    merged = layer.merged().detach().numpy()
    assert_bits(merged + 0, reference.merge(W, d) + 0)
    assert_bits(layer.merge()(tensor(x)).detach().numpy() + 0, expected + 0)


@given(exact_layers())
def test_gradients_agree_bit_for_bit(case):
    x, W, bias, d, grad_y = case
    layer, leaf = dora_layer(W, bias, d), tensor(x).requires_grad_()
    layer(leaf).backward(tensor(grad_y))
    adapter = layer.adapters["default"]
    ours = (leaf, adapter.A, adapter.B, adapter.magnitude)
    grads = reference.backward(grad_y, x, W, d)
    for value, expected in zip(ours, grads, strict=True):
        assert_bits(value.grad.numpy() + 0, expected + 0)
    assert layer.base.weight.grad is None


@given(gaussian_layers, seeds)
def test_values_and_gradients_agree_within_a_bound(t, seed):
    magnitude = np.random.default_rng(seed).standard_normal(len(t.W), np.float32)
    d = reference.DoRA(t.A, t.B, t.scaling, magnitude)
    wide = [np.float64(v) for v in (t.x, t.W, t.A, t.B, magnitude, t.grad_y)]
    x, W, A, B, m, G = wide
    bias = np.zeros(len(W)) if t.bias is None else np.float64(t.bias)
    exact = reference.DoRA(A, B, t.scaling, m)
    norm = reference.row_norm(W, exact.lora)
    update = reference_lora.LoRA(abs(A), abs(B), abs(t.scaling))
    condition = reference.squared_row_norm(abs(W), update) / norm**2
    roundings = sum(W.shape) + 3 * len(A) + G.size // len(W) + 24
    assume(np.all(gamma(roundings) * condition < 0.5))  # else nothing can be said
    size = reference.DoRA(update.A, update.B, update.scaling, abs(m) * condition)

    layer, leaf = dora_layer(t.W, t.bias, d), tensor(t.x).requires_grad_()
    y = layer(leaf)
    y.backward(tensor(t.grad_y))
    adapter = layer.adapters["default"]
    # The base adds its bias before the gain, which then takes it out again.
    extra = (1 + abs(m / norm)) * abs(bias)
    bound = reference._forward(abs(x), abs(W), size, extra, norm)
    exactly = reference.forward(x, W, exact, bias)
    assert_within(y.detach().numpy(), exactly, 2 * gamma(roundings) * bound)
    bounds = [*reference._backward(abs(G), abs(x), abs(W), size, norm)]
    # What is left of z in the output errs by a bias over a gain of 1/16 or more.
    per_row = abs(G).reshape(-1, len(W)).sum(axis=0)
    bounds[3] = bounds[3] * condition + per_row * 34 * abs(bias) / norm
    ours = (leaf, adapter.A, adapter.B, adapter.magnitude)
    grads = reference.backward(G, x, W, exact)
    for value, expected, bound in zip(ours, grads, bounds, strict=True):
        assert_within(value.grad.numpy(), expected, 2 * gamma(roundings) * bound)


@given(gaussian_layers)
def test_a_new_adapter_changes_no_bit(t):
    base = nn.Linear(*t.W.T.shape, bias=t.bias is not None)
    expected = base(tensor(t.x)).detach().numpy()
    adapter = dora.init(None, base.weight.detach(), len(t.A), 16)
    layer = DoRALinear(base, adapter)
    assert_bits(layer(tensor(t.x)).detach().numpy(), expected)
    assert_bits(layer.merged().detach().numpy(), base.weight.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_every_bit_back_however_often(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    inject(model, DoRAConfig(r=4, alpha=8), ["0", "1"])
    _train_a_little(model)
    x = torch.randn(3, 24, dtype=dtype)
    y = model(x)
    for _ in range(5):
        merged = merge(model)(x)
        assert not torch.equal(merged, model[1].base(model[0].base(x)))
        unmerge(model)
    assert torch.equal(model(x), y)
    for old, new in zip(before, unload(model).parameters(), strict=True):
        assert torch.equal(old, new)


def _train_a_little(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Adapted):
                for p in layer.adapters.parameters():
                    p += 0.1 * torch.randn(p.shape, generator=generator)


def _kept(model, x):
    """Bytes that autograd keeps between forward and backward, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = model(x)  # alive until everything is counted: storages are told by address
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
    # The outputs that the next layer does not keep as they are: the last one; in 16
    # bits all, of which the next layer keeps a wider copy. And numbers for each row.
    outputs = 1 if dtype == torch.float32 else 6
    assert ours <= theirs + outputs * x.nbytes + 6 * 4 * 256 * 4
    weights = sum(p.nbytes for p in stacks[0].parameters())
    if dtype == torch.float32:
        assert weights + ours <= 1.05 * (weights + theirs)


def test_the_norm_never_forms_the_update():
    # 2,048 rows of W + s B A would be 8 MB; the largest tensor made is a block of rows.
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


@pytest.mark.parametrize("kind", ["embedding", "conv1d"])
def test_other_layouts_are_the_dense_layer_turned(kind):
    torch.manual_seed(0)
    if kind == "embedding":
        base, x = nn.Embedding(12, 7), torch.tensor([[1, 5], [0, 11]])
        rows = nn.functional.one_hot(x, 12).float()
    else:
        from transformers.pytorch_utils import Conv1D

        base, x = Conv1D(7, 12), torch.randn(2, 3, 12)
        rows = x
    model = nn.Sequential(base)
    inject(model, DoRAConfig(r=3, alpha=7), ["0"])
    _train_a_little(model)
    layer = model[0]
    adapter = layer.adapters["default"]
    d = reference.DoRA(
        *(p.detach().double().numpy() for p in (adapter.A, adapter.B)),
        adapter.scaling,
        adapter.magnitude.detach().double().numpy(),
    )
    W = layer.W.detach().double().numpy()
    bias = getattr(base, "bias", None)
    b = np.zeros(7) if bias is None else bias.detach().double().numpy()
    exact = reference.forward(rows.double().numpy(), W, d, b)
    size = reference.forward(
        abs(rows.double().numpy()), abs(W), reference.DoRA(*map(abs, vars(d).values()))
    )
    norm = reference.row_norm(W, d.lora)
    absolute = reference.DoRA(*map(abs, vars(d).values())).lora
    condition = reference.squared_row_norm(abs(W), absolute) / norm**2
    size = size * np.sqrt(condition) * condition  # the norm of V, not of its bound
    bound = 2 * gamma(12 + 9 + 24) * (size + 2 * abs(b))
    assert_within(layer(x).detach().numpy(), exact, bound)
    assert_within(layer.merge()(x).detach().numpy(), exact, bound)


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
    size = 6 * (abs(W) + abs(merged["default"]) + abs(merged["other"]))
    ours = model[0].merged().detach().numpy()
    assert_within(ours, expected.numpy(), gamma(16) * size.numpy())
    x = torch.randn(4, 9)
    y, y_merged = model(x).detach(), merge(model)(x).detach()
    bias = abs(model[0].base.bias.detach())
    bound = gamma(64) * (abs(x) @ size.T + 8 * bias).numpy()
    assert_within(y.numpy(), y_merged.numpy(), bound)
    unmerge(model)
    activate(model, {})
    assert_bits(model[0].merged().detach().numpy(), W.numpy())


def test_dropout_spares_the_base_and_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    inject(model, DoRAConfig(r=2, alpha=4, dropout=0.5), ["0"])
    x = torch.randn(5, 8)
    base = model[0].base(x)
    assert torch.equal(model.train()(x), base)  # B is zero: there is nothing to drop
    _train_a_little(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


COMPILED = """
import sys, torch
from torch import nn
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import inject
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6))
inject(model, DoRAConfig(r=2, alpha=4), ["0", "1"])
trained = [p for p in model.parameters() if p.requires_grad]
with torch.no_grad():
    for p in trained:
        p += torch.randn(p.shape)
x, found = torch.randn(3, 8), []
for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
    model.zero_grad()
    run(x).square().sum().backward()
    found.append([p.grad.clone() for p in trained])
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_a_compiled_layer_does_the_same(tmp_path):
    # In a process of its own: the checks of every annotation cannot be compiled.
    file = tmp_path / "gradients.pt"
    subprocess.run([sys.executable, "-c", COMPILED, str(file)], check=True)
    for eager, compiled in zip(*torch.load(file), strict=True):
        largest = float(eager.abs().max())
        assert_within(compiled.numpy(), eager.numpy(), gamma(256) * largest)


def test_a_model_learns_and_its_adapter_comes_back():
    model = llama()
    inject(model, DoRAConfig(r=2, alpha=4), ["q_proj", "down_proj"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    first = model(TEXT, labels=TEXT).loss
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert model(TEXT, labels=TEXT).loss < first
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("r", [0, 5])
def test_a_rank_out_of_range_is_refused_and_the_layer_named(r):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=rf"^0: r is {r}; choose 1 to 4"):
        inject(model, DoRAConfig(r=r, alpha=4), ["0"])
    assert isinstance(model[0], nn.Linear)
