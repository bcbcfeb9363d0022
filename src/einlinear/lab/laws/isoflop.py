"""Approaches 1 and 2: how the best size grows with compute, read off curves of loss over size at equal compute.

Approach 2 (IsoFLOP): runs planned at a few budgets, several sizes each. Approach 1 (envelope): finished runs of each
size at several horizons, interpolated to equal compute. Both end in ln N* = a ln C + const, and in the losses at the
optima. (Hoffmann et al. 2022, sections 3.1 and 3.2; the interpolating variant and its weights after Porian et al.
2024, appendix on fitting.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats, Integers
from einlinear.lab.laws.parametric import NoFit
from einlinear.lab.laws.table import size_labels

with extra("lab"):
    from scipy import interpolate, stats  # type: ignore[import-untyped]

Method = Literal["parabola", "akima"]
TOGETHER = 0.05  # runs whose neighbours in ln C are nearer share a budget
WIDEST = 0.3  # in ln C, of one budget: beyond it the runs are scattered over compute, not planned at budgets
FEWEST_SIZES = {"parabola": 4, "akima": 5}
SPAN = 2.0  # the sizes of a budget span at least so much
WINDOW = 4.0  # a parabola is only read within so many times its vertex: over wider grids its vertex is biased
DRAWS = 1000
FINE = 25  # points between two sizes, on which the interpolant's minimum is sought
VALID = 0.5  # share of the draws that need an interior minimum
BUDGETS = 60  # at which the envelope is read
GROUPS = 20  # of sizes that the envelope's jackknife leaves out in turn


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Loss over size at one budget."""

    flops: float
    sizes: Floats  # [s]
    losses: Floats  # [s], means over seeds
    optimum: float  # N*; NaN without an interior minimum
    loss: float  # at N*
    weight: float  # of the budget in the regression
    reason: str = ""  # why it is not used


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """N* = exp(intercept) C^a, with what it was read from."""

    method: str
    a: float
    a_low: float  # 95 % interval
    a_high: float
    intercept: float
    budgets: tuple[Budget, ...]
    scatter: float  # of the runs' ln L about their curves; 0 where there is no telling

    @property
    def used(self) -> list[Budget]:
        """The budgets with an interior minimum."""
        return [budget for budget in self.budgets if not budget.reason]

    def optimum(self, flops: Floats) -> Floats:
        """N* at budgets `[n]`."""
        return np.asarray(np.exp(self.intercept) * flops**self.a)


def budgets_of(flops: Floats, parameters: Floats) -> list[Integers]:
    """The numbers of the runs at each budget: runs of nearly equal FLOPs whose sizes differ, cheapest first."""
    order = np.argsort(flops, kind="stable")
    cut = np.flatnonzero(np.diff(np.log(flops[order])) > TOGETHER) + 1
    groups = np.split(order, cut)
    return [
        group for group in groups
        if np.ptp(np.log(flops[group])) <= WIDEST
        and size_labels(parameters[group]).max() + 1 >= FEWEST_SIZES["parabola"]
        and np.ptp(np.log(parameters[group])) >= np.log(SPAN)
    ]  # fmt: skip


def isoflop(
    parameters: Floats, flops: Floats, loss: Floats, method: Method = "akima", *, noise: float | None = None
) -> Allocation:
    """Approach 2 on runs `[n]`.

    "parabola": ln L over ln N, read again within 4× of its vertex where five sizes are left. "akima": an
    interpolating spline, whose vertex is not biased by a wide grid; every budget's N* is the median over 1000 draws
    of noise, and weighs as much as it is certain.

    `noise` is the standard deviation of ln L; by default that of seeds, or else of the runs about their parabolas.

    Raises:
        NoFit: with fewer than two budgets that have an interior minimum.
    """
    groups = budgets_of(flops, parameters)
    if not groups:
        raise NoFit(
            "Reading IsoFLOP curves: no budget has four sizes or more within 5 % of equal FLOPs, so the runs are not "
            "an IsoFLOP design."
        )
    curves = _curves(parameters, flops, loss, groups)
    scatter, freedom = _scatter(curves) if noise is None else (noise, math.inf)
    return _allocation(curves, method, scatter, freedom)


def envelope(parameters: Floats, flops: Floats, loss: Floats) -> Allocation:
    """Approach 1 on finished runs `[n]`: each size's loss over C is interpolated, and its least over sizes is taken.

    Sizes need four horizons or more. The interval is a jackknife over sizes, as all points of one size are dependent
    where its horizons share a trunk; of more than 20 sizes it is one over 20 groups. Losses in the middle of a
    decaying schedule are too high: the runs must be finished ones.

    Raises:
        NoFit: for fewer than four such sizes, or where no least loss lies between them.
    """
    curves = []
    labels = size_labels(parameters)
    for label in range(int(labels.max()) + 1):
        own = labels == label
        size = np.exp(np.log(parameters[own]).mean())
        costs, index = np.unique(np.log(flops[own]), return_inverse=True)
        if len(costs) >= 4:
            means = np.bincount(index, np.log(loss[own])) / np.bincount(index)
            curves.append((float(size), costs, interpolate.Akima1DInterpolator(costs, means)))
    if len(curves) < 4:
        raise NoFit(f"Reading the envelope: {len(curves)} sizes have four horizons or more; it takes four such sizes.")
    low, high = min(c[0] for _, c, _ in curves), max(c[-1] for _, c, _ in curves)
    grid = np.linspace(low, high, BUDGETS)
    sizes = np.array([size for size, _, _ in curves])
    losses = np.exp([[curve(grid)] for _, _, curve in curves])[:, 0]  # [sizes, budgets], NaN outside a curve

    def read(chosen: NDArray[np.bool_]) -> list[Budget]:
        found = []
        for cost, column in zip(grid, losses.T, strict=True):
            there = chosen & np.isfinite(column)
            if there.sum() >= 4:
                found.append(_budget(float(np.exp(cost)), sizes[there], column[there][None], "akima", 0.0, 1))
        return found

    budgets = read(np.ones(len(curves), dtype=bool))
    line = _line([b for b in budgets if not b.reason])
    if line is None:
        raise NoFit("Reading the envelope: the least loss lies at the smallest or largest size almost everywhere.")
    group = np.arange(len(curves)) % GROUPS
    left_out = [_line([b for b in read(group != g) if not b.reason]) for g in range(min(GROUPS, len(curves)))]
    slopes = np.array([other[0] for other in left_out if other is not None])
    half, count = float("nan"), len(slopes)
    if count == len(left_out):  # else some size is needed for there to be any optimum
        deviation = np.sqrt((count - 1) / count * ((slopes - slopes.mean()) ** 2).sum())
        half = float(stats.t.ppf(0.975, count - 1) * deviation)
    return Allocation(
        method="envelope", a=line[0], a_low=line[0] - half, a_high=line[0] + half, intercept=line[1],
        budgets=tuple(budgets), scatter=0.0,
    )  # fmt: skip


def _curves(
    parameters: Floats, flops: Floats, loss: Floats, groups: Sequence[Integers]
) -> list[tuple[float, Floats, Floats, Floats]]:
    """(FLOPs, ln sizes, ln losses, runs per size) of each budget, the losses moved to exactly equal FLOPs.

    Losses fall with C at a rate that all budgets share, estimated next to one parabola for each.
    """
    count = 3 * len(groups)
    rows, target = [], []
    for number, group in enumerate(groups):
        x, cost = np.log(parameters[group]), np.log(flops[group])
        design = np.zeros((len(group), count + 1))
        x = x - x.mean()
        design[:, 3 * number : 3 * number + 3] = np.stack([np.ones_like(x), x, x**2], axis=1)
        design[:, count] = cost - cost.mean()
        rows.append(design)
        target.append(np.log(loss[group]))
    spread = np.concatenate([row[:, count] for row in rows])
    slope = 0.0
    if np.ptp(spread) > 1e-6 and len(spread) > count + 1:
        slope = float(np.linalg.lstsq(np.concatenate(rows), np.concatenate(target))[0][count])
    curves = []
    for row, values, group in zip(rows, target, groups, strict=True):
        label, level = size_labels(parameters[group]), values - slope * row[:, count]
        runs = np.bincount(label)
        sizes, means = (np.bincount(label, values) / runs for values in (np.log(parameters[group]), level))
        curves.append((float(np.exp(np.log(flops[group]).mean())), sizes, means, runs.astype(np.float64)))
    return curves


def _scatter(curves: Sequence[tuple[float, Floats, Floats, Floats]]) -> tuple[float, float]:
    """Standard deviation of a run's ln L: how far each size lies from the cubic through its two neighbours each side.

    Local, because a curve over a wide range of sizes is no polynomial, and its misfit is not noise. With it come its
    degrees of freedom: neighbouring cubics share points, and count half (as its variance in simulation says).
    """
    squares, count, freedom = 0.0, 0, 0.0
    for _, sizes, losses, runs in curves:
        width = 5 if len(sizes) >= 5 else 4
        for first in range(len(sizes) - width + 1):
            part = slice(first, first + width)
            x = sizes[part] - sizes[part].mean()
            others = np.arange(width) != width // 2
            # Lagrange's weights of the other points for the value at the middle one.
            weights = np.linalg.solve(np.vander(x[others], increasing=True).T, x[~others] ** np.arange(width - 1))
            off = losses[part][~others][0] - weights @ losses[part][others]
            variance = 1 / runs[part][~others][0] + (weights**2 / runs[part][others]).sum()
            squares, count = squares + float(off**2 / variance), count + 1
        freedom += max(1.0, (len(sizes) - width + 1) / 2)
    return (float(np.sqrt(squares / count)), freedom) if count else (0.0, 0.0)


def _allocation(
    curves: Sequence[tuple[float, Floats, Floats, Floats]], method: Method, scatter: float, freedom: float
) -> Allocation:
    generator = np.random.default_rng(0)
    draws = DRAWS if scatter > 0 else 1
    budgets, optima = [], []
    for flops, sizes, losses, runs in curves:
        noise = scatter / np.sqrt(runs) * generator.normal(size=(draws, len(sizes)))
        noisy = np.concatenate([losses[None], losses + noise])
        budgets.append(_budget(flops, np.exp(sizes), np.exp(noisy), method, scatter, draws))
        optima.append(_minima(sizes, noisy, method)[0][1:])
    used = [number for number, budget in enumerate(budgets) if not budget.reason]
    line = _line([budgets[number] for number in used])
    if line is None:
        reasons = "; ".join(dict.fromkeys(budget.reason for budget in budgets if budget.reason))
        raise NoFit(
            f"Reading IsoFLOP curves: {len(used)} of {len(budgets)} budgets have a minimum inside their sizes"
            f"{f' ({reasons})' if reasons else ''}; it takes two."
        )
    cost = np.log([budgets[number].flops for number in used])
    weight = np.array([budgets[number].weight for number in used])
    drawn = np.array([optima[number] for number in used])
    drawn = np.where(np.isfinite(drawn), drawn, np.log([[budgets[number].optimum] for number in used]))
    spread = cost - np.average(cost, weights=weight)
    slopes = (weight * spread) @ drawn / (weight @ spread**2)
    best = np.log([budgets[number].optimum for number in used])
    off = weight * (best - line[1] - line[0] * cost) ** 2
    half = _half(float(slopes.var()), freedom, float(off.sum() / (weight @ spread**2)), len(used) - 2)
    return Allocation(
        method=method, a=line[0], a_low=line[0] - half, a_high=line[0] + half, intercept=line[1],
        budgets=tuple(budgets), scatter=scatter,
    )  # fmt: skip


def _half(drawn: float, freedom: float, off: float, left: int) -> float:
    """Half a 95 % interval from two estimates of one variance: that of the draws, which know the noise with so many
    degrees of freedom, and that of the budgets about their line, `off / left`. They are pooled, as the wider of two
    intervals covers 97 to 99 %; budgets that lie further off than noise explains speak for themselves.
    """
    known = freedom if drawn > 0 else 0.0
    if known + left <= 0:
        return math.inf if drawn <= 0 else 1.96 * math.sqrt(drawn)
    if math.isinf(known):
        pooled = 1.96 * math.sqrt(drawn)
    else:
        pooled = float(stats.t.ppf(0.975, known + left)) * math.sqrt((known * drawn + off) / (known + left))
    if left > 0 and known > 0 and off / left > drawn * stats.f.ppf(0.95, left, min(known, 1e6)):
        return max(pooled, float(stats.t.ppf(0.975, left)) * math.sqrt(off / left))
    return pooled


def _budget(flops: float, sizes: Floats, losses: Floats, method: Method, scatter: float, draws: int) -> Budget:
    """One budget from its losses `[1 + draws, sizes]`, the first row as measured."""
    x = np.log(sizes)
    optima, depths = _minima(x, np.log(losses), method)
    reason, optimum, weight = "", float(optima[0]), 1.0
    if method == "akima" and len(sizes) < FEWEST_SIZES["akima"] and scatter > 0:
        reason = f"{len(sizes)} sizes; the spline takes {FEWEST_SIZES['akima']}"
    elif not np.isfinite(optimum):
        least = int(losses[0].argmin())
        edge = {0: "smallest", len(sizes) - 1: "largest"}.get(least)
        reason = f"the least loss is at the {edge} size" if edge else "no minimum inside the sizes"
    elif len(optima) > 1:
        valid = np.isfinite(optima[1:])
        if valid.mean() < VALID:
            reason = "the noise hides the minimum"
        elif scatter > 0:
            if method == "akima":
                optimum = float(np.median(optima[1:][valid]))
            floor = np.diff(x).mean() / 3
            weight = 1 / max(float(optima[1:][valid].std()), floor) ** 2 * valid.mean()
    return Budget(
        flops=flops, sizes=sizes, losses=losses[0], optimum=float(np.exp(optimum)), loss=float(np.exp(depths[0])),
        weight=weight, reason=reason,
    )  # fmt: skip


def _minima(x: Floats, losses: Floats, method: Method) -> tuple[Floats, Floats]:
    """ln N* and ln L* of each row of ln losses `[m, sizes]`; NaN where the minimum is not inside."""
    if method == "akima" and len(x) >= FEWEST_SIZES["parabola"]:
        return _akima(x, losses)
    place, depth = _parabola(x, losses)
    near = np.abs(x - place[0]) <= np.log(WINDOW) if np.isfinite(place[0]) else np.zeros(len(x), dtype=bool)
    if len(x) > near.sum() >= FEWEST_SIZES["parabola"] + 1:
        again, deep = _parabola(x[near], losses[:, near])
        return np.where(np.isfinite(again), again, place), np.where(np.isfinite(again), deep, depth)
    return place, depth


def _parabola(x: Floats, losses: Floats) -> tuple[Floats, Floats]:
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)
    (c, q, p), *_ = np.linalg.lstsq(design, losses.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = middle - q / (2 * p)
        inside = (p > 0) & (place > x[0]) & (place < x[-1])
        return np.where(inside, place, np.nan), np.where(inside, c - q**2 / (4 * p), np.nan)


def _akima(x: Floats, losses: Floats) -> tuple[Floats, Floats]:
    steps = np.linspace(0, 1, FINE, endpoint=False)
    grid = np.concatenate([(x[:-1, None] + np.diff(x)[:, None] * steps).ravel(), x[-1:]])
    values = interpolate.Akima1DInterpolator(x, losses, axis=1)(grid)
    at = values.argmin(axis=1)
    inside = (at > 0) & (at < len(grid) - 1)
    here = at.clip(1, len(grid) - 2)
    rows = np.arange(len(values))
    # The vertex of the parabola through the three lowest points: finer than the grid.
    left, low, right = (values[rows, here + shift] for shift in (-1, 0, 1))
    h1, h2 = grid[here] - grid[here - 1], grid[here + 1] - grid[here]
    d1, d2 = (low - left) / h1, (right - low) / h2
    bend = (d2 - d1) / (h1 + h2)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(bend > 0, -(d1 + bend * h1) / (2 * bend), 0.0)
    shift = shift.clip(-h1, h2)
    depth = low + shift * (d1 + bend * h1) + bend * shift**2
    return np.where(inside, grid[here] + shift, np.nan), np.where(inside, depth, np.nan)


def _line(budgets: Sequence[Budget]) -> tuple[float, float] | None:
    """Slope and intercept of ln N* over ln C, weighted."""
    if len({budget.flops for budget in budgets}) < 2:
        return None
    cost, size = (np.log([getattr(b, name) for b in budgets]) for name in ("flops", "optimum"))
    weight = np.array([budget.weight for budget in budgets])
    middle = np.average(cost, weights=weight)
    slope = float((weight * (cost - middle)) @ size / (weight @ (cost - middle) ** 2))
    return slope, float(np.average(size, weights=weight) - slope * middle)
