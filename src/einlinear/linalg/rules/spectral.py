"""Eigenvalues and eigenvectors. Vectors come back in the structure of the operator.

Sorting is left to the entry point (`einlinear.linalg.eigh`): rules give values in the order of
their vectors, so that these stay Kronecker products, transforms and blocks.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from einlinear.linalg.borrowed import banded_eigenvalues
from einlinear.linalg.direct import cubic, written
from einlinear.linalg.rules.banded import by_band
from einlinear.linalg.rules.predicates import (
    blocks,
    body,
    conjugation,
    factors,
    has,
    middle,
    shift,
    shifted,
    square_blocks,
    square_factors,
    terms,
    unshifted,
)
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, OperatorError, Product, Scaled, Sum, product
from einlinear.operators import (
    Banded,
    BlockDiagonal,
    Circulant,
    Diagonal,
    DirectSum,
    Fourier,
    Kronecker,
    KroneckerSum,
    Triangular,
    kron,
)


class Spectrum(NamedTuple):
    """A V = V diag(values): `values`, `[..., n]`, and the operator V whose columns are the vectors."""

    values: Tensor
    vectors: Operator


def outer(*values: Tensor) -> Tensor:
    """All products of one entry of each, the last index fastest."""
    return reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), values)


def outer_sum(*values: Tensor) -> Tensor:
    """All sums of one entry of each, the last index fastest."""
    return reduce(lambda a, b: (a[..., :, None] + b[..., None, :]).flatten(-2), values)


def joined(*values: Tensor) -> Tensor:
    """One after the other, batches broadcast."""
    batch = torch.broadcast_shapes(*[part.shape[:-1] for part in values])
    return torch.cat([part.expand(*batch, -1) for part in values], -1)


def _unit(operator: Operator) -> Identity:
    return Identity(operator.shape[-1], dtype=operator.dtype, device=operator.device)


def _ones(operator: Operator) -> Tensor:
    return torch.ones(operator.shape[-1], dtype=operator.dtype, device=operator.device)


def _shift_of(operator: Sum) -> Tensor:
    term = shift(operator)
    return term.c[..., None] if isinstance(term, Scaled) else term.dense().diagonal(0, -2, -1)


def _frequencies(circulant: Circulant) -> Spectrum:
    values = circulant.eigenvalues()
    transform = Fourier(circulant.shape[-1], dtype=values.dtype, device=values.device)
    return Spectrum(values.real if "hermitian" in circulant.properties else values, transform.H)


def _eigh_dense(operator: Operator) -> Spectrum:
    values, vectors = torch.linalg.eigh(written(operator))
    return Spectrum(values, Dense(vectors).claim("unitary"))


def _eig_dense(operator: Operator) -> Spectrum:
    values, vectors = torch.linalg.eig(written(operator))
    return Spectrum(values, Dense(vectors))


def _complex(spectrum: Spectrum) -> Spectrum:
    return Spectrum(spectrum.values.to(spectrum.values.dtype.to_complex()), spectrum.vectors)


def _real_circulant(operator: Circulant, *_: object) -> bool:
    return "hermitian" in operator.properties


STRUCTURED = (
    Rule(Identity, "I x = x", lambda I: Spectrum(_ones(I), I)),
    Rule(Diagonal, "D eᵢ = dᵢ eᵢ", lambda D: Spectrum(D.values, _unit(D))),
    Rule(Scaled, "c A: values c λ", lambda cA, A: Spectrum(cA.c[..., None] * A.values, A.vectors), body),
    Rule(Sum, "A + cI: values λ + c", lambda S, A: Spectrum(A.values + _shift_of(S), A.vectors), unshifted, shifted),
    Rule(
        Kronecker,
        "A ⊗ B: values λμ, vectors V ⊗ W",
        lambda _, *parts: Spectrum(outer(*[p.values for p in parts]), kron(*[p.vectors for p in parts])),
        factors,
        square_factors,
    ),
    Rule(
        KroneckerSum,
        "A ⊕ B: values λ + μ, vectors V ⊗ W",
        lambda _, *parts: Spectrum(outer_sum(*[p.values for p in parts]), kron(*[p.vectors for p in parts])),
        terms,
    ),
    Rule(
        BlockDiagonal,
        "diag(A₁, A₂, …): all values, vectors diag(V₁, V₂, …)",
        lambda _, of: Spectrum(of.values.flatten(-2), BlockDiagonal(of.vectors)),
        body,
        square_blocks,
    ),
    Rule(
        DirectSum,
        "A ⊞ B: all values, vectors V ⊞ W",
        lambda _, *parts: Spectrum(joined(*[p.values for p in parts]), DirectSum(tuple(p.vectors for p in parts))),
        blocks,
        square_blocks,
    ),
    Rule(
        Product,
        "Q B Qᴴ: values of B, vectors Q V",
        lambda P, B: Spectrum(B.values, product(P.factors[0], B.vectors)),
        middle,
        conjugation,
    ),
)

EIGH = Table(
    "eigenvalues and vectors (Hermitian)",
    Rule(Circulant, "C = Fᴴ diag(F c) F", _frequencies),
    *STRUCTURED,
    Rule(Operator, "written out, LAPACK's Hermitian eigensolver", _eigh_dense, cost=lambda A: 9 * cubic(A)),
)

EIG = Table(
    "eigenvalues and vectors",
    Rule(Circulant, "C = Fᴴ diag(F c) F", lambda C: _complex(_frequencies(C))),
    *STRUCTURED,
    Rule(
        Operator,
        "A = Aᴴ, written out, LAPACK's Hermitian eigensolver",
        lambda A: _complex(_eigh_dense(A)),
        when=has("hermitian"),
        cost=lambda A: 9 * cubic(A),
    ),
    Rule(Operator, "written out, LAPACK's eigensolver", _eig_dense, cost=lambda A: 25 * cubic(A)),
)

VALUES = (
    Rule(Identity, "λ = 1", _ones),
    Rule(Diagonal, "λ = d", lambda D: D.values),
    Rule(Scaled, "c A: c λ", lambda cA, values: cA.c[..., None] * values, body),
    Rule(Sum, "A + cI: λ + c", lambda S, values: values + _shift_of(S), unshifted, shifted),
    Rule(Kronecker, "A ⊗ B: λμ", lambda _, *values: outer(*values), factors, square_factors),
    Rule(KroneckerSum, "A ⊕ B: λ + μ", lambda _, *values: outer_sum(*values), terms),
    Rule(BlockDiagonal, "diag(A₁, A₂, …): all", lambda _, values: values.flatten(-2), body, square_blocks),
    Rule(DirectSum, "A ⊞ B: all", lambda _, *values: joined(*values), blocks, square_blocks),
    Rule(Product, "Q B Qᴴ: those of B", lambda _, values: values, middle, conjugation),
    Rule(Triangular, "triangular: the diagonal", lambda T: T.diagonal()),
)


def _values_dense(operator: Operator) -> Tensor:
    values: Tensor = torch.linalg.eigvals(written(operator))
    return values


def _tridiagonal(operator: Banded, *_: object) -> bool:
    return operator.reach in ((0, 1), (1, 0))


EIGVALSH = Table(
    "eigenvalues (Hermitian)",
    Rule(Circulant, "C = Fᴴ diag(F c) F: F c", lambda C: C.eigenvalues().real),
    *VALUES,
    Rule(
        Banded,
        "within the band (LAPACK, by scipy)",
        banded_eigenvalues,
        when=lambda A: by_band(A) and not (torch.is_grad_enabled() and any(t.requires_grad for t in A.tensors)),
        cost=lambda A: 30.0 * sum(A.reach) * A.shape[-1] ** 2,
    ),
    Rule(
        Operator,
        "written out, LAPACK's Hermitian eigensolver",
        lambda A: torch.linalg.eigvalsh(written(A)),
        cost=lambda A: 2 * cubic(A),
    ),
)

EIGVALS = Table(
    "eigenvalues",
    Rule(Circulant, "C = Fᴴ diag(F c) F: F c", lambda C: C.eigenvalues()),
    *VALUES,
    Rule(Banded, "bidiagonal: the diagonal", lambda B: B.dense().diagonal(0, -2, -1), when=_tridiagonal),
    Rule(
        Operator,
        "A = Aᴴ, written out, LAPACK's Hermitian eigensolver",
        lambda A: torch.linalg.eigvalsh(written(A)),
        when=has("hermitian"),
        cost=lambda A: 2 * cubic(A),
    ),
    Rule(Operator, "written out, LAPACK's eigensolver", _values_dense, cost=lambda A: 10 * cubic(A)),
)


def hermitian_or_raise(operator: Operator, doing: str) -> None:
    """Raises where an operator is not known to be Hermitian."""
    if "hermitian" not in operator.properties:
        raise OperatorError(f"cannot {doing} {operator!r}: it is not known to be Hermitian; claim it, or use eig")
