"""What every question shares: how much may be lost to rounding, and what may be refused."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
from case import Array, Case, Wrong, matrices

import einlinear as el


def singular_values(D: Array) -> Array:
    return np.linalg.svd(D, compute_uv=False)


def condition(D: Array) -> float:
    """The worst of the batch."""
    if 0 in D.shape[-2:]:
        return 1.0
    s = singular_values(D)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where(s[..., -1] > 0, s[..., 0] / s[..., -1], np.inf)
    return float(k.max()) if k.size else 1.0


def slack(case: Case) -> float:
    """Rounding that a computation of this size may have."""
    return 400 * max(case.D.shape[-2:], default=1) * case.eps


def hopeless(case: Case, factor: float = 1e-1) -> bool:
    """Whether no digit of an inverse can be expected."""
    return condition(case.D) * case.eps * max(case.D.shape[-1], 1) > factor


def refused(ask: Callable[[], Any], allowed: bool, what: str) -> Any:
    """The answer; None where it is refused or warned about, which only some cases may."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = ask()
        except el.OperatorError as error:
            if allowed:
                return None
            raise Wrong(f"{what} refused: {str(error)[:200]}") from error
    told = [w for w in caught if w.category is not DeprecationWarning]
    if told and not allowed:
        raise Wrong(f"{what} warned: {str(told[0].message)[:200]}")
    return None if told else found


def spread(D: Array, eps: float) -> float:
    """How far rounding may move an eigenvalue, relative to the norm: by the condition of the eigenvectors."""
    if not D.shape[-1]:
        return eps
    worst = 0.0
    for one in matrices(D):
        _, v = np.linalg.eig(one)
        k = condition(v)
        worst = max(worst, 1000 * eps * k if k < eps**-0.3 else 30 * eps ** (1 / max(min(len(one), 5), 2)))
    return worst


def same_set(found: Array, wanted: Array, tolerance: float, what: str) -> None:
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {found.shape}, wanted {wanted.shape}")
    if found.size:
        for mine, other in zip(*(x.reshape(-1, x.shape[-1]) for x in (found, wanted)), strict=True):
            cost = np.abs(mine[:, None] - other[None, :])
            rows, columns = scipy.optimize.linear_sum_assignment(cost)
            if not cost[rows, columns].max() <= tolerance:
                raise Wrong(f"{what}: one is off by {cost[rows, columns].max():.2g}, allowed {tolerance:.2g}")


def gap(case: Case) -> bool:
    """Whether the rank is beyond doubt: no singular value within rounding's reach of zero that is not zero."""
    s = singular_values(case.D)
    if not s.size:
        return True
    ratio = s / np.maximum(s[..., :1], 1e-300)
    return not bool(((ratio > 1e-17) & (ratio < 1e4 * case.eps) & ~(ratio < 2e-16)).any())
