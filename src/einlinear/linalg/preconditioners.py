"""Approximate inverses for the iterative solvers: Jacobi, Nyström, pivoted Cholesky; each is a callable on columns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import complement
from einlinear.linalg.krylov.system import Matmul
from einlinear.linalg.result import LinAlgError
from einlinear.linalg.stochastic.probes import probes


@dataclass(frozen=True)
class Jacobi:
    """x / diagonal, for a real positive `diagonal` [..., n]."""

    diagonal: Tensor

    def __post_init__(self) -> None:
        if self.diagonal.is_complex() or not bool((self.diagonal > 0).all()):
            raise ValueError("a Jacobi preconditioner needs a real positive diagonal")

    def __call__(self, x: Tensor) -> Tensor:
        return x / self.diagonal.unsqueeze(-1).to(x.dtype)


@dataclass(frozen=True)
class Spectral:
    """The inverse of U diag(values) Uᴴ + shift (1 - U Uᴴ), U [..., n, r] orthonormal.

    `logdet` is the log-determinant of what it inverts.
    """

    vectors: Tensor
    values: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        inside = self.vectors.mH @ x
        shift = self.shift[..., None, None]
        return x / shift + self.vectors @ ((1 / self.values.unsqueeze(-1) - 1 / shift) * inside)

    @property
    def rank(self) -> int:
        return self.values.shape[-1]

    @property
    def logdet(self) -> Tensor:
        n = self.vectors.shape[-2]
        return self.values.log().sum(-1) + (n - self.rank) * self.shift.log()


@torch.no_grad()
def nystrom(
    matmul: Matmul,
    shape: tuple[int, ...],
    shift: float,
    *,
    rank: int | None = None,
    start_rank: int = 16,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Spectral:
    """For systems (A + shift I) x = b, A Hermitian positive semidefinite of `shape` [..., n, n]; `matmul` is A's
    alone.

    Without a `rank` it doubles from `start_rank` until the smallest eigenvalue found is at most ten shifts, where the
    preconditioned condition number is bounded by a constant, or until `max_rank` (by default a fourth of n).
    Eigenvalues beyond the rank count as the smallest found. Frangella, Tropp and Udell 2023, algorithms 2.1 and E.2.
    """
    if not shift > 0:
        raise ValueError(f"a Nyström preconditioner needs a positive shift, not {shift}")
    *batch, n, _ = shape
    limit = min(n, max_rank or max(start_rank, n // 4)) if rank is None else min(rank, n)
    size = min(start_rank, limit) if rank is None else limit
    blank = torch.zeros((*batch, n, 0), dtype=dtype, device=device)
    omega, image = blank, blank
    while True:
        fresh = probes(
            (*batch, n, size - omega.shape[-1]), kind="gaussian", dtype=dtype, device=device, generator=generator
        )
        fresh = complement(fresh, omega, generator)
        omega, image = torch.cat([omega, fresh], -1), torch.cat([image, matmul(fresh)], -1)
        norm = torch.linalg.vector_norm(image, dim=(-2, -1))[..., None, None]
        nudge = torch.finfo(image.dtype).eps * norm.clamp_min(torch.finfo(norm.dtype).tiny)
        shifted = image + nudge * omega
        core = omega.mH @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.mH) / 2)
        if bool((failed > 0).any()):
            raise LinAlgError("nystrom: the matrix is not positive semidefinite")
        half = torch.linalg.solve_triangular(factor, shifted.mH, upper=False).mH
        u, s, _ = torch.linalg.svd(half, full_matrices=False)
        values = (s.square() - nudge.squeeze(-1)).clamp_min(0)
        if size >= limit or bool((values[..., -1] <= 10 * shift).all()):
            break
        size = min(2 * size, limit)
    return Spectral(u, values + shift, values[..., -1] + shift)


@torch.no_grad()
def pivoted_cholesky(diagonal: Tensor, row: Callable[[Tensor], Tensor], rank: int, *, tolerance: float = 0.0) -> Tensor:
    """L [..., n, r] with L Lᴴ ≈ A, greedily the largest remaining pivot first: Harbrecht, Peters and Schneider 2012.

    `diagonal` is [..., n]; `row(i)` gives A's rows [..., n] for indices i [...]. Stops at `rank`, or when the trace
    that is left falls to `tolerance` times the trace. r <= rank; no entry of A but those rows is asked for.
    """
    left = diagonal.clone()
    whole = left.sum(-1)
    columns: list[Tensor] = []
    if bool((left < 0).any()):
        raise LinAlgError("pivoted_cholesky: a negative entry on the diagonal, the matrix is not semidefinite")
    for _ in range(min(rank, diagonal.shape[-1])):
        pivot, at = left.max(-1)
        if bool((left.sum(-1) <= tolerance * whole).all()) or not bool((pivot > 0).any()):
            break
        column = row(at).conj()
        for earlier in columns:
            column = column - earlier * earlier.gather(-1, at.unsqueeze(-1)).conj()
        alive = (pivot > 0).unsqueeze(-1)
        column = torch.where(alive, column / torch.where(alive, pivot.unsqueeze(-1), 1).sqrt(), 0)
        columns.append(column)
        left = (left - column.abs().square()).clamp_min(0).scatter(-1, at.unsqueeze(-1), 0)
    if not columns:
        return diagonal.new_zeros((*diagonal.shape, 0))
    return torch.stack(columns, -1)


def low_rank_plus(factor: Tensor, shift: float | Tensor) -> Spectral:
    """The exact inverse of L Lᴴ + shift I, from `factor` L [..., n, r]: what a pivoted Cholesky preconditions with."""
    u, s, _ = torch.linalg.svd(factor, full_matrices=False)
    shift = torch.as_tensor(shift, dtype=s.dtype, device=s.device).expand(s.shape[:-1])
    if not bool((shift > 0).all()):
        raise ValueError("a low-rank preconditioner needs a positive shift")
    return Spectral(u, s.square() + shift.unsqueeze(-1), shift)
