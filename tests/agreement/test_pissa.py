"""The torch column's PiSSA: the split, the bits of its layer, the restored base."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import lora as reference_lora
from minipeft.reference import pissa as reference
from minipeft.torch import inject as surgery
from minipeft.torch import lora, pissa
from minipeft.torch.pissa import PiSSA, PiSSAConfig, PiSSALinear, Sketch
from tests.agreement.llama import TEXT, llama
from tests.properties.test_pissa import norm, problems, rounding, there_and_back
from tests.strategies import integer_layers, seeds
from tests.tolerance import assert_bits, assert_within, gamma, svd_roundings


def tensor(array):
    return torch.from_numpy(array.copy())


def assert_same(actual, expected):
    """Check for the same bits; signs of zeros may differ, as sums have other orders."""
    assert_bits(actual + np.float32(0), expected + np.float32(0))


def given_layer(t, data):
    """Return a PiSSA layer of integers whose adapter was trained to another one."""
    rng = np.random.default_rng(data.draw(seeds))
    A, B = (rng.integers(-8, 9, a.shape).astype(np.float32) for a in (t.A, t.B))
    base = nn.Linear(*t.W.T.shape, bias=t.bias is not None)
    adapter = PiSSA(lora.LoRA(tensor(t.A), tensor(t.B), t.scaling))
    with torch.no_grad():
        base.weight.copy_(tensor(t.W))
        if t.bias is not None:
            base.bias.copy_(tensor(t.bias))
        adapter.A.copy_(tensor(A)), adapter.B.copy_(tensor(B))
    initial = reference_lora.LoRA(t.A, t.B, t.scaling)
    return PiSSALinear(base, adapter), reference_lora.LoRA(A, B, t.scaling), initial


@given(integer_layers, st.data())
def test_the_layer_is_lora_on_the_residual_bit_for_bit(t, data):
    layer, trained, initial = given_layer(t, data)
    residual = reference.residual(t.W, initial)
    expected = reference_lora.forward(t.x, residual, trained, t.bias)
    assert_same(layer(tensor(t.x)).detach().numpy(), expected)
    assert_same(
        layer.merged().detach().numpy(), reference_lora.merge(residual, trained)
    )


@given(integer_layers, st.data())
def test_gradients_agree_bit_for_bit(t, data):
    layer, trained, initial = given_layer(t, data)
    x = tensor(t.x).requires_grad_()
    layer(x).backward(tensor(t.grad_y))
    residual = reference.residual(t.W, initial)
    grads = reference_lora.backward(t.grad_y, t.x, residual, trained)
    adapter = layer.adapters["default"]
    for ours, expected in zip((x, adapter.A, adapter.B), grads, strict=True):
        assert_same(ours.grad.numpy(), expected)


@given(integer_layers, st.data())
def test_the_conversion_agrees_bit_for_bit(t, data):
    layer, trained, initial = given_layer(t, data)
    adapter = layer.adapters["default"]
    ours = pissa.to_lora(adapter, adapter.initial)
    expected = reference.to_lora(trained, initial)
    assert_bits(ours.A.detach().numpy(), expected.A)
    assert_bits(ours.B.detach().numpy(), expected.B)
    plain = lora.LoRALinear(layer.base, ours)(tensor(t.x)).detach()
    assert_same(plain.numpy(), layer(tensor(t.x)).detach().numpy())


@given(problems())
def test_the_split_is_as_good_as_the_reference(t):
    W, r, alpha = t
    expected, _ = reference.init(W, r, alpha)
    base, initial = pissa.init(tensor(W), r, alpha)
    assert initial.scaling == alpha / r
    assert abs(norm(base.numpy()) - norm(expected)) <= 2 * rounding(W)


@given(problems())
def test_where_the_singular_values_part_the_adapters_agree(t):
    W, r, alpha = t
    S = np.append(np.linalg.svd(W.astype(np.float64), compute_uv=False), 0)
    gap = S[r - 1] - S[r]
    assume(gap > 0.05 * S[0])
    ours = lora.delta(pissa.init(tensor(W), r, alpha)[1]).detach().numpy()
    _, initial = reference.init(W, r, alpha)
    # Davis and Kahan: subspaces turn by at most the error of the matrix over the gap.
    bound = 4 * rounding(W) * (1 + S[0] / gap)
    assert norm(ours - reference_lora.delta(initial)) <= bound


@given(problems(), seeds)
def test_the_randomized_split_is_exact_too_and_reproducible(t, seed):
    W, r, alpha = t
    sketch = Sketch(seed, oversampling=0, iterations=1)
    base, initial = pissa.init_randomized(tensor(W), r, alpha, sketch)
    again, repeated = pissa.init_randomized(tensor(W), r, alpha, sketch)
    assert_bits(base.numpy(), again.numpy())
    assert_bits(initial.A.detach().numpy(), repeated.A.detach().numpy())
    A, B = (M.detach().numpy() for M in (initial.A, initial.B))
    total = base + lora.delta(initial).detach()
    split = reference_lora.LoRA(A, B, initial.scaling)
    assert_within(total.numpy(), W, there_and_back(W, base.numpy(), split))
    best = norm(reference.init(W, r, alpha)[0])
    assert best - rounding(W) <= norm(base.numpy()) <= norm(W) + rounding(W)


def test_the_seed_chooses_the_directions_that_are_tried():
    # Without W W^T every direction of an identity is as good as any other.
    found = [
        lora.delta(pissa.init_randomized(torch.eye(6), 2, 2.0, Sketch(seed, 0, 0))[1])
        for seed in (0, 1, 0, 2)
    ]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[3])
    assert all(abs(d).max() < 1 for d in found)  # no direction is an axis


@given(problems())
def test_both_factors_carry_the_same_share(t):
    W, r, alpha = t
    initial = pissa.principal_randomized(tensor(W), r, alpha / r)
    A, B = (M.detach().numpy() for M in (initial.A, initial.B))
    rows, columns = np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0)
    # Two QR factorizations and the eigenvectors of a Gram matrix, each as accurate as
    # an SVD; their errors are relative to the largest norm. One product on each side.
    roundings = 2 * 3 * svd_roundings(W) + 2
    assert_within(rows, columns, gamma(roundings) * columns.max())


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_two_passes_of_krylov_are_nearer_than_niter_4(decay):
    # peft's pissa_niter_4 calls this, with the same number of directions.
    torch.manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, 192)).Q for n in (256, 192))
    W = (U * torch.arange(1, 193) ** -decay) @ V.T if decay else torch.randn(256, 192)
    U, S, V = torch.svd_lowrank(W, 16, niter=4)
    theirs = (W - (U * S) @ V.T).norm()
    assert pissa.init_randomized(W, 16, 32)[0].norm() < theirs


def test_a_weight_of_zeros_is_split_into_zeros():
    base, initial = pissa.init_randomized(torch.zeros(6, 5), 2, 4)
    assert not base.any()
    assert not initial.A.any()
    assert not initial.B.any()


def adapted(dtype=torch.float32, sketch=pissa.SKETCH, dropout=0.0):
    model = llama().to(dtype)
    original = copy.deepcopy(model)
    config = PiSSAConfig(r=4, alpha=16, sketch=sketch, dropout=dropout)
    return surgery.inject(model, config, ["q_proj", "down_proj"]), original


def train_a_little(model):
    optimizer = torch.optim.AdamW(surgery.trainable_parameters(model), lr=0.05)
    for _ in range(3):
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    return model(TEXT).logits.float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sketch", [None, Sketch(7)])
def test_a_new_adapter_changes_nothing_bit_for_bit(dtype, sketch):
    model, original = adapted(dtype, sketch)
    assert_bits(logits(model), logits(original))
    assert_bits(logits(surgery.merge(model)), logits(original))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit(dtype):
    # Another library once switched the adapter off and computed with the residual.
    model, original = adapted(dtype)
    train_a_little(model)
    trained = logits(model)
    assert np.any(trained != logits(original))
    assert_bits(logits(surgery.activate(model, {})), logits(original))
    surgery.activate(model, "default")
    surgery.unmerge(surgery.merge(model))
    assert_bits(logits(model), trained)
    plain = surgery.unload(model)
    for name, W in original.state_dict().items():
        assert torch.equal(plain.state_dict()[name], W)


def test_a_saved_adapter_needs_no_second_svd():
    # Another library once repeated a random start on loading, and got another residual.
    model, original = adapted(sketch=Sketch(1))
    train_a_little(model)
    saved = surgery.adapter_state_dict(model)
    config = PiSSAConfig(r=4, alpha=16, sketch=Sketch(2))
    loaded = surgery.inject(original, config, ["q_proj", "down_proj"])
    surgery.load_adapter_state_dict(loaded, saved)
    assert_bits(logits(loaded), logits(model))


def test_dropout_leaves_the_base_alone():
    model, original = adapted(dropout=0.5)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        for M in (layer.adapters["default"].A, layer.adapters["default"].B):
            M.zero_()  # so that the base is the residual
    x, base = torch.randn(3, 32), original.model.layers[0].self_attn.q_proj
    layer.train()
    assert torch.equal(layer(x), layer.eval()(x))
    assert not torch.equal(layer(x), base(x))


def test_embeddings_and_turned_layers_are_split_too():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), Conv1D(24, 16), nn.Linear(24, 10))
    original, x = copy.deepcopy(model), torch.randint(0, 20, (3, 5))
    surgery.inject(model, PiSSAConfig(4, 8), ["0", "1", "2"])
    assert torch.equal(model(x), original(x))
    assert torch.equal(copy.deepcopy(model)(x), original(x))
    surgery.add(model, PiSSAConfig(2, 8), "other")
    surgery.activate(model, {"default": 0.5, "other": 2.0})
    assert torch.equal(model(x), original(x))
    for layer in surgery.adapted(model).values():
        initial, W = layer.adapters["default"].initial, layer.W.detach()
        rest = (W - lora.delta(initial)).norm()
        assert rest < W.norm()


def test_what_is_out_of_range_is_refused_with_the_name_of_the_layer():
    for config, sentence in (
        (PiSSAConfig(r=99, alpha=8), "r is 99; choose 1 to 32"),
        (PiSSAConfig(r=4, alpha=-8), "alpha is -8"),
        (PiSSAConfig(r=4, alpha=8, dropout=1.0), r"dropout is 1\.0"),
    ):
        with pytest.raises(InputError, match=f"layers.0.self_attn.q_proj: {sentence}"):
            surgery.inject(llama(), config, ["q_proj"])


def test_another_scaling_cannot_be_converted():
    _, initial = pissa.init(torch.ones(5, 3), 2, 8)
    trained = lora.LoRA(initial.A.detach(), initial.B.detach(), 1.0)
    with pytest.raises(InputError, match=r"scaling is 1.0 after training and 4.0"):
        pissa.to_lora(trained, initial)
