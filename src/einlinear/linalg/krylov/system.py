"""A linear system as the iterative solvers see it: unit columns, a working precision, an honest end.

Every solver scales each right-hand side to norm one first, and its initial guess alike, so that tolerances are
relative and 16-bit products neither overflow nor underflow; and it ends with the residual recomputed from the
operator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg.result import LinAlgError, Result

Matmul = Callable[[Tensor], Tensor]
"""A product with the operator: `[..., n, k]` to `[..., m, k]`, any batch dimensions."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative residual asked for by default, by the real precision of the right-hand side."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of columns, `[..., n, k]` twice to `[..., 1, k]`, the first conjugated."""
    return (x.conj() * y).sum(-2, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Norms of columns, `[..., n, k]` to real `[..., 1, k]`."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return size


def divide(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and zero where `by` is zero."""
    return torch.where(by == 0, torch.zeros((), dtype=x.dtype, device=x.device), x / torch.where(by == 0, 1, by))


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of norm one and the norms; zero columns stay zero. Safe where squares would overflow or vanish."""
    size = x.abs().amax(-2, keepdim=True) if x.shape[-2] else x.new_zeros((*x.shape[:-2], 1, x.shape[-1])).abs()
    x = divide(x, size)
    length = norm(x)
    return divide(x, length), size * length


def working(dtype: torch.dtype) -> torch.dtype:
    """The precision of the vectors: the caller's own, but 32 bits where theirs is 16."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def widened(matmul: Matmul, dtype: torch.dtype) -> Matmul:
    """A product in 16 bits of vectors in 32: each column goes in with largest entry one and comes out with its
    size."""
    if working(dtype) == dtype:
        return matmul

    def product(x: Tensor) -> Tensor:
        size = x.abs().amax(-2, keepdim=True)
        return matmul(divide(x, size).to(dtype)).to(x.dtype) * size

    return product


def in_parts(matmul: Matmul) -> Matmul:
    """The product of a real operator with complex columns: real and imaginary parts side by side."""

    def product(x: Tensor) -> Tensor:
        real_part, imaginary = matmul(torch.cat([x.real, x.imag], -1)).chunk(2, -1)
        return torch.complex(real_part.contiguous(), imaginary.contiguous())

    return product


def check_columns(method: str, name: str, x: Tensor) -> None:
    """Refuse what is no floating stack of columns, or has entries that are not finite."""
    if x.ndim < 2:
        raise ValueError(f"{method} takes `{name}` as columns [..., n, k], not {list(x.shape)}: unsqueeze a vector")
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"{method} takes a floating or complex `{name}`, not {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise LinAlgError(f"{method}: `{name}` has entries that are NaN or infinite")


def starts(method: str, start: Tensor) -> tuple[Tensor, Tensor]:
    """First basis vectors [..., n, k] in the working precision, and the lengths [..., 1, k] they stand for.

    A zero column gets length zero and some unit vector, so that its Krylov space lies in the spectrum like any other.
    """
    check_columns(method, "start", start)
    n = start.shape[-2]
    if not n:
        raise ValueError(f"{method} needs a matrix that is not empty")
    vector, length = unit(start.to(working(start.dtype)))
    return torch.where(length == 0, n**-0.5, vector), length


@dataclass(frozen=True)
class System:
    """A x = b with unit columns, and what to do at the end. `rhs` must have the batch dimensions of the product."""

    method: str
    matmul: Matmul
    rhs: Tensor
    scale: Tensor
    guess: Tensor | None
    tolerance: float
    limit: int
    dtype: torch.dtype

    @staticmethod
    def of(
        method: str,
        matmul: Matmul,
        rhs: Tensor,
        guess: Tensor | None,
        tolerance: float | None,
        max_iterations: int | None,
    ) -> "System":
        check_columns(method, "rhs", rhs)
        dtype, (b, scale) = rhs.dtype, unit(rhs.to(working(rhs.dtype)))
        if guess is not None:
            check_columns(method, "guess", guess)
            guess = divide(guess.to(b.dtype), scale).expand_as(b)
        tolerance = TOLERANCE[real(dtype)] if tolerance is None else tolerance
        limit = min(10 * b.shape[-2], 10_000) if max_iterations is None else max_iterations
        return System(method, widened(matmul, dtype), b, scale, guess, tolerance, limit, dtype)

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.rhs) if self.guess is None else self.guess

    @property
    def every(self) -> int:
        """Iterations between two looks at the residual: on an accelerator each look waits for the queue to drain."""
        return 1 if self.rhs.device.type == "cpu" else 8

    def product(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        if y.shape != x.shape:
            raise ValueError(
                f"{self.method} solves square systems with rhs broadcast against the operator's batch: the product of "
                f"{list(x.shape)} came out as {list(y.shape)}"
            )
        return y

    def residual(self, x: Tensor) -> Tensor:
        return self.rhs - self.product(x) if bool(x.any()) else self.rhs.clone()

    def unsolved(self, residual: Tensor) -> Tensor:
        """Columns [..., 1, k] whose residual lies above the tolerance; NaN is an error at once."""
        size = norm(residual)
        if bool(size.isnan().any()):
            raise LinAlgError(f"{self.method}: the product with the operator gave NaN or overflowed")
        return size > self.tolerance

    def finish(self, x: Tensor, iterations: int, note: str = "") -> Result[Tensor]:
        """The solution in the caller's precision and scale, with the residual of exactly that solution."""
        value = (x * self.scale).to(self.dtype)
        residual = norm(self.residual(divide(value.to(x.dtype), self.scale))).squeeze(-2)
        slack = 1.01 * self.tolerance  # the solvers stop at the tolerance, before the last rounding
        done = Result(value, iterations, bool((residual <= slack).all()), residual)
        done.or_warn(self.method, self.tolerance, note)
        return done


STALLED = "Another run hardly lowers the residual: rounding, or the matrix, lets this method get no further."


@dataclass(frozen=True)
class Run:
    """One run of a solver: its correction of the solution, its iterations, the columns it gave up and why."""

    correction: Tensor
    iterations: int
    hopeless: Tensor
    why: str


def refined(system: System, run: Callable[[Tensor, int], Run], stagnation: float = 0.5) -> Result[Tensor]:
    """Rounds of `run(residual, budget)` until the *true* residual is small.

    Rounding lets the residual of a recurrence drift away from the true one. So each round starts from the true one.
    The rounds end when it is small enough, when the iterations are used up, or when no column's falls below
    `stagnation` times itself any more (a half: a new run that cannot do that has met rounding). A later round that
    makes a column worse is dropped; the first one never, for its residual need not be monotone.
    """
    x, spent, note = system.start, 0, ""
    r = system.residual(x)
    open_ = system.unsolved(r)
    while bool(open_.any()) and spent < system.limit:
        done = run(torch.where(open_, r, 0), system.limit - spent)
        left = system.residual(x + done.correction)
        kept = norm(left) < norm(r) if spent else torch.ones_like(open_)
        falls = norm(left) <= stagnation * norm(r)
        spent += done.iterations
        x, r = torch.where(kept, x + done.correction, x), torch.where(kept, left, r)
        missing = open_ & system.unsolved(r)
        open_ = missing & falls & ~done.hopeless
        if bool((missing & done.hopeless).any()):
            note = done.why
        elif bool((missing & ~falls).any()) and spent < system.limit:
            note = note or STALLED
    return system.finish(x, spent, note)
