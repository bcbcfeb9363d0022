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

SCATTERS = 4.0  # a cell counts as frontier up to so many standard deviations of the noise above the hull
FARTHEST = 0.1  # but not beyond this share of the loss: then it was badly trained, not unlucky
NEAR = 0.02  # the same as a share of the loss, where the noise is not known


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


def near_hull(cells: Sequence[Cell], tolerance: float) -> list[Cell]:
    """The cells at most `tolerance` in ln loss above their lower hull, which goes on to the right as it ended."""
    vertices = lower_hull(cells)
    last = vertices[-1]
    steepness = slope(vertices[-2], last) if len(vertices) > 1 else 0.0
    ends = [*vertices, replace(last, cost=last.cost * math.e**9, loss=last.loss * math.exp(9 * steepness))]
    floor = np.interp(
        [math.log(cell.cost) for cell in cells],
        [math.log(cell.cost) for cell in ends],
        [math.log(cell.loss) for cell in ends],
    )
    return [cell for cell, least in zip(cells, floor, strict=True) if math.log(cell.loss) <= least + tolerance + 1e-9]


def frontier_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one family that its law is fitted to: those that noise alone may have put above the hull.

    To fit the vertices alone would select the lucky runs and then measure the noise on them: the intervals
    come out too narrow (coverage .82 to .87 in simulation). The noise is what a smooth surface in parameters
    and tokens leaves of ln loss; where there are too few cells to tell, 2 % of the loss.
    """
    if not cells:
        return []
    size = np.log([max(1e-9, cell.runs[0].parameters) for cell in cells])
    size -= size.mean()
    tokens = np.log([cell.tokens for cell in cells])
    tokens -= tokens.mean()
    surface = np.stack([np.ones(len(cells)), size, size**2, tokens, size * tokens], axis=1)
    loss = np.log([cell.loss for cell in cells])
    solution, _, rank, _ = np.linalg.lstsq(surface, loss)
    freedom = len(cells) - int(rank)
    if freedom < 1:
        return near_hull(cells, NEAR)
    noise = math.sqrt(((loss - surface @ solution) ** 2).sum() / freedom)
    return near_hull(cells, min(SCATTERS * noise, FARTHEST))


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
