"""The law card: everything a fit found and everything one needs to know of it, as plain data for JSON.

It fills the checklist of Li et al. 2025, "(Mis)Fitting: a survey of scaling laws": what is not known from the runs
has to be stated by whoever fits, and is null until then. `docs/laws.md` describes every field.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

import einlinear
from einlinear.lab.laws.cells import Cell, cells_of
from einlinear.lab.laws.frontier import OFFSET_CELLS, Frontier, fit_frontier
from einlinear.lab.laws.grid import allocation_warnings, design_warnings, fit_warnings
from einlinear.lab.laws.isoflop import Allocation, Method, envelope, isoflop
from einlinear.lab.laws.multiplier import Multiplier, compare_cells
from einlinear.lab.laws.parametric import DELTA, NAMES, Draws, NoFit, Parametric, bootstrap, fit_surface
from einlinear.lab.laws.rows import optima, rows_of
from einlinear.lab.laws.scaled import scaled_surface
from einlinear.lab.laws.sensitivity import DELTAS, Variant, by_delta, by_outliers, by_window, held_out
from einlinear.lab.laws.separable import variable_projection
from einlinear.lab.laws.surface import Surface
from einlinear.lab.laws.table import Table, TableError, size_labels

Card = dict[str, Any]
SCHEMA = 1
DRAWS = 1000
WORK = 15_000_000  # draws times runs, above which there are fewer draws
FEWEST_DRAWS = 100
FEWEST_BUDGETS = 4  # IsoFLOP optima that make a frontier; below, the lower hull of the runs does
BASELINES = ({"dense"}, {"baseline", "vanilla", "standard", "control", "reference"})
"""Words in the name of the family that others are compared with; the first kind goes before the second."""

STATED = (  # what runs do not tell
    "data", "tokenizer", "architecture", "counted_in_params", "counted_in_flops", "optimizer", "learning_rate",
    "schedule", "warmup", "batch", "tuning", "finished_runs_or_checkpoints", "smoothing", "evaluation",
)  # fmt: skip


def law_card(
    table: Table,
    *,
    baseline: str | None = None,
    delta: float = DELTA,
    draws: int = DRAWS,
    about: Mapping[str, str] | None = None,
    progress: Callable[[str, float], object] = lambda doing, share: None,
) -> Card:
    """Fits everything that the runs allow, and says of the rest why not.

    Args:
        table: the runs.
        baseline: the family that multipliers compare with; by default "dense", or the first of the table.
        delta: of Huber's loss.
        draws: of the bootstrap.
        about: what the checklist asks and runs do not tell, such as `{"data": "C4"}`; see `STATED`.
        progress: called with what is being done and the share that is done.

    Raises:
        TableError: for a baseline that the table lacks, and for things to state that the checklist does not have.
    """
    told = dict(about or {})
    if unknown := [name for name in told if name not in STATED]:
        raise TableError(f"Stating {unknown[0]}: the checklist has no such item; it has {', '.join(STATED)}.")
    notes = list(table.notes)
    name = _baseline(table, baseline, notes)
    blocks: dict[str, Card] = {}
    chosen: dict[str, list[Cell] | None] = {}
    families = table.families
    with np.errstate(all="ignore"):  # a refit of odd draws may leave all numbers; it ends as a null
        for number, family in enumerate(families):

            def tell(share: float, family: str = family, number: int = number) -> None:
                progress(family, (number + share) / len(families))

            blocks[family], chosen[family] = _family(table.of(family), family, delta, draws, tell)
        multipliers = {f: _multiplier(table, f, name, chosen) for f in families if f != name}
    reference = blocks[name]
    if not any(_anything(block) for block in blocks.values()):
        raise NoFit(f"Fitting {table.source or 'the runs'}: no law can be had. {_why_nothing(reference)}")
    card: Card = _finite({
        "einlinear": einlinear.__version__,
        "schema": SCHEMA,
        "source": table.source,
        "rows": table.rows,
        "used": len(table),
        "dropped": dict(table.dropped),
        "columns": dict(table.columns),
        "loss_unit": table.unit,
        "notes": notes,
        "baseline": name,
        **{key: reference[key] for key in BLOCKS},
        "families": blocks,
        "multiplier": multipliers,
        "checklist": _checklist(table, reference, told, delta),
    })  # fmt: skip
    return card


def _anything(block: Card) -> bool:
    """Whether there is a law to speak of; a line through three or four runs alone is none."""
    if len(block["frontier"].get("points", ())) >= OFFSET_CELLS:
        return True
    return any("reason" not in part for part in (block["parametric"], block["envelope"], *block["isoflop"].values()))


def _why_nothing(block: Card) -> str:
    few = f"{len(block['frontier'].get('points', ()))} sizes on its lower hull; it takes {OFFSET_CELLS}"
    return f"{block['parametric']['reason']} Its frontier: {block['frontier'].get('reason', few)}."


BLOCKS = (
    "parametric", "variable_projection", "isoflop", "envelope", "frontier", "sensitivity", "held_out", "warnings",
)  # fmt: skip


def _baseline(table: Table, given: str | None, notes: list[str]) -> str:
    families = table.families
    if given is not None:
        if given not in families:
            raise TableError(f"Comparing with {given}: the runs are of {', '.join(families)}; name one of these.")
        return given
    for words in BASELINES:
        named = [family for family in families if words & set(re.findall("[a-z]+", family.lower()))]
        if len(named) == 1:
            if len(families) > 1 and named[0] != "dense":
                notes.append(f"{named[0]} was taken for the baseline, by its name (--baseline chooses another).")
            return named[0]
        if len(named) > 1 and "dense" in named:
            return "dense"
    if len(families) > 1:
        notes.append(
            f"No one family is called dense: {families[0]}, the first, is the baseline (--baseline chooses another)."
        )
    return families[0]


def _family(
    table: Table, family: str, delta: float, draws: int, progress: Callable[[float], object]
) -> tuple[Card, list[Cell] | None]:
    """All fits to one family's runs, and its frontier's cells where IsoFLOP curves give better ones than a hull."""
    warnings = design_warnings(table)
    card: Card = {
        "runs": len(table),
        "sizes": int(size_labels(table.parameters).max()) + 1,
        "ranges": {
            "parameters": _range(table.parameters), "tokens": _range(table.tokens), "flops": _range(table.flops),
            "tokens_per_parameter": _range(table.tokens / table.parameters), "loss": _range(table.loss),
        },
    }  # fmt: skip
    outliers = by_outliers(table, delta=delta)
    card["sensitivity"] = {
        "outliers": [_variant(v, "dropped") for v in outliers],
        "delta": [_variant(v, "delta") for v in by_delta(table, DELTAS)],
        "window": [],
    }
    try:
        fit = fit_surface(table.parameters, table.tokens, table.loss, delta=delta)
        card["parametric"], main = _parametric(table, fit, draws, progress)
        windows = by_window(table, fit)
        card["sensitivity"]["window"] = [_variant(v, "times_optimum") for v in windows]
        warnings += fit_warnings(table, fit, main, outliers, windows)
        least = variable_projection(table.parameters, table.tokens, table.loss)
        card["variable_projection"] = {
            **_surface(least.surface), "intervals": least.intervals, "squares": least.squares,
            "objective": "least squares of the loss, E, A and B non-negative",
        }  # fmt: skip
    except NoFit as error:
        card["parametric"] = card["variable_projection"] = {"reason": str(error)}
    card["isoflop"], cells = _isoflop(table, family, warnings)
    try:
        card["envelope"] = _allocation(envelope(table.parameters, table.flops, table.loss))
    except NoFit as error:
        card["envelope"] = {"reason": str(error)}
    every = cells_of(rows_of(table))[family]
    card["frontier"] = _frontier(fit_frontier(every, chosen=cells), table.unit)
    try:
        card["held_out"] = asdict(held_out(table, delta))
    except NoFit as error:
        card["held_out"] = {"reason": f"without the most expensive runs: {error}"}
    card["warnings"] = warnings
    progress(1.0)
    return card, cells


def _parametric(table: Table, fit: Parametric, draws: int, progress: Callable[[float], object]) -> tuple[Card, Draws]:
    """The main fit. Intervals are over runs, or over trunks where they are known."""
    draws = max(min(draws, FEWEST_DRAWS), min(draws, WORK // len(fit)))
    main = bootstrap(fit, draws, clusters=table.trunk, progress=lambda done: progress(0.6 * done / draws))
    by_size = bootstrap(
        fit, draws, clusters=size_labels(table.parameters), progress=lambda done: progress(0.6 + 0.3 * done / draws)
    )
    deviations = np.abs(fit.residuals)
    total = np.log(fit.loss)
    return {
        **_surface(fit.surface),
        "intervals": {name: main.interval(name) for name in NAMES},
        "intervals_by_size": {name: by_size.interval(name) for name in NAMES},
        "bootstrap": {
            "draws": draws, "resampled": "runs" if table.trunk is None else "trunks", "units": main.clusters,
            "sizes": by_size.clusters,
        },
        "objective": {
            "name": "sum of Huber's loss of ln L", "delta": fit.delta, "value": fit.objective,
            "inside_delta": fit.inside,
        },
        "starts": fit.starts,
        "starts_agreeing": fit.agreement,
        "residuals": {
            "median_absolute": float(np.median(deviations)), "rms": float(np.sqrt((deviations**2).mean())),
            "largest": float(deviations.max()),
            "r2_of_ln_loss": 1 - float((fit.residuals**2).sum() / max(((total - total.mean()) ** 2).sum(), 1e-300)),
        },
        "flops_per_parameter_and_token": float(np.median(table.flops / (table.parameters * table.tokens))),
    }, main  # fmt: skip


def _isoflop(table: Table, family: str, warnings: list[str]) -> tuple[Card, list[Cell] | None]:
    found: Card = {}
    cells = None
    methods: tuple[Method, ...] = ("parabola", "akima")
    for method in methods:
        try:
            allocation = isoflop(table.parameters, table.flops, table.loss, method)
        except NoFit as error:
            found[method] = {"reason": str(error)}
            continue
        found[method] = _allocation(allocation)
        warnings += allocation_warnings(allocation)
        if method == "parabola" and table.trunk is None and len(allocation.used) >= FEWEST_BUDGETS:
            cells = optima(family, allocation)
    return found, cells


def _allocation(found: Allocation) -> Card:
    return {
        "a": found.a,
        "interval": (found.a_low, found.a_high),
        "b": 1 - found.a,
        "intercept": found.intercept,
        "scatter": found.scatter,
        "budgets": [
            {
                "flops": budget.flops, "sizes": len(budget.sizes), "optimum": budget.optimum, "loss": budget.loss,
                "used": not budget.reason, "reason": budget.reason,
            }
            for budget in found.budgets
        ],
    }  # fmt: skip


def _frontier(found: Frontier, unit: str) -> Card:
    if found.reason:
        return {"reason": found.reason}
    card: Card = {
        "law": "L = E + (C/C0)^-c", "E": found.E, "C0": found.C0, "c": found.c,
        "intervals": {"c": (found.c_low, found.c_high), "E": (found.E_low, found.E_high)},
        "points": [{"flops": cell.cost, "loss": cell.loss, "runs": len(cell.runs)} for cell in found.fitted],
        "starts_agreeing": found.agreement, "unit": unit,
    }  # fmt: skip
    if found.held_out is not None:
        card["held_out_error"] = {"with_E": found.held_out[0], "without_E": found.held_out[1]}
    return card


def _multiplier(table: Table, family: str, baseline: str, chosen: Mapping[str, list[Cell] | None]) -> Card:
    """By FLOPs, by seconds where they are known, and by one surface for both."""
    both = {name: table.of(name) for name in (family, baseline)}
    rows = {name: rows_of(part) for name, part in both.items()}
    cells = {name: cells_of(rows[name])[name] for name in both}
    by_optima = all(chosen[name] for name in both)
    picked = (chosen[family] or [], chosen[baseline] or []) if by_optima else None
    found = compare_cells(cells[family], cells[baseline], names=(family, baseline), chosen=picked)
    card = _compared(found) | {
        "frontier": "IsoFLOP optima" if by_optima else "cells of about the best size for their cost"
    }
    if table.seconds is not None:
        timed = {name: cells_of(rows[name], "seconds").get(name, []) for name in both}
        by_time = compare_cells(timed[family], timed[baseline], "seconds", names=(family, baseline))
        card["seconds"] = _compared(by_time)
    try:
        card["surface"] = asdict(scaled_surface(both[family], both[baseline]))
    except NoFit as error:
        card["surface"] = {"reason": str(error)}
    return card


def _compared(found: Multiplier) -> Card:
    if found.reason:
        return {"value": None, "interval": None, "verdict": found.verdict, "reason": found.reason}
    return {
        "value": found.value, "low": found.low, "high": found.high, "interval": (found.low, found.high),
        "verdict": found.verdict, "method": found.method, "losses": (found.loss_low, found.loss_high),
        "extrapolation": found.extrapolation, "cells": found.cells, "scatter": found.scatter,
        "same_exponent_p": found.exponent_p, "interpolated": found.crosscheck, "at_the_ends": found.trend,
    }  # fmt: skip


def _surface(surface: Surface) -> Card:
    return {**asdict(surface), "a": surface.a, "b": 1 - surface.a, "gamma": surface.gamma, "G": surface.G}


def _variant(found: Variant, choice: str) -> Card:
    card: Card = {choice: found.choice if math.isfinite(found.choice) else None, "runs": found.runs}
    if found.surface is None:
        return card | {"reason": found.reason}
    return card | _surface(found.surface) | {"median_residual": found.median_residual}


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _checklist(table: Table, reference: Card, told: Mapping[str, str], delta: float) -> Card:
    """(Mis)Fitting's questions; null is what nobody stated."""
    fit = reference["parametric"]
    return {
        "form": "L(N, D) = E + A N^-alpha + B D^-beta; L(C) = E + (C/C0)^-c along the frontier",
        "variables": {"N": table.columns.get("parameters"), "D": table.columns.get("tokens"),
                      "C": table.columns.get("flops"), "L": table.columns.get("loss"), "loss_unit": table.unit},
        "runs": {family: int((table.family == family).sum()) for family in table.families},
        "seeds": None if table.seed is None else len(set(table.seed.tolist())),
        "ranges": reference["ranges"],
        "points_left_out": dict(table.dropped),
        "effect_of_leaving_out": "sensitivity.outliers",
        **{name: told.get(name) for name in STATED},
        "not_stated": [name for name in STATED if name not in told],
        "objective": f"sum of Huber's loss of ln L, delta = {delta:g}",
        "optimizer": "BFGS on (ln E, ln of both terms at the data's centre, alpha, beta), objective over delta",
        "starts": fit.get("starts"),
        "tolerance": "largest gradient entry 1e-7, or no relative gain over 1e-13 in three steps",
        "starts_agreeing": fit.get("starts_agreeing"),
        "goodness_of_fit": fit.get("residuals"),
        "held_out": reference["held_out"],
        "intervals": "95 %; surface: Bayesian bootstrap, percentiles; IsoFLOP: draws of noise and Student's t over "
        "budgets; multiplier: Student's t over cells, CR2 over trunks",
        "code": f"einlinear {einlinear.__version__}, einlinear.lab.laws",
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
