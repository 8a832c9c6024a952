"""The torch column's HiRA: several adapters multiply the same frozen weight."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.inject import inject
from minipeft.torch.lora import LoRAConfig
from tests.agreement.on_torch import module, numpy, tensor
from tests.parametrizations import ROWS
from tests.tolerance import assert_sums

HIRA = next(row for row in ROWS if row.name == "hira")


@given(data=st.data())
def test_two_adapters_change_the_same_frozen_weight(data):
    case = HIRA.case(data, "integers")
    layer = module(case)
    layer.add("other", module(case).adapters["default"])
    layer.activate({"default": 0.5, "other": 2.0})
    update = np.float32(2.5) * (case.merged() - case.base)
    assert_sums(numpy(layer.merged()), case.base + update)
    assert_sums(numpy(layer.delta()), update)
    y = layer(tensor(case.x))
    assert_sums(numpy(layer.merge()(tensor(case.x))), numpy(y))


def test_the_start_is_that_of_lora():
    models = [nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)) for _ in range(2)]
    for model, config in zip(models, (HiRAConfig(2), LoRAConfig(2, 2)), strict=True):
        inject(model, config, ["0", "1"], generator=torch.Generator().manual_seed(0))
    ours, theirs = ([*m.parameters()] for m in models)
    trained = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.requires_grad]
    assert len(trained) == 4
    assert all(torch.equal(a, b) for a, b in trained)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (HiRAConfig(0), "0: r is 0"),
        (HiRAConfig(2, scaling=float("nan")), "scaling is nan"),
        (HiRAConfig(2, dropout=1.0), "dropout is 1.0"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_changes(config, sentence):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=sentence):
        inject(model, config, ["0"])
    assert isinstance(model[0], nn.Linear)
