"""AdamW in torch: its distance from torch's own AdamW, and the common settings."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import adamw as reference
from minipeft.reference.adamw import AdamW
from minipeft.torch import adamw
from tests.bounds import Counted, assert_both_within, bound
from tests.properties.test_adamw import counted_step, tensors
from tests.states import SETTINGS
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer(W, config):
    """Return our optimizer over one parameter."""
    p = torch.nn.Parameter(torch.from_numpy(W.copy()))
    return p, adamw.AdamW([p], **vars(config))


def descend(p, optimizer, grads):
    for grad in grads:
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()


@pytest.mark.parametrize("n", [4095, 4096, 4097])
def test_eight_bits_begin_at_one_size_with_one_code(n):
    ours, theirs = adamw.init(torch.zeros(n), 8), reference.init(np.zeros(n), 8)
    coded = {m: getattr(theirs, m) for m in "mv" if f"{m}_codes" in ours}
    assert bool(coded) == (n >= 4096)
    for m, moment in coded.items():
        assert_bits(ours[f"{m}_codes"].numpy(), moment.packed)


@given(seeds, SETTINGS, st.integers(1, 5))
def test_it_is_the_adamw_of_torch_up_to_rounding(seed, config, k):
    W, grads = tensors(seed, k, 300)
    p, ours = optimizer(W, config)
    q = torch.nn.Parameter(torch.from_numpy(W.copy()))
    theirs = torch.optim.AdamW([q], **vars(config), foreach=False)

    off = np.zeros(W.size)
    sizes = Counted(off), Counted(off)
    for t, grad in enumerate(grads, 1):
        before = abs(q.detach().numpy())
        descend(p, ours, [grad])
        descend(q, theirs, [grad])
        *sizes, moved = counted_step(before, abs(grad), *sizes, t, config)
        # The two may err in opposite directions, and torch's root may err by one
        # rounding more. The difference of the weights is carried into the next step,
        # where the decay rounds twice.
        off = off * (1 + gamma(3)) + 2 * bound(moved) + gamma(1) * moved.size
        assert_within(p.detach().numpy(), q.detach().numpy(), off)
        state, held = theirs.state[q], ours.state[p]
        for ours_name, name, formula in zip("mv", MOMENTS, sizes, strict=True):
            found, right = held[ours_name].numpy(), state[name].numpy()
            assert_both_within(found, right, formula, formula)


SAME_STATES = """
import json, numpy as np, torch
from minipeft.reference import adamw
rng = np.random.default_rng(7)
W = rng.standard_normal((37, 53)).astype(np.float32)
p = torch.nn.Parameter(torch.from_numpy(W.copy()))
theirs, state = torch.optim.AdamW([p], foreach=False), adamw.init(W)
for _ in range(25):
    sizes = 10 ** rng.uniform(-4, 1, W.shape)
    grad = (rng.standard_normal(W.shape) * sizes).astype(np.float32)
    p.grad = torch.from_numpy(grad)
    theirs.step()
    W, state = adamw.step(W, grad, state, adamw.AdamW())
m, v = theirs.state[p]["exp_avg"].numpy(), theirs.state[p]["exp_avg_sq"].numpy()
print(json.dumps([bool((m == state.m).all()), bool((v == state.v).all())]))
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="only on x86 does torch have kernels without a fused multiply-add",
)
def test_the_states_are_those_of_torch_bit_for_bit_where_nothing_is_fused():
    # torch's vectorized CPU kernels multiply and add in one rounding. Its plain kernels
    # round as NumPy does; an environment variable chooses them when torch is imported.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_STATES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_leaves_codes_and_scales_as_they_are(dtype):
    # torch.optim.Optimizer casts all state that it loads to the dtype of the parameter,
    # also codes and scales (bitsandbytes 782 is about resuming with 8-bit states).
    p = torch.nn.Parameter(torch.randn(5000).to(dtype))
    ours = adamw.AdamW([p], bits=8)
    p.grad = torch.randn(5000).to(dtype)
    ours.step()
    saved = ours.state_dict()
    other = adamw.AdamW([torch.nn.Parameter(p.detach().clone())], bits=8)
    other.load_state_dict(saved)
    (state,) = other.state.values()
    assert state["m_codes"].dtype == state["v_codes"].dtype == torch.uint8
    for name in ("m_absmax", "v_absmax", "m_codes", "v_codes"):
        assert torch.equal(state[name], saved["state"][0][name])
        assert state[name].data_ptr() != saved["state"][0][name].data_ptr()


def test_groups_and_schedules_work_as_everywhere():
    a, b, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    ours = adamw.AdamW(
        [{"params": [a, idle]}, {"params": [b], "lr": 0.5, "weight_decay": 0.0}],
        weight_decay=0.0,
    )
    halved = torch.optim.lr_scheduler.StepLR(ours, 1, 0.5)
    loss = ours.step(lambda: _loss(a, b))
    assert loss == 6.0
    zero, ones = Counted(np.zeros(3)), np.ones(3)
    for p, lr in ((a, 1e-3), (b, 0.5)):
        config = AdamW(lr=lr, weight_decay=0.0)
        *_, moved = counted_step(ones, ones, zero, zero, 1, config)
        assert_within(p.detach().numpy(), np.full(3, 1 - lr), bound(moved))
    assert idle not in ours.state
    halved.step()
    assert [group["lr"] for group in ours.param_groups] == [5e-4, 0.25]


def test_nothing_changes_where_a_gradient_is_refused():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = adamw.AdamW([a, b])
    a.grad, b.grad = torch.ones(3), torch.tensor([0.0, torch.inf, torch.nan])
    with pytest.raises(
        InputError, match="the gradient of parameter 1 holds inf at index 1; skip"
    ):
        ours.step()
    assert torch.equal(a, torch.ones(3))
    assert not ours.state
    a.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(InputError, match="sparse=False"):
        ours.step()


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"bits": 4},
    ],
)
def test_a_setting_out_of_range_is_refused(bad):
    (name,) = bad
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=name):
        adamw.AdamW([p], **bad)
    with pytest.raises(InputError, match=name):
        adamw.AdamW([{"params": [p], **bad}])


def _loss(a, b):
    loss = a.sum() + b.sum()
    loss.backward()
    return float(loss.detach())
