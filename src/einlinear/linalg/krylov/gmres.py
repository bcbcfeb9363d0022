"""Generalised minimal residuals for any square system (Saad and Schultz 1986), restarted and preconditioned."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import Basis
from einlinear.linalg.krylov.system import Matmul, Run, System, divide, norm, refined
from einlinear.linalg.result import LinAlgError, Result

SINGULAR = (
    "The Krylov space is exhausted: the matrix is singular and this system has no solution in it; lsmr may serve."
)
ROOM = 2**25
"""Entries of all bases together, where no restart is asked for."""


@torch.no_grad()
def gmres(
    matmul: Matmul,
    rhs: Tensor,
    *,
    guess: Tensor | None = None,
    preconditioner: Matmul | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    restart: int | None = None,
) -> Result[Tensor]:
    """Solve A x = b for any square A, each column of `rhs` [..., n, k] with a Krylov space of its own.

    `preconditioner` applies an approximate inverse from the right, so that the residual minimised is the true one.
    Memory: `restart` + 1 vectors a column; by default up to 200 (all n of them in small systems, where GMRES is then
    exact), fewer where they would fill 256 MB in float64. Singular consistent systems are solved where the Krylov
    space holds a solution.
    """
    if restart is not None and restart < 1:
        raise ValueError(f"gmres needs restart of 1 or more, not {restart}")
    system = System.of("gmres", matmul, rhs, guess, tolerance, max_iterations)
    length = min(restart or max(20, min(200, ROOM // max(1, rhs.numel()))), rhs.shape[-2])

    def run(residual: Tensor, budget: int) -> Run:
        return _cycle(system, residual, min(budget, length), preconditioner or (lambda v: v))

    return refined(system, run, stagnation=0.99)


def _cycle(system: System, r: Tensor, steps: int, precondition: Matmul) -> Run:
    """One cycle from residual `r`.

    The residual norm of the small least-squares problem is |r| / |u|, u the vector with u H = 0 and u_0 = 1, which
    grows by one inner product a step: no rotations. The problem itself is solved once, at the end.
    """
    length = norm(r)
    basis = Basis(divide(r, length), steps + 1)
    hessenberg = r.new_zeros((*r.shape[:-2], r.shape[-1], steps + 1, steps))
    u = r.new_zeros((*r.shape[:-2], r.shape[-1], steps + 1))
    u[..., 0] = 1
    done = 0
    for j in range(steps):
        coefficients, w, rest = basis.orthogonalise(system.product(precondition(basis.rows[..., j, :].mT)))
        hessenberg[..., : j + 1, j] = coefficients
        hessenberg[..., j + 1, j] = rest.squeeze(-2)
        basis.append(w)
        done = j + 1
        u[..., j + 1] = -divide((u[..., : j + 1] * coefficients).sum(-1), rest.squeeze(-2))
        if done % system.every == 0:
            ended = rest == 0
            missing = length > system.tolerance * torch.linalg.vector_norm(u[..., : done + 1], dim=-1).unsqueeze(-2)
            if not bool((missing & ~ended).any()):
                break
    small = hessenberg[..., : done + 1, :done]
    if not bool(torch.isfinite(small).all()):
        raise LinAlgError("gmres: the product with the operator gave NaN or overflowed")
    rhs = r.new_zeros(small.shape[:-1])
    rhs[..., 0] = length.squeeze(-2)
    # The pseudo-inverse, for a singular matrix makes the small problem singular; but only to rounding.
    tolerance = 10 * done * torch.finfo(length.dtype).eps
    weights = (torch.linalg.pinv(small, rtol=tolerance) @ rhs.unsqueeze(-1)).squeeze(-1)
    left = torch.linalg.vector_norm(rhs - (small @ weights.unsqueeze(-1)).squeeze(-1), dim=-1).unsqueeze(-2)
    ended = (basis.rows[..., done, :] == 0).all(-1).unsqueeze(-2)
    return Run(precondition(basis.combine(weights)), done, ended & (left > system.tolerance), SINGULAR)
