from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Operator, inexact, remembered


@dataclass(eq=False, repr=False)
class Householder(Operator):
    """H₁ H₂ … H_k, where H_j = I − τ_j v_j v_jᴴ.

    Args:
        vectors: `[..., n, k]`, one v in each column.
        tau: `[..., k]`; without it 2 / ‖v‖², which makes every H a reflection and the product unitary.
    """

    vectors: Tensor
    tau: Tensor | None = None

    def __post_init__(self) -> None:
        self.vectors = inexact(self.vectors, 2)

    @remembered
    def shape(self) -> torch.Size:
        n = self.vectors.shape[-2]
        return torch.Size((*self.vectors.shape[:-2], n, n))

    def _facts(self) -> set[str]:
        if self.tau is not None:
            return set()
        return {"unitary", "hermitian"} if self.vectors.shape[-1] == 1 else {"unitary"}

    def scales(self) -> Tensor:
        """τ of each factor, `[..., k]`; a zero vector has none, so that its factor is the unit."""
        if self.tau is not None:
            return self.tau
        square = self.vectors.abs().square().sum(-2)
        return torch.where(square > 0, 2 / torch.where(square > 0, square, 1), 0)

    def determinant(self) -> Tensor:
        """Π (1 − τ ‖v‖²), by Sylvester's identity; (−1)^k for reflections."""
        return (1 - self.scales() * self.vectors.abs().square().sum(-2)).prod(-1)

    def _matmul(self, x: Tensor) -> Tensor:
        tau = self.scales()
        for j in reversed(range(self.vectors.shape[-1])):
            v = self.vectors[..., j : j + 1]
            x = x - tau[..., j, None, None] * (v @ (v.mH @ x))
        return x

    def _transpose(self) -> "Householder":
        tau = None if self.tau is None else self.tau.flip(-1)
        return Householder(self.vectors.flip(-1).conj(), tau)

    @property
    def flops(self) -> float:
        return 4.0 * self.vectors.shape[-1] * self.shape[-1]
