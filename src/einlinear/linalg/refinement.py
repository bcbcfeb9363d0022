"""Solving in 16 or 32 bits to the accuracy of 64: iterative refinement (Wilkinson 1963; Carson and Higham 2018).

The matrix may be stored in 16 bits and is multiplied in 32; residuals are taken in 64. Each outer step gains a factor
of about u κ, the unit roundoff of the *vectors* times the condition number: where that nears one nothing is gained,
which is reported. The system solved is that of the matrix as stored; that its rounding to 16 bits changed it is not
seen here.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from einlinear.linalg.krylov.cg import cg
from einlinear.linalg.krylov.system import Matmul, System, norm
from einlinear.linalg.result import NotConverged, Result

HOPELESS = (
    "An outer step gains a factor of {:.2g} only: unit roundoff times condition number is about one in the low "
    "precision; use a higher one, or a preconditioner."
)

ROWS = 1024
"""Rows of a stored matrix that are widened at once."""


def widening(matrix: Tensor, dtype: torch.dtype) -> Matmul:
    """Products of a matrix [..., m, n] stored in few bits with columns of a wider `dtype`, without a wide copy of
    it."""

    def product(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return torch.cat([rows.to(dtype) @ x for rows in matrix.split(ROWS, -2)], -2)

    return product


@torch.no_grad()
def refine(
    matmul: Matmul,
    rhs: Tensor,
    *,
    low: Matmul | None = None,
    inner: Callable[[Tensor], tuple[Tensor, int]] | None = None,
    inner_dtype: torch.dtype = torch.float32,
    inner_tolerance: float = 1e-3,
    tolerance: float = 1e-10,
    max_outer: int = 40,
    max_iterations: int = 20_000,
) -> Result[Tensor]:
    """Solve A x = b to `tolerance` in float64, all hard work in `inner_dtype`; b is [..., n, k], the result float64.

    `matmul` is A on float64 (or complex128) columns, for residuals: one product an outer step. `low` is A on columns
    of `inner_dtype`, `matmul` itself by default. The inner solver is `cg`, unless `inner(r) -> (correction,
    iterations)` is given, for example a `gmres` or a factorisation in low precision; it sees residuals scaled to norm
    one. `iterations` counts all inner ones.
    """
    wide = torch.complex128 if rhs.is_complex() else torch.float64
    system = System.of("refine", lambda x: matmul(x).to(wide), rhs.to(wide), None, tolerance, max_iterations)
    narrow = inner_dtype.to_complex() if rhs.is_complex() and not inner_dtype.is_complex else inner_dtype

    def conjugate(r: Tensor) -> tuple[Tensor, int]:
        with warnings.catch_warnings():  # what an inner solve leaves over is the outer one's business
            warnings.simplefilter("ignore", NotConverged)
            limit = min(2 * max(r.shape[-2], 500), max_iterations)
            found = cg(low or matmul, r, tolerance=inner_tolerance, max_iterations=limit)
        return found.value, found.iterations

    x, spent, note = system.start, 0, ""
    r = system.residual(x)
    for _ in range(max_outer):
        missing = system.unsolved(r)
        if not bool(missing.any()) or spent >= max_iterations:
            break
        size = norm(r)
        direction = torch.where(missing, r / torch.where(size == 0, 1, size), 0).to(narrow)
        correction, iterations = (inner or conjugate)(direction)
        spent += iterations
        ahead = x + correction.to(wide) * size
        left = system.residual(ahead)
        better = norm(left) < size
        x, r = torch.where(better, ahead, x), torch.where(better, left, r)
        gain = float(torch.where(missing & system.unsolved(left), norm(left) / size, 0).max())
        if gain > 0.5:
            note = HOPELESS.format(1 / gain)
            if not bool((better & missing).any()) or gain > 0.9:
                break
    return system.finish(x, spent, note)
