"""Runs of a table as the laws of cost see them: rows, cells, and the optima of IsoFLOP curves as cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.lab.laws.cells import Cell, measured
from einlinear.lab.laws.isoflop import Allocation
from einlinear.lab.laws.parametric import NoFit
from einlinear.lab.laws.table import Table
from einlinear.lab.run import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a table; `cells.Measured`."""

    family: str
    parameters: float
    tokens: float
    flops: float
    loss: float | None
    seconds: float = 0.0
    trunk: str = ""
    device: str = ""
    linear_flops: float = 0.0
    width: int = 0

    @property
    def size(self) -> tuple[float, ...]:
        """Runs of one size and length differ in their seed."""
        return (self.parameters,)


def from_runs(runs: Sequence[Run]) -> Table:
    """A store's finished measurement runs as a table, for a law card.

    Raises ValueError where there is none, and where they do not compare (see `cells.measured`).
    """
    chosen = measured(runs)
    if not chosen:
        raise NoFit("Fitting laws: no measurement run has finished.")
    family, seed, device = (
        np.array([str(getattr(run, name)) for run in chosen]) for name in ("family", "seed", "device")
    )
    numbers = ("parameters", "tokens", "flops", "loss", "seconds")
    parameters, tokens, flops, loss, seconds = (
        np.array([float(getattr(run, name)) for run in chosen]) for name in numbers
    )
    trunk = np.array([run.trunk or "/".join(map(str, run.key)) for run in chosen])
    return Table(
        family=family, seed=seed, device=device, trunk=trunk, parameters=parameters, tokens=tokens, flops=flops,
        loss=loss, seconds=seconds, source="the store", rows=len(runs),
        columns={name: name for name in numbers},
        dropped={"no finished measurements": len(runs) - len(chosen)} if len(runs) > len(chosen) else {},
    )  # fmt: skip


def rows_of(table: Table) -> list[Row]:
    """The runs of a table."""
    empty = [""] * len(table)
    trunks = empty if table.trunk is None else table.trunk.tolist()
    devices = empty if table.device is None else table.device.tolist()
    seconds = [0.0] * len(table) if table.seconds is None else np.nan_to_num(table.seconds).tolist()
    columns = (table.family, table.parameters, table.tokens, table.flops, table.loss)
    numbers = zip(*(column.tolist() for column in columns), seconds, trunks, devices, strict=True)
    return [
        Row(family=f, parameters=n, tokens=d, flops=c, loss=loss, seconds=s, trunk=trunk, device=device)
        for f, n, d, c, loss, s, trunk, device in numbers
    ]


def optima(family: str, allocation: Allocation) -> list[Cell]:
    """The least loss of each budget with one: the finished frontier, freed from the grid of sizes."""
    return [
        Cell(
            family, budget.flops / max(6 * budget.optimum, 1e-300), budget.flops, budget.loss,
            (Row(family=family, parameters=budget.optimum, tokens=math.nan, flops=budget.flops, loss=budget.loss),),
        )
        for budget in allocation.used
    ]  # fmt: skip
