"""Stabilised biconjugate gradients for any square system, in constant memory (van der Vorst 1992)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, Run, System, divide, dot, norm, refined, unit
from einlinear.linalg.result import Result


@torch.no_grad()
def bicgstab(
    matmul: Matmul,
    rhs: Tensor,
    *,
    guess: Tensor | None = None,
    preconditioner: Matmul | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Result[Tensor]:
    """Solve A x = b for any square A, each column of `rhs` [..., n, k] converging on its own.

    Two products an iteration. `preconditioner` applies an approximate inverse from the right. A breakdown restarts
    the recurrence from the true residual; where that no longer helps the result has not converged and says so.
    """
    system = System.of("bicgstab", matmul, rhs, guess, tolerance, max_iterations)

    def run(residual: Tensor, budget: int) -> Run:
        return _run(system, residual, budget, preconditioner or (lambda v: v))

    return refined(system, run, stagnation=0.9)


def _run(system: System, r: Tensor, budget: int, precondition: Matmul) -> Run:
    """The recurrence until every column has converged, broken down or wandered off; the best iterate of each."""
    shadow, p, x = r, r, torch.zeros_like(r)
    rho = dot(shadow, r)
    best, best_size = x, norm(r)
    active, broken = system.unsolved(r), torch.zeros_like(best_size, dtype=torch.bool)
    tiny = torch.finfo(best_size.dtype).eps
    for iteration in range(budget):
        p_hat = precondition(p)
        v = system.product(p_hat)
        step = divide(rho, dot(shadow, v))
        s = r - step * v
        s_hat = precondition(s)
        t = system.product(s_hat)
        direction, length = unit(t)  # squares of its entries might vanish
        omega = divide(dot(direction, s), length)
        x = x + torch.where(active, step * p_hat + omega * s_hat, 0)
        r = torch.where(active, s - omega * t, r)
        rho_next = dot(shadow, r)
        turn = divide(rho_next, rho) * divide(step, omega)
        p = r + turn * (p - omega * v)
        rho = rho_next
        size = norm(r)
        better = size < best_size
        best, best_size = torch.where(better, x, best), torch.where(better, size, best_size)
        lost = (rho.abs() <= tiny * norm(shadow) * size) | (omega == 0) | ~(size < best_size / tiny**0.5)
        broken = broken | (active & lost)
        if iteration % system.every == 0:
            system.unsolved(torch.where(active, r, 0))
            active = (best_size > system.tolerance) & ~broken
            if not bool(active.any()):
                break
    return Run(best, iteration + 1, torch.zeros_like(broken), "")
