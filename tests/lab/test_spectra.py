"""Ranks of changes and intruder dimensions, on weights with a known result."""

import math

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import spectra
from tests.tolerance import gamma, svd_roundings

HADAMARD = torch.tensor([[1.0, 1.0], [1.0, -1.0]])


def hadamard(power):
    """Return the orthogonal matrix of size n = 2^power with entries 1/√n or −1/√n."""
    H = torch.ones(1, 1)
    for _ in range(power):
        H = torch.kron(HADAMARD, H)
    return H / math.sqrt(len(H))


def rotated(singular, power=4):
    """Return a weight with given singular values, in an unusual basis."""
    n = 2**power
    S = torch.zeros(n)
    S[: len(singular)] = torch.tensor(singular, dtype=torch.float32)
    return hadamard(power) @ torch.diag(S) @ hadamard(power).T


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.9, 2), (0.999, 2)]
)
def test_the_rank_counts_the_singular_values_that_hold_the_share(share, rank):
    assert spectra.rank_for(rotated([4.0, 3.0]), share) == rank  # squares 16 and 9


@pytest.mark.parametrize("n", [4, 16])
def test_equal_singular_values_need_their_share_of_all_directions(n):
    assert spectra.rank_for(torch.eye(n), 0.5) == n // 2
    assert spectra.rank_for(5 * torch.eye(n), 0.9) == math.ceil(0.9 * n)


def test_the_rank_does_not_depend_on_the_size_of_a_change():
    change = rotated(
        [8.0, 4.0, 2.0, 1.0]
    )  # squares 64, 16, 4, 1: 94 % in the first two
    assert spectra.rank_for(change) == spectra.rank_for(1e-6 * change) == 2


def turned(degrees):
    """Return the weight diag(2, 1) with its left singular vectors turned."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ torch.diag(
        torch.tensor([2.0, 1.0], dtype=torch.float64)
    )


@pytest.mark.parametrize("degrees", [0, 10, 45, 80])
def test_a_turned_weight_is_alike_by_the_cosine_of_the_angle(degrees):
    alike = spectra.similarities(turned(0), turned(degrees), count=2)
    angle = math.radians(degrees)
    exact = max(math.cos(angle), math.sin(angle))
    bound = gamma(svd_roundings(turned(0)), "float64")
    assert float((alike - exact).abs().max()) <= bound
    assert spectra.intruders(alike, 0.9) == (2 if degrees == 45 else 0)


@pytest.mark.parametrize("shape", [(16, 16), (16, 8)])
def test_equally_mixed_directions_are_intruders_above_one_over_the_root(shape):
    before = torch.zeros(shape, dtype=torch.float64)
    before.diagonal().copy_(torch.arange(shape[1], 0, -1))
    after = hadamard(4).double() @ before  # each new vector has 1/√16 of every old one
    alike = spectra.similarities(before, after, count=5)
    assert spectra.intruders(alike, 0.26) == 5
    assert spectra.intruders(alike, 0.24) == 0


def test_the_vectors_with_the_largest_singular_values_are_looked_at():
    before = torch.diag(torch.arange(16.0, 0, -1))
    new = hadamard(4)[:, :1]
    quiet = spectra.similarities(before, before + 1e-3 * new @ new.T, count=3)
    loud = spectra.similarities(before, before + 1e3 * new @ new.T, count=3)
    assert spectra.intruders(quiet) == 0
    assert spectra.intruders(loud) == 1
    assert int(loud.argmin()) == 0


def test_sign_and_scale_of_a_weight_do_not_matter():
    torch.manual_seed(0)
    before = torch.randn(12, 20)
    assert spectra.intruders(spectra.similarities(before, -3 * before, 12), 0.999) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectra.rank_for(torch.eye(2), 0), "share is 0; give"),
        (lambda: spectra.rank_for(torch.eye(2), 1), "share is 1; give"),
        (lambda: spectra.rank_for(torch.zeros(2, 2)), "the change is 0; give"),
        (lambda: spectra.rank_for(torch.full((2, 2), math.nan)), "the change is nan"),
        (
            lambda: spectra.similarities(torch.eye(2), torch.ones(2, 3), 1),
            r"\(2, 2\) and after \(2, 3\)",
        ),
        (lambda: spectra.similarities(torch.eye(2), torch.eye(2), 3), "count is 3"),
        (lambda: spectra.intruders(torch.ones(2), 1.0), "threshold is 1.0; give"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
