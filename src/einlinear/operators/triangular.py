from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einlinear.operator import Operator, common, inexact, remembered


@dataclass(eq=False, repr=False)
class Triangular(Operator):
    """One triangle of `matrix`, `[..., n, n]`; what lies on the other side is never read.

    Args:
        matrix: holds the triangle.
        upper: which one.
        unit: whether the diagonal is one, whatever `matrix` holds there.
        inverted: whether this is the inverse of that triangle, applied by substitution.
    """

    matrix: Tensor
    upper: bool = False
    unit: bool = False
    inverted: bool = False

    def __post_init__(self) -> None:
        self.matrix = inexact(self.matrix, 2)

    @remembered
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def _facts(self) -> set[str]:
        return {"upper" if self.upper else "lower"}

    def triangle(self) -> Tensor:
        """The triangle, written out."""
        written = self.matrix.triu() if self.upper else self.matrix.tril()
        return written - torch.diag_embed(self.matrix.diagonal(0, -2, -1) - 1) if self.unit else written

    def diagonal(self) -> Tensor:
        """The diagonal of this operator, `[..., n]`."""
        entries = self.matrix.diagonal(0, -2, -1)
        if self.unit:
            return torch.ones_like(entries)
        return 1 / entries if self.inverted else entries

    def _matmul(self, x: Tensor) -> Tensor:
        if self.inverted:
            matrix = self.matrix.to(x.dtype)
            batch = common(tuple(matrix.shape[:-2]), tuple(x.shape[:-2]))
            x = x.expand(*batch, *x.shape[-2:])
            return torch.linalg.solve_triangular(matrix, x, upper=self.upper, unitriangular=self.unit)
        return self.triangle() @ x

    def _transpose(self) -> "Triangular":
        return replace(self, matrix=self.matrix.mT, upper=not self.upper, claims=frozenset())

    def inverse(self) -> "Triangular":
        """The inverse, which shares the triangle."""
        return replace(self, inverted=not self.inverted, claims=frozenset())

    @property
    def flops(self) -> float:
        return float(self.shape[-1] ** 2)

    def _text(self) -> str:
        return f"{super()._text()}{'⁻¹' if self.inverted else ''}"
