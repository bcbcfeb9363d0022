"""The public functions: each checks its input, asks the table, and gives the answer its form."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from einlinear.linalg.choosing import choosable, chosen, counted, few, patience
from einlinear.linalg.direct import written
from einlinear.linalg.iterative import extreme
from einlinear.linalg.rules.determinant import SLOGDET, Determinant, real_if_real
from einlinear.linalg.rules.factors import CHOLESKY, LU, PLU
from einlinear.linalg.rules.functions import APPLY, TRACE_OF
from einlinear.linalg.rules.inverse import INVERSE
from einlinear.linalg.rules.norm import FROBENIUS, SUMS
from einlinear.linalg.rules.singular import PINV, SINGULAR, SVD, SVDVALS, default_cut
from einlinear.linalg.rules.spectral import EIG, EIGH, EIGVALS, EIGVALSH, Spectrum
from einlinear.linalg.rules.trace import DIAGONAL, TRACE
from einlinear.linalg.scalar import EXP, LOG, SQRT, Function, power
from einlinear.linalg.subjects import Subject, fitting, hermitian, operator, ready
from einlinear.operator import Dense, Operator, OperatorError, product, transformed
from einlinear.operators import Selection


def solve(A: Subject, b: Tensor) -> Tensor:
    """x with A x = b.

    `inverse(A)` holds the factorisation where there are several right-hand sides that come one
    after the other, or where the determinant is wanted too.

    Args:
        A: square, `[..., n, n]`.
        b: a vector `[n]`, or columns `[..., n, k]`.

    Raises:
        OperatorError: where A is singular or not square, where b does not fit or either is not finite.
    """
    A = ready(A, "solve with", square=True)
    fitting(A, b, A.shape[-1], "solve with")
    wide = b if b.ndim > 1 else b[:, None]
    x = INVERSE(A).matmul(wide.to(torch.promote_types(wide.dtype, A.dtype)))
    x = x.to(b.dtype) if b.is_floating_point() and b.element_size() == 2 else x
    return x if b.ndim > 1 else x[..., 0]


def inverse(A: Subject) -> Operator:
    """A⁻¹ as an operator: structured where A is, otherwise a factorisation that substitution applies.

    Its determinant, and its own inverse, are known without further work.

    Raises:
        OperatorError: where A is singular or not square.
    """
    result: Operator = INVERSE(ready(A, "invert", square=True))
    return result


def pinv(A: Subject, rtol: float | None = None) -> Operator:
    """The pseudo-inverse A⁺ of Moore and Penrose.

    Args:
        A: of any shape.
        rtol: singular values up to this part of the largest count as zero; max(m, n)·ε by default. (Products alone,
            beyond the memory for a matrix, know no such cut.)
    """
    A = ready(A, "pseudo-invert")
    if rtol is not None and not 0 <= rtol < math.inf:
        raise OperatorError(f"cannot pseudo-invert {A!r} with rtol={rtol!r}: it must be a number from 0 on")
    result: Operator = PINV(A, default_cut(A) if rtol is None else float(rtol))
    return result


def lstsq(A: Subject, b: Tensor, rtol: float | None = None) -> Tensor:
    """The shortest x among those that minimise ‖A x − b‖, for a vector `[m]` or columns `[..., m, k]`.

    `rtol` is that of `pinv`.
    """
    A = operator(A)
    fitting(A, b, A.shape[-2], "solve in the sense of least squares with")
    return pinv(A, rtol) @ b


def slogdet(A: Subject) -> Determinant:
    """Sign (phase, where A is complex) and logarithm of the modulus of det A, each `[...]`."""
    A = ready(A, "take the determinant of", square=True)
    result: Determinant = SLOGDET(A)
    sign, logarithm = real_if_real(A, result)
    return Determinant(sign.to(A.dtype).expand(A.batch_shape), logarithm.expand(A.batch_shape))


def logdet(A: Subject) -> Tensor:
    """log det A, `[...]`; −∞ where A is singular, complex where A is.

    Raises:
        OperatorError: where A is real and its determinant negative.
    """
    sign, logarithm = slogdet(A)
    if sign.is_complex():
        return torch.complex(logarithm, sign.angle())
    if not transformed(sign) and bool((sign < 0).any()):
        raise OperatorError(
            "cannot take the logarithm of a negative determinant: slogdet gives its sign and log|det|, "
            "and logdet of the operator in a complex dtype has a value"
        )
    return torch.where(sign < 0, torch.nan, logarithm)


def trace(A: Subject, f: Callable[..., Any] | None = None) -> Tensor:
    """The sum of the diagonal, `[...]`, of A or of f(A).

    `trace(A, exp)` is `trace(exp(A))` without f(A) ever being formed where eigenvalues are enough.

    Args:
        A: square.
        f: `exp`, `log`, `sqrt` of this module, or a function of a tensor of eigenvalues, entry by entry.
    """
    A = ready(A, "take the trace of", square=True)
    if f is not None:
        function = FUNCTIONS.get(f) or entrywise(f)
        result: Tensor = TRACE_OF(A, function)
    else:
        result = TRACE(A)
    return result.expand(A.batch_shape)


def diagonal(A: Subject) -> Tensor:
    """The main diagonal, `[..., min(m, n)]`."""
    A = ready(A, "take the diagonal of")
    result: Tensor = DIAGONAL(A)
    return result.expand(*A.batch_shape, min(A.shape[-2:]))


def eigh(A: Subject, k: int | None = None, which: str = "LA") -> Spectrum:
    """Eigenvalues, ascending, and orthonormal eigenvectors of a Hermitian operator.

    Args:
        A: known to be Hermitian, or so by two random probes.
        k: how many; all of them where it is left out.
        which: "LA" or "SA" for the largest or smallest values, "LM" or "SM" by magnitude.
    """
    A = hermitian(A, "find the eigenvalues of")
    choosable(k, A.shape[-1], which)
    if "psd" in A.properties:  # by magnitude and algebraically are one order, and the ends are what products find
        which = {"LM": "LA", "SM": "SA"}.get(which, which)
    if k is not None and few(A, k, which) and (found := extreme(A, k, which, patience(A))):
        return chosen(found[0], Dense(found[1]), k, which, "ascending")
    values, vectors = EIGH(A)
    values = (values.real if values.is_complex() else values).expand(*A.batch_shape, -1)
    return chosen(values, vectors, k, which, "ascending")


def eigvalsh(A: Subject) -> Tensor:
    """Eigenvalues of a Hermitian operator, ascending, `[..., n]`."""
    A = hermitian(A, "find the eigenvalues of")
    values: Tensor = EIGVALSH(A)
    values = values.real if values.is_complex() else values
    return values.expand(*A.batch_shape, -1).sort(-1).values


def eig(A: Subject, k: int | None = None, which: str = "LM") -> Spectrum:
    """Eigenvalues and eigenvectors, complex, in no order; the `k` of largest ("LM") or smallest ("SM") magnitude.

    "LR" and "SR" choose by the real part.
    """
    A = ready(A, "find the eigenvalues of", square=True)
    choosable(k, A.shape[-1], which)
    values, vectors = EIG(A)
    values = values.to(A.dtype.to_complex()).expand(*A.batch_shape, -1)
    return Spectrum(values, vectors) if k is None else chosen(values, vectors, k, which, "by size")


def eigvals(A: Subject) -> Tensor:
    """Eigenvalues, complex, in no order, `[..., n]`."""
    A = ready(A, "find the eigenvalues of", square=True)
    values: Tensor = EIGVALS(A)
    return values.to(A.dtype.to_complex()).expand(*A.batch_shape, -1)


def svd(A: Subject, k: int | None = None) -> SVD:
    """A = U diag(S) Vh with min(m, n) singular values, descending, or the `k` largest of them."""
    A = ready(A, "find the singular values of")
    if k is not None:
        counted(k, min(A.shape[-2:]), "singular values")
    u, s, vh = SINGULAR(A)
    s = s.expand(*A.batch_shape, -1)
    if isinstance(u, Dense) and isinstance(vh, Dense):
        return SVD(Dense(u.matrix[..., :k]), s[..., :k], Dense(vh.matrix[..., :k, :]))
    order = s.argsort(-1, descending=True)[..., :k]
    picked = Selection(order, s.shape[-1], dtype=A.dtype, device=A.device)
    return SVD(product(u, picked.T), s.gather(-1, order), product(picked, vh))


def svdvals(A: Subject) -> Tensor:
    """Singular values, descending, `[..., min(m, n)]`."""
    A = ready(A, "find the singular values of")
    values: Tensor = SVDVALS(A)
    return values.expand(*A.batch_shape, -1).sort(-1, descending=True).values


def cholesky(A: Subject) -> Operator:
    """The lower triangular L with A = L Lᴴ.

    Raises:
        OperatorError: where A is not Hermitian and positive definite.
    """
    result: Operator = CHOLESKY(hermitian(A, "factorise"))
    return result


def lu(A: Subject) -> LU:
    """A = P L U, with partial pivoting."""
    result: LU = PLU(ready(A, "factorise"))
    return result


def exp(A: Subject) -> Operator:
    """The exponential, as an operator."""
    return _function(A, EXP)


def log(A: Subject) -> Operator:
    """The principal logarithm, as an operator."""
    return _function(A, LOG)


def sqrt(A: Subject) -> Operator:
    """The principal square root, as an operator."""
    return _function(A, SQRT)


def pow(A: Subject, p: float) -> Operator:
    """Aᵖ: repeated products for whole p, principal powers otherwise."""
    if not isinstance(p, int | float) or not math.isfinite(p):
        raise OperatorError(f"cannot take the power {p!r} of an operator: the exponent must be a finite real number")
    if p == -1:
        return inverse(A)
    return _function(A, power(p))


def apply(A: Subject, f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None = None) -> Operator:
    """f(A): the operator with A's eigenvectors and the values f(λ).

    Args:
        A: square.
        f: from a tensor of eigenvalues to one of values, entry by entry.
        slope: f′, which makes gradients finite where eigenvalues coincide.
    """
    return _function(A, entrywise(f, slope))


def norm(A: Subject, ord: float | str = "fro") -> Tensor:
    """A norm, `[...]`.

    "fro"; 2 and -2, the largest and the smallest singular value; "nuc", their sum; 1 and -1, the largest and the
    smallest column sum; inf and -inf, those of rows.
    """
    A = ready(A, "find the norm of")
    if ord == "fro":
        square: Tensor = FROBENIUS(A)
        root = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())  # of zero, with a gradient
        return root.expand(A.batch_shape)
    if ord in (1, -1, math.inf, -math.inf):
        result = SUMS(A if ord in (1, -1) else A.T, *picking(ord))
        return result.expand(A.batch_shape)
    if ord in (2, -2, "nuc"):
        values = svdvals(A)
        if values.shape[-1] == 0:
            return values.sum(-1)
        return values.sum(-1) if ord == "nuc" else values[..., 0 if ord == 2 else -1]
    raise OperatorError(
        f"cannot find the norm {ord!r} of {A!r}: the norms are 'fro', 'nuc', 2, -2, 1, -1, inf and -inf"
    )


def cond(A: Subject, p: float | str = 2) -> Tensor:
    """‖A‖ ‖A⁻¹‖ in the norm p; the ratio of extreme singular values for p = 2. ∞ where A is singular."""
    A = ready(A, "find the condition of", square=p != 2)
    if p == 2:
        values = svdvals(A)
        if not values.shape[-1]:
            return values.sum(-1)
        return torch.where(values[..., -1] == 0, torch.inf, values[..., 0] / values[..., -1])
    size = norm(A, p)
    try:
        return size * norm(inverse(A), p)
    except OperatorError:  # singular, perhaps in a part of the batch alone
        return torch.linalg.cond(written(A), p)


def picking(ord: float | str) -> tuple[Any]:
    """What takes one of the column sums."""
    return (torch.amax if ord in (1, math.inf) else torch.amin,)


def entrywise(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None = None) -> Function:
    if not callable(f):
        raise OperatorError(f"cannot apply {f!r} to an operator: pass a function of a tensor of eigenvalues")
    return Function(getattr(f, "__name__", "function"), f, slope)


FUNCTIONS: dict[Any, Function] = {exp: EXP, log: LOG, sqrt: SQRT}


def _function(A: Subject, f: Function) -> Operator:
    result: Operator = APPLY(ready(A, f"take the {f.name} of", square=True), f)
    return result
