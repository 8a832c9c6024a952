"""A bias is refused, not dropped, if the base has no tensor for it."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop.adapter import Adapter
from minipeft.interop.merging import merge
from tests.interop.folders import write_model


def test_a_bias_of_a_layer_without_one_is_refused(tmp_path):
    base = write_model(tmp_path / "base", {"a.weight": torch.ones(2, 2)})
    with pytest.raises(InputError, match=r"changes a\.bias, which the base does not"):
        merge(base, Adapter({}, {"a.bias": torch.ones(2)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
