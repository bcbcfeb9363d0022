"""The diagonal and its sum."""

import math
from functools import reduce

import torch
from torch import Tensor

from einlinear.linalg.rules.predicates import (
    blocks,
    body,
    conjugation,
    factors,
    middle,
    square_blocks,
    square_factors,
    terms,
)
from einlinear.linalg.rules.spectral import joined, outer, outer_sum
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, Product, Scaled, Sum, Zero, product
from einlinear.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Circulant,
    Diagonal,
    DirectSum,
    Kernel,
    Kronecker,
    KroneckerSum,
    LowRankUpdate,
    Permutation,
    Sparse,
    Toeplitz,
    Triangular,
)

COLUMNS = 512
"""Unit vectors that an operator without a rule is applied to at a time."""


def _spread(value: Tensor, n: int) -> Tensor:
    return value[..., None].expand(*value.shape, n)


def _thin(operator: Product, *_: object) -> bool:
    """Whether the product passes through fewer dimensions than it starts from."""
    return min(factor.shape[-1] for factor in operator.factors) < operator.shape[-1]


def _cyclic(operator: Product) -> Tensor:
    """tr(AB) = tr(BA): the trace of the smallest of the products' cyclic turns."""
    at = min(range(len(operator.factors)), key=lambda k: operator.factors[k].shape[-1])
    turned = operator.factors[at + 1 :] + operator.factors[: at + 1]
    return product(*turned).dense().diagonal(0, -2, -1).sum(-1)


def _row_sums(operator: Product) -> Tensor:
    """(U Vᴴ)_ii through the narrowest place."""
    at = min(range(len(operator.factors) - 1), key=lambda k: operator.factors[k].shape[-1])
    left, right = product(*operator.factors[: at + 1]).dense(), product(*operator.factors[at + 1 :]).T.dense()
    size = min(operator.shape[-2:])
    return (left[..., :size, :] * right[..., :size, :]).sum(-1)


def _by_units(operator: Operator) -> Tensor:
    """Entry by entry, from products with unit vectors."""
    size, n = min(operator.shape[-2:]), operator.shape[-1]
    parts = []
    for start in range(0, size, COLUMNS):
        count = min(COLUMNS, size - start)
        unit = torch.eye(n, count, dtype=operator.dtype, device=operator.device).roll(start, 0)
        parts.append(operator.matmul(unit)[..., start : start + count, :].diagonal(0, -2, -1))
    batch = operator.batch_shape
    nothing = torch.zeros(*batch, 0, dtype=operator.dtype, device=operator.device)
    return torch.cat(parts, -1).expand(*batch, size) if parts else nothing


def _fixed_points(P: Permutation) -> Tensor:
    return (P.index == torch.arange(P.shape[-1], device=P.device)).to(P.dtype)


def _own_blocks(A: Block, *_: object) -> bool:
    """Whether the blocks on the diagonal are square, and as many rows as columns of blocks."""
    return len(A.rows) == len(A.rows[0]) and all(row[k].square for k, row in enumerate(A.rows))


def _central(A: Block) -> tuple[Operator, ...]:
    return tuple(row[k] for k, row in enumerate(A.rows))


def _gram(A: LowRankUpdate) -> Tensor:
    """Σ over the columns of U C ∘ conj(V)."""
    left = A.left if A.core is None else A.core.T.matmul(A.left.mT).mT
    return (left * A.V.conj()).sum(-1)


def _main_band(A: Banded) -> Tensor:
    return A.band(0) if 0 in A.offsets else torch.zeros_like(A.bands[..., 0, :])


DIAGONAL = Table(
    "diagonal",
    Rule(Dense, "read off", lambda A: A.matrix.diagonal(0, -2, -1)),
    Rule(Identity, "ones", lambda I: torch.ones(I.shape[-1], dtype=I.dtype, device=I.device)),
    Rule(Zero, "zeros", lambda Z: torch.zeros(min(Z.shape), dtype=Z.dtype, device=Z.device)),
    Rule(Diagonal, "d", lambda D: D.values),
    Rule(Triangular, "read off", lambda T: T.diagonal()),
    Rule(Permutation, "fixed points", _fixed_points),
    Rule(
        Toeplitz,
        "constant",
        lambda T: _spread(T.first_column[..., 0], min(T.shape[-2:])).expand(*T.batch_shape, -1),
        when=lambda T: min(T.shape[-2:]) > 0,
    ),
    Rule(Circulant, "constant", lambda C: _spread(C.column[..., 0], C.shape[-1]), when=lambda C: C.shape[-1] > 0),
    Rule(Banded, "the main band", _main_band),
    Rule(Sparse, "entries with equal row and column", lambda S: S.diagonal()),
    Rule(Kernel, "k(xᵢ, zᵢ)", lambda K: K.entries(), when=lambda K: K.square),
    Rule(Scaled, "c diag A", lambda cA, A: cA.c[..., None] * A, body),
    Rule(Sum, "diag A + diag B", lambda _, *parts: reduce(torch.add, parts), terms),
    Rule(Kronecker, "diag A ⊗ diag B", lambda _, *parts: outer(*parts), factors, square_factors),
    Rule(KroneckerSum, "diag A ⊕ diag B", lambda _, *parts: outer_sum(*parts), terms),
    Rule(BlockDiagonal, "all", lambda _, of: of.flatten(-2), body, square_blocks),
    Rule(DirectSum, "all", lambda _, *parts: joined(*parts), blocks, square_blocks),
    Rule(Block, "those of the blocks on the diagonal", lambda _, *parts: joined(*parts), _central, _own_blocks),
    Rule(
        LowRankUpdate, "diag A + Σᵣ (UC ∘ V̄)", lambda A, base: base + _gram(A), lambda A: (A.base,), lambda A: A.square
    ),
    Rule(Product, "Σᵣ (U ∘ V̄), U Vᴴ through few dimensions", _row_sums, when=_thin),
    Rule(Operator, "products with unit vectors", _by_units, cost=lambda A: A.flops * min(A.shape[-2:])),
)


def _kronecker_sum(A: KroneckerSum, *traces: Tensor) -> Tensor:
    n = A.shape[-1]
    return reduce(
        torch.add, (trace * (n // max(part.shape[-1], 1)) for trace, part in zip(traces, A.terms, strict=True))
    )


TRACE = Table(
    "trace",
    Rule(Scaled, "tr cA = c tr A", lambda cA, A: cA.c * A, body),
    Rule(Sum, "tr (A + B) = tr A + tr B", lambda _, *parts: reduce(torch.add, parts), terms),
    Rule(Kronecker, "tr A ⊗ B = tr A tr B", lambda _, *parts: reduce(torch.mul, parts), factors, square_factors),
    Rule(KroneckerSum, "tr A ⊕ B = n tr A + m tr B", _kronecker_sum, terms),
    Rule(BlockDiagonal, "tr diag(A₁, A₂, …) = Σ tr Aᵢ", lambda _, of: of.sum(-1), body, square_blocks),
    Rule(DirectSum, "tr A ⊞ B = tr A + tr B", lambda _, *parts: reduce(torch.add, parts), blocks, square_blocks),
    Rule(Product, "tr Q B Qᴴ = tr B", lambda _, B: B, middle, conjugation),
    Rule(Product, "tr AB = tr BA, through the fewest dimensions", _cyclic, when=_thin),
    Rule(
        Operator,
        "the sum of the diagonal",
        lambda A: DIAGONAL(A).sum(-1),
        cost=lambda A: float(math.prod(A.shape[-1:])),
    ),
)
