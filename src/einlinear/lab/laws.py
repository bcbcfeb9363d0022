"""From finished runs to laws: the lower hull, L(C) = E + (C/C0)^-c, and the compute multiplier.

Everything works on cells, the means over seeds of runs that agree in all else, and on the cells of a family
that are near its lower hull: for a given cost, the best that this family was seen to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Literal

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.run import Run

with extra("lab"):
    from einlinear.lab.fit import Fit, Floats, Sample, fit_law, needless, predict

Axis = Literal["flops", "seconds", "parameters", "linear_flops"]
AXES: dict[Axis, str] = {
    "flops": "training FLOPs",
    "seconds": "training seconds",
    "parameters": "parameters",
    "linear_flops": "FLOPs in linear layers",
}

SCATTERS = 4.0  # a cell counts as frontier up to so many standard deviations of the noise above the hull
FARTHEST = 0.1  # but not beyond this share of the loss: then it was badly trained, not unlucky
NEAR = 0.02  # the same as a share of the loss, where the noise is not known
OFFSET_CELLS = 5  # a floor E takes at least so many
EXPONENT_CELLS = 8  # two families with exponents of their own take at least so many
NEEDED_OFFSET = 0.05  # p-value of the F-test below which a family's law has a floor E
NEEDED_EXPONENT = 0.01  # p-value of the F-test below which two families have exponents of their own


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in seed, with the geometric means of their cost and loss.

    Means, because the least of several noisy runs is too low.
    """

    family: str
    width: int
    tokens: int
    cost: float  # in units of the axis
    loss: float  # nats
    runs: tuple[Run, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """L(C) = E + (C/C0)^-c of one family on its lower hull. Without a law, `reason` says why."""

    family: str
    axis: Axis
    cells: tuple[Cell, ...]
    hull: tuple[Cell, ...]
    fitted: tuple[Cell, ...] = ()  # those on the hull or near it
    E: float = math.nan  # nats; 0 where the data do not show a floor
    C0: float = math.nan  # cost at which the reducible loss is one nat, in units of the axis
    c: float = math.nan
    c_low: float = math.nan  # 95 % interval of c
    c_high: float = math.nan
    agreement: float = math.nan  # share of the solver's starts that found this optimum
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


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """How many times its own cost a family would cost as the baseline, at equal loss: above 1 it is better.

    Where the two curves are not parallel no single number is true: `value` then stands for the middle of
    the losses both reached, `trend` holds the two ends, and the interval covers all of that range.
    """

    family: str
    baseline: str
    axis: Axis
    value: float = math.nan
    low: float = math.nan  # 95 % interval
    high: float = math.nan
    method: str = ""
    loss_low: float = math.nan  # the losses (nats) for which the multiplier was measured
    loss_high: float = math.nan
    extrapolation: float = math.nan  # baseline's cost at the family's best loss, over the largest it was measured at
    cells: int = 0
    crosscheck: float = math.nan  # by inverting the baseline's hull, no law; nan where the losses do not meet
    trend: tuple[float, float] | None = None  # at `loss_high` and at `loss_low`
    reason: str = ""  # why there is no value

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """What the interval says; only one that excludes 1 decides."""
        if self.low > 1:
            return "better"
        return "worse" if self.high < 1 else "undecided"

    def __str__(self) -> str:
        return self.reason or f"{self.value:.2f}× ({self.low:.2f}–{self.high:.2f})"


def measured(runs: Sequence[Run], *, allow_mixed_data: bool = False) -> list[Run]:
    """The finished runs that laws are fitted to: not the tuning runs, not those that diverged.

    Raises ValueError where they do not compare: of several tasks, data fingerprints or setups.
    """
    chosen = [run for run in runs if run.purpose == "measure" and run.status == "done" and _has_loss(run)]
    for name, what in (("task", "tasks"), ("fingerprint", "data sets"), ("setup", "setups")):
        values = sorted({str(getattr(run, name)) for run in chosen})
        if len(values) > 1 and not allow_mixed_data:
            raise ValueError(
                f"Fitting laws: the runs are of {len(values)} {what} ({shorten(', '.join(values), 200)}), and their "
                f"losses do not compare; select the runs of one {name}, or pass allow_mixed_data=True."
            )
    return chosen


def hull(runs: Sequence[Run], axis: Axis = "flops", *, allow_mixed_data: bool = False) -> dict[str, list[Cell]]:
    """Each family's lower convex hull of ln loss over ln cost, on cell means, cheapest first.

    Only cells that improve on every cheaper one are on it.
    """
    groups = _cells(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    return {family: _hull(cells) for family, cells in groups.items()}


def frontiers(runs: Sequence[Run], axis: Axis = "flops", *, allow_mixed_data: bool = False) -> dict[str, Frontier]:
    """Each family's own law on its lower hull."""
    groups = _cells(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    return {family: fit_frontier(cells, axis) for family, cells in groups.items()}


def fit_frontier(cells: Sequence[Cell], axis: Axis = "flops") -> Frontier:
    """L(C) = E + (C/C0)^-c on those of one family's cells that are on its lower hull or near it.

    E is fitted to five cells or more, and kept where an F-test asks for it: over less than two decades of
    cost it is often flat. Otherwise E = 0. With fewer than three cells, or where cost does not
    help, there is no law and `reason` says so.
    """
    nothing = Frontier(family=cells[0].family, axis=axis, cells=tuple(cells), hull=tuple(_hull(cells)))
    kept = _frontier(cells)
    if len(kept) < 3:
        return replace(nothing, reason="fewer than three sizes on its lower hull: no law of its own")
    centre = _centre(kept)
    sample = _sample([kept], centre)
    fit = fit_law(sample, offset=False)
    if len(kept) >= OFFSET_CELLS and needless(fit, curved := fit_law(sample)) < NEEDED_OFFSET:
        fit = curved
    floor, scale, exponent = map(float, fit.parameters)
    if exponent <= 0:
        return replace(nothing, reason="its loss does not fall with cost: no law")
    low, high = fit.interval(lambda parameters: parameters[:, 2:3])
    return replace(
        nothing, fitted=tuple(kept), E=floor, C0=math.exp(centre + scale / exponent), c=exponent,
        c_low=float(low[0]), c_high=float(high[0]), agreement=fit.agreement, _fit=fit, _centre=centre,
    )  # fmt: skip


def multiplier(
    runs: Sequence[Run], family: str, baseline: str = "dense", axis: Axis = "flops", *,
    allow_mixed_data: bool = False,
) -> Multiplier:  # fmt: skip
    """Compute multiplier of `family` over `baseline`: C_baseline(L) / C_family(L) at equal loss L.

    Both families share E, the exponent and the scale, and differ by one horizontal shift, ln of the
    multiplier: the only estimator that is stable on one or two decades. Only the two are
    fitted together, so the answer does not change when a third is added to the study. Where an F-test finds
    the exponents different, the interval covers the multiplier over the whole range of losses instead.

    The interval is the wider of the t-interval of the cells and of the bootstrap over trunks, see
    `einlinear.lab.fit.Fit.interval`. Raises ValueError for a family that is not in `runs` and as `measured`.
    """
    for name in (family, baseline):
        if name not in (present := sorted({run.family for run in runs})):
            raise ValueError(f"Comparing {family} with {baseline}: there are no runs of {name}, only of {present}.")
    groups = _cells(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    both = [groups.get(baseline, []), groups.get(family, [])]
    nothing = Multiplier(family=family, baseline=baseline, axis=axis)
    devices = sorted({run.device for cells in both for cell in cells for run in cell.runs})
    if axis == "seconds" and len(devices) > 1:
        return replace(nothing, reason=f"seconds on different devices ({', '.join(devices)}) do not compare")
    kept = [_frontier(cells) for cells in both]
    if min(map(len, kept)) < 2 or sum(map(len, kept)) < 5:
        counts = f"{len(kept[0])} of {baseline}, {len(kept[1])} of {family}"
        return replace(nothing, reason=f"too few sizes on the lower hulls ({counts}; 2 of each and 5 in all needed)")

    centre = _centre([*kept[0], *kept[1]])
    sample = _sample(kept, centre)
    trending = len(sample.loss) >= EXPONENT_CELLS and (
        needless(fit_law(sample, draws=0), fit_law(sample, own_exponent=True, draws=0)) < NEEDED_EXPONENT
    )
    fit = fit_law(sample, own_exponent=trending)
    exponents = [fit.parameters[2], fit.parameters[2] + (fit.parameters[4] if trending else 0.0)]
    if min(exponents) <= 0:
        return replace(nothing, reason="the loss of one of them does not fall with cost")

    losses = [[cell.loss for cell in cells] for cells in kept]
    low, high = max(map(min, losses)), min(map(max, losses))
    if low >= high:  # nothing in common: all of it is extrapolated, and `extrapolation` tells how far
        low, high = min(losses[1]), max(losses[1])
    at = np.array([math.sqrt(low * high), high, low, min(losses[1])])

    def shift(parameters: Floats) -> Floats:
        return _log_multiplier(parameters, at)

    best = np.exp(shift(fit.parameters[None])[0])
    lower, upper = np.exp(np.clip(fit.interval(shift), -50, 50))
    cost_of_best = min(kept[1], key=lambda cell: (cell.loss, cell.cost)).cost
    return Multiplier(
        family=family, baseline=baseline, axis=axis,
        value=float(best[0]), low=float(lower[:3].min()), high=float(upper[:3].max()),
        method="shared floor, own exponents" if trending else "shared law, horizontal shift",
        loss_low=low, loss_high=high,
        extrapolation=max(1.0, float(best[3]) * cost_of_best / max(cell.cost for cell in kept[0])),
        cells=len(sample.loss), crosscheck=_inverted(_hull(both[1]), _hull(both[0])),
        trend=(float(best[1]), float(best[2])) if trending else None,
    )  # fmt: skip


def _has_loss(run: Run) -> bool:
    return run.loss is not None and math.isfinite(run.loss) and run.loss > 0


def _cells(runs: Sequence[Run], axis: Axis) -> dict[str, list[Cell]]:
    """Cells by family, in the order of first appearance."""
    together: dict[tuple[str | float, ...], list[Run]] = {}
    for run in runs:
        if getattr(run, axis) > 0:
            together.setdefault((run.family, run.width, run.depth, run.tokens, run.rate), []).append(run)
    groups: dict[str, list[Cell]] = {}
    for members in together.values():
        cost = math.exp(np.mean([math.log(getattr(run, axis)) for run in members]))
        loss = math.exp(np.mean([math.log(run.loss) for run in members if run.loss is not None]))
        one = members[0]
        groups.setdefault(one.family, []).append(Cell(one.family, one.width, one.tokens, cost, loss, tuple(members)))
    return groups


def _hull(cells: Sequence[Cell]) -> list[Cell]:
    vertices: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.cost, cell.loss)):
        if vertices and cell.loss >= vertices[-1].loss:
            continue
        while len(vertices) > 1 and _slope(vertices[-2], vertices[-1]) >= _slope(vertices[-2], cell):
            vertices.pop()
        vertices.append(cell)
    return vertices


def _slope(left: Cell, right: Cell) -> float:
    return math.log(right.loss / left.loss) / math.log(right.cost / left.cost)


def _near(cells: Sequence[Cell], tolerance: float) -> list[Cell]:
    """The cells at most `tolerance` in ln loss above their lower hull, which goes on to the right as it ended."""
    vertices = _hull(cells)
    last = vertices[-1]
    slope = _slope(vertices[-2], last) if len(vertices) > 1 else 0.0
    ends = [*vertices, replace(last, cost=last.cost * math.e**9, loss=last.loss * math.exp(9 * slope))]
    floor = np.interp(
        [math.log(cell.cost) for cell in cells],
        [math.log(cell.cost) for cell in ends],
        [math.log(cell.loss) for cell in ends],
    )
    return [cell for cell, least in zip(cells, floor, strict=True) if math.log(cell.loss) <= least + tolerance + 1e-9]


def _frontier(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one family that its law is fitted to: those that noise alone may have put above the hull.

    To fit the vertices alone would select the lucky runs and then measure the noise on them: the intervals
    come out too narrow (coverage .82 to .87 in simulation). The noise is what a smooth surface in parameters
    and tokens leaves of ln loss; where there are too few cells to tell, 2 % of the loss.
    """
    if not cells:
        return []
    size = np.log([max(1, cell.runs[0].parameters) for cell in cells])
    size -= size.mean()
    tokens = np.log([cell.tokens for cell in cells])
    tokens -= tokens.mean()
    surface = np.stack([np.ones(len(cells)), size, size**2, tokens, size * tokens], axis=1)
    loss = np.log([cell.loss for cell in cells])
    solution, _, rank, _ = np.linalg.lstsq(surface, loss)
    freedom = len(cells) - int(rank)
    if freedom < 1:
        return _near(cells, NEAR)
    noise = math.sqrt(((loss - surface @ solution) ** 2).sum() / freedom)
    return _near(cells, min(SCATTERS * noise, FARTHEST))


def _centre(cells: Sequence[Cell]) -> float:
    return float(np.mean([math.log(cell.cost) for cell in cells]))


def _sample(groups: Sequence[Sequence[Cell]], centre: float) -> Sample:
    cells = [cell for group in groups for cell in group]
    runs = [(run, index) for index, cell in enumerate(cells) for run in cell.runs]
    names = [(run.family, run.trunk) if run.trunk else run.key for run, _ in runs]
    clusters = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Sample(
        cost=np.array([math.log(cell.cost) for cell in cells]) - centre,
        loss=np.array([math.log(cell.loss) for cell in cells]),
        group=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        run_loss=np.array([math.log(run.loss) for run, _ in runs if run.loss is not None]),
        run_cell=np.array([index for _, index in runs]),
        run_cluster=np.array([clusters[name] for name in names]),
    )


def _log_multiplier(parameters: Floats, loss: Floats) -> Floats:
    """ln of C_baseline(L) / C_family(L) under parameters `[n, 4 or 5]` at losses `[m]`: `[n, m]`."""
    floor, scale, exponent, shift = (parameters[:, i : i + 1] for i in range(4))
    if parameters.shape[1] == 4:
        return np.repeat(shift, len(loss), axis=1)
    reach = scale - np.log(np.maximum(loss - floor, 1e-300))
    difference: Floats = reach / exponent - reach / (exponent + parameters[:, 4:5])
    return shift + difference


def _inverted(family: Sequence[Cell], baseline: Sequence[Cell]) -> float:
    """Geometric mean, over the family's hull, of the baseline's cost at the same loss over the family's."""
    rising = sorted(baseline, key=lambda cell: cell.loss)
    losses = [math.log(cell.loss) for cell in rising]
    inside = [cell for cell in family if losses[0] <= math.log(cell.loss) <= losses[-1]]
    if not inside:
        return math.nan
    reached = np.interp([math.log(cell.loss) for cell in inside], losses, [math.log(cell.cost) for cell in rising])
    return math.exp(np.mean(reached - [math.log(cell.cost) for cell in inside]))
