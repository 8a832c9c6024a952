"""Torch's `load_state_dict` on a changed model: all fits, or nothing is written."""

import copy
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.experts import Experts
from minipeft.torch.inject import (
    adapted,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    remove,
    unload,
)
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig
from tests.lab.architectures import build
from tests.operands import annotations_off
from tests.properties.test_torch_programs import (
    MERGE,
    ROWS,
    WRAPPERS,
    Model,
    make,
    start,
)

LORA = LoRAConfig(2, 4.0)


class Routed(nn.Module):
    """A layer of experts whose tokens all go to the first."""

    def __init__(self):
        super().__init__()
        self.experts = Experts(torch.randn(3, 5, 8))

    def forward(self, x):
        return self.experts(x, torch.zeros(len(x), dtype=torch.int64))


def net():
    """Return three linear layers; what is damaged belongs to the last of them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))


def lora():
    return inject(net(), LORA, ["0", "3"])


def four_bits():
    return inject(quantize_linears(net(), ["2"], blocksize=8), LORA, ["0", "3"])


def experts():
    made = nn.Sequential(nn.Linear(8, 8), Routed())
    return inject(made, LORA, ["1.experts"])


A, B = "3.adapters.default.A", "3.adapters.default.B"
FIRST, LAST = "1.experts.adapters.default.W.A", "1.experts.adapters.default.W.B"

# The model, what the file has in place of its tensors, and the sentence.
DAMAGED = {
    "a scale that is NaN": (
        four_bits,
        {"3.base.nested_absmax": torch.nan},
        r"^3\.base\.nested_absmax is not finite; load another file",
    ),
    "a codebook that is infinite": (
        lambda: quantize_linears(net(), blocksize=8),
        {"3.codebook": torch.inf},
        r"^3\.codebook is not finite",
    ),
    "an adapter that is NaN": (
        lora,
        {B: torch.nan},
        r"^3\.adapters\.default\.B is not finite",
    ),
    "numbers that the adapter's dtype cannot hold": (
        lora,
        {B: torch.full((8, 2), 1e300, dtype=torch.float64)},
        r"^3\.adapters\.default\.B is not finite",
    ),
    "whole numbers": (
        lora,
        {A: torch.ones(2, 8, dtype=torch.int64)},
        r"^3\.adapters\.default\.A has dtype torch\.int64, not torch\.float32",
    ),
    "another rank": (
        lora,
        {A: torch.ones(3, 8), B: torch.ones(8, 3)},
        r"A has shape \(3, 8\), not \(2, 8\), and 1 more; build the model as the one",
    ),
    "no tensor": (lora, {"3.base.bias": "many"}, r"3\.base\.bias is of type str;"),
    "a merged weight that overflows": (
        lambda: merge(lora()),
        {A: 3e38, B: 3e38},
        r"^3: merging would turn the weight at \[0, 0\]",
    ),
    "a merged weight of four bits that overflows": (
        lambda: merge(four_bits()),
        {A: 3e38, B: 3e38},
        r"^3: merging would turn the weight at \[0, 0\]",
    ),
    "merged experts that overflow": (
        lambda: merge(experts()),
        {FIRST: 3e38, LAST: 3e38},
        r"^1\.experts: merging would turn W at \[0, 0, 0\]",
    ),
    "a seed of VeRA that is none": (
        lambda: inject(net(), VeRAConfig(4), ["0", "3"]),
        {"3.adapters.default.drawn": torch.tensor([-5, 4, 8, 8])},
        r"^3\.adapters\.default\.drawn: the seed is -5; choose 0 to 4294967295",
    ),
    "a pair of VeRA that is too small": (
        lambda: inject(net(), VeRAConfig(4), ["0", "3"]),
        {"3.adapters.default.drawn": torch.tensor([0, 4, 7, 8])},
        r"drawn: in_features is 7; choose 8 or more",
    ),
    "a network beside a module": (
        lambda: place_beside(net(), BottleneckConfig(2), ["3"], 8),
        {"3.adapter.up": torch.nan},
        r"^3\.adapter\.up is not finite",
    ),
    "a soft prompt": (
        lambda: PromptModel(build("LlamaForCausalLM"), PromptConfig(2)),
        {"P": torch.inf},
        "^P is not finite",
    ),
}


def held(model):
    """Return every tensor, also of merged weights, and which object it is."""
    return {
        (name, key): (id(tensor), tensor.clone())
        for name, module in model.named_modules()
        for key, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }


def assert_untouched(model, before):
    now = held(model)
    assert now.keys() == before.keys()
    for key, (identity, value) in now.items():
        assert identity == before[key][0], key
        assert torch.equal(value, before[key][1]), key


def damaged(model, parts):
    """Return other values for every tensor of the model, and the damaged ones."""
    state = {
        key: tensor + 1 if tensor.is_floating_point() else tensor.clone()
        for key, tensor in model.state_dict().items()
    }
    for key, value in parts.items():
        scalar = isinstance(value, float)
        state[key] = torch.full_like(state[key], value) if scalar else value
    return state


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_refused_anywhere_is_refused_before_the_first_tensor_is_written(what):
    make, parts, sentence = DAMAGED[what]
    original = make()
    for way in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = way(original)
        state, before = damaged(model, parts), held(model)
        for assign in (False, True)[: 1 if "dtype cannot hold" in what else 2]:
            for strict in (False, True):
                with pytest.raises(InputError, match=sentence):
                    model.load_state_dict(state, strict=strict, assign=assign)
                assert_untouched(model, before)
        around = nn.ModuleList([model])  # such as DDP and torch.compile put around it
        with pytest.raises(InputError, match=sentence.removeprefix("^")):
            around.load_state_dict({f"0.{key}": t for key, t in state.items()})
        assert_untouched(model, before)


def test_a_file_of_one_adapter_is_loaded_whole_or_not_at_all():
    """Also where an adapter's own hook would refuse after others were written."""
    model = inject(net(), VeRAConfig(4), ["0", "3"])
    saved = {key: t + 1 for key, t in adapter_state_dict(model).items()}
    saved["0.drawn"] -= 1
    saved["3.drawn"] = torch.tensor([-5, 4, 8, 8])
    before = held(model)
    with pytest.raises(
        InputError, match=r"^3: adapters\.default\.drawn: the seed is -5"
    ):
        load_adapter_state_dict(model, saved)
    assert_untouched(model, before)
    model, saved = merge(lora()), {"0.A": 1.0, "0.B": 1.0, "3.A": 3e38, "3.B": 3e38}
    own, before = adapter_state_dict(model), held(model)
    with pytest.raises(InputError, match=r"^3: merging would turn the weight"):
        load_adapter_state_dict(
            model, {key: torch.full_like(own[key], saved[key]) for key in own}
        )
    assert_untouched(model, before)


def test_plain_layers_have_torchs_own_rules_again():
    wrong = {key: t[:1] for key, t in net().state_dict().items()}
    for put_back in (unload, lambda model: remove(model, "default")):
        model = put_back(lora())
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(wrong)
    quantized = unload(four_bits())  # its layers of four bits are still there
    with pytest.raises(InputError, match=r"does not fit: 0\.bias has shape \(1,\)"):
        quantized.load_state_dict({"0.bias": torch.ones(1)}, strict=False)


def test_a_hook_of_another_program_may_change_what_is_loaded():
    model = lora()
    older = {key: t.clone() for key, t in model.state_dict().items()}
    older["2.weight"] = older["2.weight"].reshape(64)

    def reshape(module, state, prefix, *_):
        state[f"{prefix}weight"] = state[f"{prefix}weight"].reshape(8, 8)

    model[2].register_load_state_dict_pre_hook(reshape)
    model.load_state_dict(older)
    for layer in (quantize_linears(net(), blocksize=8)[0], lora()[0]):
        layer.register_load_state_dict_pre_hook(lambda *_: None)
        state = {key: t.clone() for key, t in layer.state_dict().items()}
        layer.load_state_dict(state)
        key = "adapters.default.B" if "adapters.default.B" in state else "offset"
        state[key].fill_(torch.nan)
        with pytest.raises(InputError, match=rf"^{key} is not finite"):
            layer.load_state_dict(state)


def test_what_torch_tells_no_hook_is_left_to_torch():
    """A hook gets strict=True always, so missing names are torch's to report."""
    told, model = [], lora()
    model[2].register_load_state_dict_pre_hook(lambda *given: told.append(given[4]))
    part = {A: torch.ones(2, 8)}
    model.load_state_dict(part, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*\"0\.base\.weight\""):
        model.load_state_dict(part)
    assert told == [True, True]
    # A module around the model is loaded in torch's order: the children before it.
    around = nn.ModuleList([nn.Linear(1, 1), model])
    state = {key: torch.zeros_like(t) for key, t in around.state_dict().items()}
    before = held(model)
    with pytest.raises(InputError, match=r"1\.3\.adapters\.default\.B is not finite"):
        around.load_state_dict({**state, f"1.{B}": torch.full((8, 2), torch.nan)})
    assert_untouched(model, before)
    assert around[0].weight == 0


def test_checking_a_merged_layer_leaves_hooks_of_other_programs_alone():
    """They may hold a file or a lock, which no copy of the layer can hold too."""
    model, seen = merge(lora()), []

    class Recorder:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, *given):
            seen.append(given)

        def note(self, *given):
            seen.append(given)

    for part in (model[3], model[3].base, model[3].adapters["default"]):
        part.register_load_state_dict_post_hook(Recorder().note)
    model[3].base.register_state_dict_pre_hook(Recorder())
    state = {key: t + 1 for key, t in model.state_dict().items()}
    seen.clear()
    model.load_state_dict(state)
    assert len(seen) == 3
    assert model[3].base.weight.equal(state["3.base.weight"])


def test_each_layer_is_checked_once_a_load(monkeypatch):
    model, asked = merge(lora()), []
    own = type(model[0]).check_load

    def check(layer, state, prefix, assign):
        asked.append(prefix)
        own(layer, state, prefix, assign)

    monkeypatch.setattr(type(model[0]), "check_load", check)
    state = model.state_dict()
    for _ in range(2):
        model.load_state_dict(state)
        assert asked == ["0.", "3."]
        asked.clear()
    model[3].load_state_dict(model[3].state_dict())
    assert asked == [""]


SMALLER = {
    "lora": (lora, B),
    "experts": (experts, LAST),
    "a network beside": (DAMAGED["a network beside a module"][0], "3.adapter.up"),
    "a soft prompt": (DAMAGED["a soft prompt"][0], "P"),
}


@pytest.mark.parametrize("kind", list(SMALLER))
def test_what_replaces_a_tensor_is_judged_in_its_own_dtype(kind):
    """1e5 is no number in float16, and 1e300 none in float32."""
    make, name = SMALLER[kind]
    for dtype, value in ((torch.float32, 1e5), (torch.float64, 1e300)):
        model = make()
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        if value == 1e5:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.half()
        state[name] = torch.full_like(state[name], value, dtype=dtype)
        with pytest.raises(InputError, match=f"{name} is not finite"):
            model.load_state_dict(state)
        model.load_state_dict(state, assign=True)
        assert torch.equal(model.state_dict()[name], state[name])
        state[name][0] = torch.nan
        with pytest.raises(InputError, match=f"{name} is not finite"):
            model.load_state_dict(state, assign=True)


def test_floats_of_eight_bits_are_judged_too():
    model = lora()
    state = dict(model.state_dict())
    name = next(key for key in state if key.endswith(".B"))
    state[name] = state[name].to(torch.float8_e4m3fn)
    model.load_state_dict(state, assign=True)
    assert model.state_dict()[name].dtype == torch.float8_e4m3fn
    state[name] = torch.full_like(state[name], torch.nan)
    with pytest.raises(InputError, match=f"{name} is not finite"):
        model.load_state_dict(state, assign=True)


def test_each_process_refuses_its_own_part_of_a_sharded_file():
    with WRAPPERS["sharded"](lora()) as model:
        before = held(model)
        state = {key: tensor.clone() + 1 for key, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        assert torch.equal(model[3].adapters["default"].B.to_local(), torch.ones(8, 2))
        state[B].to_local()[0, 0] = torch.nan
        before = held(model)
        with pytest.raises(InputError, match=rf"^{re.escape(B)} is not finite"):
            model.load_state_dict(state)
        for key, (identity, value) in held(model).items():
            assert identity == before[key][0]
            ours, right = (
                getattr(t, "_local_tensor", t) for t in (value, before[key][1])
            )
            assert torch.equal(ours, right)


def test_a_graph_of_a_model_is_loaded_layer_by_layer():
    """Its root has no hook, so the layers before the refused one are written."""
    with annotations_off():
        graph = torch.fx.symbolic_trace(quantize_linears(net(), blocksize=8))
    state = {
        key: tensor + 1 if tensor.is_floating_point() else tensor
        for key, tensor in graph.state_dict().items()
    }
    state["3.nested_absmax"] = state["3.nested_absmax"] * torch.nan
    before = held(graph)
    with pytest.raises(InputError, match=r"^3\.nested_absmax is not finite"):
        graph.load_state_dict(state)
    changed = {
        name
        for name, (_, t) in held(graph).items()
        if not torch.equal(t, before[name][1])
    }
    assert {name for name, _ in changed} == {"0", "2"}


@pytest.mark.parametrize("place", ["3", "3.adapters", "3.adapters.default"])
def test_whole_numbers_that_a_hook_turns_into_floats_are_no_wrong_dtype(place):
    model = lora()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[A] = torch.arange(16).reshape(2, 8)
    with pytest.raises(
        InputError, match=r"^3\.adapters\.default\.A has dtype torch\.in"
    ):
        model.load_state_dict(state)

    def to_floats(module, state, *_):
        state[A] = state[A] / 8

    model.get_submodule(place).register_load_state_dict_pre_hook(to_floats)
    for part in (model, copy.deepcopy(model), merge(model)):
        part.load_state_dict(dict(state))
        assert torch.equal(part.state_dict()[A], state[A] / 8)
    state[B] = torch.full((8, 2), torch.nan)
    with pytest.raises(InputError, match=r"^3\.adapters\.default\.B is not finite"):
        model.load_state_dict(state)
    state[B] = torch.ones(8, 2)
    state["0.adapters.default.A"] = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(InputError, match=r"^0\.adapters\.default\.A has dtype"):
        model.load_state_dict(state)


@pytest.mark.parametrize("row", list(ROWS))
def test_tensors_without_values_are_computed_with_and_loaded(row):
    """In a `FakeTensorMode` torch asks for shapes; a value cannot be read there."""
    model, mode = make(row), FakeTensorMode(allow_non_fake_inputs=True)
    for merged in (False, True)[: 1 + (row in MERGE)]:
        if merged:
            merge(model)
        named = (*model.named_parameters(), *model.named_buffers())
        fake = {n: mode.from_tensor(t) for n, t in named if "projections" not in n}
        with mode:
            y = torch.func.functional_call(model, fake, (torch.ones(3, 6),))
            assert type(y) is FakeTensor
            assert y.shape == (3, 5)
            if not merged:
                state = {n: t for n, t in fake.items() if n in model.state_dict()}
                model.load_state_dict(state, strict=False)
    assert model(torch.ones(3, 6)).isfinite().all()


@pytest.mark.parametrize("row", list(ROWS))
def test_nothing_is_adapted_or_quantized_where_nothing_has_values(row):
    model = Model()
    with FakeTensorMode(), pytest.raises(InputError, match="a FakeTensorMode"):
        start(model, row)
    assert not adapted(model)
    with FakeTensorMode(), pytest.raises(InputError, match=r"^0: the weight is in a F"):
        quantize_linears(Model(), blocksize=8)
