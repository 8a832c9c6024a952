"""Stacks of experts in files: merged, audited and inspected."""

import math
from dataclasses import replace

import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import (
    fixing,
    gguf_format,
    inspecting,
    merging,
    parts,
    peft_folder,
    peft_format,
    peft_model,
)
from minipeft.interop.audit import BOUND, EXACT, WRONG, audit
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import merged
from minipeft.torch import inject
from minipeft.torch.lora import LoRAConfig
from tests.interop.folders import InMemory, write_model
from tests.interop.test_peft_experts import experts
from tests.tolerance import assert_within, gamma

E, R = 3, 2
SHAPES = {"gate_up_proj": (10, 8), "down_proj": (8, 5)}


def base(turned=False, dtype=torch.bfloat16):
    """Return the tensors of two layers of experts."""
    draw = torch.Generator().manual_seed(0)
    found = {"model.norm.weight": torch.ones(8, dtype=dtype)}
    for layer in range(2):
        for name, shape in SHAPES.items():
            W = (torch.randn(E, *shape, generator=draw) * 0.1).to(dtype)
            key = f"model.layers.{layer}.mlp.experts.{name}"
            found[key] = W.mT.contiguous() if turned else W
    return found


def adapter_of(path, alpha=3.0, change=None):
    """Write and read an adapter of both stacks, as peft nests them."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        start = f"base_model.model.model.layers.{layer}.mlp.experts."
        for level, (d, k) in zip(("base_layer.", ""), SHAPES.values(), strict=True):
            A = torch.randn(E * R, k, generator=draw)
            B = torch.randn(d, R * E, generator=draw)
            tensors |= {f"{start}{level}lora_A.weight": A}
            tensors |= {f"{start}{level}lora_B.weight": B}
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": alpha,
        "alpha_pattern": {"experts.down_proj": 5.0},
        "target_modules": [],
        "target_parameters": [f"experts.{name}" for name in SHAPES],
        **(change or {}),
    }
    peft_folder.write(path, peft_folder.Contents(config, tensors))
    return peft_format.read(path)


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_is_merged_expert_by_expert(turned, tmp_path):
    adapter = adapter_of(tmp_path / "adapter")
    own = base(turned, torch.float32)
    key = "model.layers.1.mlp.experts.down_proj"
    A = adapter.stacks["model.layers.1.mlp.experts"]["lora_A"]
    B = adapter.stacks["model.layers.1.mlp.experts"]["lora_B"]
    folder = write_model(tmp_path / "base", own)
    merging.merge(folder, adapter, tmp_path / "merged")
    found = open_tensors(tmp_path / "merged").read(key)
    for e in range(E):
        change = 5 / R * B[:, e::E] @ A[e * R : (e + 1) * R]
        W = own[key][e].mT if turned else own[key][e]
        expected = (W + change).mT if turned else W + change
        size = W.abs() + 5 / R * B[:, e::E].abs() @ A[e * R : (e + 1) * R].abs()
        # R products and their sum, the scaling, and the sum with W; on both sides.
        bound = 2 * gamma(R + 2) * (size.mT if turned else size).double().numpy()
        assert_within(found[e].numpy(), expected.numpy(), bound)
    findings = [*audit(InMemory(own), adapter, open_tensors(tmp_path / "merged"))]
    assert {f.verdict for f in findings} == {EXACT}
    assert sum(f.adapted for f in findings) == 4


def changed(own, adapter, change):
    """Return the right merge, with one stack changed."""
    key = "model.layers.0.mlp.experts.gate_up_proj"
    updates = adapter.renamed(InMemory(own).about).updates
    right = {n: merged(W, updates[n]) if n in updates else W for n, W in own.items()}
    return key, {**right, key: change(own[key], updates[key], right[key])}


def of_expert(e, make):
    """Change one expert only."""

    def change(W, update, right):
        right = right.clone()
        right[e] = make(W, update)
        return right

    return change


CHANGES = {
    "experts in the wrong order": lambda W, u, right: right.roll(1, 0),
    "not applied": of_expert(2, lambda W, u: W[2]),
    "applied twice": lambda W, u, right: merged(right, u),
    "alpha alone": lambda W, u, right: merged(W, replace(u, alpha=u.alpha * R)),
    "another layer's alpha": lambda W, u, right: merged(W, replace(u, alpha=5.0)),
    "subtracted": of_expert(
        0, lambda W, u: merged(W[0], replace(u.expert(0), alpha=-u.alpha))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_a_stack_is_named(name, tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), base()
    key, tensors = changed(own, adapter, CHANGES[name])
    wrong = [
        f
        for f in audit(InMemory(own), adapter, InMemory(tensors))
        if f.verdict == WRONG
    ]
    assert [(f.tensor, f.mistake) for f in wrong] == [(key, name)]
    assert "are wrong)" in wrong[0].sentence


def test_the_update_of_another_expert_is_named(tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), base()

    def crossed(W, update, right):
        order = [1, 2, 0]
        return merged(W, replace(update, A=update.A[order], B=update.B[order]))

    _, tensors = changed(own, adapter, crossed)
    (wrong,) = (
        f
        for f in audit(InMemory(own), adapter, InMemory(tensors))
        if f.verdict == WRONG
    )
    assert wrong.mistake == "experts in the wrong order"
    assert "the update of expert" in wrong.sentence


def test_another_order_of_sums_is_no_mistake(tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), base(dtype=torch.float32)

    def backwards(W, update, right):
        delta = update.B.flip(2) @ update.A.flip(1)
        return W + update.scaling * delta

    key, tensors = changed(own, adapter, backwards)
    findings = {f.tensor: f for f in audit(InMemory(own), adapter, InMemory(tensors))}
    assert findings[key].verdict in (EXACT, BOUND)


def test_a_base_with_other_experts_is_refused(tmp_path):
    adapter = adapter_of(tmp_path / "adapter")
    key = "model.layers.0.mlp.experts"
    names = {f"{key}.gate_up_proj": torch.ones(E, 10, 8)}
    with pytest.raises(InputError, match=r"2 pairs A, B .* has 1 of the stacks"):
        adapter.renamed(InMemory(names).about)
    with pytest.raises(InputError, match="which the base does not have"):
        adapter.renamed(InMemory({"model.norm.weight": torch.ones(8)}).about)
    with pytest.raises(InputError, match="another base's experts"):
        adapter.renamed(InMemory({n: W[..., :4] for n, W in base().items()}).about)


def test_square_stacks_are_refused(tmp_path):
    only = {"target_parameters": ["experts.down_proj"], "alpha_pattern": {}}
    adapter = adapter_of(tmp_path / "adapter", change=only)
    key = "model.layers.0.mlp.experts"
    square = {"lora_A": torch.ones(E * R, 8), "lora_B": torch.ones(8, R * E)}
    names = InMemory({f"{key}.down_proj": torch.ones(E, 8, 8)}).about
    with pytest.raises(InputError, match="are square"):
        replace(adapter, stacks={key: square}).renamed(names)


def test_the_folder_of_a_model_is_merged_as_the_model_merges(tmp_path):
    name = "GptOssForCausalLM"  # whose files hold stacks
    model = inject.inject(experts(name), LoRAConfig(2, 5), ["experts", "q_proj"])
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save(model, tmp_path / "adapter")
    write_model(tmp_path / "base", experts(name).state_dict())
    given = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    out = str(tmp_path / "merged")
    assert cli.main(["merge", *given, "--out", out]) == 0
    live = inject.unload(inject.merge(model)).state_dict()
    write_model(tmp_path / "live", live)
    assert cli.main(["audit", *given, "--merged", out]) == 0
    assert cli.main(["audit", *given, "--merged", str(tmp_path / "live")]) == 0


def test_inspect_measures_each_stack(tmp_path):
    adapter_of(tmp_path / "adapter")
    contents = parts.read(tmp_path / "adapter")
    own = base()
    found = inspecting.inspect(contents, InMemory(own))
    assert (found.matched, found.unmatched) == (4, ())
    updates = (
        peft_format.read(tmp_path / "adapter").renamed(InMemory(own).about).updates
    )
    expected = sorted(
        float((u.scaling * u.B.double() @ u.A.double()).norm())
        for u in updates.values()
    )
    layers = sorted(found.layers, key=lambda layer: layer.norm)
    for layer, norm in zip(layers, expected, strict=True):
        assert abs(layer.norm - norm) < 2.0**-40 * norm
        assert layer.share > 0


def test_a_gguf_adapter_of_stacks_is_refused(tmp_path):
    adapter = adapter_of(tmp_path / "adapter")
    with pytest.raises(InputError, match="stacks of experts"):
        gguf_format.write_lora(tmp_path / "lora.gguf", adapter, {})


def test_a_scale_that_the_file_alone_does_not_say_is_left_open(tmp_path):
    adapter_of(tmp_path / "adapter")
    contents = parts.read(tmp_path / "adapter")
    found = inspecting.inspect(contents)
    assert all(math.isnan(layer.scaling) for layer in found.layers)
    with pytest.raises(InputError, match="does not say which stack"):
        fixing.fix(contents, tmp_path / "fixed")
    adapter_of(tmp_path / "plain", change={"alpha_pattern": {}})
    plain = parts.read(tmp_path / "plain")
    assert {layer.scaling for layer in inspecting.inspect(plain).layers} == {1.5}
    fixing.fix(plain, tmp_path / "fixed")
    names = InMemory(base()).about
    one, other = (
        peft_format.read(tmp_path / f).renamed(names).updates
        for f in ("plain", "fixed")
    )
    for name, update in one.items():
        fixed = other[name]
        assert fixed.alpha == fixed.r
        assert torch.equal(fixed.B, update.scaling * update.B)
