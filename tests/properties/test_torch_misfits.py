"""Layers in unfit programs: NaN, overflow, hooks, names of inputs, tracers."""

from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.inject import (
    activate,
    adapted,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    remove,
    unload,
)
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.operands import annotations_off
from tests.properties.test_torch_programs import (
    each_mergeable,
    each_row,
    make,
    plain,
    start,
    trained,
)


@pytest.mark.parametrize("held", ["weight", "bias"])
@each_row
def test_nan_in_a_layer_is_named_before_the_first_layer_is_replaced(row, held):
    model = plain(row)
    tensor = model[2].nested_absmax if "bits" in row and held == "weight" else None
    with torch.no_grad():
        (getattr(model[2], held) if tensor is None else tensor)[0] = torch.nan
    state = {key: p.requires_grad for key, p in model.named_parameters()}
    named = held if tensor is None else "nested_absmax"
    with pytest.raises(InputError, match=f"^2: the {named} holds NaN; load it again"):
        start(model, row)
    assert not adapted(model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == state


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_a_hook_that_would_be_lost_is_refused_before_a_layer_is_replaced(register):
    model = merge(make("lora"))
    handle = register(model[2], lambda *_: None)
    before = [module.base.weight for module in adapted(model).values()]
    for away in (unload, lambda model: remove(model, "default")):
        with pytest.raises(InputError, match=r"2: .*<lambda> is a hook of the adapted"):
            away(model)
        assert [m.base.weight for m in adapted(model).values()] == before
    with pytest.raises(InputError, match="remove it by its handle"):
        model[2].unload()
    handle.remove()
    assert not adapted(unload(model))


def test_a_handle_still_removes_a_hook_after_four_bits_are_unloaded():
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model = plain("lora on four bits")
    handle = model[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    y = unload(merge(trained(start(model, "lora on four bits"))))(x)
    handle.remove()
    assert torch.equal(2 * model(x), y)


def overflowing(row):
    """Return a model in float16 whose second layer overflows when it is merged."""
    model = make(row).half()
    model[2].activate({"default": 1e9})
    return model


def non_finite(row):
    """Return a model with one NaN in an adapter of its second layer."""
    model = make(row)
    with torch.no_grad():
        next(model[2].adapters["default"].parameters()).flatten()[0] = torch.nan
    return model


@pytest.mark.parametrize("damage", [overflowing, non_finite])
@each_mergeable
def test_a_merge_that_would_not_be_finite_is_refused_whole(row, damage):
    model = damage(row)
    with pytest.raises(InputError, match=r"2: merging would turn the \w+ at \[.*into"):
        merge(model)
    assert all(layer.merged_weight is None for layer in adapted(model).values())


def test_a_merged_model_that_would_not_stay_finite_keeps_its_adapters():
    model = merge(make("lora"))
    x, tensors = torch.ones(1, 6), adapter_state_dict(model)
    y = model(x)
    huge = {key: torch.full_like(tensor, 3e38) for key, tensor in tensors.items()}
    with pytest.raises(InputError, match="0: merging would turn"):
        load_adapter_state_dict(model, huge)
    with pytest.raises(InputError, match="0: merging would turn"):
        activate(model, {"default": 1e308})
    assert torch.equal(model(x), y)
    assert torch.equal(merge(model)(x), y)


@pytest.mark.parametrize("called", ["alone", "with adapters"])
@each_row
def test_the_input_has_the_name_that_the_wrapped_layer_gives_it(row, called):
    model, x = plain(row) if called == "alone" else make(row), torch.ones(2, 6)
    assert torch.equal(model[0](input=x), model[0](x))


def test_a_conv1d_names_its_input_x_and_an_embedding_names_it_input():
    model = nn.ModuleList([Conv1D(5, 6), nn.Embedding(6, 5)])
    conv, embedding = inject(model, LoRAConfig(2, 4.0), ["0", "1"])
    x, ids = torch.ones(2, 6), torch.arange(4)
    assert torch.equal(conv(x=x), conv(x))
    assert torch.equal(embedding(input=ids), embedding(ids))
    for given in ({}, {"input": x, "x": x}):
        with pytest.raises(InputError, match="takes one input"):
            conv(**given)


@each_row
def test_a_tracer_that_cannot_see_an_adapter_is_named(row):
    sentence = r"^torch\.fx records.*use torch\.export"
    with annotations_off(), pytest.raises(InputError, match=sentence):
        torch.fx.symbolic_trace(make(row))


@pytest.mark.parametrize("constant", [torch.tensor(2.0), torch.ones(2), None, [2.0]])
def test_a_constant_that_is_no_number_or_text_is_refused(constant):
    model = make("lora")
    tensors, saved = adapter_state_dict(model), {"0.scaling": constant}
    sentence = r"^0\.scaling of saved is of type"
    with annotations_off(), pytest.raises(InputError, match=sentence):
        load_adapter_state_dict(model, tensors, saved=saved)


# --- forwards and offloading ----------------------------------------------------------


def test_a_forward_that_would_be_lost_is_refused_before_a_layer_is_replaced():
    model = merge(make("lora"))
    inner = model[2].forward
    model[2].forward = lambda x: 2 * inner(x)
    for away in (
        unload,
        lambda model: remove(model, "default"),
        lambda m: m[2].unload(),
    ):
        with pytest.raises(InputError, match="a forward was set on the adapted layer"):
            away(model)
        assert list(adapted(model)) == ["0", "2"]
    del model[2].forward
    assert not adapted(unload(model))


def test_the_forwards_that_accelerate_sets_on_every_module_are_no_obstacle():
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    model = merge(make("lora"))
    y = model(x)
    hooks.add_hook_to_module(model[2], hooks.ModelHook())
    with pytest.raises(InputError, match="accelerate: remove_hook_from_submodules"):
        unload(model)  # the base has no hook that could stay
    hooks.add_hook_to_module(model[2].base, hooks.ModelHook())
    assert torch.equal(unload(model)(x), y)
    assert model[2]._hf_hook


@each_mergeable
def test_an_offloaded_layer_is_merged_and_unloaded_after_it_came_back(row):
    """Offloaded, a layer gets its old weight before each call, or has no values."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    expected = merge(make(row))(x)
    for merged, buffers in product((False, True), (False, True)):
        model, act = (merge(make(row)), unload) if merged else (make(row), merge)
        accelerate.cpu_offload(model, "cpu", offload_buffers=buffers)
        with pytest.raises(InputError, match="comes in for a call alone; bring the"):
            act(model)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(act(model)(x), expected)


def test_four_bits_keep_hooks_and_refuse_a_forward_that_they_would_not_run():
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    expected = quantize_linears(plain("lora"), blocksize=8)(x)
    model = plain("lora")
    handle = model[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    quantize_linears(model, blocksize=8)
    assert torch.equal(model(x), 2 * expected)
    handle.remove()
    assert torch.equal(model(x), expected)
    model = plain("lora")
    model[2].forward = model[0].forward
    with pytest.raises(InputError, match=r"^2: a forward was set on this Linear"):
        quantize_linears(model, blocksize=8)
    assert type(model[0]) is nn.Linear
    model = plain("lora on four bits")
    model[2].forward = model[0].forward
    merge(start(model, "lora on four bits"))
    with pytest.raises(InputError, match=r"^2: a forward was set on this Quantized"):
        unload(model)
    assert list(adapted(model)) == ["0", "2"]


def test_a_quantized_layer_is_traced_inside_a_model_and_not_alone():
    layer, x = QuantizedLinear.from_linear(nn.Linear(8, 8)), torch.ones(2, 8)
    with annotations_off():
        traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.Tanh()))
        assert torch.equal(traced(x), layer(x).tanh())
        with pytest.raises(InputError, match=r"trace a module that holds the layer"):
            torch.fx.symbolic_trace(layer)


def test_a_bottleneck_behind_a_layer_that_is_only_read_says_so():
    model = nn.MultiheadAttention(8, 2)
    inject(nn.ModuleList([model]), BottleneckConfig(2), ["out_proj"])
    x = torch.ones(3, 1, 8)
    with pytest.raises(InputError, match="reads the weight of this layer and does not"):
        model(x, x, x)
