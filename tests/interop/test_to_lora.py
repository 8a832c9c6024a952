"""Any update as plain LoRA: the nearest of its rank, with a reported distance."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import peft_folder, peft_model
from minipeft.interop.tensors import open_tensors
from minipeft.interop.to_lora import to_lora
from minipeft.lab import models
from minipeft.torch import blockwise, inject, loftq
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.vera import VeRAConfig
from tests.agreement.llama import llama, logit_bound
from tests.interop import peers
from tests.interop.test_peft_model import silent
from tests.tolerance import assert_within, gamma, svd_roundings

TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "LoRA": LoRAConfig(r=3, alpha=7),
    "DoRA": DoRAConfig(r=3, alpha=7),
    "VeRA": VeRAConfig(r=8, seed=4),
    "IA3": IA3Config(feedforward=["down_proj"]),
    "PiSSA": PiSSAConfig(r=3, alpha=7),
}


def adapted(method, make=llama, targets=TARGETS):
    config = METHODS.get(method, IA3Config())
    model = inject.inject(make(), config, targets)
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def product(contents, key):
    A, B = (
        contents.tensors[f"base_model.model.{key}.lora_{M}.weight"].double()
        for M in "AB"
    )
    return B @ A


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", [{"rank": 2}, {"share": 0.75}])
def test_the_error_is_that_of_the_best_rank(method, choice):
    model = adapted(method)
    found = to_lora(model, **choice)
    for key, layer in inject.adapted(model).items():
        exact = layer.delta().detach().double()
        S = torch.linalg.svdvals(exact)
        r, total = found.ranks[key], S.square().sum().sqrt()
        left = torch.linalg.matrix_norm(exact - product(found.contents, key)) / total
        # An SVD in float32 is the exact SVD of a matrix that differs by at most this.
        slack = gamma(svd_roundings(exact))
        assert abs(found.errors[key] - left) <= slack
        assert abs(left - S[r:].square().sum().sqrt() / total) <= slack
        if "rank" in choice:
            assert r == 2
        else:
            kept = S.square().cumsum(0) / S.square().sum()
            assert kept[r - 1] >= 0.75 - slack
            assert r == 1 or kept[r - 2] < 0.75 + slack


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_rank_does_the_same_and_peft_loads_it(method, tmp_path):
    pytest.importorskip("peft")
    model = adapted(method)
    found = to_lora(model, share=1.0)
    for key, layer in inject.adapted(model).items():
        assert found.errors[key] <= gamma(svd_roundings(layer.delta()))
    peft_folder.write(tmp_path / "plain", found.contents)
    expected = peers.logits(model)
    bound = 2 * logit_bound(llama(), expected)  # the update's and its SVD's
    theirs = peers.reloaded(llama(), tmp_path / "plain")
    assert_within(peers.logits(theirs).numpy(), expected.numpy(), bound)
    mine = peft_model.load(llama(), tmp_path / "plain", say=silent).eval()
    assert_within(peers.logits(mine).numpy(), expected.numpy(), bound)


def test_a_changed_bias_is_kept_whole(tmp_path):
    pytest.importorskip("peft")
    model = adapted("outputs", peers.biased, ["k_proj", "v_proj"])
    found = to_lora(model, share=1.0)
    assert found.contents.config["lora_bias"] is True
    peft_folder.write(tmp_path / "plain", found.contents)
    expected = peers.logits(model)
    theirs = peers.reloaded(peers.biased(), tmp_path / "plain")
    bound = 2 * logit_bound(llama(), expected)
    assert_within(peers.logits(theirs).numpy(), expected.numpy(), bound)
    mixed = adapted("outputs", peers.biased, ["k_proj", "up_proj"])
    with pytest.raises(InputError, match="up_proj has none"):
        to_lora(mixed, rank=2)


def test_an_update_of_zero_has_no_error():
    model = inject.inject(llama(), METHODS["LoRA"], ["q_proj"])
    for choice in ({"rank": 1}, {"share": 0.5}):
        found = to_lora(model, **choice)
        assert set(found.errors.values()) == {0.0}
        assert set(found.ranks.values()) == {1}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, "give one of the two"),
        ({"rank": 2, "share": 0.5}, "give one of the two"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"share": float("nan")}, "share is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 17}, "r is 17"),
    ],
)
def test_odd_choices_are_refused(choice, words):
    with pytest.raises(InputError, match=words):
        to_lora(adapted("LoRA"), **choice)


def test_what_changes_no_weight_is_refused():
    serial = inject.inject(llama(), BottleneckConfig(4), ["down_proj"])
    for model in (llama(), serial, PromptModel(llama(), PromptConfig(3))):
        with pytest.raises(InputError):
            to_lora(model, rank=2)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_loftq_is_no_lora_of_rank_2r_on_the_base(name):
    # On W, plain LoRA must add Q - W and s B A, whose sum has full rank, not 2r.
    W = open_tensors(models.TINY).read(f"model.layers.0.{name}.weight").float()
    r = 8
    q, adapter = loftq.init(W, r, 2 * r)
    change = blockwise.dequantize(q).double() - W.double()
    assert int(torch.linalg.matrix_rank(change)) == min(W.shape)
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    whole = change + adapter.scaling * B @ A
    squares = torch.linalg.svdvals(whole).square()
    # LoRA of rank 2r on W leaves more than half of this sum.
    assert float(squares[2 * r :].sum() / squares.sum()) > 0.5
