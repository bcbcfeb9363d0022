"""How far the answer moves with choices that a paper often leaves out: outliers, delta, window, what is held out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.lab.laws.parametric import DELTA, NoFit, Parametric, fit_surface
from einlinear.lab.laws.surface import Surface
from einlinear.lab.laws.table import Table

DROPPED = (0, 1, 2, 3, 4, 5, 10, 20)
DELTAS = (0.1, 0.01, 0.001)
WINDOWS = (np.inf, 8.0, 4.0, 2.5)  # times N*
STARTS = 40  # of each refit: the main fit has shown how many agree
HELD_OUT = 0.2  # share of the runs, the most expensive ones


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One refit under another choice. Without a fit, `reason` says why."""

    choice: float
    runs: int
    surface: Surface | None = None
    median_residual: float = float("nan")  # of |ln L|
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Errors of ln L on the most expensive runs, predicted from the others."""

    runs: int
    reach: float  # largest held-out compute over the largest fitted
    bias: float  # mean of predicted minus measured ln L
    rms: float


def by_outliers(table: Table, dropped: Sequence[int] = DROPPED, delta: float = DELTA) -> list[Variant]:
    """Refits without so many of the highest losses. Which runs are left out often moves a law more than chance does."""
    return [_refit(table.without_highest(count), count, delta) for count in dropped if count < len(table)]


def by_delta(table: Table, deltas: Sequence[float] = DELTAS) -> list[Variant]:
    """Refits with other widths of Huber's loss: .1 is least squares, .001 nearly least absolute deviations."""
    return [_refit(table, delta, delta) for delta in deltas]


def by_window(table: Table, fit: Parametric, windows: Sequence[float] = WINDOWS) -> list[Variant]:
    """Refits of the runs within so many times the optimal size N*(C) of `fit`: the form may not hold far from it."""
    k = float(np.exp(np.median(np.log(table.flops / (table.parameters * table.tokens)))))
    away = np.abs(np.log(table.parameters / fit.surface.optimum(table.flops, k)[0]))
    return [_refit(table.where(away <= np.log(window)), window, fit.delta) for window in windows]


def held_out(table: Table, delta: float = DELTA, share: float = HELD_OUT) -> HeldOut:
    """Fits the cheaper runs and predicts the most expensive ones.

    Raises:
        NoFit: where the cheaper runs do not hold a surface.
    """
    edge = np.quantile(table.flops, 1 - share)
    last = table.flops > edge if (table.flops > edge).any() else table.flops >= edge
    known, left = table.where(~last), table.where(last)
    fit = fit_surface(known.parameters, known.tokens, known.loss, delta=delta)
    error = np.log(fit.surface.loss(left.parameters, left.tokens) / left.loss)
    return HeldOut(
        runs=len(left), reach=float(left.flops.max() / known.flops.max()),
        bias=float(error.mean()), rms=float(np.sqrt((error**2).mean())),
    )  # fmt: skip


def _refit(table: Table, choice: float, delta: float) -> Variant:
    try:
        fit = fit_surface(table.parameters, table.tokens, table.loss, delta=delta, starts=STARTS)
    except NoFit as error:
        return Variant(choice=choice, runs=len(table), reason=str(error))
    median = float(np.median(np.abs(fit.residuals)))
    return Variant(choice=choice, runs=len(table), surface=fit.surface, median_residual=median)
