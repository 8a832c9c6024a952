"""The contract of every state: the torch column has the bits of the reference."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.reference import adamw as reference
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging
from tests.states import (
    ROWS,
    SETTINGS,
    bits,
    budgets,
    dtypes,
    gradient,
    page_sizes,
    weights,
)
from tests.strategies import seeds
from tests.tolerance import assert_bits


def _adamw(draw, params, **settings):
    return AdamW(params, **settings)


def _paged(draw, params, **settings):
    paging = Paging(draw(page_sizes), draw(budgets))
    return PagedAdamW(params, paging=paging, **settings)


def _move_pages(draw, optimizer):
    table = optimizer.table
    pages = [page for pages in optimizer.pages.values() for page in pages]
    for page in draw(st.lists(st.sampled_from(pages), max_size=4)):
        getattr(table, draw(st.sampled_from(["touch", "prefetch", "evict"])))(page)
        assert len(table.resident) <= table.budget
    table.resize(draw(budgets))


OPTIMIZERS = {
    "adamw": (_adamw, lambda draw, optimizer: None),
    "paged": (_paged, _move_pages),
}
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def parameters(W):
    return [torch.nn.Parameter(to_torch(w).clone()) for w in W]


def gradients(draw, rng, W):
    """Return gradients for at least one of the tensors, and None for the others."""
    idle = draw(st.sets(st.integers(0, len(W) - 1), max_size=len(W) - 1))
    return [None if i in idle else gradient(rng, w) for i, w in enumerate(W)]


def descend(optimizer, grads):
    for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = None if grad is None else to_torch(grad)
    optimizer.step()


def assert_agree(optimizer, W, row, held, stepped):
    """Check that weights and states are those of the reference, bit for bit."""
    for p, expected in zip(optimizer.param_groups[0]["params"], W, strict=True):
        assert_bits(to_numpy(p), expected)
    states = optimizer.state_dict()["state"]
    assert states.keys() == stepped
    for i, state in states.items():
        expected = reference.to_arrays(row.state(held, i))
        assert int(state["step"]) == int(expected.pop("t"))
        assert state.keys() - {"step"} == expected.keys()
        for name, array in expected.items():
            flat = array.reshape(-1) if "codes" in name else array
            assert_bits(state[name].numpy(), flat)


@rows
@given(seeds, SETTINGS, bits, dtypes, st.data())
def test_weights_and_states_agree_in_every_bit(row, seed, config, b, dtype, data):
    rng, draw = np.random.default_rng(seed), data.draw
    W = weights(rng, dtype)
    make, between = OPTIMIZERS[row.name]
    optimizer = make(draw, parameters(W), **vars(config), bits=b)
    held = row.hold(draw, [reference.init(w, b) for w in W])
    stepped = set()
    for _ in range(draw(st.integers(1, 4))):
        grads = gradients(draw, rng, W)
        descend(optimizer, grads)
        for i, grad in enumerate(grads):
            if grad is not None:
                W[i], held = row.step(held, i, W[i], grad, config)
                stepped.add(i)
        between(draw, optimizer)
        held = row.between(draw, held)
    assert_agree(optimizer, W, row, held, stepped)


@rows
@given(seeds, bits, st.data())
def test_saving_and_loading_between_two_steps_changes_nothing(row, seed, b, data):
    rng, draw, config = np.random.default_rng(seed), data.draw, reference.AdamW()
    W = weights(rng)
    make, _ = OPTIMIZERS[row.name]
    first = make(draw, parameters(W), bits=b)
    held = row.hold(draw, [reference.init(w, b) for w in W])
    before, after = ([gradient(rng, w) for w in W] for _ in range(2))
    descend(first, before)
    file = io.BytesIO()
    torch.save([first.param_groups[0]["params"], first.state_dict()], file)
    file.seek(0)
    params, saved = torch.load(file, weights_only=False)
    second = make(draw, params, lr=9.0, bits=b)
    descend(second, [gradient(rng, w) for w in W])  # nothing of it may remain
    with torch.no_grad():
        for p, q in zip(params, first.param_groups[0]["params"], strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    descend(second, after)
    for grads in (before, after):
        for i, grad in enumerate(grads):
            W[i], held = row.step(held, i, W[i], grad, config)
    assert_agree(second, W, row, held, set(range(len(W))))


def test_every_row_is_here():
    assert {row.name for row in ROWS} == set(OPTIMIZERS)
