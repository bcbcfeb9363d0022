"""Least squares of any shape from products with A and its adjoint (Fong and Saunders 2011, algorithm LSMR)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import (
    TOLERANCE,
    Matmul,
    check_columns,
    divide,
    norm,
    real,
    unit,
    widened,
    working,
)
from einlinear.linalg.result import LinAlgError, Result


@torch.no_grad()
def lsmr(
    matmul: Matmul,
    adjoint: Matmul,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Result[Tensor]:
    """The x [..., n, k] of least norm that minimises |A x - b|² + damping² |x|², for any A: m x n, singular or not.

    `matmul` maps [..., n, k] to [..., m, k], `adjoint` back; `rhs` is [..., m, k]. The residual reported is the one
    that vanishes at a solution, |Aᴴ(b - A x) - damping² x| / (|A| |b|) with the norm of A as estimated on the way (at
    most its Frobenius norm), or |b - A x| / |b| where that is smaller.
    """
    check_columns("lsmr", "rhs", rhs)
    if damping < 0:
        raise ValueError(f"lsmr takes a damping of zero or more, not {damping}")
    tolerance = TOLERANCE[real(rhs.dtype)] if tolerance is None else tolerance
    forward, backward = widened(matmul, rhs.dtype), widened(adjoint, rhs.dtype)
    b, scale = unit(rhs.to(working(rhs.dtype)))
    v = backward(b)
    limit = min(10 * min(b.shape[-2], v.shape[-2]) + 10, 10_000) if max_iterations is None else max_iterations
    x, size, spent = torch.zeros_like(v), norm(v), 0
    r, gradient = b, v
    every = 1 if b.device.type == "cpu" else 8
    while spent < limit:  # rounds, each from the true residual, as rounding lets the recurrence drift
        correction, steps, size = _bidiagonalise(
            forward, backward, r, gradient, x, damping, tolerance, size, limit - spent, every
        )
        spent += steps
        ahead = x + correction
        r_new = b - forward(ahead)
        gradient_new = backward(r_new) - damping**2 * ahead
        before, after = (_relative(res, grad, size, damping) for res, grad in ((r, gradient), (r_new, gradient_new)))
        kept = after < before if steps < spent else torch.ones_like(after, dtype=torch.bool)
        x, r = torch.where(kept, ahead, x), torch.where(kept, r_new, r)
        gradient = torch.where(kept, gradient_new, gradient)
        if not bool(((after > tolerance) & (after < before / 2)).any()):
            break
    if bool(norm(x).isnan().any()):
        raise LinAlgError("lsmr: the product with the operator gave NaN or overflowed")
    value = (x * scale).to(rhs.dtype)
    x = divide(value.to(x.dtype), scale)
    r = b - forward(x)
    residual = _relative(r, backward(r) - damping**2 * x, size, damping).squeeze(-2)
    done = Result(value, spent, bool((residual <= 1.01 * tolerance).all()), residual)
    done.or_warn("lsmr", tolerance)
    return done


def _relative(r: Tensor, gradient: Tensor, size: Tensor, damping: float) -> Tensor:
    """The smaller of the two relative residuals, of columns with a right-hand side of norm one."""
    stationary = divide(norm(gradient), torch.maximum(size, size.new_tensor(damping)))
    return stationary if damping else torch.minimum(stationary, norm(r))


def _bidiagonalise(
    forward: Matmul,
    backward: Matmul,
    r: Tensor,
    gradient: Tensor,
    x0: Tensor,
    damping: float,
    tolerance: float,
    size: Tensor,
    budget: int,
    every: int,
) -> tuple[Tensor, int, Tensor]:
    """The correction of x0, the steps taken and the estimated norm of A; names as in section 2 and 3 of the paper.

    With damping and a start other than zero the system is [A; d I] with residual [r; -d x0]: its second half is
    carried along as a tensor of its own.
    """
    damped = damping > 0
    tail = -damping * x0 if damped else None
    beta = norm(r) if tail is None else torch.hypot(norm(r), norm(tail))
    u = divide(r, beta)
    w = divide(tail, beta) if tail is not None else None
    v = divide(gradient, beta)
    alpha = norm(v)
    v = divide(v, alpha)
    zeta_bar, alpha_bar = alpha * beta, alpha
    rho = rho_bar = cosine_bar = torch.ones_like(alpha)
    sine_bar = torch.zeros_like(alpha)
    h, h_bar, x = v, torch.zeros_like(v), torch.zeros_like(v)
    square = torch.maximum(size, alpha) ** 2
    small = 10 * torch.finfo(alpha.dtype).eps
    for step in range(budget):
        u = forward(v) - alpha * u
        if w is not None:
            w = damping * v - alpha * w
        length = norm(u) if w is None else torch.hypot(norm(u), norm(w))
        length = torch.where(length > small * square.sqrt(), length, 0)
        u = divide(u, length)
        w = divide(w, length) if w is not None else None
        v = (backward(u) if w is None else backward(u) + damping * w) - length * v
        alpha_next = norm(v)
        alpha_next = torch.where(alpha_next > small * square.sqrt(), alpha_next, 0)
        v = divide(v, alpha_next)
        square = torch.maximum(square, alpha**2 + length**2)
        rho_before, rho = rho, torch.hypot(alpha_bar, length)
        cosine, sine = divide(alpha_bar, rho), divide(length, rho)
        theta, alpha_bar = sine * alpha_next, cosine * alpha_next
        rho_bar_before, zeta_before = rho_bar, zeta_bar
        theta_bar, rho_temp = sine_bar * rho, cosine_bar * rho
        rho_bar = torch.hypot(rho_temp, theta)
        cosine_bar, sine_bar = divide(rho_temp, rho_bar), divide(theta, rho_bar)
        zeta, zeta_bar = cosine_bar * zeta_before, -sine_bar * zeta_before
        h_bar = h - divide(theta_bar * rho, rho_before * rho_bar_before) * h_bar
        x = x + divide(zeta, rho * rho_bar) * h_bar
        h = v - divide(theta, rho) * h
        alpha = alpha_next
        if step % every == 0 and not bool((zeta_bar.abs() > tolerance * square.sqrt() / 2).any()):
            return x, step + 1, square.sqrt()
    return x, budget, square.sqrt()
