"""What a conversion did, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.contract import dense
from einlinear.cost import flops, parameters
from einlinear.layer import Linear
from einlinear.targeting import (
    LinearLayer,
)


@dataclass(frozen=True)
class Row:
    """One converted layer. Parameters are those of its weight, FLOPs are for one token."""

    name: str
    family: str
    structure: str
    d_in: int
    d_out: int
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    error: float | None  # ‖W − Ŵ‖ / ‖W‖ in Frobenius norm, None where nothing was projected

    @property
    def ratio(self) -> float:
        """FLOPs relative to the dense layer that was there."""
        return self.flops_after / self.flops_before


@dataclass(frozen=True)
class Report:
    """What `convert` did: a row for each converted layer, a reason for each skipped one. Prints as a table.

    `parameters_before` and `parameters_after` are those of the whole model, shared ones counted once.
    """

    rows: tuple[Row, ...]
    skipped: dict[str, str]
    parameters_before: int
    parameters_after: int

    @property
    def flops_before(self) -> int:
        """FLOPs per token of the converted layers, before."""
        return sum(row.flops_before for row in self.rows)

    @property
    def flops_after(self) -> int:
        """FLOPs per token of the converted layers, after."""
        return sum(row.flops_after for row in self.rows)

    def __str__(self) -> str:
        table = [["layer", "structure", "in -> out", "parameters", "FLOPs/token", "ratio", "error"]]
        for row in self.rows:
            cells = [row.name, row.family, f"{row.d_in} -> {row.d_out}"]
            cells += [_change(row.parameters_before, row.parameters_after), _change(row.flops_before, row.flops_after)]
            table.append([*cells, f"{row.ratio:.3g}", "-" if row.error is None else f"{row.error:.3g}"])
        name, family, *numbers = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(name), cells[1].ljust(family), *map(str.rjust, cells[2:], numbers)])
            for cells in table
        ]
        lines.append(
            f"{len(self.rows)} layers converted: {_change(self.flops_before, self.flops_after)} FLOPs per token; "
            f"whole model: {_change(self.parameters_before, self.parameters_after)} parameters"
        )
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped.items())])


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"


def converted(layer: LinearLayer, family: str, new: Linear, project: bool) -> Row:
    structure, d_in, d_out = new.structure, new.in_features, new.out_features
    routing = 0 if new.router is None else new.router.weight.numel()
    sizes = (d_in * d_out, parameters(structure) + routing, 2 * d_in * d_out, flops(structure) + 2 * routing)
    error = _relative_error(layer.linear.weight, new) if project else None
    return Row(layer.name, family, repr(structure), d_in, d_out, *sizes, error)


def reversed_row(layer: LinearLayer) -> Row:
    old = layer.module
    assert isinstance(old, Linear)
    d_in, d_out = old.in_features, old.out_features
    sizes = (parameters(old.structure), d_in * d_out, flops(old.structure), 2 * d_in * d_out)
    return Row(layer.name, "dense", "dense", d_in, d_out, *sizes, None)


@torch.no_grad()
def _relative_error(weight: Tensor, new: Linear) -> float:
    """‖W − Ŵ‖ / ‖W‖ of the factors as they are stored, computed in float32 at least."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    one = new.structure.expert  # of experts the first: they start alike
    first = [factor[: shape[0]] for factor, shape in zip(new.factors, one.matrix_shapes, strict=True)]
    approximation = dense(one, [factor.to(exact.dtype) for factor in first])
    return float((exact - approximation).norm() / exact.norm()) if exact.any() else 0.0
