"""Approach 3: L(N, D) = E + A N^-alpha + B D^-beta by Huber's loss of ln L, as Hoffmann et al. (2022, section 3.3).

    fit = fit_surface(parameters, tokens, loss)
    fit.surface, fit.agreement
    draws = bootstrap(fit, 4000)
    draws.interval("alpha")

The optimiser works on e = ln E and on the logarithms of the other two terms at the centre of the data, with the
objective divided by delta. With the raw a = ln A and b = ln B it is so badly conditioned that the published fit
stopped early (Besiroglu et al. 2024); this way nearly all starts end at one optimum.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import CACHED, Floats, Integers, minimise
from einlinear.lab.laws.surface import Surface

with extra("lab"):
    from scipy import stats  # type: ignore[import-untyped]

DELTA = 1e-3
AGREE = 1e-6  # starts within this share of the best objective found the same optimum
FEWEST_AGREE = 3  # starts that have to find the optimum before it is called one
FEWEST_RUNS = 7  # distinct (N, D): five unknowns, and something left to judge them by
FEWEST_SIZES = 3
UNKNOWNS = 5
STARTS = 240
LEAST = 0.005  # exponent; below it a term is a constant, and cannot be told from E
FLOOR = 0.05  # of the lowest loss: draws start with no smaller E, as nothing pulls at one that has left the scale
NOTHING = 1e-4  # of the lowest loss: an E below it is none
MANY = 4096  # runs, above which starts are tried on some of them
SOME = 2048
POLISHED = 4  # of those starts, the best, that go on with all runs
MOST = 5.0  # beyond it a term only parts the smallest size, or length, from the rest
LEVEL = 0.95
NAMES = ("E", "A", "B", "alpha", "beta", "a", "gamma")


class NoFit(ValueError):
    """Data that do not determine the law asked for, in one sentence with what is missing."""


@dataclass(frozen=True, kw_only=True)
class Parametric:
    """A fitted surface, with the data `[n]` it was fitted to."""

    surface: Surface
    delta: float
    objective: float  # sum of Huber's loss of ln L
    starts: int
    agreement: float  # share of the starts that found this optimum
    residuals: Floats = field(repr=False)  # of ln L
    parameters: Floats = field(repr=False)
    tokens: Floats = field(repr=False)
    loss: Floats = field(repr=False)
    _found: Floats = field(repr=False)  # [5] in the optimiser's coordinates

    def __len__(self) -> int:
        return len(self.loss)

    def terms(self, parameters: float, tokens: float) -> tuple[float, float]:
        """ln of A N^-alpha and of B D^-beta; also where A itself is beyond all numbers."""
        x, y = _centres(self)
        first = self._found[1] - self._found[3] * (np.log(parameters) - x)
        second = self._found[2] - self._found[4] * (np.log(tokens) - y)
        return float(first), float(second)

    @property
    def inside(self) -> float:
        """Share of the residuals within delta; where it is small the fit is one of least absolute deviations."""
        return float(np.mean(np.abs(self.residuals) <= self.delta))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Refits of reweighted runs `[draws, 7]`, a column for each of `NAMES`."""

    values: Floats
    clusters: int
    squared: float  # share of the residuals within delta, the five that any fit can have there left aside
    best: Floats  # [7], of the data themselves

    def interval(self, name: str) -> tuple[float, float]:
        """95 % interval of one of `NAMES`, by percentiles.

        Least squares makes the noise look smaller than it is, by the numbers it fits, and its percentiles are taken
        further out: by Student's t, as Hesterberg (2015, "What Teachers Should Know About the Bootstrap") expands
        them, and by the factor n / (n - 5) of the jackknife. Least absolute deviations do not: what counts is the
        share of residuals within delta, of those but the five that such a fit goes through.
        `benchmarks/law_coverage.py` measures what comes of it.
        """
        normal = stats.norm.ppf((1 + LEVEL) / 2)
        left = max(2, self.clusters - UNKNOWNS)
        wide = stats.t.ppf((1 + LEVEL) / 2, left) * self.clusters / left
        tail = float(stats.norm.sf(normal + self.squared * (wide - normal)))
        low, high = np.nanquantile(self.values[:, NAMES.index(name)], [tail, 1 - tail])
        return float(low), float(high)

    def deviation(self, name: str) -> float:
        """Standard deviation over the draws."""
        return float(np.nanstd(self.values[:, NAMES.index(name)]))


def fit_surface(
    parameters: Floats, tokens: Floats, loss: Floats, *, delta: float = DELTA, starts: int = STARTS
) -> Parametric:
    """The surface of least Huber loss of ln L, from starts that span every share of the three terms.

    Starts do not depend on the units of N, D or L; with fewer than all 240 it is every so-manieth. Of more than 4096
    runs, 2048 judge the starts, and the best four go on with all.

    Raises:
        NoFit: where N, D, D/N or the loss hardly vary, for too few runs, where fewer than three starts agree, and where
            the loss does not fall with N or D.
    """
    parameters, tokens, loss = (np.asarray(v, dtype=np.float64) for v in (parameters, tokens, loss))
    _refuse(parameters, tokens, loss)
    problem = _Problem(parameters, tokens, loss, delta)
    tried = problem.starts()[:: max(1, STARTS // starts)]
    some = problem if len(loss) <= MANY else problem.part(np.random.default_rng(0).permutation(len(loss))[:SOME])
    found, values = some.minimise(tried)
    agreement = float(np.mean(values <= values.min() * (1 + AGREE) + 1e-12 * len(some.loss)))
    if some is not problem:
        found, values = problem.minimise(found[np.argsort(values)[:POLISHED]])
    least = values.min()
    if agreement * len(tried) < FEWEST_AGREE:
        raise NoFit(
            f"Fitting E + A/N^alpha + B/D^beta: only {round(agreement * len(tried))} of {len(tried)} starts reached "
            "the best optimum found, so there may be a better one; the data do not hold the law."
        )
    best = found[values.argmin()]
    for name, exponent in (("params", best[3]), ("tokens", best[4])):
        if not LEAST <= exponent <= MOST:
            fault = "does not fall" if exponent < LEAST else "falls in a step, not by a power,"
            raise NoFit(f"Fitting E + A/N^alpha + B/D^beta: the loss {fault} with {name} (exponent {exponent:.3g}).")
    return Parametric(
        surface=problem.surface(best), delta=delta, objective=float(least) * delta, starts=len(tried),
        agreement=agreement, residuals=problem.residuals(best), parameters=parameters, tokens=tokens, loss=loss,
        _found=best,
    )  # fmt: skip


def bootstrap(
    fit: Parametric,
    draws: int = 1000,
    *,
    clusters: Sequence[object] | np.ndarray | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Draws:
    """The Bayesian bootstrap (Rubin 1981): refits with random weights on the runs, each from the optimum of all runs.

    Its weights are exponential where those of resampling are whole counts, that is, runs are never lost altogether.
    With few runs that matters: by resampling, 95 % intervals of 20 or 36 runs covered 97 to 99.5 % in simulation,
    by weights 96 to 98 %; with 240 runs the two agree.

    Args:
        fit: what to judge.
        draws: how many.
        clusters: `[n]` labels; runs of one label have one weight, because they are dependent (horizons of one
            training run) or share an error (all runs of a size). None gives each run its own.
        seed: of the draws.
        progress: called with the draws done.
    """
    count = len(fit)
    label = np.arange(count) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    number = int(label.max()) + 1
    generator = np.random.default_rng(seed)
    values = np.empty((draws, len(NAMES)))
    best = _columns(fit._found[None], *_centres(fit), fit.loss.min())
    start = fit._found.copy()
    start[0] = max(start[0], np.log(FLOOR * fit.loss.min()))
    for first in range(0, draws, 500):
        size = min(500, draws - first)
        weights = number * generator.dirichlet(np.ones(number), size=size)
        problem = _Problem(fit.parameters, fit.tokens, fit.loss, fit.delta, weights[:, label])
        found, _ = problem.minimise(np.repeat(start[None], size, axis=0))
        values[first : first + size] = _columns(found, *_centres(fit), fit.loss.min())
        progress(first + size)
    squared = max(0.0, fit.inside * count - UNKNOWNS) / max(1, count - UNKNOWNS)
    return Draws(values=values, clusters=number, squared=squared, best=best[0])


def _centres(fit: Parametric) -> tuple[float, float]:
    return float(np.log(fit.parameters).mean()), float(np.log(fit.tokens).mean())


def _columns(found: Floats, x: float, y: float, lowest: float) -> Floats:
    """`NAMES` of points of the optimiser `[m, 5]`: `[m, 7]`. An E far below the lowest loss is 0."""
    alpha, beta = found[:, 3], found[:, 4]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        E = np.where(np.exp(found[:, 0]) < NOTHING * lowest, 0.0, np.exp(found[:, 0]))
        A, B = np.exp(found[:, 1] + alpha * x), np.exp(found[:, 2] + beta * y)
        return np.stack([E, A, B, alpha, beta, beta / (alpha + beta), alpha * beta / (alpha + beta)], axis=1)


def _refuse(parameters: Floats, tokens: Floats, loss: Floats) -> None:
    runs = len(set(zip(parameters.tolist(), tokens.tolist(), strict=True)))
    sizes, lengths = len(np.unique(parameters)), len(np.unique(tokens))
    doing = "Fitting E + A/N^alpha + B/D^beta"
    for number, what, of, lost, term, exponent in (
        (sizes, "size", "model", "A and alpha", "A/N^alpha", "beta"),
        (lengths, "number", "tokens", "B and beta", "B/D^beta", "alpha"),
    ):
        if number < FEWEST_SIZES:
            alone = (
                f" {lost} are not identified, nor is E, which shows only in one sum with {term}; {exponent} is the "
                "exponent of the frontier."
            )
            raise NoFit(
                f"{doing}: the runs have {_count(number, what)} of {of}; it takes three or more."
                f"{alone if number == 1 else ''}"
            )
    if np.ptp(np.log(loss)) < 1e-9:
        raise NoFit(f"{doing}: all losses are the same.")
    if runs < FEWEST_RUNS:
        raise NoFit(f"{doing}: {runs} different pairs of params and tokens do not determine its five numbers; it takes "
                    f"{FEWEST_RUNS} or more.")  # fmt: skip
    x, y = np.log(parameters), np.log(tokens)
    if (own := 1 - np.corrcoef(x, y)[0, 1] ** 2) < 1e-3:
        raise NoFit(
            f"{doing}: tokens follow from params (all but {own:.1g} of their variation), so A and B "
            "cannot be told apart; vary tokens per parameter by 8 times or more at one size."
        )


def _count(number: int, what: str) -> str:
    return f"one {what}" if number == 1 else f"{number} {what}s"


class _Problem:
    """The objective over (e, u, v, alpha, beta), u and v being the logarithms of the terms at the data's centre."""

    def __init__(
        self, parameters: Floats, tokens: Floats, loss: Floats, delta: float, weights: Floats | None = None
    ) -> None:
        x, y = np.log(parameters), np.log(tokens)
        self.centre = float(x.mean()), float(y.mean())
        self.x, self.y, self.loss, self.delta = x - self.centre[0], y - self.centre[1], np.log(loss), delta
        self.weights = weights

    def part(self, chosen: Integers) -> "_Problem":
        """The objective over some of the runs, in the coordinates of all."""
        other = copy(self)
        other.x, other.y, other.loss = self.x[chosen], self.y[chosen], self.loss[chosen]
        return other

    def minimise(self, starts: Floats) -> tuple[Floats, Floats]:
        return minimise(self._objective, starts, self._inverse(starts), data=len(self.loss))

    def surface(self, point: Floats) -> Surface:
        E, A, B, alpha, beta = (float(v) for v in _columns(point[None], *self.centre, np.exp(self.loss.min()))[0, :5])
        return Surface(E=E, A=A, B=B, alpha=alpha, beta=beta)

    def residuals(self, point: Floats) -> Floats:
        residual: Floats = self._predict(point[None])[0][0]
        return residual

    def starts(self) -> Floats:
        """Shares of E in the lowest loss, of the two terms in the rest, and exponents: 240 of them."""
        lowest, typical = np.exp(self.loss.min()), np.exp(self.loss.mean())
        points = []
        for floor, share, alpha, beta in product(
            (0.1, 0.3, 0.5, 0.7, 0.9), (0.2, 0.5, 0.8), (0.1, 0.25, 0.5, 1.0), (0.1, 0.25, 0.5, 1.0)
        ):
            E = floor * lowest
            rest = max(typical - E, 0.02 * typical)
            points.append([np.log(E), np.log(share * rest), np.log((1 - share) * rest), alpha, beta])
        return np.array(points)

    def _predict(self, points: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Residuals of ln L, and the shares of the three terms, each `[m, n]`."""
        first = points[:, 0:1]
        second = points[:, 1:2] - points[:, 3:4] * self.x
        third = points[:, 2:3] - points[:, 4:5] * self.y
        top = np.maximum(np.maximum(first, second), third)
        terms = np.exp(first - top), np.exp(second - top), np.exp(third - top)
        total = terms[0] + terms[1] + terms[2]
        return self.loss - top - np.log(total), terms[0] / total, terms[1] / total, terms[2] / total

    def _objective(self, points: Floats, rows: Integers) -> tuple[Floats, Floats]:
        residual, first, second, third = self._predict(points)
        pull = residual.clip(-self.delta, self.delta)
        value, slope = pull * (residual - pull / 2) / self.delta, pull / -self.delta
        if self.weights is not None:
            value, slope = value * self.weights[rows], slope * self.weights[rows]
        second, third = slope * second, slope * third
        gradient = [
            (slope * first).sum(axis=1),
            second.sum(axis=1),
            third.sum(axis=1),
            -second @ self.x,
            -third @ self.y,
        ]
        return value.sum(axis=1), np.stack(gradient, axis=1)

    def _inverse(self, points: Floats) -> Floats:
        """Inverse Hessians of the reweighted least squares that touches the objective from above, `[m, 5, 5]`."""
        found = np.empty((len(points), 5, 5))
        size = max(1, CACHED // len(self.loss))
        for first in range(0, len(points), size):
            rows = slice(first, first + size)
            residual, one, two, three = self._predict(points[rows])
            jacobian = np.stack([one, two, three, -two * self.x, -three * self.y], axis=-1)
            weight = 1 / np.maximum(np.abs(residual), self.delta)
            weight = weight if self.weights is None else weight * self.weights[rows]
            hessian = np.swapaxes(jacobian * weight[:, :, None], 1, 2) @ jacobian
            ridge = 1e-8 * np.trace(hessian, axis1=1, axis2=2) + 1e-30
            found[rows] = np.linalg.inv(hessian + ridge[:, None, None] * np.eye(5))
        return found
