"""Does a structure save parameters or data? One surface for two families, with a factor on N and one on D.

    L = E + A (r_N N)^-alpha + B (r_D D)^-beta,    r_N = r_D = 1 for the baseline

At equal compute C = k N D, both spent best, the multiplier is r_N r_D k_baseline / k_family.
"""

from dataclasses import dataclass

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.parametric import NoFit, fit_surface
from einlinear.lab.laws.power import Fit
from einlinear.lab.laws.table import Table

with extra("lab"):
    from scipy import optimize  # type: ignore[import-untyped]

FEWEST = 4  # runs of the family


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """r_N, r_D and the multiplier, each with its 95 % interval (Student's t, clustered by trunk)."""

    parameters: float
    parameters_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    multiplier: float
    multiplier_interval: tuple[float, float]
    scatter: float  # standard deviation of ln L about the common surface


def scaled_surface(family: Table, baseline: Table) -> Scaled:
    """Least squares of ln L on all runs of both, from the baseline's own surface.

    Raises:
        NoFit: where the baseline's runs do not hold a surface of their own, or the family has too few.
    """
    if len(set(zip(family.parameters.tolist(), family.tokens.tolist(), strict=True))) < FEWEST:
        raise NoFit(f"Fitting one surface to two families: {len(family)} runs are too few; it takes {FEWEST} sizes.")
    fitted = fit_surface(baseline.parameters, baseline.tokens, baseline.loss)
    own = fitted.surface
    x, y, loss = (np.log(np.append(getattr(baseline, n), getattr(family, n))) for n in ("parameters", "tokens", "loss"))
    other = np.repeat([0.0, 1.0], [len(baseline), len(family)])
    x, y, middle = x - x.mean(), y - y.mean(), (x.mean(), y.mean())

    def terms(p: Floats) -> tuple[Floats, Floats, Floats]:
        first = np.exp(p[1] - p[3] * (x + p[5] * other))
        second = np.exp(p[2] - p[4] * (y + p[6] * other))
        return first, second, np.exp(p[0]) + first + second

    def residual(p: Floats) -> Floats:
        return np.asarray(loss - np.log(terms(p)[2]))

    def jacobian(p: Floats) -> Floats:
        first, second, total = terms(p)
        columns = [
            np.full_like(x, np.exp(p[0])), first, second, -first * (x + p[5] * other), -second * (y + p[6] * other),
            -first * p[3] * other, -second * p[4] * other,
        ]  # fmt: skip
        return np.asarray(np.stack(columns, axis=1) / total[:, None])

    start = [
        np.log(max(own.E, 1e-12)), *fitted.terms(*np.exp(middle)), own.alpha, own.beta, 0.0, 0.0,
    ]  # fmt: skip
    found = optimize.least_squares(residual, start, jac=lambda p: -jacobian(p), x_scale="jac", max_nfev=500)
    names = [_labels(table, number) for number, table in enumerate((baseline, family))]
    fit = Fit(
        parameters=found.x, free=np.ones(7, dtype=bool), jacobian=jacobian(found.x), residual=residual(found.x),
        cluster=np.unique(np.concatenate(names), return_inverse=True)[1], agreement=1.0,
    )  # fmt: skip
    k = [float(np.median(np.log(t.flops / (t.parameters * t.tokens)))) for t in (baseline, family)]

    def three(p: Floats) -> Floats:
        return np.stack([p[:, 5], p[:, 6], p[:, 5] + p[:, 6] + k[0] - k[1]], axis=1)

    best = np.exp(three(found.x[None])[0])
    low, high = (np.exp(np.clip(end, -50, 50)) for end in fit.interval(three))
    r_N, r_D, rho = [(float(best[i]), (float(low[i]), float(high[i]))) for i in range(3)]
    return Scaled(
        parameters=r_N[0], parameters_interval=r_N[1], tokens=r_D[0], tokens_interval=r_D[1],
        multiplier=rho[0], multiplier_interval=rho[1], scatter=fit.scatter,
    )  # fmt: skip


def _labels(table: Table, number: int) -> np.ndarray:
    """A label per run: its trunk, or itself."""
    own = [f"{number}/{row}" for row in range(len(table))]
    return np.array(own if table.trunk is None else [f"{number}:{trunk}" for trunk in table.trunk])
