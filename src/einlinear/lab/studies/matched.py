"""Equal loss at equal width: how much more of its cost one model needs as another of the same width, without a law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.cells import Cell

with extra("lab"):
    from scipy import stats  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a run's ln loss between seeds, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Matched:
    """How many times its own cost a model would cost as the baseline of its width, with a 95 % interval."""

    width: int
    value: float
    low: float
    high: float


def pooled(cells: Sequence[Cell]) -> Noise | None:
    """The noise of runs about their cells; None where none has two seeds."""
    squares, freedom = 0.0, 0
    for cell in cells:
        losses = np.log([run.loss for run in cell.runs if run.loss])
        squares += float(((losses - losses.mean()) ** 2).sum())
        freedom += len(losses) - 1
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else None


def matched(family: Sequence[Cell], baseline: Sequence[Cell], noise: Noise) -> list[Matched]:
    """For each width, the cost at which the baseline of that width has the losses that the family has, over its own.

    Between two horizons the baseline's ln loss is on the line over ln cost; losses that it has at none are left out,
    and so are widths without others. Horizons of one trunk are taken to err alike: the interval's error is that of one
    run of each, over the seeds, through the slope of the line.
    """
    found = []
    for width in sorted({cell.width for cell in family}):
        own = [cell for cell in family if cell.width == width]
        line = sorted((cell for cell in baseline if cell.width == width), key=lambda cell: -cell.loss)
        losses, costs = (np.log([getattr(cell, name) for cell in line]) for name in ("loss", "cost"))
        ratios, errors = [], []
        for cell in own:
            at = int(np.searchsorted(-losses, -math.log(cell.loss)))  # the first that is as good
            if not 0 < at < len(line):
                continue
            steepness = (costs[at] - costs[at - 1]) / (losses[at] - losses[at - 1])
            ratios.append(costs[at] + steepness * (math.log(cell.loss) - losses[at]) - math.log(cell.cost))
            errors.append(abs(steepness) * noise.deviation * math.sqrt(1 / len(cell.runs) + 1 / len(line[at].runs)))
        if ratios:
            middle, half = float(np.mean(ratios)), float(stats.t.ppf(0.975, noise.freedom) * np.mean(errors))
            found.append(Matched(width, *(math.exp(middle + side * half) for side in (0, -1, 1))))
    return found
