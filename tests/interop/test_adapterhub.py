"""Bottleneck adapters in AdapterHub's format.

The library needs transformers 4: `tools/adapterhub.py` compares with it, by hand.
"""

import json

import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import adapterhub_format, peft_folder
from minipeft.interop.adapterhub_format import WEIGHTS
from minipeft.torch import inject
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.lora import LoRAConfig
from tests.agreement.llama import llama
from tests.interop import peers

PLACES = {
    "Pfeiffer": ["down_proj"],
    "Houlsby": ["o_proj", "down_proj"],
    "the first layer": ["layers.0.mlp.down_proj"],
    "the second layer": ["layers.1.self_attn.o_proj"],
}


def trained(targets, bottleneck=5, scaling=0.5):
    """Return a model with adapters, with every trained number changed."""
    config = BottleneckConfig(bottleneck, scaling)
    model = inject.inject(llama(), config, targets)
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("case", PLACES)
def test_a_folder_is_read_back_bit_for_bit(case, tmp_path, capsys):
    model = trained(PLACES[case])
    adapterhub_format.save(model, tmp_path / "one")
    again = adapterhub_format.load(llama(), tmp_path / "one").eval()
    assert "the base is the one" in capsys.readouterr().err
    assert torch.equal(peers.logits(again), peers.logits(model))
    assert not torch.equal(peers.logits(again), peers.logits(llama()))
    adapterhub_format.save(again, tmp_path / "two")
    for name in ("adapter_config.json", WEIGHTS):
        one, two = ((tmp_path / f / name).read_bytes() for f in ("one", "two"))
        assert one == two


def test_the_commands_say_what_the_folder_is(tmp_path, capsys):
    folder = str(tmp_path / "adapter")
    adapterhub_format.save(trained(["down_proj"]), folder)
    out = ["--base", "none", "--out", str(tmp_path / "out"), "--adapter"]
    for given in (["inspect"], ["merge", *out], ["export", "--to", "peft", *out]):
        assert cli.main([*given, folder]) == 2
        said = capsys.readouterr().err
        assert f"{folder} holds adapter.safetensors, a bottleneck adapter of" in said
        assert "minipeft.interop.adapterhub_format.load" in said


def test_names_and_settings_are_those_of_the_library(tmp_path):
    adapterhub_format.save(trained(["down_proj"]), tmp_path / "adapter", "default")
    contents = peft_folder.read(tmp_path / "adapter", WEIGHTS)
    start = "model.layers.1.output_adapters.adapters.default."
    shapes = {
        key.removeprefix(start): tuple(tensor.shape)
        for key, tensor in contents.tensors.items()
        if key.startswith(start)
    }
    assert shapes == {
        "adapter_down.0.weight": (5, 32),
        "adapter_down.0.bias": (5,),
        "adapter_up.weight": (32, 5),
        "adapter_up.bias": (32,),
    }
    assert len(contents.tensors) == 8
    inner = contents.config["config"]
    assert (inner["mh_adapter"], inner["output_adapter"]) == (False, True)
    assert inner["scaling"] == 0.5


@pytest.mark.parametrize("bottleneck", range(1, 33))
def test_the_library_computes_the_bottleneck_from_the_factor(bottleneck):
    for features in (32, 384, 2880, 4096):
        factor = adapterhub_format._factor(features, bottleneck)
        assert int(features // factor) == bottleneck


CHANGES = {
    "a layer norm": ({"ln_before": True}, "ln_before = True"),
    "another activation": ({"non_linearity": "swish"}, "non_linearity = 'swish'"),
    "the residual before": ({"original_ln_before": True}, "original_ln_before = True"),
    "parallel": ({"is_parallel": True}, "is_parallel = True"),
    "of tomorrow": ({"a_setting": 3}, "a_setting = 3"),
    "a learned scaling": ({"scaling": "learned"}, "scaling is 'learned'"),
}


def changed(folder, change):
    """Change settings of a folder."""
    path = folder / peft_folder.CONFIG
    config = json.loads(path.read_text())
    config["config"] |= change
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", CHANGES)
def test_an_adapter_that_computes_anything_else_is_refused(case, tmp_path):
    change, words = CHANGES[case]
    adapterhub_format.save(trained(["down_proj"]), tmp_path / "adapter")
    changed(tmp_path / "adapter", change)
    model = llama()
    with pytest.raises(InputError, match=r"\A.+\Z") as refusal:
        adapterhub_format.load(model, tmp_path / "adapter")
    assert words in str(refusal.value)
    assert not inject.adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_another_base_is_refused_and_may_be_allowed(tmp_path, capsys):
    adapterhub_format.save(trained(["down_proj"]), tmp_path / "adapter")
    other = llama()
    other.model.norm.weight.data[3] += 1
    with pytest.raises(InputError, match=r"another base: model\.norm\.weight"):
        adapterhub_format.load(other, tmp_path / "adapter")
    assert not inject.adapted(other)
    adapterhub_format.load(other, tmp_path / "adapter", allow_base_mismatch=True)
    assert "not compared" in capsys.readouterr().err
    assert len(inject.adapted(other)) == 2


def _widths():
    model = trained(["down_proj"])
    adapter = inject.adapted(model)["model.layers.1.mlp.down_proj"].adapters["default"]
    adapter.scaling = 2.0
    return model


def _uneven():
    return trained(["layers.0.self_attn.o_proj", "down_proj"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_widths, "differ in width or scaling"),
        (_uneven, "some layers have two adapters"),
        (lambda: trained(["q_proj"]), r"q_proj has no place in AdapterHub's format"),
        (
            lambda: inject.inject(llama(), LoRAConfig(2, 4), ["q_proj"]),
            "LoRA is no bottleneck adapter",
        ),
    ],
)
def test_what_the_format_does_not_hold_is_refused(make, words, tmp_path):
    with pytest.raises(InputError, match=words):
        adapterhub_format.save(make(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_refused(tmp_path):
    adapterhub_format.save(trained(["down_proj"]), tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).rename(
        tmp_path / "adapter" / "pytorch_adapter.bin"
    )
    with pytest.raises(InputError, match=r"pytorch_adapter\.bin, a pickle"):
        adapterhub_format.load(llama(), tmp_path / "adapter")


def test_what_is_trained_beside_the_adapters_is_not_lost(tmp_path):
    model = inject.inject(llama(), BottleneckConfig(2), ["o_proj", "down_proj"])
    model.lm_head.requires_grad_(True)
    with pytest.raises(InputError, match=r"^lm_head\.weight is trained too, and"):
        adapterhub_format.save(model, tmp_path / "adapter")
    assert not [*tmp_path.iterdir()]
    model.lm_head.requires_grad_(False)
    adapterhub_format.save(model, tmp_path / "adapter")
