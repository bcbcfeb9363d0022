"""Least squares of the shared power law, on plain arrays: one exponent, one horizontal shift per group.

    ln L = ln(E + exp(a - (b + d_g) (x + s_g))),    x = ln C minus its mean,    s_0 = d_0 = 0

L is the loss, C the cost, g the group (a family). With one group this is L = E + (C/C0)^-c; with two,
exp(s_1) is the compute multiplier of group 1 over group 0. A parameter vector is `[E, a, b, s.., d..]`.
The solver is our own because it takes every start and every bootstrap draw as one batch of small problems,
which no library at hand does; a report needs some ten thousand of these fits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DRAWS = 400  # of the bootstrap: the 2.5 % quantile then rests on 10 draws
STEPS = 200  # of the solver; a draw that still moves then is used as it is
TOP = 0.999  # E stays in [0, TOP * the lowest loss]
AGREE = 1e-6  # starts within this share of the best sum of squares found the same optimum


@dataclass(frozen=True)
class Sample:
    """Cells (the means that are fitted) and the runs behind them (that are resampled)."""

    cost: Floats  # [cells] ln C, centred
    loss: Floats  # [cells] ln L
    group: Integers  # [cells] 0 for the baseline
    run_loss: Floats  # [runs] ln L
    run_cell: Integers  # [runs] index of the run's cell
    run_cluster: Integers  # [runs] runs of one cluster (a trunk) are dependent; a cluster lies in one group


@dataclass(frozen=True)
class Fit:
    """A fitted law with what its intervals rest on."""

    parameters: Floats  # [p]
    covariance: Floats  # [p, p] Gauss-Newton, zero for a parameter held fixed or at its bound
    draws: Floats  # [draws, p] of the bootstrap
    squares: float  # sum of squared residuals of the cells
    freedom: int  # cells minus free parameters
    stretch: float  # widens percentile intervals of few clusters
    agreement: float  # share of the starts that reached the best optimum

    @property
    def scatter(self) -> float:
        """Standard deviation of ln L around the law."""
        return float(np.sqrt(self.squares / self.freedom))

    def interval(self, functional: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
        """95 % interval of `functional`, a map of parameters `[n, p]` to values `[n, m]`: low and high `[m]`.

        The wider one of two at each end. The t-interval (Gauss-Newton, delta method) covers 95 % when cells
        are independent but not when horizons share a trunk. The bootstrap over trunks sees that dependence,
        yet percentiles of a handful of clusters are too narrow: they are stretched by what fitting took from
        the residuals and by Student's t (the expanded percentile interval of Hesterberg 2015, "What Teachers
        Should Know About the Bootstrap"). `tests/lab/test_laws.py` measures the coverage of both.
        """
        best = functional(self.parameters[None])[0]
        step = 1e-5 * np.maximum(np.sqrt(np.diag(self.covariance)), 1e-9)
        shifts = np.diag(step)
        ahead, behind = functional(self.parameters + shifts), functional(self.parameters - shifts)
        slope = (ahead - behind) / (2 * step[:, None])
        deviation = np.sqrt(np.einsum("pm,pq,qm->m", slope, self.covariance, slope))
        half = stats.t.ppf(0.975, self.freedom) * deviation
        low, high = np.nanquantile(functional(self.draws), [0.025, 0.975], axis=0)
        return (
            np.minimum(best - half, best + self.stretch * (low - best)),
            np.maximum(best + half, best + self.stretch * (high - best)),
        )


def predict(parameters: Floats, cost: Floats) -> Floats:
    """ln L `[n, points]` of group 0 under parameters `[n, p]`, at centred ln C `[points]`."""
    return _evaluate(parameters, cost, np.zeros(len(cost), dtype=np.int64), own_exponent=False)[0]


def fit_law(sample: Sample, *, offset: bool = True, own_exponent: bool = False, draws: int = DRAWS) -> Fit:
    """Fit the law to the cells and bootstrap it over clusters of runs, always with the same random draws.

    Least squares of ln L, not Huber's loss: with the handful of cells of a sweep, a loss that ignores
    the largest residuals ignores a quarter of the data. `offset=False` holds E = 0 (a pure power law).

    Starts: E / min L in {0, .3, .6, .9} times b in {.05, .1, .2, .4}.
    """
    groups = int(sample.group.max())
    top = TOP * float(np.exp(sample.loss.min())) if offset else 0.0
    starts = _starts(sample, groups * (2 if own_exponent else 1), offset)
    found, squares = _least_squares(
        starts, sample.cost, np.repeat(sample.loss[None], len(starts), axis=0), sample.group,
        np.ones(len(sample.loss)), top, own_exponent,
    )  # fmt: skip
    best = found[squares.argmin()]
    least = float(squares.min())

    free = np.ones(len(best), dtype=bool)
    free[0] = offset and best[0] > 0
    freedom = len(sample.loss) - int(free.sum())
    if freedom < 1:
        raise ValueError(
            f"Fitting a power law: {len(sample.loss)} cells do not determine {int(free.sum())} parameters; "
            "measure more widths or horizons."
        )
    expected, jacobians = _evaluate(best[None], sample.cost, sample.group, own_exponent)
    jacobian = jacobians[0][:, free]
    covariance = np.zeros((len(best), len(best)))
    covariance[np.ix_(free, free)] = np.linalg.pinv(jacobian.T @ jacobian) * least / freedom

    cell = sample.run_cell
    drawn, _ = _least_squares(
        np.repeat(best[None], draws, axis=0), sample.cost[cell], _disturbed(sample, expected[0], draws),
        sample.group[cell], 1 / np.bincount(cell)[cell], top, own_exponent,
    )  # fmt: skip
    clusters = len(np.unique(sample.run_cluster))
    left = clusters - int(free.sum())
    shrunken = np.sqrt(clusters / max(1, left))
    student = stats.t.ppf(0.975, max(2, left)) / stats.norm.ppf(0.975)
    return Fit(
        parameters=best, covariance=covariance, draws=drawn,
        squares=least, freedom=freedom, stretch=float(shrunken * student),
        agreement=float(np.mean(squares <= least * (1 + AGREE) + 1e-18 * len(sample.loss))),
    )  # fmt: skip


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


def _least_squares(
    parameters: Floats, cost: Floats, loss: Floats, group: Integers, weights: Floats, top: float, own_exponent: bool
) -> tuple[Floats, Floats]:
    """Levenberg-Marquardt with E projected to [0, top], for many rows of ln loss `[n, points]` at once.

    Takes starts and returns parameters `[n, p]`, and the weighted sums of squares `[n]`.
    """
    all_parameters, all_squares = parameters.copy(), np.empty(len(parameters))
    rows = np.arange(len(parameters))  # those still moving
    damping = np.full(len(rows), 1e-3)
    identity = np.eye(parameters.shape[1])

    def evaluate(candidate: Floats) -> tuple[Floats, Floats, Floats]:
        predicted, jacobian = _evaluate(candidate, cost, group, own_exponent)
        residual = loss - predicted
        return (weights * residual**2).sum(axis=1), residual, jacobian

    squares, residual, jacobian = evaluate(parameters)
    for _ in range(STEPS):
        pull = (weights * residual * jacobian[:, :, 0]).sum(axis=1)
        stuck = (parameters[:, 0] <= 0) & (pull <= 0) | (parameters[:, 0] >= top) & (pull >= 0)
        moving = jacobian.copy()
        moving[stuck, :, 0] = 0.0
        weighted = moving * weights[:, None]
        hessian = np.swapaxes(weighted, 1, 2) @ moving
        gradient = (weighted * residual[:, :, None]).sum(axis=1)
        diagonal = np.diagonal(hessian, axis1=1, axis2=2)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        step = np.linalg.solve(hessian + ridge[:, :, None] * identity, gradient[:, :, None])[:, :, 0]
        candidate = parameters + step
        candidate[:, 0] = candidate[:, 0].clip(0.0, top)
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
        rows, loss, damping = rows[left], loss[left], damping[left]
        parameters, squares, residual, jacobian = (
            parameters[left],
            squares[left],
            residual[left],
            jacobian[left],
        )
    return all_parameters, all_squares


def _disturbed(sample: Sample, law: Floats, draws: int) -> Floats:
    """ln L of the runs `[draws, runs]`: the law, and the runs' residuals with a random weight per cluster.

    The six weights are Webb's (2014), made for few clusters.
    """
    webb = np.array([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5])
    webb = np.sign(webb) * np.sqrt(np.abs(webb))
    generator = np.random.default_rng(0)
    _, cluster = np.unique(sample.run_cluster, return_inverse=True)
    weight = generator.choice(webb, size=(draws, cluster.max() + 1))
    expected = law[sample.run_cell]
    return expected + weight[:, cluster] * (sample.run_loss - expected)
