"""Minimal residuals for Hermitian systems, indefinite and singular ones too (Paige and Saunders 1975)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, Run, System, divide, dot, norm, refined, unit
from einlinear.linalg.result import LinAlgError, Result

INCONSISTENT = (
    "The residual is orthogonal to the range: the matrix is singular and no x solves the system; the value is a "
    "least-squares solution."
)


@torch.no_grad()
def minres(
    matmul: Matmul,
    rhs: Tensor,
    *,
    guess: Tensor | None = None,
    preconditioner: Matmul | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Result[Tensor]:
    """Solve A x = b for Hermitian A, each column of `rhs` [..., n, k] converging on its own.

    `preconditioner` applies a Hermitian positive definite approximate inverse of |A|. A singular system without
    solution ends with a least-squares solution and a `NotConverged` warning that says so.
    """
    system = System.of("minres", matmul, rhs, guess, tolerance, max_iterations)

    def run(residual: Tensor, budget: int) -> Run:
        return _minimise(system, residual, budget, preconditioner)

    return refined(system, run)


def _minimise(system: System, r: Tensor, budget: int, preconditioner: Matmul | None) -> Run:
    """Lanczos from `r`, its tridiagonal matrix made triangular by one Givens rotation a step."""
    precondition = preconditioner or (lambda v: v)
    target = torch.where(system.unsolved(r), system.tolerance, torch.inf)
    z = precondition(r)
    beta = _length(r, z)
    goal = target * beta / norm(r)  # the recurrence measures in the preconditioner's norm
    x, v_before = torch.zeros_like(r), torch.zeros_like(r)
    v, z = divide(r, beta), divide(z, beta)
    d, d_before = torch.zeros_like(r), torch.zeros_like(r)
    phi, beta_here = beta, torch.zeros_like(beta)
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    epsilon, delta_bar = torch.zeros_like(beta), torch.zeros_like(beta)
    scale = torch.zeros_like(beta)
    tiny = torch.finfo(beta.dtype).eps
    small = max(100 * tiny, min(system.tolerance, tiny**0.5) / 10)
    stationary = torch.zeros_like(beta, dtype=torch.bool)
    for iteration in range(budget):
        q = system.product(z)
        alpha = dot(z, q).real
        q = q - alpha * v - beta_here * v_before
        z_next = precondition(q)
        beta_next = _length(q, z_next)
        scale = torch.maximum(scale, alpha.abs() + beta_here + beta_next)
        beta_next = torch.where(beta_next > 10 * tiny * scale, beta_next, 0)  # the Krylov space is exhausted
        # Columns of T against the previous rotation, then the rotation that clears beta_next.
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon_before, epsilon, delta_bar = epsilon, sine * beta_next, -cosine * beta_next
        gamma = torch.hypot(gamma_bar, beta_next)
        singular = gamma <= tiny * scale
        slope = phi * torch.hypot(gamma_bar, delta_bar)  # norm of A r, of the residual before this step
        cosine, sine = divide(gamma_bar, gamma), divide(beta_next, gamma)
        d_new = torch.where(singular, 0, divide(z - epsilon_before * d_before - delta * d, gamma))
        # |A r| tells a least-squares solution: past it the iterates of a singular system run away.
        stationary = stationary | singular | (slope <= small * scale * phi)
        moved = (phi > goal) & ~stationary
        x = x + torch.where(moved, cosine * phi, 0) * d_new
        phi = torch.where(moved, sine * phi, phi)
        d_before, d = d, d_new
        v_before, v, z = v, divide(q, beta_next), divide(z_next, beta_next)
        beta_here = beta_next
        if iteration % system.every == 0:
            if bool(phi.isnan().any()):
                raise LinAlgError("minres: the product with the operator gave NaN or overflowed")
            still = phi > goal
            if not bool((still & ~stationary & (beta_here > 0)).any()):
                return Run(x, iteration + 1, still & stationary, INCONSISTENT)
    return Run(x, budget, (phi > goal) & stationary, INCONSISTENT)


def _length(r: Tensor, z: Tensor) -> Tensor:
    """Norm of r in the preconditioner's inner product."""
    if r is z:
        return norm(r)
    (r, size_r), (z, size_z) = unit(r), unit(z)
    cosine = dot(r, z).real
    if bool((cosine < -(torch.finfo(cosine.dtype).eps ** 0.5)).any()):
        raise LinAlgError("minres: the preconditioner is not positive definite")
    return (cosine.clamp_min(0) * size_r * size_z).sqrt()
