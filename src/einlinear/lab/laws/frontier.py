"""L(C) = E + (C/C0)^-c along the best that a family was seen to do for each cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from einlinear.lab.laws.cells import (
    Axis,
    Cell,
    cells_of,
    cluster_labels,
    frontier_cells,
    log_costs,
    lower_hull,
    measured,
)
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.power import Fit, Sample, fit_law, needless, predict, profile
from einlinear.lab.run import Run

OFFSET_CELLS = 5  # a floor E takes at least so many
SAME_LOSS = 1e-9  # of ln L: rounding
NEEDED_OFFSET = 0.05  # p-value of the F-test below which a family's law has a floor E


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """L(C) = E + (C/C0)^-c of one family on its lower hull. Without a law, `reason` says why."""

    family: str
    axis: Axis
    cells: tuple[Cell, ...]
    hull: tuple[Cell, ...]
    fitted: tuple[Cell, ...] = ()  # those on the hull or near it
    E: float = math.nan  # nats; 0 where the data do not show a floor
    E_low: float = math.nan  # 95 % interval by profile likelihood, whether or not E is kept; NaN for few cells
    E_high: float = math.nan
    C0: float = math.nan  # cost at which the reducible loss is one nat, in units of the axis
    c: float = math.nan
    c_low: float = math.nan  # 95 % interval of c
    c_high: float = math.nan
    agreement: float = math.nan  # share of the solver's starts that found this optimum
    held_out: tuple[float, float] | None = None  # error of ln L at the largest cost, left out: with E, and with E = 0
    reason: str = ""
    _fit: Fit | None = field(default=None, repr=False)
    _centre: float = field(default=0.0, repr=False)

    def loss(self, cost: Floats) -> tuple[Floats, Floats, Floats]:
        """The law and its 95 % band at costs `[n]`: loss, low, high, each `[n]` in nats."""
        if self._fit is None:
            raise ValueError(f"Evaluating the law of {self.family}: there is none ({self.reason}).")
        position = np.log(cost) - self._centre
        low, high = self._fit.interval(lambda parameters: predict(parameters, position))
        return np.exp(predict(self._fit.parameters[None], position)[0]), np.exp(low), np.exp(high)


def frontiers(runs: Sequence[Run], axis: Axis = "flops", *, allow_mixed_data: bool = False) -> dict[str, Frontier]:
    """Each family's own law on its lower hull."""
    groups = cells_of(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    return {family: fit_frontier(cells, axis) for family, cells in groups.items()}


def fit_frontier(cells: Sequence[Cell], axis: Axis = "flops", *, chosen: Sequence[Cell] | None = None) -> Frontier:
    """L(C) = E + (C/C0)^-c on those of one family's cells that are on its lower hull or near it, or on `chosen`.

    E is fitted to five cells or more, and kept where an F-test asks for it: over less than two decades of
    cost it is often flat. Otherwise E = 0. With fewer than three cells, or where cost does not
    help, there is no law and `reason` says so.
    """
    nothing = Frontier(family=cells[0].family, axis=axis, cells=tuple(cells), hull=tuple(lower_hull(cells)))
    kept = list(frontier_cells(cells) if chosen is None else chosen)
    if len(kept) < 3:
        return replace(nothing, reason="fewer than three sizes on its lower hull: no law of its own")
    if np.ptp(log_costs(kept)) < math.log(1.05):
        return replace(nothing, reason="all its costs are the same: no law")
    if np.ptp(np.log([cell.loss for cell in kept])) < SAME_LOSS:
        return replace(nothing, reason="all its losses are the same: no law")
    centre = float(log_costs(kept).mean())
    sample = sample_of([kept], centre)
    fit, floors, held_out = fit_law(sample, offset=False), (math.nan, math.nan), None
    if len(kept) >= OFFSET_CELLS:
        curved = fit_law(sample)
        floors = profile(sample, curved)
        held_out = _held_out(sample)
        if needless(fit, curved) < NEEDED_OFFSET:
            fit = curved
    floor, scale, exponent = map(float, fit.parameters)
    if exponent <= 0:
        return replace(nothing, reason="its loss does not fall with cost: no law")
    low, high = fit.interval(lambda parameters: parameters[:, 2:3])
    return replace(
        nothing, fitted=tuple(kept), E=floor, E_low=floors[0], E_high=floors[1],
        C0=math.exp(min(700.0, centre + scale / exponent)), c=exponent, c_low=float(low[0]), c_high=float(high[0]),
        agreement=fit.agreement, held_out=held_out, _fit=fit, _centre=centre,
    )  # fmt: skip


def sample_of(groups: Sequence[Sequence[Cell]], centre: float) -> Sample:
    """Families' cells as arrays, the baseline's first; ln cost less `centre`."""
    cells = [cell for group in groups for cell in group]
    return Sample(
        cost=log_costs(cells) - centre,
        loss=np.log([cell.loss for cell in cells]),
        group=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        cluster=cluster_labels(cells),
    )


def _held_out(sample: Sample) -> tuple[float, float] | None:
    """Predicts the most expensive eighth of the cells from the others: mean error of ln L with E, and with E = 0."""
    order = np.argsort(sample.cost, kind="stable")
    last = max(1, len(order) // 8)
    known, left = order[:-last], order[-last:]
    if len(known) < OFFSET_CELLS - 1:
        return None
    part = Sample(
        cost=sample.cost[known], loss=sample.loss[known], group=sample.group[known], cluster=sample.cluster[known]
    )
    errors = []
    for offset in (True, False):
        fit = fit_law(part, offset=offset)
        errors.append(float((predict(fit.parameters[None], sample.cost[left])[0] - sample.loss[left]).mean()))
    return errors[0], errors[1]
