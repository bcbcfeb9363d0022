"""A few eigenpairs: which of all, and whether they are looked for by products first."""

from collections.abc import Callable

from torch import Tensor

from einlinear.linalg.direct import affordable
from einlinear.linalg.rules.banded import SMALL, by_band
from einlinear.linalg.rules.spectral import EIGH, Spectrum
from einlinear.operator import Dense, Operator, OperatorError, product, transformed
from einlinear.operators import Banded, Selection

_KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "LA": lambda values: -values.real,
    "SA": lambda values: values.real,
    "LR": lambda values: -values.real,
    "SR": lambda values: values.real,
    "LM": lambda values: -values.abs(),
    "SM": lambda values: values.abs(),
}


def counted(k: int, n: int, what: str) -> None:
    if not isinstance(k, int) or not 0 <= k <= n:
        raise OperatorError(f"cannot find {k!r} {what}: there are {n}, pass a whole number from 0 to {n}")


def choosable(k: int | None, n: int, which: str) -> None:
    if which not in _KEYS:
        raise OperatorError(f"cannot choose eigenvalues by {which!r}: pass one of {', '.join(_KEYS)}")
    if k is not None:
        counted(k, n, "eigenvalues")


def chosen(values: Tensor, vectors: Operator, k: int | None, which: str, order: str) -> Spectrum:
    """The `k` values that `which` names, with their vectors, in ascending order or by that key."""
    n = values.shape[-1]
    choosable(k, n, which)
    index = _KEYS[which](values).argsort(-1)[..., : n if k is None else k]
    if order == "ascending":
        index = index.gather(-1, values.gather(-1, index).argsort(-1))
    chosen = values.gather(-1, index)
    if isinstance(vectors, Dense):
        return Spectrum(chosen, Dense(vectors.matrix.gather(-1, index[..., None, :].expand(*vectors.shape[:-1], -1))))
    return Spectrum(chosen, product(vectors, Selection(index, n, dtype=vectors.dtype, device=vectors.device).T))


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


def patience(A: Operator) -> int | None:
    """Products worth four times the whole spectrum, after which that is taken; None where it cannot be had."""
    *_, (*_, cost) = EIGH.plan(A)
    return int(4 * cost / (60 * A.flops)) if affordable(A) else None
