"""Least squares of the shared power law, on plain arrays: one exponent, one horizontal shift per group.

    ln L = ln(E + exp(a - (b + d_g) (x + s_g))),    x = ln C minus its mean,    s_0 = d_0 = 0

L is the loss, C the cost, g the group (a family). With one group this is L = E + (C/C0)^-c; with two,
exp(s_1) is the compute multiplier of group 1 over group 0. A parameter vector is `[E, a, b, s.., d..]`.
The solver is our own because it takes every start as one batch of small problems,
which no library at hand does; a profile of E alone is two hundred of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats, Integers

with extra("lab"):
    from scipy import stats  # type: ignore[import-untyped]

STEPS = 200  # of the solver
TOP = 0.999  # E stays in [0, TOP * the lowest loss]
AGREE = 1e-6  # starts within this share of the best sum of squares found the same optimum
PROFILE = 200  # values of E at which its likelihood is looked up


@dataclass(frozen=True)
class Sample:
    """Cells, the means over seeds that are fitted."""

    cost: Floats  # [cells] ln C, centred
    loss: Floats  # [cells] ln L
    group: Integers  # [cells] 0 for the baseline
    cluster: Integers  # [cells] cells of one label are dependent


@dataclass(frozen=True)
class Fit:
    """A fitted law with what its intervals rest on."""

    parameters: Floats  # [p]
    free: NDArray[np.bool_]  # [p] False for a parameter held fixed or at its bound
    jacobian: Floats  # [cells, free parameters] of ln L
    residual: Floats  # [cells] of ln L
    cluster: Integers  # [cells]
    agreement: float  # share of the starts that reached the best optimum

    @property
    def squares(self) -> float:
        """Sum of squared residuals."""
        return float(self.residual @ self.residual)

    @property
    def freedom(self) -> int:
        """Cells minus free parameters."""
        return len(self.jacobian) - int(self.free.sum())

    @property
    def scatter(self) -> float:
        """Standard deviation of ln L around the law."""
        return float(np.sqrt(self.squares / self.freedom))

    def interval(self, functional: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
        """95 % interval of `functional`, a map of parameters `[n, p]` to values `[n, m]`: low and high `[m]`.

        Student's t by the delta method. Where cells share trunks their errors are dependent: the variance is then
        the cluster-robust one with the small-sample correction CR2 and the degrees of freedom of Bell and McCaffrey
        (2002), "Bias reduction in standard errors for linear regression with multi-stage samples", which hold up
        with a handful of clusters. `benchmarks/law_coverage.py` measures the coverage of both.
        """
        best = functional(self.parameters[None])[0]
        step = np.where(self.free, 1e-6 * np.maximum(np.abs(self.parameters), 1e-3), 0.0)[self.free]
        shifts = np.zeros((len(step), len(self.parameters)))
        shifts[:, self.free] = np.diag(step)
        ahead, behind = functional(self.parameters + shifts), functional(self.parameters - shifts)
        deviation, freedom = self._deviation(np.asarray((ahead - behind) / (2 * step[:, None])))
        half = stats.t.ppf(0.975, freedom) * deviation
        return best - half, best + half

    def _deviation(self, slope: Floats) -> tuple[Floats, Floats]:
        """Standard errors `[m]` of combinations `[free, m]` of the parameters, and their degrees of freedom `[m]`."""
        inverse = np.linalg.pinv(self.jacobian.T @ self.jacobian)
        labels = np.unique(self.cluster)
        if len(labels) == len(self.cluster):
            variance = np.einsum("pm,pq,qm->m", slope, inverse, slope) * self.squares / self.freedom
            return np.sqrt(variance), np.full(slope.shape[1], float(self.freedom))
        values, vectors = np.linalg.eigh(inverse)
        half = vectors * np.sqrt(np.maximum(values, 0.0))  # inverse = half half'
        influence = self.jacobian @ inverse @ slope  # [cells, m]
        pulls, squares, shares = [], [], []
        for label in labels:
            own = self.cluster == label
            part = self.jacobian[own]
            values, vectors = np.linalg.eigh(np.eye(len(part)) - part @ inverse @ part.T)
            root = np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-9)), 0.0)
            weight = (vectors * root) @ vectors.T @ influence[own]  # [own, m]
            pulls.append(self.residual[own] @ weight)
            squares.append((weight**2).sum(axis=0))
            shares.append(half.T @ part.T @ weight)  # [free, m]
        # Entry (g, h) of Bell and McCaffrey's matrix: what clusters g and h have of (1 - hat), weighted. It is made of
        # two small parts, so that neither it nor the hat matrix is ever written out.
        alone, share = np.array(squares), np.array(shares)  # [clusters, m], [clusters, free, m]
        own_share = (share**2).sum(axis=1)
        gram = np.einsum("gpm,gqm->mpq", share, share)
        total = (gram**2).sum(axis=(1, 2)) + (alone**2 - 2 * alone * own_share).sum(axis=0)
        freedom = (alone - own_share).sum(axis=0) ** 2 / np.maximum(total, 1e-300)
        return np.sqrt((np.array(pulls) ** 2).sum(axis=0)), np.maximum(freedom, 1.0)


def predict(parameters: Floats, cost: Floats) -> Floats:
    """ln L `[n, points]` of group 0 under parameters `[n, p]`, at centred ln C `[points]`."""
    return _evaluate(parameters, cost, np.zeros(len(cost), dtype=np.int64), own_exponent=False)[0]


def fit_law(sample: Sample, *, offset: bool = True, own_exponent: bool = False) -> Fit:
    """Fit the law to the cells.

    Least squares of ln L, not Huber's loss: with the handful of cells of a sweep, a loss that ignores
    the largest residuals ignores a quarter of the data. `offset=False` holds E = 0 (a pure power law).

    Starts: E / min L in {0, .3, .6, .9} times b in {.05, .1, .2, .4}.
    """
    groups = int(sample.group.max())
    top = TOP * float(np.exp(sample.loss.min())) if offset else 0.0
    starts = _starts(sample, groups * (2 if own_exponent else 1), offset)
    found, squares = _least_squares(starts, sample, top, own_exponent)
    best, least = found[squares.argmin()], float(squares.min())
    free = np.ones(len(best), dtype=bool)
    free[0] = offset and best[0] > 0
    if len(sample.loss) <= free.sum():
        raise ValueError(
            f"Fitting a power law: {len(sample.loss)} cells do not determine {int(free.sum())} parameters; "
            "measure more widths or horizons."
        )
    expected, jacobian = _evaluate(best[None], sample.cost, sample.group, own_exponent)
    return Fit(
        parameters=best, free=free, jacobian=jacobian[0][:, free], residual=sample.loss - expected[0],
        cluster=sample.cluster,
        agreement=float(np.mean(squares <= least * (1 + AGREE) + 1e-18 * len(sample.loss))),
    )  # fmt: skip


def profile(sample: Sample, fit: Fit) -> tuple[float, float]:
    """95 % interval of E by profile likelihood: where the best fit with E held there is not yet refused by an F-test.

    Over less than two decades of cost it often reaches from 0 to nearly the lowest loss: then E is not known.
    """
    floors = np.linspace(0.0, TOP * float(np.exp(sample.loss.min())), PROFILE)
    starts = np.repeat(fit.parameters[None], PROFILE, axis=0)
    starts[:, 0] = floors
    starts[:, 1] = np.log(np.exp(sample.loss)[None] - floors[:, None]).mean(axis=1)
    _, squares = _least_squares(starts, sample, None, own_exponent=False)
    freedom = max(1, len(sample.loss) - 3)
    least = min(fit.squares, float(squares.min()))
    inside = floors[squares <= least * (1 + stats.f.ppf(0.95, 1, freedom) / freedom) + 1e-18 * len(sample.loss)]
    ends = np.append(inside, fit.parameters[0])
    return float(ends.min()), float(ends.max())


def needless(few: Fit, many: Fit) -> float:
    """p-value of the F-test that the parameters `many` has beyond those of `few` are not needed."""
    added = few.freedom - many.freedom
    gain = few.squares - many.squares
    if added < 1 or gain <= 1e-18:  # nothing gained, or both fit to rounding error
        return 1.0
    noise = max(many.squares / many.freedom, 1e-300)
    return float(stats.f.sf(gain / added / noise, added, many.freedom))


def _evaluate(parameters: Floats, cost: Floats, group: Integers, own_exponent: bool) -> tuple[Floats, Floats]:
    """ln L `[n, points]` and its Jacobian `[n, points, p]`."""
    groups = (parameters.shape[1] - 3) // (2 if own_exponent else 1)
    zeros = np.zeros((len(parameters), 1))
    shift = np.concatenate([zeros, parameters[:, 3 : 3 + groups]], axis=1)[:, group]
    change = np.concatenate([zeros, parameters[:, 3 + groups :]], axis=1)[:, group] if own_exponent else 0.0
    floor, scale, exponent = (parameters[:, i : i + 1] for i in range(3))
    slope, position = exponent + change, cost + shift
    reducible = np.exp(np.clip(scale - slope * position, -300, 300))
    loss = floor + reducible
    share = reducible / loss
    columns = [1 / loss, share, -share * position]
    columns += [np.where(group == g, -share * slope, 0.0) for g in range(1, groups + 1)]
    if own_exponent:
        columns += [np.where(group == g, -share * position, 0.0) for g in range(1, groups + 1)]
    return np.log(loss), np.stack(columns, axis=-1)


def _starts(sample: Sample, shifts: int, offset: bool) -> Floats:
    lowest = np.exp(sample.loss.min())
    return np.array([
        [part * lowest, np.log(np.exp(sample.loss) - part * lowest).mean(), exponent] + [0.0] * shifts
        for part in ((0.0, 0.3, 0.6, 0.9) if offset else (0.0,))
        for exponent in (0.05, 0.1, 0.2, 0.4)
    ])  # fmt: skip


def _least_squares(parameters: Floats, sample: Sample, top: float | None, own_exponent: bool) -> tuple[Floats, Floats]:
    """Levenberg-Marquardt with E projected to [0, top], or held where it starts, for many starts at once.

    Takes starts and returns parameters `[n, p]`, and the sums of squares `[n]`.
    """
    all_parameters, all_squares = parameters.copy(), np.empty(len(parameters))
    rows = np.arange(len(parameters))  # those still moving
    damping = np.full(len(rows), 1e-3)
    identity = np.eye(parameters.shape[1])

    def evaluate(candidate: Floats) -> tuple[Floats, Floats, Floats]:
        predicted, jacobian = _evaluate(candidate, sample.cost, sample.group, own_exponent)
        residual = sample.loss - predicted
        return (residual**2).sum(axis=1), residual, jacobian

    squares, residual, jacobian = evaluate(parameters)
    for _ in range(STEPS):
        pull = (residual * jacobian[:, :, 0]).sum(axis=1)
        stuck = np.ones(len(rows), dtype=bool)
        if top is not None:
            stuck = (parameters[:, 0] <= 0) & (pull <= 0) | (parameters[:, 0] >= top) & (pull >= 0)
        moving = jacobian.copy()
        moving[stuck, :, 0] = 0.0
        hessian = np.swapaxes(moving, 1, 2) @ moving
        gradient = (moving * residual[:, :, None]).sum(axis=1)
        diagonal = np.diagonal(hessian, axis1=1, axis2=2)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        step = np.linalg.solve(hessian + ridge[:, :, None] * identity, gradient[:, :, None])[:, :, 0]
        candidate = parameters + step
        candidate[:, 0] = parameters[:, 0] if top is None else candidate[:, 0].clip(0.0, top)
        new_squares, new_residual, new_jacobian = evaluate(candidate)
        better = new_squares < squares
        settled = np.where(better, squares - new_squares < 1e-12 * squares, damping > 1e8)
        parameters = np.where(better[:, None], candidate, parameters)
        residual = np.where(better[:, None], new_residual, residual)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        squares = np.where(better, new_squares, squares)
        damping = np.where(better, damping / 5, damping * 4)
        all_parameters[rows], all_squares[rows] = parameters, squares
        left = ~settled
        if not left.any():
            break
        rows, damping, parameters = rows[left], damping[left], parameters[left]
        squares, residual, jacobian = squares[left], residual[left], jacobian[left]
    return all_parameters, all_squares
