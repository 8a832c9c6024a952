"""The torch column's LoRA: bases of 16 and of 4 bits, and its initial values."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import lora as reference
from minipeft.torch import lora
from minipeft.torch.qlora import QuantizedLinear
from tests.agreement.on_torch import ADAPTED, dense, module, numpy, run, tensor
from tests.parametrizations import ROWS
from tests.strategies import seeds, sizes
from tests.tolerance import assert_sums

LORA = next(row for row in ROWS if row.name == "lora")


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)],
)
@given(data=st.data())
def test_a_base_of_16_bits_is_merged_with_one_rounding(dtype, kind, data):
    # W uses every bit that 16 bits allow, and the update needs more than 16 bits.
    case = LORA.case(data, "integers")
    W = (case.base / 3).astype(kind).astype(np.float32)
    adapter = replace(case.adapter, A=37 * case.adapter.A)
    case = replace(case, base=W, adapter=adapter)
    layer = module(case)
    layer.base.to(dtype)
    merged = layer.merged()
    assert merged.dtype == dtype
    rounded = case.merged().astype(kind)
    assert_sums(numpy(merged.float()), rounded.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(data=st.data())
def test_over_a_base_of_16_bits_the_sum_is_rounded_once(dtype, data):
    case = LORA.case(data, "integers")
    layer = module(case)
    layer.base.to(dtype)
    x = tensor(case.x).to(dtype)  # small integers, so all sums are exact
    update = tensor(case.x @ reference.delta(case.adapter).T)
    y = (layer.base(x).float() + update).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), y)


@given(data=st.data())
def test_a_quantized_base_is_the_reference_on_the_dequantized_weight(data):
    case = LORA.case(data, "gaussians")
    base = QuantizedLinear.from_linear(dense(case.base, case.bias), blocksize=4)
    layer = ADAPTED["lora"](base, case)
    plain = module(replace(case, base=numpy(base.weight)))
    for ours, theirs in zip(run(layer, case), run(plain, case), strict=True):
        assert_sums(ours, theirs)
    assert_sums(numpy(layer.merged()), numpy(plain.merged()))


@given(seeds, sizes(), st.booleans())
def test_init_starts_where_the_reference_does(seed, s, rank_stabilized):
    generator = torch.Generator().manual_seed(seed)
    new = lora.init(generator, s.k, s.d, s.r, 16, rank_stabilized)
    theirs = reference.init(
        np.random.default_rng(0), s.k, s.d, s.r, 16, rank_stabilized
    )
    assert new.scaling == theirs.scaling
    assert new.A.shape == theirs.A.shape
    assert_sums(numpy(new.B), theirs.B)
    assert (new.A.abs() <= 1 / np.sqrt(s.k)).all()
    again = lora.init(generator.manual_seed(seed), s.k, s.d, s.r, 16)
    assert torch.equal(new.A, again.A)


@pytest.mark.parametrize("r", [0, -1, 4])
def test_a_rank_out_of_range_is_refused_in_the_same_words(r):
    with pytest.raises(InputError) as theirs:
        reference.init(np.random.default_rng(0), 3, 5, r, alpha=8)
    with pytest.raises(InputError) as ours:
        lora.init(None, 3, 5, r, alpha=8)
    assert str(ours.value) == str(theirs.value)
