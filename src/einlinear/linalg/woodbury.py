"""A + UCVᴴ, an operator and an update of low rank: what its inverse and its determinant are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Dense, Operator, Scaled, Zero, remembered, transformed
from einlinear.operators import Diagonal, LowRankUpdate

REFINEMENTS = 5
"""Steps at most."""


@dataclass(eq=False, repr=False)
class WoodburyInverse(Operator):
    """(A + UCVᴴ)⁻¹ = A⁻¹ − A⁻¹UC (I + VᴴA⁻¹UC)⁻¹ VᴴA⁻¹ (Woodbury 1950), made once.

    Args:
        of: A + UCVᴴ.
        base: A⁻¹.
        left: A⁻¹UC.
        right: A⁻ᴴV.
        core: (I + VᴴA⁻¹UC)⁻¹, r × r.
    """

    of: LowRankUpdate
    base: Operator
    left: Tensor
    right: Tensor
    core: Operator

    @remembered
    def shape(self) -> torch.Size:
        return self.of.shape

    def _facts(self) -> set[str]:
        return {*self.of.properties & {"hermitian", "psd"}}

    def _matmul(self, b: Tensor) -> Tensor:
        x = self._once(b)
        return x if transformed(b, *self.tensors) else x + self._correction(x, b)

    @torch.no_grad()
    def _correction(self, x: Tensor, b: Tensor) -> Tensor:
        """What refinement adds: where A is small beside UCVᴴ the difference below cancels.

        Until a step changes no more than half the digits.
        """
        refined = x
        for _ in range(REFINEMENTS):
            change = self._once(b - self.of.matmul(refined))
            refined = refined + change
            if bool(change.norm() <= torch.finfo(x.dtype).eps ** 0.5 * refined.norm()):
                break
        return refined - x

    def _once(self, b: Tensor) -> Tensor:
        return self.base.matmul(b) - self.left @ self.core.matmul(self.right.mH @ b)

    def _transpose(self) -> "WoodburyInverse":
        of = self.of.T
        assert isinstance(of, LowRankUpdate)
        return WoodburyInverse(of, self.base.T, self.right.conj(), self.left.conj(), self.core.T)

    def _conj(self) -> "WoodburyInverse":
        of = self.of.conj()
        assert isinstance(of, LowRankUpdate)
        left, right = self.left.conj(), self.right.conj()
        return WoodburyInverse(of, self.base.conj(), left, right, self.core.conj(), claims=self.claims)


def capacitance(A: LowRankUpdate, inverse: Operator) -> tuple[Tensor, Operator]:
    """A⁻¹UC, and the r × r operator I + VᴴA⁻¹UC of an update A + UCVᴴ."""
    left = A.left if A.core is None else A.core.T.matmul(A.left.mT).mT
    solved = inverse.matmul(left)
    inner = A.V.mH @ solved
    small = Dense(inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=A.device))
    return solved, small.claim("psd") if symmetric(A) and "psd" in A.base.properties else small


def symmetric(A: LowRankUpdate) -> bool:
    """Whether an update is A + U Uᴴ of a Hermitian A."""
    return A.right is None and A.core is None and "hermitian" in A.base.properties


def regular_base(A: LowRankUpdate, *_: object) -> bool:
    """Whether the base of an update may be inverted, as far as that can be seen without doing it."""
    base = A.base.of if isinstance(A.base, Scaled) else A.base
    if isinstance(base, Zero | Diagonal):
        return isinstance(base, Diagonal) and (transformed(base.values) or bool((base.values != 0).all()))
    return True
