"""The compute multiplier: how many times its own cost a family would cost as the baseline, at equal loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.cells import Axis, Cell, cells_of, frontier_cells, log_costs, lower_hull, measured
from einlinear.lab.laws.frontier import sample_of
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.power import fit_law, needless
from einlinear.lab.run import Run

with extra("lab"):
    from scipy import interpolate  # type: ignore[import-untyped]

EXPONENT_CELLS = 8  # two families with exponents of their own take at least so many
NEEDED_EXPONENT = 0.01  # p-value of the F-test below which two families have exponents of their own


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
    scatter: float = math.nan  # standard deviation of a cell's ln loss about the law
    exponent_p: float = math.nan  # F-test that both share one exponent; NaN where there are too few cells for it
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
        return self.reason or f"{times(self.value)}× ({times(self.low)}–{times(self.high)})"


def times(value: float) -> str:
    """A multiplier as text, hundredths around 1: 0.043, 0.43, 1.66, 18.9, 189, 1.9e5."""
    if value >= 1e4:
        mantissa, _, power = f"{value:.1e}".partition("e+")
        return f"{mantissa}e{int(power)}" if power else "∞"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def multiplier(
    runs: Sequence[Run], family: str, baseline: str = "dense", axis: Axis = "flops", *,
    allow_mixed_data: bool = False,
) -> Multiplier:  # fmt: skip
    """Compute multiplier of `family` over `baseline`: C_baseline(L) / C_family(L) at equal loss L, see `compare_cells`.

    Raises ValueError for a family that is not in `runs` and as `measured`.
    """
    for name in (family, baseline):
        if name not in (present := sorted({run.family for run in runs})):
            raise ValueError(f"Comparing {family} with {baseline}: there are no runs of {name}, only of {present}.")
    groups = cells_of(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    return compare_cells(groups.get(family, []), groups.get(baseline, []), axis, names=(family, baseline))


def compare_cells(
    family: Sequence[Cell],
    baseline: Sequence[Cell],
    axis: Axis = "flops",
    *,
    names: tuple[str, str],
    chosen: tuple[Sequence[Cell], Sequence[Cell]] | None = None,
) -> Multiplier:
    """The multiplier from two families' cells: those near their lower hulls, or `chosen` ones.

    Both families share E, the exponent and the scale, and differ by one horizontal shift, ln of the
    multiplier: the only estimator that is stable on one or two decades. Only the two are
    fitted together, so the answer does not change when a third is added to the study. Where an F-test finds
    the exponents different, the interval covers the multiplier over the whole range of losses instead.

    The interval is Student's t over cells, robust to what horizons of one trunk have in common, see
    `einlinear.lab.laws.power.Fit.interval`.
    """
    nothing = Multiplier(family=names[0], baseline=names[1], axis=axis)
    devices = sorted({run.device for cells in (baseline, family) for cell in cells for run in cell.runs})
    if axis == "seconds" and len(devices) > 1:
        return replace(nothing, reason=f"seconds on different devices ({', '.join(devices)}) do not compare")
    kept = [frontier_cells(baseline), frontier_cells(family)] if chosen is None else [list(chosen[1]), list(chosen[0])]
    if min(map(len, kept)) < 2 or sum(map(len, kept)) < 5:
        counts = f"{len(kept[0])} of {names[1]}, {len(kept[1])} of {names[0]}"
        return replace(nothing, reason=f"too few sizes on the lower hulls ({counts}; 2 of each and 5 in all needed)")

    sample = sample_of(kept, float(log_costs([*kept[0], *kept[1]]).mean()))
    fit, p_value = fit_law(sample), math.nan
    if len(sample.loss) >= EXPONENT_CELLS and min(map(len, kept)) >= 3:
        p_value = needless(fit, own := fit_law(sample, own_exponent=True))
        fit = own if p_value < NEEDED_EXPONENT else fit
    trending = p_value < NEEDED_EXPONENT
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
        family=names[0], baseline=names[1], axis=axis,
        value=float(best[0]), low=float(lower[:3].min()), high=float(upper[:3].max()),
        method="shared floor, own exponents" if trending else "shared law, horizontal shift",
        loss_low=low, loss_high=high,
        extrapolation=max(1.0, float(best[3]) * cost_of_best / max(cell.cost for cell in kept[0])),
        cells=len(sample.loss), scatter=fit.scatter, exponent_p=p_value,
        crosscheck=_inverted(lower_hull(kept[1]), lower_hull(kept[0])),
        trend=(float(best[1]), float(best[2])) if trending else None,
    )  # fmt: skip


def multiplier_at(
    runs: Sequence[Run], losses: Sequence[float], family: str, baseline: str = "dense", axis: Axis = "flops"
) -> list[Multiplier]:
    """The multiplier as a curve: one for each loss (nats), of two laws that share E and have an exponent each.

    Where curves are not parallel, the interval of `multiplier` has to cover all of their range; here each holds for
    its own loss alone. A loss that not both families have reached, or that all cells of one lie below, has a `reason`.

    Raises ValueError as `multiplier` does.
    """
    overall = multiplier(runs, family, baseline, axis)
    if overall.reason:
        return [overall] * len(losses)
    groups = cells_of(measured(runs), axis)
    kept = [frontier_cells(groups[name]) for name in (baseline, family)]
    if overall.cells < EXPONENT_CELLS or min(map(len, kept)) < 3:
        return [replace(overall, reason="too few sizes on the lower hulls for a curve")] * len(losses)
    sample = sample_of(kept, float(log_costs([*kept[0], *kept[1]]).mean()))
    fit = fit_law(sample, own_exponent=True)
    at = np.array(losses, dtype=float)
    best = np.exp(_log_multiplier(fit.parameters[None], at)[0])
    lower, upper = np.exp(np.clip(fit.interval(lambda parameters: _log_multiplier(parameters, at)), -50, 50))
    reached = [(min(cell.loss for cell in cells), max(cell.loss for cell in cells)) for cells in kept]
    found = []
    for loss, value, low, high in zip(losses, best, lower, upper, strict=True):
        one = replace(
            overall, loss_low=loss, loss_high=loss, method="shared floor, own exponents", scatter=fit.scatter,
            trend=None, value=math.nan, low=math.nan, high=math.nan,
        )  # fmt: skip
        if all(least <= loss <= most for least, most in reached):
            found.append(replace(one, value=float(value), low=float(low), high=float(high)))
        else:
            found.append(replace(one, reason=f"not both were measured at {loss:g}"))
    return found


def expected_error(noise: float, slope: float, family: int, baseline: int) -> float:
    """Standard error of ln multiplier that a study will have: noise / |slope| · sqrt(1/family + 1/baseline).

    Args:
        noise: standard deviation of ln loss of one run, mis-tuning included; .003 to .03 have been seen.
        slope: of ln loss over ln cost where the runs are, around -.08 for byte models of some million parameters.
        family, baseline: runs of each near their lower hulls.

    For planning: the interval's factor is about exp(2 errors). In simulations it was right within 20 %.
    """
    return noise / abs(slope) * math.sqrt(1 / family + 1 / baseline)


def _log_multiplier(parameters: Floats, loss: Floats) -> Floats:
    """ln of C_baseline(L) / C_family(L) under parameters `[n, 4 or 5]` at losses `[m]`: `[n, m]`."""
    floor, scale, exponent, shift = (parameters[:, i : i + 1] for i in range(4))
    if parameters.shape[1] == 4:
        return np.repeat(shift, len(loss), axis=1)
    reach = scale - np.log(np.maximum(loss - floor, 1e-300))
    difference: Floats = reach / exponent - reach / (exponent + parameters[:, 4:5])
    return shift + difference


def _inverted(family: Sequence[Cell], baseline: Sequence[Cell]) -> float:
    """Geometric mean, over the family's hull, of the baseline's cost at the same loss over the family's.

    Between the baseline's vertices ln cost is a monotone cubic of ln loss: no law, and nothing outside them.
    """
    rising = sorted(baseline, key=lambda cell: cell.loss)
    losses = [math.log(cell.loss) for cell in rising]
    inside = [cell for cell in family if losses[0] <= math.log(cell.loss) <= losses[-1]]
    if not inside or len(rising) < 2:
        return math.nan
    curve = interpolate.PchipInterpolator(losses, log_costs(rising))
    reached = curve([math.log(cell.loss) for cell in inside])
    return math.exp(float(np.mean(reached - log_costs(inside))))
