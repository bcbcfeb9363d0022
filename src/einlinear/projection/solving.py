"""Solvers of normal equations: Hermitian, positive semi-definite, often singular, in batches."""

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-9
"""Relative to the mean curvature, how firmly a solve holds on to what the equations do not determine."""
STEPS = 3
"""Conjugate gradient steps at most: few, as the other factors move before the next solve."""


def solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solutions of `normal` `[batch, n, n]` for `right` `[batch, n, columns]`, with a slight ridge."""
    solutions: Tensor = torch.cholesky_solve(right, _cholesky(normal, RIDGE))
    return solutions


def inverse(normal: Tensor) -> Tensor:
    """The inverses of `normal`, `[batch, n, n]`, with a ridge that suits a preconditioner."""
    inverses: Tensor = torch.cholesky_inverse(_cholesky(normal, 1e-6))
    return inverses


def square_root(matrices: Tensor) -> Tensor:
    """The Hermitian roots of positive semi-definite matrices, `[batch, n, n]`, singular or not."""
    values, vectors = torch.linalg.eigh(matrices)
    roots: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH
    return roots


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor
) -> Tensor:
    """A step that lowers the quadratic error: to its minimum, or where `STEPS` lead towards it."""
    step, residual = torch.zeros_like(right), right
    direction = ready = precondition(residual)
    power = start = _dot(residual, ready)
    for _ in range(STEPS):
        if power <= 1e-12 * start or power <= 0:
            break
        image = apply(direction)
        curvature = _dot(direction, image)
        if curvature <= 0:
            break
        step = step + power / curvature * direction
        residual = residual - power / curvature * image
        ready = precondition(residual)
        after = _dot(residual, ready)
        direction = ready + after / power * direction
        power = after
    return step


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).real.sum())


def _cholesky(normal: Tensor, ridge: float) -> Tensor:
    """Lower triangles; the ridge grows where rounding leaves a matrix indefinite."""
    scale = normal.diagonal(dim1=-2, dim2=-1).real.mean(-1)[:, None, None]
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    while True:
        # Equations of zeros ask for nothing: any ridge will do.
        lower, failed = torch.linalg.cholesky_ex(normal + torch.where(scale > 0, ridge * scale, 1.0) * eye)
        if not failed.any():
            break
        ridge *= 100
    assert isinstance(lower, Tensor)
    return lower
