"""The contract of both optimizers in torch: a step changes all or nothing."""

import copy
import pickle
import re
from functools import partial
from typing import get_type_hints

import numpy as np
import pytest
import torch
from beartype.door import is_bearable
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import adamw as reference
from minipeft.torch import adamw, slices
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging
from tests.properties.ambient import STATES
from tests.tolerance import assert_bits, assert_within, gamma

SIZE = 5000  # small tensors have no 8-bit states
KINDS = {
    "AdamW": AdamW,
    "PagedAdamW": partial(PagedAdamW, paging=Paging(1024, 2)),
}
HINTS = get_type_hints(AdamW.__init__)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
both_widths = pytest.mark.parametrize("bits", [8, 32])


def made(kind, bits=32, dtype=torch.float32, seed=0, **settings):
    """Return an optimizer after a step; one of its parameters has no gradient."""
    torch.manual_seed(seed)
    sizes = {"first": (SIZE,), "second": (SIZE,), "idle": (3,)}
    named = [(n, nn.Parameter(torch.randn(s).to(dtype))) for n, s in sizes.items()]
    ours = kind(named, bits=bits, **settings)
    descend(ours)
    return ours, [p for _, p in named]


def descend(ours, spoil=lambda first, second: None):
    first, second, _ = ours.param_groups[0]["params"]
    torch.manual_seed(7)
    first.grad, second.grad = torch.randn_like(first), torch.randn_like(second)
    spoil(first, second)
    ours.step()


def snapshot(ours):
    params = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    return copy.deepcopy([params, ours.state_dict()])


def same(a, b):
    """Compare two snapshots, every bit of them."""
    leaves = zip(
        torch.utils._pytree.tree_leaves(a),
        torch.utils._pytree.tree_leaves(b),
        strict=True,
    )
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else repr(x) == repr(y)
        for x, y in leaves
    )


def refused(ours, spoil, sentence):
    before = snapshot(ours)
    with pytest.raises(InputError, match=re.escape(sentence)):
        descend(ours, spoil)
    assert same(snapshot(ours), before)


def at(index, value):
    def spoil(first, second):
        second.grad[index] = value

    return spoil


@kinds
@both_widths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_changes(
    kind, bits, dtype, bad
):
    ours, _ = made(kind, bits, dtype)
    sentence = f"the gradient of second holds {bad} at index 3000; skip this step."
    refused(ours, at(3000, bad), sentence)


@kinds
@both_widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_whose_square_overflows_is_named_and_nothing_changes(
    kind, bits, dtype
):
    ours, _ = made(kind, bits, dtype)
    sentence = "at index 3000, and its square overflows the second moment (float32)"
    refused(ours, at(3000, 1e21), sentence)
    descend(ours)  # and the next step works
    other, _ = made(kind, bits, dtype)
    descend(other)
    assert same(snapshot(ours), snapshot(other))


@kinds
@pytest.mark.parametrize("bits", [8, 32])
def test_a_large_gradient_that_fits_is_taken_with_the_bits_of_the_reference(kind, bits):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(SIZE).astype(np.float32)
    p = nn.Parameter(torch.from_numpy(W.copy()))
    ours, state = kind([p], bits=bits), reference.init(W, bits)
    for size in (1.0, 1e20, 1.0, 1e-3):
        grad = (size * rng.standard_normal(SIZE)).astype(np.float32)
        p.grad = torch.from_numpy(grad.copy())
        ours.step()
        W, state = reference.step(W, grad, state, reference.AdamW())
        assert_bits(p.detach().numpy(), W)


@kinds
def test_a_weight_that_leaves_its_dtype_is_named_and_nothing_changes(kind):
    ours, (first, *_) = made(kind, dtype=torch.float16, weight_decay=0.0)
    with torch.no_grad():
        first[17] = 65504.0
    ours.param_groups[0]["lr"] = 300.0

    def up(first, second):
        first.grad[17] = -60000.0

    refused(ours, up, "beyond float16; lower the learning rate")


@kinds
def test_the_first_step_is_checked_as_the_first(kind):
    # It moves a weight by lr = 20, the second by less than 15: 65,519 is still rounded
    # to the largest float16, 65,504.
    p = nn.Parameter(torch.full((1,), 65504.0, dtype=torch.float16))
    ours = kind([p], lr=20.0, weight_decay=0.0)
    p.grad = -torch.ones_like(p)
    with pytest.raises(InputError, match="beyond float16; lower the learning rate"):
        ours.step()
    assert p.item() == 65504


@kinds
@both_widths
def test_a_step_after_a_large_gradient_is_computed_before_it_is_written(kind, bits):
    # m = 5e20 over eps, with settings that suffice where no gradient was large.
    p = nn.Parameter(torch.zeros(SIZE))
    ours = kind([p], lr=0.0, betas=(0.0, 0.999), weight_decay=0.0, bits=bits)
    p.grad = torch.full_like(p, 5e20)
    ours.step()
    ours.param_groups[0].update(lr=1.9e5, betas=(0.9, 0.0), eps=1e-12)
    p.grad = torch.zeros_like(p)
    before = copy.deepcopy([p, ours.state_dict()["state"]])
    with pytest.raises(InputError, match="is 0 at index 0, so eps alone divides the"):
        ours.step()
    assert same(before, [p, ours.state_dict()["state"]])


@kinds
def test_a_weight_of_float64_is_computed_in_float64(kind):
    rng = np.random.default_rng(0)
    W, grad = rng.standard_normal((2, SIZE))
    p = nn.Parameter(torch.from_numpy(W.copy()))
    p.grad = torch.from_numpy(grad)
    kind([p]).step()
    right, _ = reference.step(W, grad, reference.init(W), reference.AdamW())
    # Six roundings after the moments in each column; torch's root may err by two.
    allowed = 2 * gamma(7, "float64") * (abs(W) + abs(right - W))
    assert_within(p.detach().numpy(), right, allowed)


@kinds
def test_a_quotient_of_zeros_is_named_and_nothing_changes(kind):
    def still(first, second):
        second.grad[2000:] = 0

    _, params = made(kind)
    ours = kind(params, eps=0.0)
    refused(ours, still, "the second moment of parameter 1 is 0 at index 2000")


@kinds
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lr", bad) for bad in (-1.0, np.nan, np.inf, "0.1", None, True)],
        *[("eps", bad) for bad in (-1e-8, np.nan, np.inf)],
        *[("weight_decay", bad) for bad in (-0.1, np.nan, np.inf)],
        *[("betas", bad) for bad in ((0.9, 1.0), (-0.1, 0.5), (np.nan, 0.9), 0.9)],
        *[("betas", bad) for bad in ((0.9,), (0.9, 0.9, 0.9), ("a", "b"), "ab")],
        *[("bits", bad) for bad in (4, 16, "8", None)],
    ],
)
def test_settings_are_checked_at_the_start_in_groups_and_at_every_step(
    kind, name, value
):
    p = nn.Parameter(torch.ones(3))
    if is_bearable(value, HINTS[name]):  # the annotations refuse others
        with pytest.raises(InputError, match=f"{name} (is|are)"):
            kind([p], **{name: value})
    with pytest.raises(InputError, match=f"{name} (is|are)"):
        kind([{"params": [p], name: value}])
    ours, _ = made(kind)
    ours.param_groups[0][name] = value
    refused(ours, lambda *_: None, name)


@kinds
def test_a_gradient_of_another_shape_device_or_kind_is_named(kind):
    ours, (_, second, _) = made(kind)
    second.grad = torch.randn_like(second)
    whole = second.data
    second.data = whole[:10].clone()
    with pytest.raises(InputError, match=r"of second has shape \(5000,\); the param"):
        ours.step()
    second.grad = torch.ones(10)
    with pytest.raises(InputError, match="m of second is float32 of shape"):
        ours.step()
    second.data = whole
    second.grad = torch.sparse_coo_tensor([[0]], [1.0], (SIZE,), check_invariants=True)
    with pytest.raises(InputError, match=r"of second is sparse; .* sparse=False"):
        ours.step()


@kinds
def test_a_change_of_bits_is_refused_at_the_next_step(kind):
    ours, _ = made(kind, bits=8)
    ours.param_groups[0]["bits"] = 32
    refused(ours, lambda *_: None, "the state of first holds m_absmax, m_codes, step")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "is complex64; train float16"),
        (lambda: torch.ones(3, 4)[:1].expand(3, 4), "is expanded"),
        (lambda: torch.ones(3).to_sparse(), "is sparse or sharded"),
        (lambda: nn.LazyLinear(3).weight, "has no values yet"),
    ],
)
@kinds
def test_a_parameter_that_no_step_could_change_is_refused(kind, build, sentence):
    fits, p = nn.Parameter(torch.ones(3)), build()
    p = p if isinstance(p, nn.Parameter) else p.requires_grad_()
    with pytest.raises(InputError, match=f"parameter 1 {sentence}"):
        kind([fits, p])
    ours = kind([fits])
    with pytest.raises(InputError, match=f"parameter 1 {sentence}"):
        ours.add_param_group({"params": [p]})
    assert [group["params"] for group in ours.param_groups] == [[fits]]


def test_a_parameter_of_inference_mode_is_refused():
    with torch.inference_mode():
        p = torch.ones(3)
    with pytest.raises(InputError, match="made in inference mode"):
        AdamW([p])


# State dicts that do not fit: a change of a correct one, and the message.
def _state(saved):
    return saved["state"][1]


def _group(saved):
    return saved["param_groups"][0]


MISFITS = {
    "no groups": (lambda s: s.pop("param_groups"), "has a state and a list of"),
    "no states": (lambda s: s.pop("state"), "has a state and a list of"),
    "another number": (lambda s: _group(s)["params"].pop(), "has groups of [2] param"),
    "another order": (
        lambda s: _group(s)["param_names"].reverse(),
        "has the states of idle, second, first, in this order",
    ),
    "other bits": (lambda s: _group(s).update(bits=32), "states of 32 bits; build"),
    "no bits": (lambda s: _group(s).pop("bits"), "the file has no bits"),
    "no lr": (lambda s: _group(s).pop("lr"), "the file has no lr"),
    "lr is nan": (lambda s: _group(s).update(lr=np.nan), "lr is nan"),
    "a stranger": (lambda s: s["state"].update({9: {}}), "state for parameter 9 of 3"),
    "a moment missing": (lambda s: _state(s).pop("v_codes"), "of second holds m_abs"),
    "a moment more": (lambda s: _state(s).update(w=1), "this optimizer keeps step, m"),
    "another method": (
        lambda s: s["state"].update({1: {"step": 1, "exp_avg": torch.ones(SIZE)}}),
        "of second holds exp_avg, step",
    ),
    "states of 32 bits": (
        lambda s: s["state"].update({1: adamw.init(torch.ones(SIZE))}),
        "of second holds m, step, v",
    ),
    "another size": (
        lambda s: s["state"].update({1: adamw.init(torch.ones(SIZE + 1), 8)}),
        "m_codes of second is uint8 of shape (5001,), and this optimizer needs",
    ),
    "another blocksize": (
        lambda s: _state(s).update(m_absmax=torch.ones(40)),
        "m_absmax of second is float32 of shape (40,), and this optimizer needs",
    ),
    "another dtype": (
        lambda s: _state(s).update(m_absmax=torch.ones(20).half()),
        "m_absmax of second is float16 of shape (20,)",
    ),
    "no tensor": (
        lambda s: _state(s).update(v_absmax=[1.0]),
        "v_absmax of second is l",
    ),
    "a negative step": (lambda s: _state(s).update(step=-1), "second has step -1"),
    "half a step": (lambda s: _state(s).update(step=1.5), "second has step 1.5"),
    "nan": (lambda s: _state(s)["v_absmax"].fill_(np.nan), "of second is not finite"),
    "negative": (lambda s: _state(s)["v_absmax"].fill_(-1), "of second is negative"),
}


@kinds
@pytest.mark.parametrize("misfit", MISFITS)
def test_states_that_do_not_fit_are_refused_before_anything_changes(kind, misfit):
    ours, _ = made(kind, bits=8)
    saved = snapshot(made(kind, bits=8, seed=1)[0])[1]
    change, sentence = MISFITS[misfit]
    change(saved)
    before = snapshot(ours)
    for attempt in (ours.check_state_dict, ours.load_state_dict):
        with pytest.raises(InputError, match=re.escape(sentence)):
            attempt(saved)
        assert same(snapshot(ours), before)


@kinds
def test_the_state_of_torch_s_own_is_refused(kind):
    p = nn.Parameter(torch.ones(8))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones(8)
    theirs.step()
    with pytest.raises(InputError, match="has no bits: it is of another optimizer"):
        kind([p]).load_state_dict(theirs.state_dict())


@both_widths
@pytest.mark.parametrize("extra", [1, 300])
def test_slices_do_not_change_a_bit(bits, extra):
    """Tensors longer than a slice, and transposed ones."""
    torch.manual_seed(0)
    shape = (2, slices.SLICE // 2 + extra)
    W, grad = torch.randn(shape), torch.randn(shape)
    results = []
    for kind in KINDS.values():
        for turned in (False, True):
            p = nn.Parameter(W.T.contiguous().T if turned else W.clone())
            ours = kind([p], bits=bits)
            p.grad = grad.T.contiguous().T if turned else grad.clone()
            ours.step()
            ours.step()
            results.append([p.detach().clone(), *ours.state_dict()["state"].values()])
    assert all(same(result, results[0]) for result in results)
    state, expected = reference.init(W.numpy(), bits), W.numpy()
    for _ in range(2):
        args = (expected, grad.numpy(), state, reference.AdamW())
        expected, state = reference.step(*args)
    assert_bits(results[0][0].contiguous().numpy(), expected)


@both_widths
def test_a_page_may_be_longer_than_a_slice(bits):
    torch.manual_seed(0)
    W, grad = torch.randn(4 * slices.SLICE), torch.randn(4 * slices.SLICE)
    results = []
    for kind in (AdamW, partial(PagedAdamW, paging=Paging(2 * slices.SLICE, 1))):
        p = nn.Parameter(W.clone())
        ours = kind([p], bits=bits)
        p.grad = grad
        ours.step()
        results.append([p, ours.state_dict()["state"]])
    assert same(*results)


def transient(call):
    """Return the peak of memory during a call, less the larger of before and after."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(np.cumsum(changes), default=0)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@both_widths
def test_the_transient_of_a_step_is_below_a_page_however_large_the_tensor(
    bits, dtype, turned
):
    page = Paging().page_size * torch.float32.itemsize
    most = []
    for size in (slices.SLICE, 2 * slices.SLICE):
        W = torch.randn(2, size).to(dtype)
        p = nn.Parameter(W.T if turned else W)
        ours = AdamW([p], bits=bits)
        p.grad = torch.randn_like(p)
        ours.step()
        most.append(transient(ours.step))
    assert 0 < most[1] == most[0] <= page


@kinds
@both_widths
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_copy_and_a_pickle_go_on_with_the_same_bits(kind, bits, again):
    ours, _ = made(kind, bits)
    other = again(ours)
    for optimizer in (ours, other):
        descend(optimizer)
    assert same(snapshot(other), snapshot(ours))
    if kind is not AdamW:
        assert other.table.budget == ours.table.budget


@kinds
@both_widths
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_step_is_the_same_under_every_state_of_torch(kind, bits, state):
    ours, _ = made(kind, bits)
    torch.manual_seed(0)
    sizes = {"first": (SIZE,), "second": (SIZE,), "idle": (3,)}
    named = [(n, nn.Parameter(torch.randn(s))) for n, s in sizes.items()]
    torch.manual_seed(7)
    with state():
        other = kind(named, bits=bits)
    for _, p in named[:2]:
        p.grad = torch.randn(SIZE)
    with state():
        other.step()
    other.step()  # the next step uses states made in inference mode
    descend(ours)
    assert same(snapshot(other), snapshot(ours))
    with state():
        other.load_state_dict(other.state_dict())
    other.step()
    descend(ours)
    assert same(snapshot(other), snapshot(ours))
