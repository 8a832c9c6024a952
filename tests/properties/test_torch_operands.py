"""The law of every public function and class of the torch column: wrong operands.

Each wrong operand is refused before anything changes, in one sentence that names the
operand. The lists below hold the values that are accepted instead.
"""

import inspect
import re

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch import inject, lora, qlora
from tests.agreement.llama import TEXT
from tests.operands import annotations_off
from tests.torch_operands import (
    ADAPTERS,
    STEPS,
    arguments,
    at,
    base,
    checked,
    function,
    nested,
    net,
    numbers,
    odd,
    paths,
    quantized,
    substituted,
)

NAMES = sorted(checked())

# An operand that the message calls by another name: the name at the place of the check.
CALLED = {
    "p": "dropout",
    "grad": "gradient",
    "adapter": "adapter|served",
    "shares": "shares|adapter",
    "targets": "targets?",
    "absmax_codes": "the scales",
    "nested_absmax": "the scales",
    "nested_blocksize": "blocksize",
}
# None has a meaning here, which the docstring names: torch's own generator, no bias, no
# adapter yet, all the memory.
MAY_BE_NONE = {
    *("generator", "bias", "mask", "down_bias", "up_bias", "adapter", "paging"),
    *("budget", "saved", "sketch", "nested_blocksize"),
}
MUST_BE_THERE = {"bottleneck.Parallel", "double_quant"}
# Any number of axes is correct.
ANY_SHAPE = {
    *(f"{row}.quantize" for row in ("blockwise", "bof4", "double_quant")),
    *("blockwise.nearest", "blockwise.check_dense", "adamw.init", "attention.Head"),
    *("lora_batched.forward", "prompt.forward"),
    *("microscaling.quantize_mxfp4", "microscaling.quantize_nvfp4"),
}
# Torch's generators accept a negative seed.
ANY_SEED = {"pissa.Sketch", "prompt.PromptConfig"}


def accepted(name, path, kind):
    if kind == "None":
        own = not set(MUST_BE_THERE) & {name, name.partition(".")[0]}
        return path[-1] in MAY_BE_NONE and own
    if kind == "below":
        return path[-1] == "seed" and name in ANY_SEED
    return kind == "more axes" and name in ANY_SHAPE


def called(name):
    """Return the function; for a method's configuration, a function that uses it."""
    made = function(name)
    if not hasattr(made, "wrapper"):
        return made
    return lambda **given: inject.inject(net(), made(**given), ["0"])


def state(given):
    """Return what a refusal must not change: the models among the operands."""
    found = [value for value in given.values() if isinstance(value, nn.Module)]
    return [
        (key, type(module), module.training, [p.requires_grad for p in parameters])
        for model in found
        for key, module in model.named_modules()
        for parameters in [list(module.parameters())]
    ]


def wrong_calls(name):
    """Yield the operands of each wrong call, and a description of the mistake."""
    given = arguments(name)
    for path in paths(given):
        value = at(given, path)
        for kind, wrong in odd(value):
            if value is not None and not accepted(name, path, kind):
                yield path, kind, substituted(given, path, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_odd_operands_are_refused_by_name_and_change_nothing(name):
    call, missed = called(name), []
    with annotations_off():
        for path, kind, given in wrong_calls(name):
            wanted, before = CALLED.get(path[-1], path[-1]), state(given)
            try:
                call(**given)
            except InputError as error:
                said = str(error)
                if re.search(rf"^[^\n]*\b({wanted})\b.*\.$", said) is None:
                    missed.append((*path, kind, said))
            except Exception as error:
                missed.append((*path, kind, repr(error)))
            else:
                missed.append((*path, kind, "accepted"))
            assert state(given) == before, (path, kind)
    assert not missed


@pytest.mark.parametrize("name", NAMES)
def test_operands_that_fit_are_taken(name):
    with annotations_off():
        called(name)(**arguments(name))


def test_every_step_that_is_left_out_is_there():
    assert all(inspect.isroutine(function(name)) for name in STEPS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("make", "part"), [(quantized, "absmax"), (nested, "nested_absmax")]
)
def test_scales_that_are_not_finite_are_refused_where_they_are_read(make, part, value):
    """On a CPU in each pass; on every device when a file is loaded."""
    layer = qlora.QuantizedLinear(make())
    model = nn.ModuleDict({"up": layer})
    damaged = {k: v.clone() for k, v in model.state_dict().items()}
    damaged[f"up.{part}"][1] = value
    with pytest.raises(InputError, match=rf"^up\.{part} is not finite; load another"):
        model.load_state_dict(damaged)
    assert torch.isfinite(layer(numbers(3, 5))).all()
    getattr(layer, part)[1] = value
    with pytest.raises(InputError, match=f"absmax holds {value} at block 1;"):
        layer(numbers(3, 5))


@pytest.mark.parametrize("wrapper", ADAPTERS)
def test_an_adapter_of_another_method_does_not_pass_for_lora(wrapper):
    """It would compute one update and merge another."""
    other = ADAPTERS[wrapper]()
    if type(other) is lora.LoRA:
        lora.LoRALinear(base(), other)
        return
    kind = type(other).__name__
    said = rf"^(the )?adapter is (a|of type) {kind}; .+\.$"
    with annotations_off(), pytest.raises(InputError, match=said):
        lora.LoRALinear(base(), other)


@pytest.mark.parametrize("name", ["prefix.PrefixModel", "prompt.PromptModel"])
def test_a_text_of_another_kind_is_refused_by_name(name):
    model = function(name)(**arguments(name))
    given = {"input_ids": TEXT, "attention_mask": TEXT > 0, "labels": TEXT}
    for operand, kinds in {
        "input_ids": ("None", "text", "a number", "list", "numpy", "floats", "complex"),
        "labels": ("text", "a number", "list", "numpy", "floats", "complex"),
        "attention_mask": ("text", "a number", "list", "numpy", "more axes"),
    }.items():
        wrong = dict(odd(TEXT))
        for kind in kinds:
            with annotations_off(), pytest.raises(InputError, match=f"^{operand} "):
                model(**{**given, operand: wrong[kind]})
