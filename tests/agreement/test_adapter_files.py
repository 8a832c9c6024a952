"""The code that reads adapter files agrees with the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.interop import peft_update
from minipeft.interop.adapter import Adapter
from minipeft.interop.tensors import About
from minipeft.interop.update import merged
from minipeft.reference import adapter_files as reference
from minipeft.reference.adapter_files import Parts
from tests.agreement.on_torch import numpy, tensor
from tests.strategies import integers
from tests.tolerance import assert_sums

NAME = "model.layers.1.self_attn.q_proj"
KEYS = st.sampled_from(["q_proj", "k_proj", "proj", NAME, r"layers\.[01]\..*", "1"])


@given(data=st.data())
def test_the_settings_of_a_layer_are_those_of_the_reference(data):
    common, own = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    config = {
        **{"r": common, "lora_alpha": data.draw(st.sampled_from([1, 4.0, -2]))},
        "use_rslora": data.draw(st.booleans()),
        "rank_pattern": {data.draw(KEYS): own},
        "alpha_pattern": {data.draw(KEYS): 16, data.draw(KEYS): 32},
        "fan_in_fan_out": data.draw(st.booleans()),
    }
    found = reference.settings(config, NAME)
    A, B = data.draw(integers((found.r, 5))), data.draw(integers((4, found.r)))
    update = peft_update.update(
        NAME, {"lora_A": tensor(A), "lora_B": tensor(B)}, config
    )
    assert (update.r, update.scaling, update.transposed) == found
    if found.scaling == int(found.scaling):
        W = data.draw(integers((5, 4) if found.transposed else (4, 5)))
        bias = np.zeros(4, np.float32)
        stored, _ = reference.merge(W, bias, Parts(A, B), config, NAME)
        assert_sums(numpy(merged(tensor(W), update)), stored)


def test_a_bias_of_another_length_is_refused_beside_its_weight_and_taken_with_it():
    base = {
        "a.weight": About(torch.float32, (4, 5)),
        "a.bias": About(torch.float32, (4,)),
    }
    with pytest.raises(InputError, match=r"a\.bias has shape \(4,\) in the base"):
        Adapter({}, saved={"a.bias": torch.ones(3)}).renamed(base)
    whole = {"a.weight": torch.ones(3, 5), "a.bias": torch.ones(3)}
    assert Adapter({}, saved=whole).renamed(base).saved.keys() == whole.keys()
