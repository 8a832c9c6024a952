"""Many failures get one cause, and one case is shown in full."""

import sys

import numpy as np
import pytest

from minipeft.golden import diagnosis, profiles
from minipeft.golden.drivers.reference import (
    adamw,
    attention,
    blockwise,
    dora,
    ia3,
    linear,
    lora,
    vera,
)
from minipeft.golden.implementations import Functions, functions
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all
from tests.golden.commands import minipeft


def low_bits_first(W, blocksize):
    packed, absmax = blockwise.nf4_quantize(W, blocksize)
    return packed >> 4 | packed << 4, absmax


def reads_low_bits_first(packed, absmax, **rest):
    return blockwise.nf4_dequantize(packed >> 4 | packed << 4, absmax, **rest)


def scales_by_alpha(W, A, B, alpha, rank_stabilized):
    return lora.lora_merge(W, A, B, alpha * len(A), False)


def does_not_scale(x, W, A, B, alpha, rank_stabilized, bias=None):
    return lora.lora_forward(x, W, A, B, float(len(A)), False, bias)


def transposes(W, A, B, alpha, rank_stabilized):
    return lora.lora_merge(W, A, B, alpha, rank_stabilized).T.copy()


def divides_by_the_width(Q, K, V, mask=None):
    root = np.float32(np.sqrt(Q.shape[-1]))
    return attention.attention_forward(Q / root, K, V, mask)


def never_decays(W, grad, m, v, **settings):
    return adamw.adamw_step(W, grad, m, v, **settings | {"weight_decay": 0.0})


def corrects_by_t(W, grad, m, v, t, **settings):
    """Return what `1 - beta**t` gives in place of `1 - beta**(t + 1)`."""
    moved, m_, v_ = adamw.adamw_step(W, grad, m, v, t=max(t - 1, 0), **settings)
    return moved if t else np.full_like(W, np.nan), m_, v_


def scales_the_other_side(W, l, side):  # noqa: E741
    return ia3.ia3_merge(W, l, "input" if side == "output" else "output")


def loses_the_bias(x, W, bias=None):
    return linear.linear_forward(x, W)


def forgets_b(W, A, B, d, b):
    return vera.vera_merge(W, A, B, d, np.ones_like(b))


def forgets_the_magnitude(W, A, B, magnitude, alpha):
    return dora.dora_merge(W, A, B, np.ones_like(magnitude), alpha)


WRONG = {
    ("nf4_quantize", low_bits_first): "the first code stands in the low bits",
    ("nf4_dequantize", reads_low_bits_first): "the first code is read from the low",
    ("lora_merge", scales_by_alpha): "the scaling is alpha, not alpha/r",
    ("lora_forward", does_not_scale): "the scaling is left out",
    ("lora_merge", transposes): "the result is transposed",
    ("attention_forward", divides_by_the_width): "divided by d, not sqrt(d)",
    ("adamw_step", never_decays): "the weight does not decay",
    ("adamw_step", corrects_by_t): "the correction counts one step too few",
    ("ia3_merge", scales_the_other_side): "l scales the other side",
    ("linear_forward", loses_the_bias): "the bias is missing",
    ("vera_merge", forgets_b): "b is left out",
    ("dora_merge", forgets_the_magnitude): "the magnitude is left out",
}


def outcomes(operation, function):
    found = Functions("mine", {operation: function}.get)
    return list(verify(found, load_all([operation])))


@pytest.mark.parametrize(("wrong", "cause"), WRONG.items(), ids=WRONG.values())
def test_one_cause_is_named(wrong, cause):
    (said,) = diagnosis.causes(outcomes(*wrong))
    assert said.startswith(wrong[0])
    assert cause in said


def test_an_unknown_mistake_gets_no_cause():
    def noise(W, A, B, alpha, rank_stabilized):
        merged = lora.lora_merge(W, A, B, alpha, rank_stabilized)
        return merged + np.arange(merged.size, dtype=W.dtype).reshape(W.shape)

    assert not list(diagnosis.causes(outcomes("lora_merge", noise)))


def changed(operation, change):
    """Return the reference with another answer; codes stay as they are."""
    function = functions("reference").find(operation)

    def other(**arguments):
        returned = function(**arguments)
        values = returned if isinstance(returned, tuple) else (returned,)
        said = tuple(v if v.dtype == np.uint8 else change(v) for v in values)
        return said if isinstance(returned, tuple) else said[0]

    return other


@np.errstate(all="ignore")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_cause_that_changes_nothing_is_not_named(operation):
    for change in (
        lambda a: (a * np.float32(1.0005)).astype(a.dtype),
        lambda a: np.nextafter(a, np.inf, dtype=a.dtype) if a.dtype.kind == "f" else a,
        lambda a: a.astype(np.float16).astype(a.dtype),
    ):
        found = outcomes(operation, changed(operation, change))
        assert not list(diagnosis.causes(found))


@np.errstate(all="ignore")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_another_dtype_is_named_and_nothing_else(operation, dtype):
    found = outcomes(operation, changed(operation, lambda a: a.astype(dtype)))
    causes = list(diagnosis.causes(found))
    notes = [n for o in found if o.status == "fail" for n in o.notes.values()]
    if dtype == np.float64 and any(note.kind == "BASIC" for note in notes):
        assert causes
    assert all("the result has another dtype" in cause for cause in causes)


def test_a_cause_of_a_few_wrong_answers_is_not_named():
    def twice(alpha, **arguments):
        return lora.lora_merge(alpha=2 * alpha, **arguments)

    # The plainest cases have r = 2, where this is alpha in place of alpha/r.
    assert not list(diagnosis.causes(outcomes("lora_merge", twice)))


def test_a_choice_that_a_profile_forbids_has_no_cause():
    found = outcomes("lora_merge", lora.lora_merge)
    held = [profiles.hold(profiles.load("bnb-cuda"), outcome) for outcome in found]
    assert not list(diagnosis.causes(held))


def test_a_case_is_explained():
    module = "tests.impls.broken_nibbles"
    done = minipeft("verify", module, "--explain", "nf4_quantize:6")
    assert done.returncode == 1
    for line in (
        "nf4_quantize:6  -1 then 1",
        "  [-1.  1.]",
        "expected packed: uint8 [1]\n  codes 0 15",
        "got packed: uint8 [1]\n  codes 15 0",
    ):
        assert line in done.stdout
    done = minipeft("verify", "reference", "--explain", "nf4_quantize:26")
    assert done.returncode == 0
    assert "cuda-thresholds: bitsandbytes' CUDA kernel" in done.stdout
    assert done.stdout.strip().endswith("pass")


@pytest.mark.parametrize("case", ["nf4_quantize", "nf4_quantize:0", "nf4:6", ""])
def test_a_case_that_does_not_exist_is_one_sentence(case):
    done = minipeft("verify", "reference", f"--explain={case or ':'}")
    assert done.returncode == 2
    assert "write operation:tcId, such as nf4_quantize:26" in done.stderr
    assert sys.executable not in done.stderr
