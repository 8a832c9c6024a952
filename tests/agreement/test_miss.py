"""The torch column's MiSS: its sum over shards is a product; peft computes the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.inject import activate, add, inject, merge, trainable_parameters
from minipeft.torch.miss import MiSSConfig
from tests.agreement.on_torch import dense, numpy, tensor
from tests.parametrizations import ROWS
from tests.tolerance import assert_sums

MISS = next(row for row in ROWS if row.name == "miss")


@given(data=st.data())
def test_peft_and_we_compute_the_same_also_where_a_shard_is_short(data):
    peft = pytest.importorskip("peft", reason="needs peft")
    case = MISS.case(data, "integers")
    base, r = dense(case.base, case.bias), len(case.adapter.D)
    config = peft.MissConfig(r=r, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.miss_block.load_state_dict({"default": tensor(case.adapter.D)})
    assert_sums(numpy(layer(tensor(case.x))), case.forward())
    layer.merge()
    assert_sums(numpy(layer.base_layer.weight), case.merged())


def test_adapters_of_different_r_add_up():
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.arange(21.0).reshape(3, 7)
    inject(model, MiSSConfig(3), ["0"])
    add(model, MiSSConfig(4), "other")
    with torch.no_grad():
        model[0].base.weight.fill_(2.0)
        model[0].base.bias.fill_(3.0)
        for name in ("default", "other"):
            model[0].adapters[name].D.fill_(1.0)
    plain = model[0].base(x)
    total = plain + 2 * x.sum(1, keepdim=True)
    activate(model, {"default": 1.0, "other": 1.0})
    assert torch.equal(model(x), total)
    assert torch.equal(merge(model)(x), total)


def test_it_trains_r_numbers_for_each_output():
    model = inject(nn.Sequential(nn.Linear(7, 5)), MiSSConfig(3), ["0"])
    assert [p.shape for p in trainable_parameters(model)] == [(3, 5)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MiSSConfig(0), "0: r is 0; choose 1 to 8"),
        (MiSSConfig(9), "0: r is 9; choose 1 to 8"),
        (MiSSConfig(2, dropout=1.0), "0: dropout is 1.0"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_changes(config, sentence):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=sentence):
        inject(model, config, ["0"])
    assert isinstance(model[0], nn.Linear)
