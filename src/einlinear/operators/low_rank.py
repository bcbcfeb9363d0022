from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Dense, Operator, OperatorError, common, inexact, product, remembered, same


@dataclass(eq=False, repr=False)
class LowRankUpdate(Operator):
    """A + U C Vᴴ with few columns: A of any kind, U `[..., m, r]`, C `[r, r]` (any operator), V `[..., n, r]`.

    Inverse and determinant are those of A and of an r × r matrix (Woodbury 1950; the determinant lemma).
    Without V it is U, without C the unit.
    """

    base: Operator
    left: Tensor
    right: Tensor | None = None
    core: Operator | None = None

    def __post_init__(self) -> None:
        self.left = inexact(self.left, 2)
        rank = self.left.shape[-1]
        sizes = (self.left.shape[-2], self.V.shape[-2], self.V.shape[-1])
        if sizes != (*self.base.shape[-2:], rank):
            raise OperatorError(
                f"cannot update {self.base!r} by U {tuple(self.left.shape)} and V {tuple(self.V.shape)}: "
                f"U has its rows, V its columns, and both the same rank"
            )
        if self.core is not None and tuple(self.core.shape[-2:]) != (rank, rank):
            raise OperatorError(f"cannot update by U C Vᴴ of rank {rank} with {self.core!r}: C is {rank}×{rank}")

    @property
    def V(self) -> Tensor:
        """The right factor, `[..., n, r]`."""
        return self.left if self.right is None else self.right

    @remembered
    def shape(self) -> torch.Size:
        core = self.base.batch_shape if self.core is None else self.core.batch_shape
        batch = common(self.base.batch_shape, tuple(self.left.shape[:-2]), tuple(self.V.shape[:-2]), core)
        return torch.Size((*batch, *self.base.shape[-2:]))

    def update(self) -> Operator:
        """U C Vᴴ."""
        middle = () if self.core is None else (self.core,)
        return product(Dense(self.left), *middle, Dense(self.V).H)

    def _facts(self) -> set[str]:
        symmetric = self.right is None or same(Dense(self.left), Dense(self.right))
        core = {"psd", "hermitian"} if self.core is None else self.core.properties
        return {*self.base.properties & core & {"psd", "hermitian"}} if symmetric else set()

    def _matmul(self, x: Tensor) -> Tensor:
        return self.base.matmul(x) + self.update().matmul(x)

    def _transpose(self) -> Operator:
        core = None if self.core is None else self.core.T
        return LowRankUpdate(self.base.T, self.V.conj(), self.left.conj(), core)

    def _conj(self) -> Operator:
        right, core = (None if part is None else part.conj() for part in (self.right, self.core))
        return LowRankUpdate(self.base.conj(), self.left.conj(), right, core, claims=self.claims)  # type: ignore[arg-type]

    def dense(self) -> Tensor:
        return (self.base.dense() + self.update().dense()).expand(self.shape)

    @property
    def flops(self) -> float:
        return self.base.flops + self.update().flops

    def _text(self) -> str:
        middle = "" if self.core is None else f" {self.core!r}"
        return f"LowRankUpdate({self.base!r} + U{middle} Vᴴ, rank {self.left.shape[-1]})"
