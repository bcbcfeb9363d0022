"""Runs of a table as the laws of cost see them: rows, cells, and the optima of IsoFLOP curves as cells."""

import math
from dataclasses import dataclass

import numpy as np

from einlinear.lab.laws.cells import Cell
from einlinear.lab.laws.isoflop import Allocation
from einlinear.lab.laws.table import Table


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
