"""A card of a stated size: what is counted, and what does not survive."""

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.card import Card, demand, on_device
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging

FLOAT = 4


def test_a_block_notes_its_peak_and_what_was_kept():
    with Card(10_000) as card, card.takes(1000) as found:
        first = torch.zeros(500)
        second = torch.zeros(1000)
        del first, second
        torch.zeros(250)
    assert found == [1000 + 1500 * FLOAT]


@pytest.mark.parametrize("device", ["cpu", "pretended:0"])
@pytest.mark.parametrize(("size", "survives"), [(7000, True), (6999, False)])
def test_a_step_survives_exactly_what_it_needs(size, survives, device):
    def step():
        with Card(size, device) as card, card.takes(1000):
            torch.zeros(1500)

    if survives:
        step()
    else:
        with pytest.raises(torch.OutOfMemoryError, match=r"7,000 bytes .* has 6,999"):
            step()


@pytest.mark.parametrize("size", [0, -1.0, float("nan")])
def test_a_card_has_bytes(size):
    with pytest.raises(InputError, match="give a positive number"):
        Card(size)


@pytest.mark.parametrize("total", [15_835_660_288, 42_297_786_368, 85_018_279_936])
def test_the_limit_on_cuda_is_the_size_to_the_byte(monkeypatch, total):
    """Torch takes a part of the device, and the whole bytes of the product."""
    limits = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, total))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda part, index: limits.append(int(part * total) + index),
    )
    monkeypatch.setattr("gc.collect", lambda: None)
    sizes = range(2**24, total, 2**24)
    for size in [*sizes, total, 2 * total]:
        with Card(size, "cuda:0"):
            pass
    assert limits[::2] == [*sizes, total, total]
    assert set(limits[1::2]) == {total}
    with Card(total, "cuda:1"):  # its limit, and not that of the current device
        assert limits[-1] == total + 1
    assert limits[-1] == total + 1


def test_a_limit_below_what_is_taken_already_is_said_before_the_first_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 8_000)
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"8,000 bytes are .* has 7,999"),
        Card(7_999, "cuda"),
    ):
        pass


def trained(make):
    """Return a layer and its optimizer after one step."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = make(layer.parameters())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert on_device(layer, optimizer) >= 2 * 64 * 64 * FLOAT  # with its gradient
    optimizer.zero_grad()
    return layer, optimizer


def test_states_count_as_far_as_they_are_on_the_device():
    weights = 64 * 64 * FLOAT
    states = 64 * 64 * (2 + 2 * FLOAT / 256)
    layer, plain = trained(lambda p: AdamW(p, bits=8))
    assert on_device(layer, plain) == weights + states
    paging = Paging(page_size=1024, budget=3)
    layer, paged = trained(lambda p: PagedAdamW(p, bits=8, paging=paging))
    assert on_device(layer, paged) == weights + 3 / 4 * states
    paged.table.resize(1)
    assert on_device(layer, paged) == weights + 1 / 4 * states


class Loss(nn.Module):
    """A layer with a loss, as the models of transformers return it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        loss = self.layer(x).square().sum()
        return type("Output", (), {"loss": loss})


def test_the_demand_of_a_pass_has_weights_and_gradients_and_no_states():
    model = Loss()
    need = demand(model, {"x": torch.ones(1, 64)}, "cpu")
    weights = gradients = 64 * 64 * FLOAT
    assert weights + gradients <= need < weights + gradients + 16 * 64 * FLOAT
    assert model.layer.weight.grad is None
