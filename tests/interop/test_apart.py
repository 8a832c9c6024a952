"""A base that stores each expert alone, and an adapter of stacked experts."""

import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import inspecting, merging, parts, peft_model
from minipeft.interop.apart import stacked
from minipeft.interop.audit import EXACT, WRONG, audit
from minipeft.interop.tensors import open_tensors
from minipeft.torch import inject
from minipeft.torch.lora import LoRAConfig
from tests.interop.folders import InMemory, write_model
from tests.interop.test_peft_experts import assert_same_logits, experts, logits
from tests.interop.test_stacks import SHAPES, E, adapter_of, base

transformers = pytest.importorskip("transformers")

WAYS = {
    "Mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "Qwen": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def apart(tensors, way):
    """Return the tensors by the names of a checkpoint that stores each expert alone."""
    block, halves, last = WAYS[way]
    found = {}
    for name, W in tensors.items():
        owner, _, stack = name.replace(".mlp.", f".{block}.").rpartition(".")
        for e in range(E) if stack in SHAPES else ():
            wide = zip(halves, W[e].chunk(2), strict=True)
            for part, M in wide if stack == "gate_up_proj" else [(last, W[e])]:
                found[f"{owner}.{e}.{part}.weight"] = M.contiguous()
        if stack not in SHAPES:
            found[name] = W
    return found


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_lie_apart_are_merged_one_by_one(way, tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), base()
    folder = write_model(tmp_path / "base", apart(own, way), shards=3)
    merging.merge(folder, adapter, tmp_path / "merged")
    merge = open_tensors(tmp_path / "merged")
    assert merge.about == open_tensors(folder).about
    findings = [*audit(open_tensors(folder), adapter, merge)]
    assert {f.verdict for f in findings} == {EXACT}
    assert sum(f.adapted for f in findings) == 2 * 3 * E
    # The same stacks under the model's own names, in base and adapter.
    for one, other in ((InMemory(own), merge), (merge, InMemory(own))):
        found = [*audit(one, adapter, other)]
        wrong = [f.tensor for f in found if f.verdict == WRONG]
        assert len(found) == 5
        assert len(wrong) == (4 if one is merge else 0)


def test_stacks_are_read_from_their_experts():
    own = base()
    view = stacked(InMemory(apart(own, "Qwen")))
    assert view.about == InMemory(own).about
    for name, W in own.items():
        assert torch.equal(view.read(name), W)
        data = b"".join(bytes(piece) for piece in view.pieces(name, 7))
        assert data == b"".join(InMemory(own).pieces(name))


def test_another_order_of_experts_that_lie_apart_is_named(tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), apart(base(), "Mixtral")
    merging.merge(write_model(tmp_path / "base", own), adapter, tmp_path / "merged")
    merge = open_tensors(tmp_path / "merged")
    tensors = {name: merge.read(name) for name in merge.about}
    key = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    one, other = key.format(0), key.format(2)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    found = [
        f
        for f in audit(InMemory(own), adapter, InMemory(tensors))
        if f.verdict == WRONG
    ]
    assert {(f.tensor, f.mistake) for f in found} == {
        (one, "experts in the wrong order"),
        (other, "experts in the wrong order"),
    }


def test_an_expert_that_lacks_a_matrix_is_named(tmp_path):
    adapter, own = adapter_of(tmp_path / "adapter"), apart(base(), "Qwen")
    del own["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(InputError, match=r"experts\.1\.up_proj\.weight is missing"):
        adapter.renamed(InMemory(own).about)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_merged_folder_computes_what_the_adapted_model_does(name, tmp_path):
    model = experts(name)
    write_model(tmp_path / "base", _as_version_4(model, tmp_path))
    model.config.save_pretrained(tmp_path / "base")
    plain = type(model).from_pretrained(tmp_path / "base").eval()
    model = inject.inject(plain, LoRAConfig(2, 5), ["experts", "q_proj"])
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save(model, tmp_path / "adapter")
    given = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    out = str(tmp_path / "merged")
    assert cli.main(["merge", *given, "--out", out]) == 0
    assert cli.main(["audit", *given, "--merged", out]) == 0
    found = type(model).from_pretrained(out).eval()
    assert_same_logits(found, logits(found), logits(model))
    seen = inspecting.inspect(
        parts.read(tmp_path / "adapter"), open_tensors(tmp_path / "base")
    )
    assert (seen.unmatched, seen.base[:18]) == ((), "made for this base")


def _as_version_4(model, tmp_path):
    """Return the tensors as transformers writes them: each expert alone."""
    model.save_pretrained(tmp_path / "saved")
    saved = open_tensors(tmp_path / "saved")
    assert any(".experts.1." in tensor for tensor in saved.about)
    return {tensor: saved.read(tensor) for tensor in saved.about}
