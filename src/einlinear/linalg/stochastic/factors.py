"""Truncated factorisations from random ranges (Halko, Martinsson and Tropp 2011)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, divide, norm, working
from einlinear.linalg.result import Factors, LinAlgError, Result
from einlinear.linalg.stochastic.probes import probes


@torch.no_grad()
def randomised_svd(
    matmul: Matmul,
    adjoint: Matmul,
    shape: tuple[int, ...],
    k: int,
    *,
    oversample: int = 10,
    powers: int = 2,
    tolerance: float | None = None,
    max_powers: int = 50,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Factors]:
    """The k largest singular triplets of A, `shape` [..., m, n]: u [..., m, k], s [..., k] descending, vh [..., k, n].

    The residual [..., k] is |A v - s u| / s₁ (|Aᴴ u - s v| is zero by construction). `powers` rounds with AᴴA sharpen
    a slowly decaying spectrum, with orthonormalisation in between; with a `tolerance` rounds go on until the residual
    is below it.
    """
    *batch, m, n = shape
    if not 0 < k <= min(m, n):
        raise ValueError(f"randomised_svd finds from 1 to {min(m, n)} triplets of a matrix {m} x {n}, not {k}")
    if working(dtype) != dtype:
        raise ValueError("randomised_svd works in 32 bits or more: widen the operator")
    width = min(k + oversample, m, n)
    q = _range(matmul(probes((*batch, n, width), kind="gaussian", dtype=dtype, device=device, generator=generator)))
    spent, rounds = 1, 0
    while True:
        while rounds < powers:
            q = _range(matmul(_range(adjoint(q))))
            spent, rounds = spent + 2, rounds + 1
        u, s, vh = torch.linalg.svd(adjoint(q).mH, full_matrices=False)
        factors = Factors(q @ u[..., :k], s[..., :k], vh[..., :k, :])
        residual = norm(matmul(factors.vh.mH) - factors.u * factors.s.unsqueeze(-2)).squeeze(-2)
        residual = divide(residual, factors.s[..., :1])
        spent += 2
        converged = tolerance is None or bool((residual <= tolerance).all())
        if converged or rounds >= max_powers:
            break
        powers = rounds + 1
    return Result(factors, spent, converged, residual).or_warn("randomised_svd", tolerance or 0.0)


def _range(y: Tensor) -> Tensor:
    if not bool(torch.isfinite(y).all()):
        raise LinAlgError("randomised_svd: the product with the operator gave NaN or overflowed")
    q: Tensor = torch.linalg.qr(y)[0]
    return q
