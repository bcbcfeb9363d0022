from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Operator, inexact, known, remembered


@dataclass(eq=False, repr=False)
class Diagonal(Operator):
    """The diagonal matrix of `values`, `[..., n]`."""

    values: Tensor

    def __post_init__(self) -> None:
        self.values = inexact(self.values, 1)

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    def _facts(self) -> set[str]:
        real = not self.values.is_complex()
        return {"diagonal"} | ({"psd"} if real and known(self.values >= 0) else set())

    def _matmul(self, x: Tensor) -> Tensor:
        return self.values[..., None] * x

    def _transpose(self) -> "Diagonal":
        return self

    def dense(self) -> Tensor:
        return torch.diag_embed(self.values)

    @property
    def flops(self) -> float:
        return float(self.shape[-1])
