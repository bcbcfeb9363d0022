"""What results say of candidates that were not trained: a Gaussian process over taxonomy, cost and horizon."""

import math
import warnings
from collections.abc import Sequence

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats, Integers
from einlinear.space import Candidate

with extra("lab"):
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel  # type: ignore[import-untyped]

FEATURES = ("ψ", "ν", "ω", "ln FLOPs", "ln parameters", "ln seconds")
SMOOTH = 2.0  # deviations of a feature over which what it says changes
LASTING = 4.0  # rungs over which what is told of a candidate, and of all, is forgotten
POOR = 2.0  # ln multipliers below the best of a horizon at which all are equally poor
NAME = 1e-6  # between candidates' numbers: nothing to what is smooth in features
REFITS = 1.5  # times as many results as at the last choice of the kernel's scales ask for another


def features(pool: Sequence[Candidate]) -> Floats:
    """`[candidates, 6]`, the columns of `FEATURES` with mean 0 and deviation 1; what is not known is at the mean."""
    raw = np.array([
        [c.psi, c.nu, c.omega, math.log(c.flops), math.log(c.parameters), math.log(c.seconds or math.nan)]
        for c in pool
    ])  # fmt: skip
    known = np.isfinite(raw)
    mean = np.where(known, raw, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, raw - mean, 0.0)
    return np.asarray(centred / np.maximum(centred.std(axis=0), 1e-9))


class Surrogate:
    """ln multiplier as the sum of three parts: smooth in features and horizon, the trend of all, and each one's own.

    The last is what features do not tell. The trend of all makes up for later horizons having seen only what was
    promising at earlier ones. Along horizons each part is a process without memory (Matérn 1/2): the last result of a
    candidate counts, and no slope is continued, which was measured to rank worse. Each result has its own variance.
    """

    def __init__(self, features: Floats, rungs: int) -> None:
        """Of candidates' features `[n, f]`."""
        self._features, self._rungs = features, rungs
        self._mean, self._seen = 0.0, 0
        self._process: GaussianProcessRegressor | None = None
        # Sizes of the parts are chosen by likelihood, scales are not: a search has too few results.
        far, last = [1e6] * features.shape[1], 1e-3 * NAME  # scales of what a part does not look at, and of equality
        smooth = RBF([*[SMOOTH] * features.shape[1], 1e6, 1e6], "fixed")
        along = Matern([*far, LASTING, 1e6], "fixed", nu=0.5)
        own = Matern([*far, LASTING, last], "fixed", nu=0.5)
        self._kernel = (
            ConstantKernel(0.3, (1e-3, 10.0)) * smooth * along
            + ConstantKernel(0.3, (1e-3, 10.0)) * along
            + ConstantKernel(0.3, (1e-3, 10.0)) * own
            + WhiteKernel(0.03, (1e-4, 1.0))
        )

    def fit(self, which: Sequence[int], rung: Sequence[int], value: Sequence[float], variance: Sequence[float]) -> None:
        """Takes all results so far, `[m]` each. Very poor ones count as poor: how poor would only blur the others."""
        worths, rungs = np.asarray(value), np.asarray(rung)
        for at in set(rung):
            here = rungs == at
            worths = np.where(here, np.maximum(worths, worths[here].max() - POOR), worths)
        again = len(which) >= REFITS * self._seen
        self._mean = float(np.median(worths))
        self._process = GaussianProcessRegressor(
            self._kernel, alpha=np.asarray(variance), optimizer="fmin_l_bfgs_b" if again else None
        )
        with warnings.catch_warnings():  # a scale at its bound is an answer
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(self._inputs(np.asarray(which), rungs), worths - self._mean)
        if again:
            self._kernel, self._seen = self._process.kernel_, len(which)

    def predict(self, which: Integers, rung: int | None = None) -> tuple[Floats, Floats]:
        """Mean and deviation `[m]` of candidates at a rung, by default the last."""
        at = np.full(len(which), self._rungs - 1 if rung is None else rung)
        mean, deviation = self._fitted().predict(self._inputs(which, at), return_std=True)
        return mean + self._mean, deviation

    def blame(self, which: int) -> Floats:
        """By how much a candidate's prediction exceeds that of one whose feature is the pool's mean, `[f]`.

        Only what the smooth part says: the candidate's own offset does not count.
        """
        own = self._features[which]
        points = np.repeat(own[None], len(own) + 1, axis=0)
        points[1:][np.diag_indices(len(own))] = 0.0
        rung = np.full((len(points), 1), float(self._rungs - 1))
        nobody = np.full((len(points), 1), -NAME)
        found = self._fitted().predict(np.concatenate([points, rung, nobody], axis=1))
        return np.asarray(found[0] - found[1:])

    def _fitted(self) -> GaussianProcessRegressor:
        if self._process is None:
            raise ValueError("Predicting candidates: there are no results yet; fit some first.")
        return self._process

    def _inputs(self, which: Integers, rung: Integers) -> Floats:
        columns = [self._features[which], rung[:, None], NAME * which[:, None]]
        return np.asarray(np.concatenate(columns, axis=1), dtype=np.float64)
