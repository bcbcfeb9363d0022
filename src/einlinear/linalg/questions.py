"""The public functions: each checks its input, asks the table, and gives the answer its form."""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.kernels import explain
from einlinear.layer import Linear
from einlinear.linalg.adapters import from_cola, from_scipy
from einlinear.linalg.direct import affordable, written
from einlinear.linalg.iterative import extreme
from einlinear.linalg.rules.banded import SMALL, by_band
from einlinear.linalg.rules.determinant import SLOGDET, Determinant, real_if_real
from einlinear.linalg.rules.factors import CHOLESKY, LU, PLU
from einlinear.linalg.rules.functions import APPLY, EXP, LOG, SQRT, TRACE_OF, Function, power
from einlinear.linalg.rules.inverse import INVERSE
from einlinear.linalg.rules.norm import FROBENIUS, SUMS
from einlinear.linalg.rules.singular import PINV, SINGULAR, SVD, SVDVALS, default_cut
from einlinear.linalg.rules.spectral import EIG, EIGH, EIGVALS, EIGVALSH, Spectrum
from einlinear.linalg.rules.trace import DIAGONAL, TRACE
from einlinear.linalg.table import Table
from einlinear.operator import Dense, Operator, OperatorError, lift, product, refute, transformed
from einlinear.operators import Banded, Selection, Sparse, Structured
from einlinear.structure import Structure

Subject = Operator | Tensor | nn.Module
_answers: dict[Any, tuple[Table, tuple[Any, ...]]] = {}
"""For `explain`: the table that a public function asks, and what it asks it with."""


def asks(table: Table, *arguments: Any) -> Callable[[Any], Any]:
    """Notes which table answers a function, so that `explain(function, A)` can say how."""

    def note(function: Any) -> Any:
        _answers[function] = (table, arguments)
        return function

    return note


def operator(subject: Any, factors: Any = None) -> Operator:
    """The operator that something stands for.

    A tensor, dense or torch-sparse; a `Structure` with its factors; the weight of an
    `einlinear.Linear` or `torch.nn.Linear` (the bias is no part of it); a matrix, sparse matrix or
    `LinearOperator` of NumPy or scipy; an operator of CoLA.
    """
    match subject:
        case Operator():
            return subject
        case Structure() if factors is not None:
            return Structured(subject, tuple(factors))
        case Linear():
            return Structured(subject.structure, tuple(subject.effective_factors()))
        case nn.Linear():
            return Dense(subject.weight)
        case Tensor():
            return lift(subject) if subject.layout == torch.strided else Sparse.of(subject)
    library = type(subject).__module__.partition(".")[0]
    if library in ("numpy", "scipy"):
        return from_scipy(subject)
    if library == "cola":
        return from_cola(subject)
    raise OperatorError(
        f"cannot make an operator of a {type(subject).__name__}: pass an Operator, a tensor, a Structure with its "
        f"factors, a linear layer, or a matrix of NumPy or scipy"
    )


@asks(INVERSE)
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
    A = _ready(A, "solve with", square=True)
    _fitting(A, b, A.shape[-1], "solve with")
    wide = b if b.ndim > 1 else b[:, None]
    x = INVERSE(A).matmul(wide.to(torch.promote_types(wide.dtype, A.dtype)))
    x = x.to(b.dtype) if b.is_floating_point() and b.element_size() == 2 else x
    return x if b.ndim > 1 else x[..., 0]


@asks(INVERSE)
def inverse(A: Subject) -> Operator:
    """A⁻¹ as an operator: structured where A is, otherwise a factorisation that substitution applies.

    Its determinant, and its own inverse, are known without further work.

    Raises:
        OperatorError: where A is singular or not square.
    """
    result: Operator = INVERSE(_ready(A, "invert", square=True))
    return result


@asks(PINV, 0.0)
def pinv(A: Subject, rtol: float | None = None) -> Operator:
    """The pseudo-inverse A⁺ of Moore and Penrose.

    Args:
        A: of any shape.
        rtol: singular values up to this part of the largest count as zero; max(m, n)·ε by default. (Products alone,
            beyond the memory for a matrix, know no such cut.)
    """
    A = _ready(A, "pseudo-invert")
    if rtol is not None and not 0 <= rtol < math.inf:
        raise OperatorError(f"cannot pseudo-invert {A!r} with rtol={rtol!r}: it must be a number from 0 on")
    result: Operator = PINV(A, default_cut(A) if rtol is None else float(rtol))
    return result


@asks(PINV, 0.0)
def lstsq(A: Subject, b: Tensor, rtol: float | None = None) -> Tensor:
    """The shortest x among those that minimise ‖A x − b‖, for a vector `[m]` or columns `[..., m, k]`.

    `rtol` is that of `pinv`.
    """
    A = operator(A)
    _fitting(A, b, A.shape[-2], "solve in the sense of least squares with")
    return pinv(A, rtol) @ b


@asks(SLOGDET)
def slogdet(A: Subject) -> Determinant:
    """Sign (phase, where A is complex) and logarithm of the modulus of det A, each `[...]`."""
    A = _ready(A, "take the determinant of", square=True)
    result: Determinant = SLOGDET(A)
    sign, logarithm = real_if_real(A, result)
    return Determinant(sign.to(A.dtype).expand(A.batch_shape), logarithm.expand(A.batch_shape))


@asks(SLOGDET)
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


@asks(TRACE)
def trace(A: Subject, f: Callable[..., Any] | None = None) -> Tensor:
    """The sum of the diagonal, `[...]`, of A or of f(A).

    `trace(A, exp)` is `trace(exp(A))` without f(A) ever being formed where eigenvalues are enough.

    Args:
        A: square.
        f: `exp`, `log`, `sqrt` of this module, or a function of a tensor of eigenvalues, entry by entry.
    """
    A = _ready(A, "take the trace of", square=True)
    if f is not None:
        function = _FUNCTIONS.get(f) or _entrywise(f)
        result: Tensor = TRACE_OF(A, function)
    else:
        result = TRACE(A)
    return result.expand(A.batch_shape)


@asks(DIAGONAL)
def diagonal(A: Subject) -> Tensor:
    """The main diagonal, `[..., min(m, n)]`."""
    A = _ready(A, "take the diagonal of")
    result: Tensor = DIAGONAL(A)
    return result.expand(*A.batch_shape, min(A.shape[-2:]))


@asks(EIGH)
def eigh(A: Subject, k: int | None = None, which: str = "LA") -> Spectrum:
    """Eigenvalues, ascending, and orthonormal eigenvectors of a Hermitian operator.

    Args:
        A: known to be Hermitian, or so by two random probes.
        k: how many; all of them where it is left out.
        which: "LA" or "SA" for the largest or smallest values, "LM" or "SM" by magnitude.
    """
    A = _hermitian(A, "find the eigenvalues of")
    _choosable(k, A.shape[-1], which)
    if "psd" in A.properties:  # by magnitude and algebraically are one order, and the ends are what products find
        which = {"LM": "LA", "SM": "SA"}.get(which, which)
    if k is not None and few(A, k, which) and (found := extreme(A, k, which, _patience(A))):
        return _chosen(found[0], Dense(found[1]), k, which, "ascending")
    values, vectors = EIGH(A)
    values = (values.real if values.is_complex() else values).expand(*A.batch_shape, -1)
    return _chosen(values, vectors, k, which, "ascending")


@asks(EIGVALSH)
def eigvalsh(A: Subject) -> Tensor:
    """Eigenvalues of a Hermitian operator, ascending, `[..., n]`."""
    A = _hermitian(A, "find the eigenvalues of")
    values: Tensor = EIGVALSH(A)
    values = values.real if values.is_complex() else values
    return values.expand(*A.batch_shape, -1).sort(-1).values


@asks(EIG)
def eig(A: Subject, k: int | None = None, which: str = "LM") -> Spectrum:
    """Eigenvalues and eigenvectors, complex, in no order; the `k` of largest ("LM") or smallest ("SM") magnitude.

    "LR" and "SR" choose by the real part.
    """
    A = _ready(A, "find the eigenvalues of", square=True)
    _choosable(k, A.shape[-1], which)
    values, vectors = EIG(A)
    values = values.to(A.dtype.to_complex()).expand(*A.batch_shape, -1)
    return Spectrum(values, vectors) if k is None else _chosen(values, vectors, k, which, "by size")


@asks(EIGVALS)
def eigvals(A: Subject) -> Tensor:
    """Eigenvalues, complex, in no order, `[..., n]`."""
    A = _ready(A, "find the eigenvalues of", square=True)
    values: Tensor = EIGVALS(A)
    return values.to(A.dtype.to_complex()).expand(*A.batch_shape, -1)


@asks(SINGULAR)
def svd(A: Subject, k: int | None = None) -> SVD:
    """A = U diag(S) Vh with min(m, n) singular values, descending, or the `k` largest of them."""
    A = _ready(A, "find the singular values of")
    if k is not None:
        _counted(k, min(A.shape[-2:]), "singular values")
    u, s, vh = SINGULAR(A)
    s = s.expand(*A.batch_shape, -1)
    if isinstance(u, Dense) and isinstance(vh, Dense):
        return SVD(Dense(u.matrix[..., :k]), s[..., :k], Dense(vh.matrix[..., :k, :]))
    order = s.argsort(-1, descending=True)[..., :k]
    picked = Selection(order, s.shape[-1], dtype=A.dtype, device=A.device)
    return SVD(product(u, picked.T), s.gather(-1, order), product(picked, vh))


@asks(SVDVALS)
def svdvals(A: Subject) -> Tensor:
    """Singular values, descending, `[..., min(m, n)]`."""
    A = _ready(A, "find the singular values of")
    values: Tensor = SVDVALS(A)
    return values.expand(*A.batch_shape, -1).sort(-1, descending=True).values


@asks(CHOLESKY)
def cholesky(A: Subject) -> Operator:
    """The lower triangular L with A = L Lᴴ.

    Raises:
        OperatorError: where A is not Hermitian and positive definite.
    """
    result: Operator = CHOLESKY(_hermitian(A, "factorise"))
    return result


@asks(PLU)
def lu(A: Subject) -> LU:
    """A = P L U, with partial pivoting."""
    result: LU = PLU(_ready(A, "factorise"))
    return result


@asks(APPLY, EXP)
def exp(A: Subject) -> Operator:
    """The exponential, as an operator."""
    return _function(A, EXP)


@asks(APPLY, LOG)
def log(A: Subject) -> Operator:
    """The principal logarithm, as an operator."""
    return _function(A, LOG)


@asks(APPLY, SQRT)
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
    return _function(A, _entrywise(f, slope))


@asks(FROBENIUS)
def norm(A: Subject, ord: float | str = "fro") -> Tensor:
    """A norm, `[...]`.

    "fro"; 2 and -2, the largest and the smallest singular value; "nuc", their sum; 1 and -1, the largest and the
    smallest column sum; inf and -inf, those of rows.
    """
    A = _ready(A, "find the norm of")
    if ord == "fro":
        square: Tensor = FROBENIUS(A)
        root = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())  # of zero, with a gradient
        return root.expand(A.batch_shape)
    if ord in (1, -1, math.inf, -math.inf):
        result = SUMS(A if ord in (1, -1) else A.T, *_picking(ord))
        return result.expand(A.batch_shape)
    if ord in (2, -2, "nuc"):
        values = svdvals(A)
        if values.shape[-1] == 0:
            return values.sum(-1)
        return values.sum(-1) if ord == "nuc" else values[..., 0 if ord == 2 else -1]
    raise OperatorError(
        f"cannot find the norm {ord!r} of {A!r}: the norms are 'fro', 'nuc', 2, -2, 1, -1, inf and -inf"
    )


@asks(SVDVALS)
def cond(A: Subject, p: float | str = 2) -> Tensor:
    """‖A‖ ‖A⁻¹‖ in the norm p; the ratio of extreme singular values for p = 2. ∞ where A is singular."""
    A = _ready(A, "find the condition of", square=p != 2)
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


def _picking(ord: float | str) -> tuple[Any]:
    """What takes one of the column sums."""
    return (torch.amax if ord in (1, math.inf) else torch.amin,)


def _entrywise(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None = None) -> Function:
    if not callable(f):
        raise OperatorError(f"cannot apply {f!r} to an operator: pass a function of a tensor of eigenvalues")
    return Function(getattr(f, "__name__", "function"), f, slope)


_FUNCTIONS: dict[Any, Function] = {exp: EXP, log: LOG, sqrt: SQRT}


def _function(A: Subject, f: Function) -> Operator:
    result: Operator = APPLY(_ready(A, f"take the {f.name} of", square=True), f)
    return result


def _ready(subject: Subject, doing: str, square: bool = False) -> Operator:
    """The operator, in at least 32 bits, refused where it cannot be square or finite."""
    A = operator(subject)
    if square and not A.square:
        m, n = A.shape[-2:]
        raise OperatorError(f"cannot {doing} {A!r}: it is {m}×{n}, and this needs a square operator")
    _finite(doing, A)
    return A.to(torch.float32) if A.dtype in (torch.float16, torch.bfloat16) else A


def _finite(doing: str, A: Operator, *others: Tensor) -> None:
    tensors = (*A.tensors, *others)
    if transformed(*tensors):
        return
    for tensor in tensors:
        # The sum of finite numbers is finite or too large; only then are all of them looked at.
        if not math.isfinite(abs(tensor.detach().sum().item())) and not bool(tensor.isfinite().all()):
            raise OperatorError(f"cannot {doing} {A!r}: there are NaN or infinite entries in its input")


def _hermitian(subject: Subject, doing: str) -> Operator:
    A = _ready(subject, doing, square=True)
    if "hermitian" in A.properties:
        return A
    if not transformed(*A.tensors):
        try:
            refute(A, "hermitian")
        except OperatorError:
            raise OperatorError(f"cannot {doing} {A!r}: it is not Hermitian; use eig, svd or lu") from None
    return A.claim("hermitian")


def few(A: Operator, k: int, which: str) -> bool:
    """Whether k eigenpairs come cheaper from products than all of them from the matrix."""
    if which not in ("LA", "SA", "LM", "SM") or not 0 < k < A.shape[-1] or transformed(*A.tensors):
        return False
    if isinstance(A, Banded) and by_band(A):
        return A.shape[-1] > SMALL
    if which == "SM":
        return False
    *_, (_, whole, rule, cost) = EIGH.plan(A)
    structured = rule.kind is not Operator or whole.shape[-1] < A.shape[-1]
    return not structured and A.shape[-1] > 512 and cost > 60 * (2 * k + 30) * A.flops


def _patience(A: Operator) -> int | None:
    """Products worth four times the whole spectrum, after which that is taken; None where it cannot be had."""
    *_, (*_, cost) = EIGH.plan(A)
    return int(4 * cost / (60 * A.flops)) if affordable(A) else None


def _fitting(A: Operator, b: Tensor, rows: int, doing: str) -> None:
    """Raises where b is no right-hand side of so many rows."""
    if not isinstance(b, Tensor) or b.ndim == 0 or b.shape[-2 if b.ndim > 1 else -1] != rows:
        found = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
        raise OperatorError(
            f"cannot {doing} {A!r}: the right-hand side is {found}, it must be a vector [{rows}] or columns "
            f"[..., {rows}, k]"
        )
    if A.tensors and A.device != b.device:
        raise OperatorError(
            f"cannot {doing} {A!r}, which is on {A.device}, for a right-hand side on {b.device}: move one by "
            f".to(device)"
        )
    _finite("solve with", A, b)


_KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "LA": lambda values: -values.real,
    "SA": lambda values: values.real,
    "LR": lambda values: -values.real,
    "SR": lambda values: values.real,
    "LM": lambda values: -values.abs(),
    "SM": lambda values: values.abs(),
}


def _counted(k: int, n: int, what: str) -> None:
    if not isinstance(k, int) or not 0 <= k <= n:
        raise OperatorError(f"cannot find {k!r} {what}: there are {n}, pass a whole number from 0 to {n}")


def _choosable(k: int | None, n: int, which: str) -> None:
    if which not in _KEYS:
        raise OperatorError(f"cannot choose eigenvalues by {which!r}: pass one of {', '.join(_KEYS)}")
    if k is not None:
        _counted(k, n, "eigenvalues")


def _chosen(values: Tensor, vectors: Operator, k: int | None, which: str, order: str) -> Spectrum:
    """The `k` values that `which` names, with their vectors, in ascending order or by that key."""
    n = values.shape[-1]
    _choosable(k, n, which)
    index = _KEYS[which](values).argsort(-1)[..., : n if k is None else k]
    if order == "ascending":
        index = index.gather(-1, values.gather(-1, index).argsort(-1))
    chosen = values.gather(-1, index)
    if isinstance(vectors, Dense):
        return Spectrum(chosen, Dense(vectors.matrix.gather(-1, index[..., None, :].expand(*vectors.shape[:-1], -1))))
    return Spectrum(chosen, product(vectors, Selection(index, n, dtype=vectors.dtype, device=vectors.device).T))


_SQUARE = {solve, inverse, slogdet, logdet, trace, eigh, eigvalsh, eig, eigvals, cholesky, exp, log, sqrt, pow, apply}


@explain.register(FunctionType)
def _explain(question: Any, A: Subject, *arguments: Any) -> str:
    """`explain(solve, A)`: the rules that would run, from the outside in, with their cost."""
    if question in _SQUARE and not operator(A).square:
        raise OperatorError(f"cannot explain {question.__name__} of {operator(A)!r}: it needs a square operator")
    given: tuple[Any, ...]
    if question is pow:
        table, given = APPLY, (power(*arguments),)
    elif question is apply:
        table, given = APPLY, (Function("f", *arguments),)
    elif question is trace and arguments:
        table, given = TRACE_OF, (_FUNCTIONS.get(arguments[0]) or _entrywise(arguments[0]),)
    elif question is norm and arguments and arguments[0] != "fro":
        sums = arguments[0] in (1, -1, math.inf, -math.inf)
        table, given = (SUMS, _picking(arguments[0])) if sums else (SVDVALS, ())
    elif question in _answers:
        table, given = _answers[question]
    else:
        raise TypeError(f"cannot explain {question.__name__}: pass a function of einlinear.linalg and an operator")
    subject = operator(A)
    lines = [f"{question.__name__} of {subject!r}: {table.question}"]
    for depth, part, rule, cost in table.plan(subject, *given):
        what = f"{cost:.3g} flops, " if cost else ""
        lines.append(f"{'  ' * (depth + 1)}{part!r}: {rule.law} ({what}{rule.answer})")
    return "\n".join(lines)
