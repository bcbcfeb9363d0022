"""Whether the best base rate stays where it is when the width grows, and what a wrong one costs."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from einlinear.lab.laws.minimise import Floats
from einlinear.lab.run import Run
from einlinear.lab.studies.evidence import Finding, Part, Table
from einlinear.lab.studies.figures import landscape_figure
from einlinear.lab.studies.protocol import NAIVE, labelled

DRAWS = 4000
REACH = 2  # cells on either side of the best that tell where it is, and how large the noise is; beyond it is larger
FLAT = 1e-6  # ln loss per octave squared, from which a curve has a lowest point
CUBIC = 2 * REACH + 1  # cells for a cubic, which has four coefficients
STEADY = 0.25  # octaves of the best rate for each doubling of the width: a factor of 2 over 16 times the width

Losses = Mapping[tuple[str, int], Mapping[float, list[float]]]
"""Label and width, then rate, then ln loss by seed; infinite where a run did not finish."""

Drawn = Mapping[tuple[str, int], tuple[Floats, Floats]]
"""Label and width, then log2 of the rates and draws of ln loss at them; the first is what was measured."""


def rate_transfer(runs: Sequence[Run], baseline: str = "dense") -> Finding:
    """The drift of each family's best base rate over widths, by the structure-aware rule and by the naive one.

    A best rate is the lowest point of a cubic of ln loss over log rate (`best_rates`). Intervals are percentiles over
    draws of the cells' means, with the noise of a run pooled over cells near the best. In simulations those of drifts
    cover .95 to 1; those of differences between the rules .95 to 1 too, but .85 where the landscape is uneven and the
    noise so small that a cubic's misfit shows beside it (`benchmarks/study_coverage.py`). Runs of one seed share their
    start and their data, so that the noise of differences is less: the intervals are on the wide side.
    """
    found = gathered(labelled(runs))
    losses = dict(sorted(found.items(), key=lambda item: (item[0][0] != baseline, item[0])))
    noise = pooled_noise(losses)
    random = np.random.default_rng(0)
    drawn = {key: _drawn(cells, noise, random) for key, cells in losses.items()}
    notes = [f"Noise of one run, pooled: {noise:.3g} in ln loss."]
    if edges := [f"{name} at width {width}" for name, width in losses if _best(*drawn[name, width])[1]]:
        notes.append(f"Best rate at the edge of the grid, so that it may lie beyond: {', '.join(edges)}.")
    if failed := sum(run.status != "done" for run in runs):
        notes.append(f"{failed} of {len(runs)} runs did not finish; their cells count as worse than any other.")
    means = {key: {rate: float(np.mean(seeds)) for rate, seeds in cells.items()} for key, cells in losses.items()}
    return Finding(
        parts=tuple(_parts(drawn, baseline)),
        tables=(_table(drawn),),
        figure=landscape_figure(means),
        notes=tuple(notes),
    )


def _parts(drawn: Drawn, baseline: str) -> Iterator[Part]:
    """What is claimed of each structure: a steady rate, one that drifts by the naive rule, and a loss from that."""
    labels, widths = _axes(drawn)
    for name in labels:
        if name == baseline or name.endswith(NAIVE):
            continue
        naive, drift = name + NAIVE, _drift(drawn, name)
        yield _part(f"the drift of {name}'s best rate (octaves per doubling)", drift, "within", STEADY)
        more = f"the drift of {name} by the naive rule less that by the structure-aware one"
        if naive not in labels:
            yield Part(what=more, value=math.nan, low=math.nan, high=math.nan, claimed="above", bound=0)
            continue
        yield _part(more, _drift(drawn, naive) - drift, "above", 0)
        gap = _carried(drawn, naive, widths) - _carried(drawn, name, widths)
        what = f"the loss (ln) of {name} at width {widths[-1]} with the rate of width {widths[0]}, naive less aware,"
        yield _part(what, gap, "above", 0)


def _table(drawn: Drawn) -> Table:
    labels, widths = _axes(drawn)
    rows = []
    for name in labels:
        best = [f"2^{_best(*drawn[name, width])[0]:.2f}" for width in widths]
        lost = _carried(drawn, name, widths) - drawn[name, widths[-1]][1].min(axis=1)
        rows.append((name, *best, _interval(_drift(drawn, name)), _interval(lost, 3)))
    columns = ("structure", *(f"best rate, width {width}" for width in widths), "drift, octaves per doubling")
    carried = f"ln loss at width {widths[-1]}: rate of width {widths[0]} over its own best"
    return Table(title="Best base rates", columns=(*columns, carried), rows=tuple(rows))


def _axes(drawn: Drawn) -> tuple[list[str], list[int]]:
    """Labels and widths."""
    return list(dict.fromkeys(name for name, _ in drawn)), sorted({width for _, width in drawn})


def gathered(runs: Sequence[Run]) -> Losses:
    """ln losses of runs by family and width, then rate; where some rates lack some seeds, as if all had them all."""
    losses: dict[tuple[str, int], dict[float, dict[int, float]]] = {}
    for run in sorted(runs, key=lambda run: (run.width, run.rate, run.seed)):
        value = math.log(run.loss) if run.loss else math.inf
        losses.setdefault((run.family, run.width), {}).setdefault(run.rate, {})[run.seed] = value
    return {key: _level(cells) for key, cells in losses.items()}


def _level(cells: Mapping[float, Mapping[int, float]]) -> dict[float, list[float]]:
    """Losses less what is particular to their seed, going by the rates that have every seed: these keep their means.

    A seed settles start and data, and so shifts all rates of a width alike; a rate with few seeds would be shifted
    against the others.
    """
    seeds = {seed for of_rate in cells.values() for seed in of_rate}
    whole = [
        of_rate for of_rate in cells.values() if of_rate.keys() == seeds and np.isfinite([*of_rate.values()]).all()
    ]
    if not whole:
        return {rate: [*of_rate.values()] for rate, of_rate in cells.items()}
    own = {seed: np.mean([of_rate[seed] - np.mean([*of_rate.values()]) for of_rate in whole]) for seed in seeds}
    return {
        rate: [value if of_rate.keys() == seeds else float(value - own[seed]) for seed, value in of_rate.items()]
        for rate, of_rate in cells.items()
    }


def pooled_noise(losses: Losses) -> float:
    """Standard deviation of a run's ln loss about its cell, over the best cell of each width and those near it."""
    squares, freedom = 0.0, 0
    for cells in losses.values():
        means = [np.mean(seeds) for seeds in cells.values()]
        best = int(np.argmin(means))
        for seeds in list(cells.values())[max(0, best - REACH) : best + REACH + 1]:
            if len(seeds) > 1 and np.isfinite(seeds).all():
                squares += float(np.var(seeds)) * len(seeds)
                freedom += len(seeds) - 1
    if not freedom:
        raise ValueError("Judging a landscape of rates: no cell has two seeds, so its noise is not known; add a seed.")
    return math.sqrt(squares / freedom)


def _drawn(cells: Mapping[float, list[float]], noise: float, random: np.random.Generator) -> tuple[Floats, Floats]:
    """log2 of the rates, and draws of the cells' means `[1 + draws, rates]`; the first is what was measured."""
    means = np.array([np.mean(seeds) for seeds in cells.values()])
    errors = noise / np.sqrt([len(seeds) for seeds in cells.values()])
    draws = means + errors * random.normal(size=(DRAWS, len(means)))
    return np.log2(list(cells)), np.vstack([means, draws])


def best_rates(rates: Floats, losses: Floats) -> Floats:
    """log2 of the best rate for each row of ln losses `[n, rates]`: the lowest point of a cubic around the best cell.

    It is fitted to the cells at most two away from the best, and its minimum stays among them. A cubic, as landscapes
    rise faster above the best rate than below: the vertex of a parabola then depends on where the grid happens to lie,
    by more than the noise (coverage of the drift's difference .82 to .87 in simulation, of the loss's .1 to .5). With
    four cells or fewer, and where the cubic has no minimum, a parabola.
    """
    rates = np.asarray(rates, dtype=float)
    at, finite = losses.argmin(axis=1), np.isfinite(losses[0])
    found: Floats = rates[at]
    for best in np.unique(at):
        near = np.arange(max(0, best - REACH), min(len(rates), best + REACH + 1))
        window = near[finite[near]]
        if len(window) < 3:
            continue
        rows, x = np.flatnonzero(at == best), rates[window] - rates[best]
        y = losses[rows][:, window].T
        curvature, slope, _ = np.polyfit(x, y, 2)
        lowest = np.where(curvature > FLAT, -slope / (2 * np.maximum(curvature, FLAT)), 0.0)
        if len(window) == CUBIC:
            third, curvature, slope, _ = np.polyfit(x, y, 3)
            inside = curvature**2 - 3 * third * slope  # the derivative has roots where this is positive
            steep = curvature + np.sqrt(np.maximum(inside, 0.0))
            lowest = np.where((inside > 0) & (steep > FLAT), -slope / np.maximum(steep, FLAT), lowest)
        found[rows] = rates[best] + np.clip(lowest, x.min(), x.max())
    return found


def _best(rates: Floats, losses: Floats) -> tuple[float, bool]:
    """log2 of the best rate as measured, and whether it lies at the edge of the grid."""
    return float(best_rates(rates, losses[:1])[0]), int(losses[0].argmin()) in (0, len(rates) - 1)


def _drift(drawn: Drawn, name: str) -> Floats:
    """Slope of log2 of the best rate over log2 of the width, for each draw."""
    of_widths = {width: found for (family, width), found in drawn.items() if family == name}
    x = np.log2(list(of_widths))
    x -= x.mean()
    best = np.stack([best_rates(*found) for found in of_widths.values()])
    slope: Floats = x @ best / (x @ x)
    return slope


def _carried(drawn: Drawn, name: str, widths: Sequence[int]) -> Floats:
    """ln loss at the largest width with the rate that is best at the smallest, for each draw.

    Between two rates of the grid it is on the line between their losses, and beyond its ends that of the end.
    """
    rates, losses = drawn[name, widths[-1]]
    asked = np.clip(best_rates(*drawn[name, widths[0]]), rates[0], rates[-1])
    left = np.clip(np.searchsorted(rates, asked, side="right") - 1, 0, len(rates) - 2)
    share = (asked - rates[left]) / (rates[left + 1] - rates[left])
    rows = np.arange(len(losses))
    below, above = losses[rows, left], losses[rows, left + 1]
    with np.errstate(invalid="ignore"):  # 0 · ∞, at an end whose neighbour did not finish
        found: Floats = np.select([share == 0, share == 1], [below, above], (1 - share) * below + share * above)
    return found


def _part(what: str, draws: Floats, claimed: str, bound: float) -> Part:
    low, high = (float(value) for value in np.percentile(draws[1:], (2.5, 97.5)))
    return Part(what=what, value=float(draws[0]), low=low, high=high, claimed=claimed, bound=bound)  # type: ignore[arg-type]


def _interval(draws: Floats, digits: int = 2) -> str:
    value, low, high = draws[0], *np.percentile(draws[1:], (2.5, 97.5))
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
