"""An operation that fails halfway leaves every part of the model unchanged."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig, Parallel, place_beside
from minipeft.torch.inject import adapted, add, inject, merge, unload
from minipeft.torch.lora import LoRAConfig, LoRALinear
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import prepare, quantize_linears
from tests.lab.architectures import build

BESIDE = BottleneckConfig(2)


@dataclass(frozen=True)
class LastDoesNotFit:
    """LoRA, but the last layer gets an adapter of another layer's shape."""

    wrapper = LoRALinear

    def adapters(self, layers, generator=None):
        made = LoRAConfig(2, 4.0).adapters(layers, generator)
        last = list(layers)[-1]
        odd = LoRAConfig(2, 4.0).adapters({last: nn.Linear(9, 9)}, generator)
        return {**made, **odd}


def model():
    """Three linear layers; the first is trainable, the second is frozen."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    layers[1].requires_grad_(False)
    return nn.ModuleDict({"a": layers[0], "b": layers[1], "c": layers[2]})


def picture(module):
    """Return all that may change: modules, parameters, values, `requires_grad`."""
    modules = {n: (id(m), m.training, *vars(m)) for n, m in module.named_modules()}
    parameters = {
        n: (id(p), p.requires_grad, p.detach().clone())
        for n, p in module.named_parameters()
    }
    return modules, parameters


def assert_as_before(module, before):
    modules, parameters = picture(module)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, wanted, value) in parameters.items():
        assert (identity, wanted) == before[1][name][:2], name
        assert value.is_meta or torch.equal(value, before[1][name][2])


def on_meta_at_the_end():
    made = model()
    made["c"] = nn.Linear(4, 4, device="meta")
    return made


def with_a_bottleneck():
    made = inject(model(), LoRAConfig(2, 4.0), ["a", "b"])
    return inject(made, BESIDE, ["c"])


REFUSED = {
    "inject": (model, lambda m: inject(m, LastDoesNotFit(), ["a", "b", "c"]), "^c: A"),
    "inject a name": (
        model,
        lambda m: inject(m, LoRAConfig(2, 4.0), ["a", "b"], name="x.y"),
        "^a: the adapter name 'x.y' cannot",
    ),
    "add": (
        lambda: inject(model(), LoRAConfig(2, 4.0), ["a", "b", "c"]),
        lambda m: add(m, LastDoesNotFit(), "other"),
        "^c: A has shape",
    ),
    "merge": (with_a_bottleneck, merge, "^c: a bottleneck adapter bends"),
    "quantize_linears": (
        on_meta_at_the_end,
        lambda m: quantize_linears(m, blocksize=4),
        "^c: the weight is on the device meta",
    ),
    "place_beside": (
        lambda: place_beside(model(), BESIDE, ["c"], 4),
        lambda m: place_beside(m, BESIDE, ["a", "c"], 4),
        "^c: has an adapter beside it already",
    ),
    "prepare": (model, prepare, "no layer is quantized"),
    "unload": (
        lambda: merge(inject(model(), LoRAConfig(2, 4.0), ["a"]))["a"],
        unload,
        r"itself an adapted layer; call its own unload\(\)",
    ),
    "prefix": (
        lambda: build("Lfm2ForCausalLM"),
        lambda m: PrefixModel(m, PrefixConfig(2)),
        "keeps another state than keys and values",
    ),
    "prompt": (
        lambda: build("Gemma4ForCausalLM"),
        lambda m: PromptModel(m, PromptConfig(2)),
        "looks up more embeddings",
    ),
    "prompt of a token that is none": (
        lambda: build("LlamaForCausalLM"),
        lambda m: PromptModel(m, PromptConfig(tokens=(99,))),
        "99",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_refused_halfway_leaves_the_model_as_it_was(what):
    make, refused, sentence = REFUSED[what]
    given = make()
    before = picture(given)
    with pytest.raises(InputError, match=sentence):
        refused(given)
    assert_as_before(given, before)


def trained(module):
    return {n for n, p in module.named_parameters() if p.requires_grad}


def test_a_network_beside_a_module_and_updates_inside_it_train_together():
    for first_beside in (True, False):
        made = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4)), "q": model()["a"]})
        for beside in (first_beside, not first_beside):
            if beside:
                place_beside(made, BESIDE, ["mlp"], 4)
            else:
                inject(made, LoRAConfig(2, 4.0), ["0", "q"])
        kinds = {name.split(".adapter")[0] for name in trained(made)}
        assert kinds == {"mlp", "mlp.base.0", "q"}
        assert set(adapted(made)) == {"mlp.base.0", "q"}


def test_networks_beside_a_module_and_beside_a_part_of_it_both_act():
    made = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    place_beside(made, BESIDE, ["mlp", "mlp.0"], 4)
    assert isinstance(made["mlp"].base[0], Parallel)
    x = torch.ones(2, 4)
    plain = made["mlp"](x)
    made["mlp"].base[0].adapter.up_bias.data += 1
    assert not torch.equal(made["mlp"](x), plain)


def test_a_module_that_serves_twice_has_its_network_in_both_places():
    shared = nn.Linear(4, 4)
    made = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    place_beside(made, BESIDE, ["a.0"], 4)
    assert made["a"][0] is made["b"][0]
    assert isinstance(made["b"][0], Parallel)


def test_a_model_with_networks_beside_its_modules_is_not_saved_under_other_names(
    tmp_path,
):
    made = place_beside(build("LlamaForCausalLM"), BESIDE, ["mlp"], 32)
    with pytest.raises(
        InputError, match=r"beside its modules, .*model\.state_dict\(\)"
    ):
        made.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
