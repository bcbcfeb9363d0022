"""Norms that need no singular values: ‖A‖² of Frobenius, and the largest or smallest column sum."""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from einlinear.linalg.rules.predicates import blocks, body, factors, shift, shifted, terms, unshifted
from einlinear.linalg.rules.trace import COLUMNS, TRACE
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, Scaled, Sum, Zero
from einlinear.operators import (
    Banded,
    BlockDiagonal,
    Circulant,
    Diagonal,
    DirectSum,
    Kronecker,
    KroneckerSum,
    Toeplitz,
    Triangular,
)

Pick = Callable[[Tensor, int], Tensor]
"""torch.amax or torch.amin."""


def _square(values: Tensor) -> Tensor:
    return values.abs().square().sum(-1)


def _toeplitz(T: Toeplitz) -> Tensor:
    """Each entry of the ring as often as its diagonal is long."""
    m, n = T.shape[-2:]
    offset = torch.cat([torch.arange(m, device=T.device), torch.arange(min(1 - n, 0), 0, device=T.device)])
    length = torch.minimum(m - offset.clamp(min=0), n + offset.clamp(max=0))
    return (T.ring().abs().square() * length).sum(-1)


def _columns(operator: Operator, start: int) -> Tensor:
    n = operator.shape[-1]
    unit = torch.eye(n, min(COLUMNS, n - start), dtype=operator.dtype, device=operator.device).roll(start, 0)
    return operator.matmul(unit)


def _frobenius(operator: Operator) -> Tensor:
    total = torch.zeros((), dtype=operator.dtype, device=operator.device).real
    for start in range(0, operator.shape[-1], COLUMNS):
        total = total + _columns(operator, start).abs().square().sum((-2, -1))
    return total


def _sums(operator: Operator, pick: Pick) -> Tensor:
    sums = [pick(_columns(operator, start).abs().sum(-2), -1) for start in range(0, operator.shape[-1], COLUMNS)]
    if not sums or not operator.shape[-2]:
        return torch.zeros(operator.batch_shape, dtype=operator.dtype, device=operator.device).real
    return pick(torch.stack(sums), 0)


def _kronecker_sum(A: KroneckerSum, *squares: Tensor) -> Tensor:
    """Σ N/nᵢ ‖Aᵢ‖² + 2 Re Σ N/(nᵢ nⱼ) tr Aᵢ tr Āⱼ."""
    n, sizes = A.shape[-1], [term.shape[-1] for term in A.terms]
    found = reduce(torch.add, (square * (n // max(size, 1)) for square, size in zip(squares, sizes, strict=True)))
    traces = [TRACE(term) for term in A.terms]
    for j in range(len(sizes)):
        for i in range(j):
            found = found + 2 * (traces[i] * traces[j].conj()).real * (n // max(sizes[i] * sizes[j], 1))
    return found


def _shifted_sum(A: Sum, square: Tensor) -> Tensor:
    """‖A + cI‖² = ‖A‖² + 2 Re c̄ tr A + n |c|²."""
    unit, (rest,) = shift(A), unshifted(A)
    c = unit.c if isinstance(unit, Scaled) else torch.ones((), dtype=A.dtype, device=A.device)
    return square + 2 * (c.conj() * TRACE(rest)).real + A.shape[-1] * c.abs().square()


def _unitary(operator: Operator) -> Tensor:
    return torch.full((), float(operator.shape[-1]), dtype=operator.dtype, device=operator.device).real


def _band_sum(B: Banded) -> Tensor:
    return reduce(torch.add, (_square(B.band(k)) for k in B.offsets))


FROBENIUS = Table(
    "squared Frobenius norm",
    Rule(Identity, "n", _unitary),
    Rule(Operator, "n (unitary)", _unitary, when=lambda A: "unitary" in A.properties),
    Rule(Zero, "0", lambda Z: torch.zeros((), dtype=Z.dtype, device=Z.device).real),
    Rule(Diagonal, "Σ |d|²", lambda D: _square(D.values)),
    Rule(Dense, "Σ |a|²", lambda A: _square(A.matrix.flatten(-2))),
    Rule(Triangular, "Σ |a|²", lambda T: _square(T.dense().flatten(-2))),
    Rule(Circulant, "n ‖c‖²", lambda C: _square(C.column) * C.shape[-1]),
    Rule(Toeplitz, "each diagonal as often as it is long", _toeplitz),
    Rule(Banded, "Σ over the bands", _band_sum),
    Rule(Scaled, "|c|² ‖A‖²", lambda cA, A: cA.c.abs().square() * A, body),
    Rule(Kronecker, "‖A‖² ‖B‖²", lambda _, *parts: reduce(torch.mul, parts), factors),
    Rule(BlockDiagonal, "Σ ‖Aᵢ‖²", lambda _, of: of.sum(-1), body),
    Rule(DirectSum, "‖A‖² + ‖B‖²", lambda _, *parts: reduce(torch.add, parts), blocks),
    Rule(KroneckerSum, "n ‖A‖² + m ‖B‖² + 2 Re tr A tr B̄", _kronecker_sum, terms),
    Rule(Sum, "‖A + cI‖² = ‖A‖² + 2 Re c̄ tr A + n |c|²", _shifted_sum, unshifted, shifted),
    Rule(Operator, "column by column", _frobenius, cost=lambda A: A.flops * A.shape[-1]),
)

SUMS = Table(
    "largest or smallest column sum",
    Rule(Diagonal, "of |d|", lambda D, pick: pick(D.values.abs(), -1), when=lambda D, _: D.shape[-1] > 0),
    Rule(Kronecker, "‖A‖₁ ‖B‖₁", lambda _, *parts: reduce(torch.mul, parts[:-1]), factors),
    Rule(BlockDiagonal, "of the ‖Aᵢ‖₁", lambda _, of, pick: pick(of, -1), body),
    Rule(Scaled, "|c| ‖A‖₁", lambda cA, A, pick: cA.c.abs() * A, body),
    Rule(Operator, "column by column", _sums, cost=lambda A: A.flops * A.shape[-1]),
)
