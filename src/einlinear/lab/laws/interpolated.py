"""A multiplier read off two lower hulls, without any law; its interval is what other seeds would have changed.

Laws bend where models are trained too shortly for them, and a misfit makes their intervals wide or wrong. Between the
vertices of two hulls nothing is assumed; but widths and lengths that were not trained are not foreseen either: the
interval tells of noise alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.cells import Axis, Cell, Measured, cells_of, lower_hull, measured
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.multiplier import Multiplier
from einlinear.lab.run import Run

with extra("lab"):
    from scipy import stats  # type: ignore[import-untyped]

DRAWS = 400


def interpolated_multiplier(
    runs: Sequence[Run], losses: Sequence[float], family: str, baseline: str = "dense", axis: Axis = "flops"
) -> list[Multiplier]:
    """C_baseline(L) / C_family(L) for each loss L (nats), by straight lines of ln C over ln L along both lower hulls.

    Noise is drawn from what seeds of one size have differed by, over all families: whole trunks at once, as their
    horizons go up and down together, and counted from the longest one, as short ones are noisier. Each draw moves all
    runs and looks for the hulls anew; the interval is Student's t with as many degrees of freedom as there are sizes
    with more than one seed. A loss that one of the hulls does not reach has a `reason`, and so has everything where
    no size has a second seed.

    Raises ValueError for runs that do not compare, as `measured`.
    """
    pair = {name: cells for name, cells in cells_of(measured(runs), axis).items() if name in (family, baseline)}
    nothing = Multiplier(family=family, baseline=baseline, axis=axis, method="interpolated, noise of seeds")
    if len(pair) < 2:
        return [replace(nothing, reason="one of them has no runs")] * len(losses)
    deviations, sizes = seed_noise(runs)
    if not sizes:
        return [replace(nothing, reason="no size has a second seed, so the noise is not known")] * len(losses)
    best = _ratio(pair[family], pair[baseline], losses)
    generator = np.random.default_rng(0)
    drawn = np.empty((DRAWS, len(losses)))
    for row in drawn:
        own, other = (_moved(pair[name], deviations, generator) for name in (family, baseline))
        row[:] = _ratio(own, other, losses)
    found = []
    for loss, value, draws in zip(losses, best, drawn.T, strict=True):
        reached = draws[np.isfinite(draws)]
        one = replace(nothing, loss_low=loss, loss_high=loss, cells=sum(map(len, pair.values())))
        if math.isnan(value) or len(reached) < DRAWS / 2:
            found.append(replace(one, reason=f"not both were measured at {loss:g}"))
            continue
        half = stats.t.ppf(0.975, sizes) * float(np.sqrt(np.mean((reached - value) ** 2)))
        found.append(replace(one, value=math.exp(value), low=math.exp(value - half), high=math.exp(value + half)))
    return found


def seed_noise(runs: Sequence[Run]) -> tuple[list[Floats], int]:
    """What ln loss deviated by from the mean over seeds, as far as there are several: for each trunk an array over its
    horizons, the longest first; and the number of sizes that they come from. Scaled to the deviation of one run."""
    curves: dict[tuple[object, ...], dict[float, float]] = {}
    for cells in cells_of(measured(runs)).values():
        for cell in cells:
            count = len(cell.runs)
            for run in cell.runs if count > 1 else ():
                deviation = math.log(run.loss or 1.0) - math.log(cell.loss)
                curve = curves.setdefault((run.family, run.size, _trunk(run)), {})
                curve[run.tokens] = deviation * math.sqrt(count / (count - 1))
    ordered = [np.array([curve[tokens] for tokens in sorted(curve, reverse=True)]) for curve in curves.values()]
    return ordered, len({key[:2] for key in curves})


def _moved(cells: Sequence[Cell], deviations: Sequence[Floats], generator: np.random.Generator) -> list[Cell]:
    """Cells as other seeds might have had them: every trunk with a noise of its own."""
    trunks: dict[tuple[object, ...], list[float]] = {}
    for cell in cells:
        for run in cell.runs:
            trunks.setdefault((run.size, _trunk(run)), []).append(run.tokens)
    noise: dict[tuple[object, ...], float] = {}
    for (size, trunk), lengths in trunks.items():
        drawn = deviations[int(generator.integers(len(deviations)))] * generator.choice((-1.0, 1.0))
        for place, tokens in enumerate(sorted(lengths, reverse=True)):
            noise[size, trunk, tokens] = drawn[min(place, len(drawn) - 1)]
    moved = []
    for cell in cells:
        mean = np.mean([noise[run.size, _trunk(run), run.tokens] for run in cell.runs])
        moved.append(replace(cell, loss=cell.loss * math.exp(mean)))
    return moved


def _trunk(run: Measured) -> object:
    """What runs of one trunk have in common; a run that names none is one of its own."""
    return run.trunk or id(run)


def _ratio(family: Sequence[Cell], baseline: Sequence[Cell], losses: Sequence[float]) -> Floats:
    """ln of the baseline's cost over the family's at each loss; nan where one of them does not reach it."""
    return _ln_cost(baseline, losses) - _ln_cost(family, losses)


def _ln_cost(cells: Sequence[Cell], losses: Sequence[float]) -> Floats:
    falling = sorted(lower_hull(cells), key=lambda cell: cell.loss)
    places, costs = (np.log([getattr(cell, name) for cell in falling]) for name in ("loss", "cost"))
    reached: Floats = np.interp(np.log(losses), places, costs, math.nan, math.nan)
    return reached
