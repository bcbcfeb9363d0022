"""Banded and sparse operators by factorisations within their pattern, Toeplitz ones by the Levinson recursion."""

import torch
from torch import Tensor

from einlinear.linalg.borrowed import Factorised, banded_lu, fill, has_scipy, sparse_lu
from einlinear.linalg.refined import Refined, differentiable_logdet, with_phase
from einlinear.operator import Operator, OperatorError, Product, multiple, total, transformed
from einlinear.operators import Banded, Sparse, Toeplitz

FILL = 2e8
"""Entries that the factors of a sparse operator may have."""
SMALL = 256
"""Dimension up to which a dense factorisation is not worth avoiding."""


def by_band(operator: Banded, *_: object) -> bool:
    """Whether LAPACK's band factorisation serves: one matrix, narrow, its values at hand."""
    below, above = operator.reach
    narrow = 4 * (below + above) < operator.shape[-1]
    return narrow and not operator.batch_shape and has_scipy() and not transformed(*operator.tensors)


def by_pattern(operator: Sparse, *_: object) -> bool:
    """Whether SuperLU serves: one matrix, large, its values at hand, and factors that stay sparse."""
    if operator.batch_shape or operator.shape[-1] <= SMALL or not has_scipy() or transformed(*operator.tensors):
        return False
    return fill(operator) <= FILL


def by_levinson(operator: Toeplitz, *_: object) -> bool:
    """Whether the Levinson recursion serves: one definite matrix, large, its values at hand."""
    large = operator.shape[-1] > SMALL and not operator.batch_shape
    return large and "psd" in operator.properties and not transformed(*operator.tensors)


def factorised(operator: Banded | Sparse) -> Factorised:
    """By the library that fits."""
    return banded_lu(operator) if isinstance(operator, Banded) else sparse_lu(operator)


def inverse(operator: Banded | Sparse) -> Operator:
    """A⁻¹ by substitution, differentiable."""
    by = factorised(operator).inverse
    if by is None:
        raise OperatorError(
            f"cannot invert {operator!r}: it is singular (a pivot of its LU factorisation is zero); pinv and lstsq "
            f"answer in the sense of least squares"
        )
    return Refined(operator, by)


def slogdet(operator: Banded | Sparse) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the determinant, differentiable."""
    found = factorised(operator)
    sign = torch.tensor(found.sign, dtype=operator.dtype, device=operator.device)
    value = torch.tensor(found.logarithm, dtype=operator.dtype.to_real(), device=operator.device)
    if found.inverse is None:
        return sign, value
    return with_phase(sign, differentiable_logdet(operator, found.inverse, value))


def levinson(column: Tensor) -> tuple[Tensor, Tensor]:
    """First column of the inverse of a Hermitian definite Toeplitz matrix, `[n]`, and log det. O(n²).

    Source: Golub and Van Loan, Matrix Computations, section 4.7.3 (Durbin).

    Raises:
        OperatorError: where a leading minor is not positive.
    """
    n = column.shape[-1]
    step = column.new_zeros(n)  # the predictor of each order: T_k a = (error, 0, …, 0)
    step[0] = 1
    error = column[0].real.clone()
    errors = [error]
    for k in range(1, n):
        reflection = -(column[1 : k + 1].flip(0) @ step[:k]) / error
        step[: k + 1] = step[: k + 1] + reflection * step[: k + 1].flip(0).conj()
        error = error * (1 - reflection.abs().square())
        errors.append(error)
    every = torch.stack(errors)
    if not bool((every > 0).all()):
        raise OperatorError(
            f"cannot factorise a Toeplitz operator that was claimed 'psd': its leading minor of order "
            f"{int((every > 0).logical_not().nonzero()[0]) + 1} is not positive"
        )
    return step / error, every.log().sum()


def gohberg_semencul(first: Tensor) -> Operator:
    """The inverse of a Hermitian Toeplitz matrix from its first column x: (L(x) L(x)ᴴ − L(y) L(y)ᴴ) / x₀.

    L(x) is the lower triangular Toeplitz matrix with the first column x, and y = (0, x̄ₙ₋₁, …, x̄₁).
    Source: Gohberg and Semencul 1972; Kailath and Sayed, Fast Reliable Algorithms for Matrices with Structure, 1.3.
    """
    zero = torch.zeros_like(first)
    shifted = torch.cat([zero[:1], first[1:].flip(0).conj()])
    one, two = (Toeplitz(column, zero) for column in (first, shifted))
    return multiple(1 / first[0].real, total(Product((one, one.H)), -Product((two, two.H))))


def toeplitz_inverse(operator: Toeplitz) -> Operator:
    """T⁻¹ by transforms, differentiable."""
    first, _ = levinson(operator.first_column.detach())
    return Refined(operator, gohberg_semencul(first))


def toeplitz_slogdet(operator: Toeplitz) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the determinant, differentiable."""
    first, value = levinson(operator.first_column.detach())
    logarithm = differentiable_logdet(operator, gohberg_semencul(first), value)
    logarithm = logarithm.real if logarithm.is_complex() else logarithm
    return torch.ones((), dtype=operator.dtype, device=operator.device), logarithm


def quadratic(operator: Toeplitz) -> float:
    """The cost of the recursion."""
    return 4.0 * operator.shape[-1] ** 2


def banded_cost(operator: Banded) -> float:
    """The cost of a band factorisation."""
    below, above = operator.reach
    return 2.0 * operator.shape[-1] * below * (below + above)
