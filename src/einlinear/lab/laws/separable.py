"""Least squares of L(N, D) = E + A N^-alpha + B D^-beta by variable projection (Golub and Pereyra 1973).

Given the two exponents the law is linear in E, A and B: those come from non-negative least squares, and only two
numbers are searched. It weighs every run the same, where Huber's loss of ln L hardly minds the worst; how far the
two fits part says how far the form holds.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.surface import Surface

with extra("lab"):
    from scipy import optimize, stats  # type: ignore[import-untyped]

GRID = np.geomspace(0.02, 4.0, 24)  # of either exponent
ACTIVE = [subset for size in (3, 2, 1) for subset in combinations(range(3), size)]


@dataclass(frozen=True, kw_only=True)
class Separable:
    """A least-squares surface; intervals (95 %) are Student's t by the delta method, of A and B in logarithms."""

    surface: Surface
    squares: float  # sum of squared residuals of L
    intervals: dict[str, tuple[float, float]]


def variable_projection(parameters: Floats, tokens: Floats, loss: Floats) -> Separable:
    """Fits by a 24 × 24 grid of exponents, then Nelder-Mead from its best point, then one joint polish."""
    x, y = np.log(parameters), np.log(tokens)
    centre = x.mean(), y.mean()
    x, y = x - centre[0], y - centre[1]

    def inner(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:
        """Non-negative coefficients `[m, 3]` and sums of squares `[m]`, by trying every set of active ones."""
        one = np.ones((len(alpha), len(loss)))
        design = np.stack([one, np.exp(-alpha[:, None] * x), np.exp(-beta[:, None] * y)], axis=-1)
        best, least = np.zeros((len(alpha), 3)), np.full(len(alpha), np.inf)
        for active in ACTIVE:
            part = design[:, :, active]
            gram = np.swapaxes(part, 1, 2) @ part
            gram += 1e-14 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(len(active))
            solution = np.linalg.solve(gram, np.einsum("mna,n->ma", part, loss)[:, :, None])[:, :, 0]
            squares = ((loss - np.einsum("mna,ma->mn", part, solution)) ** 2).sum(axis=1)
            better = (solution >= 0).all(axis=1) & (squares < least)
            best[better] = 0.0
            for column, index in enumerate(active):
                best[better, index] = solution[better, column]
            least[better] = squares[better]
            if len(active) == 3 and better.all():  # no bound is in the way
                break
        return best, least

    alpha, beta = (v.ravel() for v in np.meshgrid(GRID, GRID, indexing="ij"))
    squares = np.concatenate([inner(np.full(len(GRID), one), GRID)[1] for one in GRID])
    found = optimize.minimize(
        lambda p: float(inner(np.exp(p[:1]), np.exp(p[1:]))[1][0]),
        np.log([alpha[squares.argmin()], beta[squares.argmin()]]),
        method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-9 * float(squares.min()), "maxiter": 400},
    )  # fmt: skip
    exponents = np.exp(found.x)
    linear = inner(exponents[:1], exponents[1:])[0][0]

    def predict(p: Floats) -> Floats:
        return np.asarray(p[0] + np.exp(p[1] - p[3] * x) + np.exp(p[2] - p[4] * y))

    start = np.array([linear[0], *np.log(np.maximum(linear[1:], 1e-12)), *exponents])
    polished = optimize.least_squares(lambda p: predict(p) - loss, start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    p = polished.x if polished.x[0] >= 0 else start
    squares_left = float(((predict(p) - loss) ** 2).sum())
    first, second = np.exp(p[1] - p[3] * x), np.exp(p[2] - p[4] * y)
    jacobian = np.stack([np.ones_like(x), first, second, -first * x, -second * y], axis=1)
    freedom = max(1, len(loss) - 5)
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * squares_left / freedom
    half = stats.t.ppf(0.975, freedom)
    alpha_, beta_ = float(p[3]), float(p[4])
    total = alpha_ + beta_
    unit = np.eye(5)
    scales = p[1] + alpha_ * centre[0], p[2] + beta_ * centre[1]
    lines = {  # name: value, gradient, and what turns them into the quantity
        "E": (p[0], unit[0], None), "A": (scales[0], unit[1] + centre[0] * unit[3], np.exp),
        "B": (scales[1], unit[2] + centre[1] * unit[4], np.exp), "alpha": (alpha_, unit[3], None),
        "beta": (beta_, unit[4], None),
        "a": (beta_ / total, (alpha_ * unit[4] - beta_ * unit[3]) / total**2, None),
        "gamma": (alpha_ * beta_ / total, (beta_**2 * unit[3] + alpha_**2 * unit[4]) / total**2, None),
    }  # fmt: skip
    intervals = {}
    for name, (value, slope, turn) in lines.items():
        deviation = half * float(np.sqrt(max(0.0, slope @ covariance @ slope)))
        ends = (value - deviation, value + deviation)
        with np.errstate(over="ignore"):
            intervals[name] = tuple(float(turn(end)) if turn else float(end) for end in ends)
    surface = Surface(E=float(p[0]), A=float(np.exp(scales[0])), B=float(np.exp(scales[1])), alpha=alpha_, beta=beta_)
    return Separable(surface=surface, squares=squares_left, intervals=intervals)  # type: ignore[arg-type]
