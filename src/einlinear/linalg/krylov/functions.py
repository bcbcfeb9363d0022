"""f(A) b from products alone: by Lanczos for Hermitian matrices, by Arnoldi for the others, exp by steps of time."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.arnoldi import Arnoldi
from einlinear.linalg.krylov.lanczos import Function, Lanczos
from einlinear.linalg.krylov.system import TOLERANCE, Matmul, check_columns, divide, in_parts, real, working
from einlinear.linalg.result import LinAlgError, Result

FIRST = 16
"""Steps before the first look at the value; each look after half as many again."""


@torch.no_grad()
def apply_function(
    matmul: Matmul,
    rhs: Tensor,
    function: Function,
    *,
    hermitian: bool = True,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    two_pass: bool = False,
) -> Result[Tensor]:
    """f(A) b for an elementwise `function` of eigenvalues, on columns [..., n, k].

    The Krylov space grows until the value no longer changes by `tolerance` relative to itself; `residual` [..., k] is
    the last change. `hermitian=False` uses Arnoldi. `two_pass` (Hermitian only) runs the recurrence twice instead of
    keeping its basis: memory of a few vectors a column however many steps. A real matrix and right-hand side give a
    real value unless the function is complex on the spectrum.
    """
    check_columns("apply_function", "rhs", rhs)
    if two_pass and not hermitian:
        raise ValueError("apply_function: two passes need the three-term recurrence of a Hermitian matrix")
    wanted = TOLERANCE[real(rhs.dtype)] if tolerance is None else tolerance
    limit = max_iterations or min(1000, rhs.shape[-2] * (4 if two_pass else 1))
    process = Lanczos(matmul, rhs, reorthogonalise=not two_pass) if hermitian else Arnoldi(matmul, rhs)
    weights, change = rhs.new_zeros(()), process.length
    while True:
        found = process.advance(min(max(FIRST, process.steps // 2), limit - process.steps))
        new = found.first_column(function)
        if weights.ndim:
            known = torch.nn.functional.pad(weights, (0, new.shape[-1] - weights.shape[-1]))
            change = divide(torch.linalg.vector_norm(new - known, dim=-1), torch.linalg.vector_norm(new, dim=-1))
        else:
            change = torch.full(new.shape[:-1], torch.inf, device=rhs.device, dtype=process.length.dtype)
        weights = new
        if process.exhausted:
            change = torch.zeros_like(change)
        if bool((change <= wanted).all()) or process.steps >= limit:
            break
    weights, spent = weights * process.length.mT, process.steps
    if process.basis is not None:
        value = process.basis.combine(weights)
    else:
        value = torch.zeros(rhs.shape, dtype=torch.promote_types(weights.dtype, working(rhs.dtype)), device=rhs.device)

        def add(j: int, v: Tensor) -> None:
            value.add_(weights[..., j].unsqueeze(-2) * v)

        Lanczos(matmul, rhs, reorthogonalise=False, visit=add).advance(spent)
        spent *= 2
    complex_only = value.is_complex() and not rhs.is_complex()
    value = value if complex_only else value.to(rhs.dtype)
    return Result(value, spent, bool((change <= wanted).all()), change).or_warn("apply_function", wanted)


@torch.no_grad()
def expm_multiply(
    matmul: Matmul,
    rhs: Tensor,
    time: float | complex = 1.0,
    *,
    hermitian: bool = False,
    tolerance: float | None = None,
    max_iterations: int = 10_000,
    room: int = 40,
) -> Result[Tensor]:
    """exp(time A) b on columns [..., n, k], in constant memory: substeps by Krylov spaces of `room` vectors.

    Each substep is as long as its error estimate allows (the last basis vector's share of the value, Saad 1992,
    section 5); `residual` sums the estimates. Complex times make real right-hand sides complex.
    """
    check_columns("expm_multiply", "rhs", rhs)
    dtype = torch.promote_types(rhs.dtype, torch.complex64) if isinstance(time, complex) else rhs.dtype
    wanted = TOLERANCE[real(rhs.dtype)] if tolerance is None else tolerance
    x = rhs.to(torch.promote_types(working(rhs.dtype), dtype) if dtype.is_complex else working(rhs.dtype))
    product = in_parts(matmul) if x.is_complex() and not rhs.is_complex() else matmul
    done, spent, error = 0.0, 0, torch.zeros(rhs.shape[:-2] + rhs.shape[-1:], dtype=torch.float64, device=rhs.device)
    step = 1.0
    while done < 1.0 and spent < max_iterations:
        process = Lanczos(product, x) if hermitian else Arnoldi(product, x)
        found = process.advance(min(room, max_iterations - spent))
        spent += process.steps
        small = found.matrix() * time
        step = min(step, 1.0 - done)
        while True:
            grown = torch.linalg.matrix_exp(small * step)[..., :, 0]
            # First omitted term: beta_m |e_m' phi_1(step H) e_1| step, phi_1 by one more matrix exponential.
            share = abs(time) * step * found.rest * _phi(small * step)[..., -1, 0].abs()
            relative = divide(share, torch.linalg.vector_norm(grown, dim=-1))
            worst = 0.0 if process.exhausted else float(relative.max())
            if worst <= wanted * step or step < 1e-8:
                break
            step *= max(0.1, min(0.8, 0.9 * (wanted * step / worst) ** (1 / max(2, process.steps // 2))))
        if not bool(torch.isfinite(grown).all()):
            raise LinAlgError("expm_multiply: the value overflows")
        x = process.basis.combine(grown * process.length.mT) if process.basis is not None else x
        error = error + (0.0 if process.exhausted else relative)
        done += step
        step *= 1.5 if worst < 0.1 * wanted * step else 1.0
    converged = done >= 1.0 and bool((error <= 2 * wanted).all())
    return Result(x.to(dtype), spent, converged, error).or_warn("expm_multiply", wanted)


def _phi(matrix: Tensor) -> Tensor:
    """phi_1(M) = (exp(M) - 1) / M, from the exponential of a matrix twice the size."""
    n = matrix.shape[-1]
    both = torch.zeros((*matrix.shape[:-2], 2 * n, 2 * n), dtype=matrix.dtype, device=matrix.device)
    both[..., :n, :n] = matrix
    both[..., :n, n:] = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    corner: Tensor = torch.linalg.matrix_exp(both)[..., :n, n:]
    return corner
