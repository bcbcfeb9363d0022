"""Functions of a matrix that is written out, differentiably: by its eigenvectors, or by Schur's form."""

from typing import Any

import torch
from torch import Tensor

from einlinear.linalg.borrowed import matrix_function
from einlinear.linalg.scalar import Function


class OfHermitian(torch.autograd.Function):
    """f(A) for Hermitian A; its derivative by divided differences, finite where eigenvalues coincide.

    Daleckii and Krein 1965; Higham, Functions of Matrices, theorem 3.11.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, f: Function) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * f.at(values, matrix.dtype)[..., None, :]) @ vectors.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.f = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(matrix)
        inner = vectors.mH @ gradient @ vectors
        weights = divided(ctx.f.cleared(values, matrix.dtype), ctx.f).conj()
        return vectors @ (weights * inner) @ vectors.mH, None


def divided(values: Tensor, f: Function) -> Tensor:
    """(f(λᵢ) − f(λⱼ)) / (λᵢ − λⱼ), and f′ between close ones."""
    assert f.slope is not None
    row, column = values[..., :, None] + 0, values[..., None, :] + 0
    gap, scale = row - column, torch.maximum(row.abs(), column.abs())
    close = gap.abs() <= 1e-5 * scale
    quotient = (f.of(row) - f.of(column)) / torch.where(close, 1, gap)
    return torch.where(close, f.slope((row + column) / 2), quotient)


class BySchur(torch.autograd.Function):
    """log and powers by scipy; their derivative is a block of f([[Aᴴ, G], [0, Aᴴ]]) (Higham, theorem 3.6)."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, name: str, p: float | None) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.settings = (name, p)
        return matrix_function(matrix, name, p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (matrix,) = ctx.saved_tensors
        n = matrix.shape[-1]
        adjoint = matrix.mH
        top = torch.cat([adjoint, gradient.to(adjoint.dtype)], -1)
        bottom = torch.cat([torch.zeros_like(adjoint), adjoint], -1)
        return BySchur.apply(torch.cat([top, bottom], -2), *ctx.settings)[..., :n, n:], None, None
