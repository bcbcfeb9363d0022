"""What laws of cost are fitted to: cells, the means over seeds of runs that agree in all else, and their lower hull."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any, Literal, Protocol

import numpy as np

from einlinear.lab.laws.minimise import Floats, Integers
from einlinear.lab.run import Run

Axis = Literal["flops", "seconds", "parameters", "linear_flops"]
AXES: dict[Axis, str] = {
    "flops": "training FLOPs",
    "seconds": "training seconds",
    "parameters": "parameters",
    "linear_flops": "FLOPs in linear layers",
}

SCATTERS = 4.0  # a cell counts as frontier up to so many standard errors of its smoothed loss above the smoothed hull
FARTHEST = 0.1  # of ln loss above the measured hull; a cell beyond was badly trained, or lies far from the optimum
NEAR = 0.02  # as `SCATTERS`, where the noise is not known
ROUNDING = 1e-9  # of ln loss


class Measured(Protocol):
    """What laws need to know of a finished run: `Run` of the store has it, and so has a row of a file."""

    @property
    def family(self) -> str: ...
    @property
    def size(self) -> tuple[Any, ...]:
        """Runs of equal family, size and tokens differ only in their seed."""

    @property
    def width(self) -> int:
        """Of the model; 0 where it is not known."""

    @property
    def parameters(self) -> float: ...
    @property
    def tokens(self) -> float: ...
    @property
    def flops(self) -> float: ...
    @property
    def linear_flops(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def trunk(self) -> str: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in seed, with the geometric means of their cost and loss.

    Means, because the least of several noisy runs is too low.
    """

    family: str
    tokens: float
    cost: float  # in units of the axis
    loss: float  # nats
    runs: tuple[Measured, ...] = field(repr=False)

    @property
    def width(self) -> int:
        """Of the runs' model; 0 where it is not known."""
        return self.runs[0].width


def measured(runs: Sequence[Run], *, allow_mixed_data: bool = False) -> list[Run]:
    """The finished runs of a store that laws are fitted to: not the tuning runs, not those that diverged.

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


def cells_of(runs: Sequence[Measured], axis: Axis = "flops") -> dict[str, list[Cell]]:
    """Cells by family, in the order of first appearance; runs without a cost on this axis are left out."""
    together: dict[tuple[Any, ...], list[Measured]] = {}
    for run in runs:
        if getattr(run, axis) > 0:
            together.setdefault((run.family, run.size, run.tokens), []).append(run)
    groups: dict[str, list[Cell]] = {}
    for members in together.values():
        cost = math.exp(np.mean([math.log(getattr(run, axis)) for run in members]))
        loss = math.exp(np.mean([math.log(run.loss) for run in members if run.loss is not None]))
        one = members[0]
        groups.setdefault(one.family, []).append(Cell(one.family, one.tokens, cost, loss, tuple(members)))
    return groups


def hull(runs: Sequence[Run], axis: Axis = "flops", *, allow_mixed_data: bool = False) -> dict[str, list[Cell]]:
    """Each family's lower convex hull of ln loss over ln cost, on cell means, cheapest first.

    Only cells that improve on every cheaper one are on it.
    """
    groups = cells_of(measured(runs, allow_mixed_data=allow_mixed_data), axis)
    return {family: lower_hull(cells) for family, cells in groups.items()}


def lower_hull(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one family on its lower hull, cheapest first."""
    vertices: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.cost, cell.loss)):
        if vertices and cell.loss >= vertices[-1].loss:
            continue
        while len(vertices) > 1 and slope(vertices[-2], vertices[-1]) >= slope(vertices[-2], cell):
            vertices.pop()
        vertices.append(cell)
    return vertices


def slope(left: Cell, right: Cell) -> float:
    """Of ln loss over ln cost."""
    return math.log(right.loss / left.loss) / math.log(right.cost / left.cost)


def above_hull(cells: Sequence[Cell]) -> Floats:
    """How far each cell's ln loss `[cells]` lies above their lower hull, which goes on to the right as it ended."""
    vertices = lower_hull(cells)
    last = vertices[-1]
    steepness = slope(vertices[-2], last) if len(vertices) > 1 else 0.0
    ends = [*vertices, replace(last, cost=last.cost * math.e**9, loss=last.loss * math.exp(9 * steepness))]
    floor = np.interp(
        [math.log(cell.cost) for cell in cells],
        [math.log(cell.cost) for cell in ends],
        [math.log(cell.loss) for cell in ends],
    )
    return np.log([cell.loss for cell in cells]) - floor


def near_hull(cells: Sequence[Cell], tolerance: float) -> list[Cell]:
    """The cells at most `tolerance` in ln loss above their lower hull."""
    above = above_hull(cells)
    return [cell for cell, height in zip(cells, above, strict=True) if height <= tolerance + ROUNDING]


def frontier_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one family that its law is fitted to: those whose size and tokens are about the best for their cost.

    A smooth surface of ln loss over parameters and tokens tells which: the cells whose smoothed losses lie at most
    `SCATTERS` times its scatter above their lower hull. Their own losses do not choose them, or lucky runs would be
    selected and the noise then measured on them: the vertices of the hull cover .82 to .87 in simulation, and cells
    near it bend the law, as those far from the optimum count too. Cells far above the hull were badly trained, and are
    not asked; where there are too few cells for a surface, those within 2 % of the hull are taken.
    """
    if not cells:
        return []
    near = near_hull(cells, FARTHEST)
    size = np.log([max(1e-9, cell.runs[0].parameters) for cell in near])
    size -= size.mean()
    tokens = np.log([cell.tokens for cell in near])
    tokens -= tokens.mean()
    surface = np.stack([np.ones(len(near)), size, size**2, tokens, size * tokens, tokens**2], axis=1)
    loss = np.log([cell.loss for cell in near])
    solution, _, rank, _ = np.linalg.lstsq(surface, loss)
    freedom = len(near) - int(rank)
    if freedom < 1:
        return near_hull(cells, NEAR)
    smooth = surface @ solution
    noise = math.sqrt(((loss - smooth) ** 2).sum() / freedom)
    smoothed = [replace(cell, loss=math.exp(value)) for cell, value in zip(near, smooth, strict=True)]
    leverage = ((np.linalg.pinv(surface).T * surface).sum(axis=1)).clip(0.0, 1.0)
    room = noise * np.maximum(1.0, SCATTERS * np.sqrt(leverage))
    chosen = above_hull(smoothed) <= np.minimum(room, FARTHEST) + ROUNDING
    return [cell for cell, kept in zip(near, chosen, strict=True) if kept]


def cluster_labels(cells: Sequence[Cell]) -> Integers:
    """Cells that share a trunk, directly or through others, have one label: their errors depend on each other."""
    labels = np.arange(len(cells))
    first: dict[tuple[str, str], int] = {}
    for number, cell in enumerate(cells):
        for run in cell.runs:
            if run.trunk:
                other = first.setdefault((run.family, run.trunk), number)
                labels[labels == labels[number]] = labels[other]
    return np.asarray(np.unique(labels, return_inverse=True)[1])


def log_costs(cells: Sequence[Cell]) -> Floats:
    """ln cost `[cells]`."""
    return np.log([cell.cost for cell in cells])


def _has_loss(run: Run) -> bool:
    return run.loss is not None and math.isfinite(run.loss) and run.loss > 0
