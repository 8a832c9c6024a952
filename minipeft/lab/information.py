"""Mutual information between two outputs: the Gaussian value, and two bounds above it.

Outputs of a network are functions of one input, so their mutual information can be
infinite (Goldfeld and others 2019). Here Gaussian noise of a known variance is added
to the second output, and all values are finite, in nats.
"""

import math

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Inexact
from minipeft.values import checked

UNEXPLAINED = 1e-12
"""The least share of a variance that is not a rounding error of float64."""


@checked
def gaussian(u: Inexact[Tensor, "n p"], v: Inexact[Tensor, "m q"]) -> float:
    r"""Return $-\frac12 \sum_i \log(1 - \rho_i^2)$: I(U; V), if both are Gaussian.

    ρ_i are the canonical correlations of the samples.

    Args:
        u: samples of U, (n, p).
        v: samples of V, (n, q), noise included.

    Raises:
        InputError: the numbers of samples differ, or there are not more than p + q; U
            or V has a direction without variance; V is a function of U.

    Source: Cover and Thomas 2006, theorem 8.4.1, for the three entropies.
    """
    _check(u, v)
    a, b = ((w.double() - w.double().mean(0)) / len(w) ** 0.5 for w in (u, v))
    left, right = _root("u", a.T @ a), _root("v", b.T @ b)
    half = torch.linalg.solve_triangular(left, a.T @ b, upper=False)
    rho = torch.linalg.svdvals(
        torch.linalg.solve_triangular(right, half.T, upper=False)
    )
    _check_share(float(1 - rho.max() ** 2))
    return -0.5 * float(torch.log1p(-rho.square()).sum())


@checked
def club(
    fitted: tuple[Inexact[Tensor, "n p"], Inexact[Tensor, "n q"]],
    judged: tuple[Inexact[Tensor, "m p"], Inexact[Tensor, "m q"]],
) -> float:
    r"""Return $E_{p(u,v)} \log q(v|u) - E_{p(u)p(v)} \log q(v|u)$, the bound CLUB.

    q(v|u) is Gaussian with mean M u + c and covariance S, both by least squares on the
    first samples; the means are over the second ones and over all their pairs. It lies
    above I(U; V) if q is the true conditional density; with another q it may not.

    Args:
        fitted: samples of (U, V) for q, (n, p) and (n, q).
        judged: other samples, (m, p) and (m, q).

    Raises:
        InputError: as `gaussian`, of either samples.

    Source: Cheng and others 2020, sections 3.1 and 3.2 (vCLUB).
    """
    for u, v in (fitted, judged):
        _check(u, v)
    u, v = (values.double() for values in fitted)
    ones = torch.ones(len(u), 1, dtype=torch.float64)
    M = torch.linalg.lstsq(torch.cat([u, ones], 1), v, driver="gels").solution
    rest = v - torch.cat([u, ones], 1) @ M
    S = rest.T @ rest / (len(u) - len(M))
    _check_share(float((S.diagonal() / v.var(0)).min()))
    L = _root("v given u", S)
    u, v = (values.double() for values in judged)
    ones = torch.ones(len(u), 1, dtype=torch.float64)
    mean = torch.cat([u, ones], 1) @ M
    # With all pairs the squares cancel: what remains is a covariance.
    a, b = (torch.linalg.solve_triangular(L, w.T, upper=False) for w in (v, mean))
    centred = (a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))
    return float(centred.sum(0).mean())


@checked
def variational(
    fitted: Inexact[Tensor, "n q"], judged: Inexact[Tensor, "m q"], variance: float
) -> float:
    r"""Return $E_x\, KL(p(v|x) \,\Vert\, r(v)) \ge I(X; V) \ge I(U; V)$.

    x is the input that U and V are functions of, p(v|x) is Gaussian around the output
    without noise, and r is the Gaussian with the mean and covariance of the first
    samples. It is a bound for every r, and it does not look at U.

    Args:
        fitted: outputs without noise, for r, (n, q).
        judged: other outputs without noise, (m, q).
        variance: σ², of the noise in each coordinate.

    Raises:
        InputError: the variance is not above 0.

    Source: Poole and others 2019, section 2.1.
    """
    if not 0 < variance < math.inf:
        raise InputError(f"variance is {variance}; give a finite number above 0")
    v = fitted.double()
    away = v - v.mean(0)
    eye = torch.eye(v.shape[1], dtype=torch.float64, device=v.device)
    C = away.T @ away / len(v) + variance * eye
    L = _root("v", C)
    white = torch.linalg.solve_triangular(
        L, (judged.double() - v.mean(0)).T, upper=False
    )
    spread = variance * float(torch.linalg.inv(C).trace()) - v.shape[1]
    volume = 2 * float(L.diagonal().log().sum()) - v.shape[1] * math.log(variance)
    return 0.5 * (spread + float(white.square().sum(0).mean()) + volume)


def _check(u: Tensor, v: Tensor) -> None:
    if len(u) != len(v) or len(u) <= u.shape[1] + v.shape[1]:
        raise InputError(
            f"there are {len(u)} samples of u with {u.shape[1]} numbers and {len(v)} "
            f"of v with {v.shape[1]}; give as many of both, and more than "
            f"{u.shape[1] + v.shape[1]}"
        )


def _check_share(unexplained: float) -> None:
    if not unexplained > UNEXPLAINED:
        raise InputError(
            "a direction of v is a linear function of u, so the mutual information is "
            "infinite; add noise to v"
        )


def _root(name: str, covariance: Tensor) -> Tensor:
    """Return the lower L with L Lᵀ = Σ."""
    L, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise InputError(
            f"a direction of {name} has no variance of its own; leave it out, or add "
            "noise to v"
        )
    return L
