"""Mutual information and its bounds, on samples with exactly known covariances."""

import math

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import information
from tests.tolerance import gamma, svd_roundings

N = 400
RHO = [0.95, 0.5, 0.1, 0.0]


def orthonormal(columns, seed=0):
    """Return columns that are exactly uncorrelated in the sample, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values - values.mean(0)).Q


def correlated(rho):
    """Return samples of U and V whose canonical correlations are these."""
    Q, r = orthonormal(2 * len(rho)), torch.tensor(rho, dtype=torch.float64)
    u = Q[:, : len(rho)]
    return u, r * u + (1 - r.square()).sqrt() * Q[:, len(rho) :]


def rounding(*arrays):
    """Return what the roundings of the matrices can change, near the largest ρ."""
    count = sum(svd_roundings(a) for a in arrays)
    size = count * sum(a.shape[1] for a in arrays)
    return gamma(size, "float64") / (1 - max(RHO) ** 2)


@pytest.mark.parametrize("rho", [RHO, [0.8], [0.0, 0.0]])
def test_the_gaussian_value_is_that_of_the_canonical_correlations(rho):
    u, v = correlated(rho)
    exact = -0.5 * sum(math.log(1 - r * r) for r in rho)
    assert abs(information.gaussian(u, v) - exact) <= rounding(u, v)


def test_the_gaussian_value_does_not_depend_on_coordinates():
    u, v = correlated(RHO)
    turn = torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 4, 1], [1, 0, 0, 2]])
    moved = information.gaussian(u @ turn.double() + 3, v @ turn.double().T - 5)
    size = float(torch.linalg.cond(turn)) ** 2 * N  # the shifts cost digits
    assert abs(moved - information.gaussian(u, v)) <= size * rounding(u, v)


def test_club_is_its_closed_form_on_gaussians_and_above_the_value():
    u, v = correlated(RHO)
    free = N - u.shape[1] - 1
    exact = free / N * sum(r * r / (1 - r * r) for r in RHO)
    found = information.club((u, v), (u, v))
    assert abs(found - exact) <= N * rounding(u, v)
    assert found > information.gaussian(u, v)


def test_club_compares_all_pairs_of_the_judged_samples():
    """The short form equals the definition, with every pair written out."""
    u, v = (w[:40] for w in correlated([0.9, 0.4]))
    a, b = (w[40:80] for w in correlated([0.9, 0.4]))
    ones = torch.ones(40, 1, dtype=torch.float64)
    M = torch.linalg.lstsq(torch.cat([u, ones], 1), v).solution
    rest = v - torch.cat([u, ones], 1) @ M
    q = torch.distributions.MultivariateNormal(
        torch.cat([a, ones], 1) @ M, rest.T @ rest / (40 - 3)
    )
    pairs = torch.stack([q.log_prob(one.expand(40, 2)) for one in b])
    defined = float(pairs.diagonal().mean() - pairs.mean())
    found = information.club((u, v), (a, b))
    assert abs(found - defined) <= 40 * rounding(u, v) * float(pairs.abs().max())


@pytest.mark.parametrize("variance", [1e-4, 1.0])
def test_the_variational_bound_is_a_channel_s_capacity_on_gaussians(variance):
    sizes = torch.tensor([4.0, 1.0, 0.01], dtype=torch.float64)
    v = orthonormal(3) * (sizes * N).sqrt()
    exact = 0.5 * sum(math.log(1 + s / variance) for s in sizes.tolist())
    found = information.variational(v, v, variance)
    assert abs(found - exact) <= rounding(v) * float(sizes.max()) / variance


def test_the_variational_bound_is_reached_by_the_whole_input_and_not_by_a_part():
    Q = orthonormal(8) * N**0.5
    x, noise = Q[:, :6], Q[:, 6:]
    mix = torch.arange(12, dtype=torch.float64).reshape(6, 2).cos()
    v = x @ mix
    bound = information.variational(v, v, 0.25)
    whole = information.gaussian(x, v + 0.5 * noise)
    part = information.gaussian(x[:, :3], v + 0.5 * noise)
    least = float(torch.linalg.eigvalsh(mix.T @ mix / 0.25 + torch.eye(2)).max())
    assert abs(whole - bound) <= rounding(x, v) * least
    assert part < whole


def test_another_distribution_r_gives_a_larger_bound():
    v = orthonormal(3) * 20
    for other in (3 * v, v / 3, v + 1):
        least = information.variational(v, v, 0.5)
        assert information.variational(other, v, 0.5) > least


def test_without_dependence_club_is_near_zero_and_with_it_is_not():
    u, _ = correlated(RHO)
    v = orthonormal(4, seed=2)
    alone = information.club((u[:200], v[:200]), (u[200:], v[200:]))
    u, v = correlated(RHO)
    beside = information.club((u[:200], v[:200]), (u[200:], v[200:]))
    assert abs(alone) < beside / 10


FLAT = torch.ones(40, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information.gaussian(FLAT, FLAT[:9]), "40 samples of u with 2 .* 9"),
        (lambda: information.gaussian(FLAT[:4], FLAT[:4]), "more than 4"),
        (lambda: information.gaussian(FLAT, FLAT), "direction of u has no"),
        (
            lambda: information.gaussian(orthonormal(2), orthonormal(2)[:, :1]),
            "infinite; add noise",
        ),
        (
            lambda: information.club((orthonormal(2),) * 2, (orthonormal(2),) * 2),
            "infinite; add noise",
        ),
        (lambda: information.variational(FLAT, FLAT, 0.0), "variance is 0.0"),
    ],
)
def test_what_has_no_finite_value_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
