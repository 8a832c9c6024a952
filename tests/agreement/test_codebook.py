"""Both columns hold the same tables, byte for byte."""

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.reference import codebook as reference
from minipeft.torch import codebook
from tests.tolerance import assert_bits

OFFSETS = [929 / 960, 0.51, 0.7, 0.9, 0.95, 0.99, 0.999]


@pytest.mark.parametrize("name", ["NF4", "FP4", "NF3", "NF2"])
def test_the_tables_are_equal(name):
    assert_bits(getattr(codebook, name).numpy(), getattr(reference, name))


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantiles_are_equal(bits):
    for offset in OFFSETS:
        ours = codebook.normal_float(bits, offset).numpy()
        assert_bits(ours, reference.normal_float(bits, offset))


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_equal(signed):
    ours = codebook.dynamic_map(signed).numpy()
    assert_bits(ours, reference.dynamic_map(signed))
    assert len(np.unique(ours)) == 256


@pytest.mark.parametrize(("bits", "offset"), [(1, 0.9), (9, 0.9), (4, 0.5), (4, 1.0)])
def test_the_same_is_refused_in_the_same_words(bits, offset):
    with pytest.raises(InputError) as theirs:
        reference.normal_float(bits, offset)
    with pytest.raises(InputError) as ours:
        codebook.normal_float(bits, offset)
    assert str(ours.value) == str(theirs.value)
