"""Conjugate gradients for Hermitian positive definite systems (Hestenes and Stiefel 1952)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, Run, System, divide, dot, refined
from einlinear.linalg.result import LinAlgError, Result

INDEFINITE = "The matrix is not positive definite: use minres if it is Hermitian, gmres or lsmr if not."
FLAT = (
    "It met a direction without curvature: the matrix is singular, or indefinite to rounding; minres or lsmr may serve."
)


@torch.no_grad()
def cg(
    matmul: Matmul,
    rhs: Tensor,
    *,
    guess: Tensor | None = None,
    preconditioner: Matmul | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    reorthogonalise: bool = False,
) -> Result[Tensor]:
    """Solve A x = b, each column of `rhs` [..., n, k] converging on its own; A Hermitian positive definite.

    `preconditioner` applies an approximate inverse, Hermitian positive definite too. `reorthogonalise` keeps every
    residual (memory grows with the iterations): fewer iterations in low precision, the same attainable accuracy. Not
    recorded by autograd: gradients are those of `einlinear.linalg.implicit.solve`.

    Raises LinAlgError for a direction of clearly negative curvature or a product that is NaN; warns `NotConverged`.
    """
    system = System.of("cg", matmul, rhs, guess, tolerance, max_iterations)

    def run(residual: Tensor, budget: int) -> Run:
        return _descend(system, residual, budget, preconditioner, reorthogonalise)

    return refined(system, run)


def _descend(system: System, r: Tensor, budget: int, preconditioner: Matmul | None, reorthogonalise: bool) -> Run:
    """One run of the recurrence from residual `r`."""
    z = r if preconditioner is None else preconditioner(r)
    p, rz, x = z, dot(r, z).real, torch.zeros_like(r)
    rz_start, active = rz, system.unsolved(r)
    steepest = torch.zeros_like(rz)  # largest p'Ap / r'z = 1 / step so far, the measure of curvature
    basis: list[tuple[Tensor, Tensor]] = []
    flat = torch.zeros_like(active)
    for iteration in range(budget):
        if preconditioner is not None and bool((active & (rz <= 0)).any()):
            raise LinAlgError("cg: the preconditioner is not positive definite")
        q = system.product(p)
        slope = divide(dot(p, q).real, rz)
        steepest = torch.maximum(steepest, slope)
        downhill = active & (slope > torch.finfo(slope.dtype).eps * steepest)
        step = torch.where(downhill, divide(torch.ones_like(slope), slope), 0)
        if reorthogonalise:
            basis.append((r, divide(z, rz)))
        x, r = x + step * p, r - step * q
        for old, dual in basis:
            r = r - old * dot(dual, r)
        if iteration % system.every == 0:
            stuck = active & ~downhill
            if bool(stuck.any()):
                falling = slope < -(torch.finfo(system.dtype).eps ** 0.5) * steepest
                # Past a direction without curvature the residual has exploded, and signs mean nothing.
                if bool((stuck & falling & (rz < 1e8 * rz_start)).any()):
                    raise LinAlgError(f"cg met a direction of negative curvature. {INDEFINITE}")
                flat = flat | stuck
            active = downhill & system.unsolved(r)
            if not bool(active.any()):
                return Run(x, iteration + 1, flat, FLAT)
        else:
            active = downhill
        z = r if preconditioner is None else preconditioner(r)
        rz, before = dot(r, z).real, rz
        p = z + torch.where(active, divide(rz, before), 0) * p
    return Run(x, budget, flat, FLAT)


@torch.no_grad()
def cg_shifted(
    matmul: Matmul,
    rhs: Tensor,
    shifts: Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Result[Tensor]:
    """Solve (A + s I) x = b for every entry s of `shifts` [s] from one Krylov space: value [s, ..., n, k].

    One product an iteration, however many shifts; A + min(s) I Hermitian positive definite. The residual is [s, ...,
    k]. Source: B. Jegerlehner, "Krylov space solvers for shifted linear systems", hep-lat/9612014, section 2.3.
    """
    if shifts.ndim != 1 or not len(shifts) or shifts.is_complex():
        raise ValueError(f"cg_shifted takes real shifts [s], one or more, not {shifts.dtype} {list(shifts.shape)}")
    order = [-1] + [1] * rhs.ndim
    smallest = shifts.min()
    seed = System.of("cg_shifted", lambda v: matmul(v) + smallest * v, rhs, None, tolerance, max_iterations)
    delta = (shifts - smallest).to(seed.scale).reshape(order)
    r = seed.rhs
    p, rr = r, dot(r, r).real
    xs = torch.zeros_like(r).expand(len(shifts), *r.shape)
    ps, zeta = r.expand_as(xs), torch.ones_like(rr).expand(len(shifts), *rr.shape)
    zeta_before, step_before, turn = zeta, torch.ones_like(rr), torch.zeros_like(rr)
    active = seed.unsolved(r)
    spent = 0
    while spent < seed.limit and bool(active.any()):
        q = seed.product(p)
        curvature = dot(p, q).real
        if bool((active & (curvature < 0)).any()):
            raise LinAlgError(f"cg_shifted met a direction of negative curvature. {INDEFINITE}")
        step = torch.where(active, divide(rr, curvature), 0)
        bottom = step * turn * (zeta_before - zeta) + zeta_before * step_before * (1 + delta * step)
        ahead = divide(zeta * zeta_before * step_before, bottom)
        ratio = divide(ahead, zeta)
        # A shift far away is done long before the seed is: it is frozen.
        moving = active & (zeta.abs() > torch.finfo(zeta.dtype).tiny ** 0.5)
        xs = xs + torch.where(moving, step * ratio, 0) * ps
        r = r - step * q
        rr, before = dot(r, r).real, rr
        turn = torch.where(active, divide(rr, before), 0)
        p = r + turn * p
        ps = ahead * r + turn * ratio**2 * ps
        zeta_before, zeta = torch.where(moving, zeta, zeta_before), torch.where(moving, ahead, zeta)
        step_before = torch.where(active, step, step_before)
        spent += 1
        if spent % seed.every == 0 or spent == seed.limit:
            active = seed.unsolved(r)
    everything = System(
        "cg_shifted",
        lambda v: seed.matmul(v.movedim(0, -2).flatten(-2)).unflatten(-1, (len(shifts), -1)).movedim(-2, 0) + delta * v,
        seed.rhs.expand_as(xs),
        seed.scale,
        None,
        seed.tolerance,
        seed.limit,
        seed.dtype,
    )
    return everything.finish(xs, spent)
