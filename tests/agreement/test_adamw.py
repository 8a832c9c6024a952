"""AdamW in torch: the bits of the reference, and the settings of torch's own."""

import io
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
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.reference import adamw as reference
from minipeft.torch import adamw
from tests.properties.test_adamw import SETTINGS, bits, half_dtypes, run, tensors
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma


def optimizer(W, config, b=32):
    """Our optimizer over one parameter."""
    p = torch.nn.Parameter(torch.from_numpy(W.copy()))
    return p, adamw.AdamW([p], **vars(config), bits=b)


def descend(p, optimizer, grads):
    for grad in grads:
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()


def as_torch(state):
    """A state of the reference, named as the torch column names it."""
    arrays = reference.to_arrays(state)
    flat = {k: v.reshape(-1) if "codes" in k else v for k, v in arrays.items()}
    return {"step": int(flat.pop("t")), **flat}


def assert_state(state, expected):
    assert state.keys() == expected.keys()
    assert state["step"] == expected["step"]
    for name in state.keys() - {"step"}:
        assert_bits(state[name].numpy(), expected[name])


@given(seeds, SETTINGS, bits, st.integers(1, 5))
def test_weights_and_states_agree_in_every_bit(seed, config, b, k):
    W, grads = tensors(seed, k)
    p, ours = optimizer(W, config, b)
    descend(p, ours, grads)
    expected, state = run(W, grads, config, reference.init(W, b))
    assert_bits(p.detach().numpy(), expected)
    assert_state(ours.state[p], as_torch(state))


@given(seeds, SETTINGS, bits, half_dtypes, st.integers(1, 3))
def test_weights_of_16_bits_agree_too(seed, config, b, dtype, k):
    W, grads = tensors(seed, k)
    W, grads = W.astype(dtype), [g.astype(dtype) for g in grads]
    p = torch.nn.Parameter(to_torch(W).clone())
    ours = adamw.AdamW([p], **vars(config), bits=b)
    for grad in grads:
        p.grad = to_torch(grad)
        ours.step()
    expected, state = run(W, grads, config, reference.init(W, b))
    assert_bits(to_numpy(p), expected)
    assert_state(ours.state[p], as_torch(state))


@given(seeds, SETTINGS, st.integers(1, 5))
def test_it_is_the_adamw_of_torch_up_to_rounding(seed, config, k):
    W, grads = tensors(seed, k, 300)
    p, ours = optimizer(W, config)
    q = torch.nn.Parameter(torch.from_numpy(W.copy()))
    theirs = torch.optim.AdamW([q], **vars(config), foreach=False)

    (beta1, beta2), lr = config.betas, config.lr
    v = absolute = bound = np.zeros(W.size)
    for t, grad in enumerate(grads, 1):
        before = np.abs(q.detach().double().numpy())
        descend(p, ours, [grad])
        descend(q, theirs, [grad])
        g = grad.astype(np.float64)
        v, absolute = (
            beta2 * v + (1 - beta2) * g**2,
            absolute + (1 - beta1) * (np.abs(g) + absolute),
        )
        scale = lr / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + config.eps)
        # Those of the reference's law, and one for a root that is off by a last bit;
        # the two may err in opposite directions, and each step adds to the last.
        share = 2 * gamma(7 * t + 12) * (before + scale * absolute)
        bound = bound * (1 + gamma(3)) + share
        assert_within(p.detach().numpy(), q.detach().numpy(), bound)
        state = theirs.state[q]
        ours_m, ours_v = ours.state[p]["m"].numpy(), ours.state[p]["v"].numpy()
        assert_within(ours_m, state["exp_avg"].numpy(), 2 * gamma(4 * t) * absolute)
        assert_within(ours_v, state["exp_avg_sq"].numpy(), 2 * gamma(5 * t) * v)


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
    # torch's vectorized CPU kernels multiply and add in one rounding; its plain ones
    # round as NumPy does, and are chosen by a variable that is read at import.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_STATES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [True, True]


@given(seeds, bits, st.integers(0, 3), st.integers(1, 3))
def test_saving_and_loading_between_two_steps_changes_nothing(seed, b, j, k):
    W, grads = tensors(seed, j + k)
    whole = optimizer(W, reference.AdamW(), b)
    descend(*whole, grads)

    first = optimizer(W, reference.AdamW(), b)
    descend(*first, grads[:j])
    file = io.BytesIO()
    torch.save([first[0].detach(), first[1].state_dict()], file)
    file.seek(0)
    saved = torch.load(file)
    second = optimizer(np.zeros_like(W), reference.AdamW(lr=9.0), b)
    with torch.no_grad():
        second[0].copy_(saved[0])
    second[1].load_state_dict(saved[1])
    descend(*second, grads[j:])
    assert_bits(second[0].detach().numpy(), whole[0].detach().numpy())
    mine = {k: v for k, v in whole[1].state[whole[0]].items() if k != "step"}
    for name, tensor in mine.items():
        assert_bits(second[1].state[second[0]][name].numpy(), tensor.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_leaves_codes_and_scales_as_they_are(dtype):
    # torch.optim.Optimizer casts all it loads to the dtype of the parameter, codes and
    # scales included (bitsandbytes 782 is about resuming with 8-bit states).
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
    assert_within(a.detach().numpy(), np.full(3, 0.999), gamma(18))
    assert_within(b.detach().numpy(), np.full(3, 0.5), gamma(18))
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
