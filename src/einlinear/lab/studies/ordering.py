"""Which properties of a structure go with a good compute multiplier: ω (sharing), ψ (rank), ν (compute)."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from einlinear.family import structure as family_of
from einlinear.lab.extras import extra
from einlinear.lab.laws import multiplier
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.run import Run
from einlinear.lab.studies.evidence import Finding, Part, Table
from einlinear.lab.studies.figures import ordering_figure
from einlinear.taxonomy import taxonomy

with extra("lab"):
    from scipy import stats  # type: ignore[import-untyped]

LITTLE = math.log(2)
"""What "matters little" is taken for: from ν = 0 to 1 the multiplier changes by less than a factor of 2."""

AXES = ("omega", "psi", "nu")
SIGNS = {"omega": "ω", "psi": "ψ", "nu": "ν"}


def ordering(runs: Sequence[Run], baseline: str = "dense") -> Finding:
    """Multipliers over the baseline in training FLOPs, and the regression of their logarithm on ω, ψ and ν.

    One point for each structure; ordinary least squares with Student's t, whose residuals hold both the noise of
    multipliers and what the three numbers do not explain. Beside it each one's rank correlation alone.
    """
    names = [name for name in dict.fromkeys(run.family for run in runs) if name != baseline]
    points: list[dict[str, Any]] = []
    notes = []
    for name in names:
        found = multiplier(runs, name, baseline)
        if found.reason:
            notes.append(f"{name}: no multiplier, {found.reason}.")
            continue
        psi, nu, omega = taxonomy(family_of(name))
        points.append({
            "family": name, "omega": omega, "psi": psi, "nu": nu, "value": found.value, "low": found.low,
            "high": found.high, "crosscheck": found.crosscheck, "extrapolation": found.extrapolation,
        })  # fmt: skip
    x, y = np.array([[p[axis] for axis in AXES] for p in points]), np.log([p["value"] for p in points])
    slopes = regression(x, y)
    notes += _leaning(x, y, [p["family"] for p in points])
    claimed = {"omega": ("below", 0.0), "psi": ("above", 0.0), "nu": ("within", LITTLE)}
    parts = tuple(
        Part(
            what=f"the slope of ln multiplier over {SIGNS[axis]}", value=value, low=low, high=high,
            claimed=claimed[axis][0], bound=claimed[axis][1],  # type: ignore[arg-type]
        )
        for axis, (value, low, high) in zip(AXES, slopes, strict=True)
    )  # fmt: skip
    ranks = []
    for axis in AXES:
        value, low, high = rank_correlation([p[axis] for p in points], [p["value"] for p in points])
        ranks.append((SIGNS[axis], f"{value:+.2f}", f"{low:+.2f} to {high:+.2f}"))
    rows = []
    for p in sorted(points, key=lambda p: -p["value"]):
        check = "–" if math.isnan(p["crosscheck"]) else f"{p['crosscheck']:.2f}"
        numbers = (f"{p[axis]:.2f}" for axis in (*AXES, "value"))
        rows.append((p["family"], *numbers, f"{p['low']:.2f} to {p['high']:.2f}", check))
    columns = ("structure", *(SIGNS[axis] for axis in AXES), "multiplier", "95 % interval", "without a law")
    return Finding(
        parts=parts,
        tables=(
            Table(title=f"Compute multipliers over {baseline}, best first", columns=columns, rows=tuple(rows)),
            Table(
                title="Rank correlation with the multiplier",
                columns=("", "Spearman", "95 % interval"),
                rows=tuple(ranks),
            ),
        ),
        figure=ordering_figure(points),
        notes=tuple(notes),
    )


def _leaning(x: Floats, y: Floats, names: Sequence[str]) -> list[str]:
    """How far each slope leans on one point: what it would be with one left out, at most and at least."""
    without = {}
    for point, name in enumerate(names):
        rest = np.arange(len(names)) != point
        with suppress(ValueError):  # those left do not settle the slopes
            without[name] = [value for value, _, _ in regression(x[rest], y[rest])]
    if not without:
        return []
    found = []
    for number, axis in enumerate(AXES):
        least, most = (choose(without, key=lambda name: without[name][number]) for choose in (min, max))
        ends = (f"{without[name][number]:+.2f} without {name}" for name in (least, most))
        found.append(f"The slope over {SIGNS[axis]}, with one point left out: from {' to '.join(ends)}.")
    return found


def regression(x: Floats, y: Floats) -> list[tuple[float, float, float]]:
    """Slopes of y over the columns of x `[points, columns]` with an intercept: value, low and high at 95 %.

    Raises ValueError for too few points, or columns that do not vary independently.
    """
    design = np.column_stack([np.ones(len(x)), x]) if len(x) else np.ones((0, 4))
    freedom = len(design) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(
            f"Regressing multipliers: {len(design)} points do not settle {design.shape[1]} coefficients; add "
            "structures that differ in ω, ψ and ν."
        )
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ y
    residual = y - design @ found
    half = stats.t.ppf(0.975, freedom) * np.sqrt(np.diag(inverse) * float(residual @ residual) / freedom)
    return [(float(b), float(b - h), float(b + h)) for b, h in list(zip(found, half, strict=True))[1:]]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's ρ with Fisher's 95 % interval, by the variance of Bonett and Wright (2000)."""
    value = float(stats.spearmanr(x, y).statistic)
    if len(x) < 4 or math.isnan(value) or abs(value) >= 1:
        return value, -1.0, 1.0
    half = 1.96 * math.sqrt((1 + value**2 / 2) / (len(x) - 3))
    middle = math.atanh(value)
    return value, math.tanh(middle - half), math.tanh(middle + half)
