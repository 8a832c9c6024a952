"""Sums of adapters: one adapter alone is unchanged, and updates add up."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import peft_folder, peft_model
from minipeft.interop.combine import concatenate, weighted_sum
from minipeft.interop.fingerprint import BASE
from minipeft.torch import inject, miss
from minipeft.torch.hira import HiRA
from minipeft.torch.ia3 import IA3
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSS
from tests.agreement.llama import llama, logit_bound
from tests.interop import peers
from tests.interop.test_peft_model import LORA, assert_same_tensors, config, silent
from tests.tolerance import assert_within, gamma

peft = pytest.importorskip("peft")

MULTIPLIED = ["HiRA", "HiRA on embeddings", "MiSS", "MiSS, uneven"]
LINEAR = ["plain", "rank-stabilized", "patterns", "patterns, rank-stabilized"]


def contents(settings, folder, seed=5, model=llama):
    """Return an adapter made by peft, as its folder holds it."""
    peers.saved(peers.trained(model(), settings, seed), folder)
    return peft_folder.read(folder)


def loaded(*adapters, folder, model=llama):
    """Return a model with all of these adapters, named 0, 1, and so on."""
    made = model()
    for i, adapter in enumerate(adapters):
        peft_folder.write(folder / str(i), adapter)
        peft_model.load(made, folder / str(i), str(i), say=silent)
    return made.eval()


@pytest.mark.parametrize(
    "case", [*LORA, "VeRA", "IA3", "HiRA", "MiSS", "prompt", "prefix"]
)
def test_one_adapter_at_weight_1_gives_itself_back(case, tmp_path):
    one = contents(config(case), tmp_path / "one")
    same = weighted_sum([(one, 1.0)])
    assert_same_tensors(one.tensors, same.tensors)
    assert dict(one.config) == dict(same.config)


@pytest.mark.parametrize("case", [*LINEAR, "embeddings", "IA3", *MULTIPLIED])
def test_an_adapter_joined_by_one_at_weight_0_does_what_it_did(case, tmp_path):
    # With a second adapter no shortcut is taken: all tensors are computed.
    one, other = (contents(config(case), tmp_path / str(s), s) for s in (5, 6))
    both = loaded(weighted_sum([(one, 1.0), (other, 0.0)]), folder=tmp_path / "a")
    alone = loaded(one, folder=tmp_path / "b")
    expected = peers.logits(alone)
    bound = logit_bound(llama(), expected)
    assert_within(peers.logits(both).numpy(), expected.numpy(), bound)


def size_of(adapter, W):
    """Return the sum of the absolute terms of an update."""
    if isinstance(adapter, IA3):
        return 2 * (1 + adapter.l.abs().max()) * W.abs()
    if isinstance(adapter, MiSS):
        return miss.delta(adapter, W.shape[1]).abs()
    if isinstance(adapter, HiRA):
        return W.abs() * (adapter.B.abs() @ adapter.A.abs())
    return adapter.scaling * (adapter.B.abs() @ adapter.A.abs())


@pytest.mark.parametrize(
    "case", [*LINEAR, "embeddings", "every linear layer", "IA3", *MULTIPLIED]
)
def test_a_sum_is_the_sum_of_its_active_adapters(case, tmp_path):
    seeds, shares = (5, 6, 7), (0.5, -1.25, 2.0)
    parts = [contents(config(case), tmp_path / str(seed), seed) for seed in seeds]
    summed = loaded(
        weighted_sum([*zip(parts, shares, strict=True)]), folder=tmp_path / "s"
    )
    several = loaded(*parts, folder=tmp_path / "several")
    inject.activate(several, {str(i): share for i, share in enumerate(shares)})
    for key, layer in inject.adapted(several).items():
        exact = layer.delta().detach()
        found = inject.adapted(summed)[key].delta().detach()
        assert not torch.equal(exact, torch.zeros_like(exact))
        sizes = [abs(share) * size_of(a, layer.W) for share, a in layer.shares()]
        # A sum over all ranks, each term with four more roundings: the factor, the
        # scaling, the share, the sum of shares.
        terms = sum(len(getattr(a, "A", "1")) for _, a in layer.shares()) + 4
        bound = 2 * gamma(terms) * sum(sizes).detach().double().numpy()
        assert_within(found.numpy(), exact.numpy(), bound)


def test_biases_are_summed_as_updates_are(tmp_path):
    given = {"lora_bias": True, "target_modules": ["q_proj"]}
    one = contents(peers.lora(**given), tmp_path / "1", 5, peers.biased)
    two = contents(peers.lora(**given, r=3), tmp_path / "2", 6, peers.biased)
    both = concatenate([one, two])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    # The bias is multiplied by s c, with s = 6 / 4 and 6 / 3; the sum keeps s = 6 / 4.
    expected = one.tensors[key] + (2 / 1.5 * two.tensors[key].double()).float()
    assert torch.equal(both.tensors[key], expected)
    assert both.config["lora_bias"] is True
    same = weighted_sum([(one, 1.0)])
    assert_same_tensors(one.tensors, same.tensors)


def test_adapters_of_different_layers_keep_their_own(tmp_path):
    one = contents(peers.lora(target_modules=["q_proj"]), tmp_path / "1")
    two = contents(peers.lora(target_modules=["v_proj"], r=2), tmp_path / "2")
    both = concatenate([one, two])
    kept = {**one.tensors, **two.tensors}
    assert_same_tensors(kept, both.tensors)  # each with its own scaling
    model = loaded(both, folder=tmp_path)
    assert len(inject.adapted(model)) == 4


def test_a_layer_that_one_hira_lacks_gets_zeros_of_its_rank(tmp_path):
    task = {"task_type": "CAUSAL_LM"}
    one, two = (
        contents(peft.HiraConfig(r=r, target_modules=[t], **task), tmp_path / t)
        for r, t in ((4, "q_proj"), (3, "v_proj"))
    )
    both = loaded(concatenate([one, two]), folder=tmp_path / "both")
    for i, alone in enumerate((one, two)):
        single = loaded(alone, folder=tmp_path / f"alone{i}")
        for key, layer in inject.adapted(single).items():
            found = inject.adapted(both)[key]
            assert len(found.adapters["0"].A) == 7
            # A sum over its own ranks, each term with the four roundings of a sum of
            # adapters; the ranks of the other add zeros.
            terms = len(layer.adapters["0"].A) + 4
            bound = 2 * gamma(terms) * size_of(layer.adapters["0"], layer.W)
            assert_within(
                found.delta().detach().numpy(),
                layer.delta().detach().numpy(),
                bound.detach().double().numpy(),
            )


def test_ranks_of_miss_that_differ_are_refused(tmp_path):
    one, two = (
        contents(peft.MissConfig(r=r, target_modules=["q_proj"]), tmp_path / str(r))
        for r in (4, 8)
    )
    with pytest.raises(InputError, match="MiSS differ in r"):
        concatenate([one, two])


def test_experts_are_summed_on_a_model(tmp_path):
    plain = contents(config("plain"), tmp_path / "plain")
    settings = {**plain.config, "target_parameters": ["experts.down_proj"]}
    stacks = peft_folder.Contents(settings, plain.tensors)
    with pytest.raises(InputError, match="stacks of experts"):
        weighted_sum([(stacks, 0.5)])


def test_adapters_of_different_bases_are_refused(tmp_path):
    found = []
    for i in range(2):
        model = llama()
        model.model.norm.weight.data += i
        inject.inject(model, LoRAConfig(r=2, alpha=3), ["q_proj"])
        found.append(peft_model.contents_of(model))
    with pytest.raises(InputError, match=r"model\.norm\.weight differs") as refused:
        concatenate(found)
    assert "sum adapters of one base" in str(refused.value)
    assert "allow" not in str(refused.value)  # no such option exists
    assert concatenate([found[0], found[0]]).metadata[BASE] == found[0].metadata[BASE]


def test_several_layouts_and_methods_are_refused(tmp_path):
    plain = contents(config("plain"), tmp_path / "plain")
    dora = contents(config("DoRA"), tmp_path / "dora")
    vera = contents(config("VeRA"), tmp_path / "vera")
    rows = contents(config("rows of tokens"), tmp_path / "rows")
    head = contents(config("saved whole"), tmp_path / "head")
    pissa = contents(peers.lora(init_lora_weights="pissa"), tmp_path / "pissa")
    for parts, words in [
        ([], "no adapter"),
        ([(plain, float("nan"))], "not finite"),
        ([(dora, 0.5)], "lora_magnitude_vector"),
        ([(plain, 1.0), (dora, 1.0)], "lora_magnitude_vector"),
        ([(vera, 2.0)], "VERA"),
        ([(plain, 1.0), (vera, 1.0)], "LORA and VERA"),
        ([(rows, 0.5)], "trainable_tokens"),
        ([(head, 0.5)], "whole"),
        ([(pissa, 0.5)], "pissa"),
    ]:
        with pytest.raises(InputError, match=words):
            weighted_sum(parts)


KINDS = {
    "LoRA": lambda **given: peers.lora(**given),
    "HiRA": lambda **given: peft.HiraConfig(r=4, task_type="CAUSAL_LM", **given),
    "MiSS": lambda **given: peft.MissConfig(r=4, task_type="CAUSAL_LM", **given),
    "IA3": lambda **given: peft.IA3Config(
        feedforward_modules=[], task_type="CAUSAL_LM", **given
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_keeps_every_layer_of_a_sum(kind, tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    parts = [
        contents(
            KINDS[kind](target_modules=["q_proj"], exclude_modules=[spared]),
            tmp_path / spared,
        )
        for spared in names
    ]
    both = concatenate(parts)
    assert both.config["target_modules"] == names
    assert both.config["exclude_modules"] is None
    peft_folder.write(tmp_path / "both", both)
    with peers.quiet():
        found = peft.PeftModel.from_pretrained(llama(), tmp_path / "both")
    assert sorted(peft.get_peft_model_state_dict(found)) == sorted(both.tensors)


def test_layers_of_the_first_adapter_do_not_narrow_a_sum(tmp_path):
    parts = [
        contents(
            peers.lora(target_modules=["q_proj"], layers_to_transform=[layer]),
            tmp_path / str(layer),
        )
        for layer in (0, 1)
    ]
    both = concatenate(parts)
    assert both.config["layers_to_transform"] is None
    assert len(both.config["target_modules"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_other_widths_are_refused(kind, tmp_path):
    one = contents(KINDS[kind](target_modules=["q_proj"]), tmp_path / "one")
    narrow = {
        k: t if "_B" in k else t[:, :1] if t.shape[1] > 1 else t[:1]
        for k, t in one.tensors.items()
    }
    other = peft_folder.Contents(one.config, narrow)
    with pytest.raises(InputError, match=r"has shape .* in one adapter and .*; sum"):
        concatenate([one, other])


def test_a_matrix_that_is_none_is_refused(tmp_path):
    one = contents(KINDS["HiRA"](target_modules=["q_proj"]), tmp_path / "one")
    flat = {k: t.flatten() for k, t in one.tensors.items()}
    with pytest.raises(InputError, match="is no matrix"):
        weighted_sum([(peft_folder.Contents(one.config, flat), 0.5)])


def test_a_weight_that_is_too_large_is_named(tmp_path):
    one = contents(config("plain"), tmp_path / "plain")
    with pytest.raises(InputError, match=r"at the weights 1e\+300, 1; give smaller"):
        weighted_sum([(one, 1e300), (one, 1.0)])


def hira(layer, config):
    """Return HiRA of rank 4 on one layer."""
    key = f"base_model.model.model.layers.{layer}.q_proj.hira_"
    tensors = {f"{key}A": torch.ones(4, 8), f"{key}B": torch.ones(6, 4)}
    return peft_folder.Contents({"peft_type": "HIRA", **config}, tensors)


@pytest.mark.parametrize("config", [{}, {"r": "4"}, {"r": -4}, {"r": 8}, {"r": None}])
def test_a_rank_that_is_not_the_files_is_refused(config):
    parts = [(hira(0, config), 1.0), (hira(1, {"r": 4}), 1.0)]
    with pytest.raises(InputError, match=r"hira_A has rank 4 in the file and r is"):
        weighted_sum(parts)


def test_the_d_of_miss_has_the_rank_that_the_configuration_names():
    tensors = {"base_model.model.x.miss_block": torch.ones(4, 8)}
    one = peft_folder.Contents({"peft_type": "MISS"}, tensors)
    with pytest.raises(InputError, match="has rank 4 in the file and r is None"):
        concatenate([one, one])


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), -float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(alpha, tmp_path):
    tensors = {
        "base_model.model.x.lora_A.weight": torch.ones(2, 4),
        "base_model.model.x.lora_B.weight": torch.ones(4, 2),
    }
    config = {"peft_type": "LORA", "r": 2}
    odd, one = (
        peft_folder.Contents({**config, "lora_alpha": a}, tensors) for a in (alpha, 2)
    )
    with pytest.raises(InputError, match=f"lora_alpha of x is {alpha}"):
        concatenate([one, odd])
    alone = weighted_sum([(odd, 1.0)])
    with pytest.raises(InputError, match=r"the configuration holds .*lora_alpha"):
        peft_folder.write(tmp_path / "out", alone)
    huge = peft_folder.Contents({**config, "lora_alpha": 1e308}, tensors)
    with pytest.raises(InputError, match="needs a lora_alpha beyond float64"):
        concatenate([huge, huge])
