"""Laws of LoRA+: the learning rate of each parameter."""

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.inject import adapted, inject, trainable_parameters
from minipeft.torch.lora_plus import parameter_groups
from tests.agreement.on_torch import CONFIGS
from tests.parametrizations import ROWS

HAVE_B = [row.name for row in ROWS if row.name in CONFIGS and "B" in row.trained]


def model():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 5))


def ids(parameters):
    return {id(p) for p in parameters}


@pytest.mark.parametrize("row", HAVE_B)
def test_what_starts_at_zero_learns_faster_and_nothing_is_left_out(row):
    own = inject(model(), CONFIGS[row], ["0", "1", "2"])
    slow, fast = parameter_groups(own, 0.5, 4.0)
    assert (slow["lr"], fast["lr"]) == (0.5, 2.0)
    everything = ids(trainable_parameters(own))
    assert ids(slow["params"]) | ids(fast["params"]) == everything
    assert len(slow["params"]) + len(fast["params"]) == len(everything)
    layers = [layer.adapters["default"] for layer in adapted(own).values()]
    wanted = [layers[0].A, layers[1].B, layers[2].B]
    assert ids(fast["params"]) == ids(wanted)
    assert not any(p.any() for p in wanted)


def test_a_step_moves_b_by_its_own_rate():
    own = inject(model(), CONFIGS["lora"], ["1", "2"])
    adapter = adapted(own)["2"].adapters["default"]
    A = adapter.A.detach().clone()
    optimizer = torch.optim.SGD(parameter_groups(own, 0.25, 4.0))
    own(torch.tensor([1, 2, 3])).square().sum().backward()
    optimizer.step()
    assert torch.equal(adapter.B, -adapter.B.grad)  # from 0, at the rate 0.25 * 4
    assert torch.equal(adapter.A, A)  # B was zero, so the gradient of A was zero


@pytest.mark.parametrize(
    ("lr", "ratio", "sentence"),
    [
        (0.0, 16.0, "lr is 0.0"),
        (float("nan"), 16.0, "lr is nan"),
        (0.1, -1.0, "ratio is -1.0"),
        (0.1, float("inf"), "ratio is inf"),
    ],
)
def test_a_rate_out_of_range_is_refused(lr, ratio, sentence):
    with pytest.raises(InputError, match=sentence):
        parameter_groups(inject(model(), CONFIGS["lora"], ["1"]), lr, ratio)


@pytest.mark.parametrize("row", sorted(CONFIGS.keys() - {*HAVE_B, "ia3"}))
def test_a_model_without_lora_is_refused(row):
    own = inject(model(), CONFIGS[row], ["1"])
    with pytest.raises(InputError, match="has no LoRA"):
        parameter_groups(own, 0.1)
    with pytest.raises(InputError, match="has no LoRA"):
        parameter_groups(model(), 0.1)
