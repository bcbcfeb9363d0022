"""Triangular factorisations, in the structure of the operator."""

from typing import NamedTuple

import torch

from einlinear.linalg.direct import cholesky, cubic, written
from einlinear.linalg.rules.predicates import blocks, body, factors, square_blocks, square_factors
from einlinear.linalg.scalar import SQRT
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, OperatorError, Scaled, multiple, transformed
from einlinear.operators import BlockDiagonal, Diagonal, DirectSum, Kronecker, Triangular, kron


class LU(NamedTuple):
    """A = P L U: a permutation, a lower triangle with a unit diagonal, an upper triangle."""

    P: Operator
    L: Operator
    U: Operator


def _unit(operator: Operator) -> Identity:
    return Identity(operator.shape[-1], dtype=operator.dtype, device=operator.device)


def _positive(D: Diagonal) -> Diagonal:
    values = D.values.real
    if not transformed(values) and not bool((values > 0).all()):
        raise OperatorError(f"cannot factorise {D!r} as L Lᴴ: it is not positive definite (an entry is not positive)")
    return Diagonal(values.sqrt().to(D.dtype))


def _lu(operator: Operator) -> LU:
    p, lower, upper = torch.linalg.lu(written(operator))
    square = operator.square
    return LU(
        Dense(p).claim("unitary"),
        Triangular(lower, unit=True) if square else Dense(lower),
        Triangular(upper, upper=True) if square else Dense(upper),
    )


CHOLESKY = Table(
    "Cholesky factor",
    Rule(Identity, "I = I Iᴴ", lambda I: I),
    Rule(Diagonal, "√d", _positive),
    Rule(
        Scaled,
        "√c L",
        lambda cA, L: multiple(SQRT(cA.c), L),
        body,
        lambda A: not A.c.is_complex() and bool((A.c > 0).all()),
    ),
    Rule(
        Kronecker,
        "A ⊗ B = (L ⊗ M)(L ⊗ M)ᴴ",
        lambda _, *parts: kron(*parts),
        factors,
        lambda A: square_factors(A) and all("psd" in f.properties for f in A.factors),
    ),
    Rule(BlockDiagonal, "diag(L₁, L₂, …)", lambda _, of: BlockDiagonal(of), body, square_blocks),
    Rule(DirectSum, "L ⊞ M", lambda _, *parts: DirectSum(parts), blocks, square_blocks),
    Rule(Operator, "written out, LAPACK's Cholesky", cholesky, cost=lambda A: cubic(A) / 2),
)

PLU = Table(
    "LU factors",
    Rule(Identity, "I = I I I", lambda I: LU(I, I, I)),
    Rule(Diagonal, "D = I I D", lambda D: LU(_unit(D), _unit(D), D)),
    Rule(Scaled, "cA = P L (cU)", lambda cA, A: LU(A.P, A.L, multiple(cA.c, A.U)), body),
    Rule(
        Kronecker,
        "A ⊗ B = (P ⊗ P')(L ⊗ L')(U ⊗ U')",
        lambda _, *parts: LU(*(kron(*[part[k] for part in parts]) for k in range(3))),
        factors,
        square_factors,
    ),
    Rule(
        BlockDiagonal,
        "diag(P₁, …) diag(L₁, …) diag(U₁, …)",
        lambda _, of: LU(*map(BlockDiagonal, of)),
        body,
        square_blocks,
    ),
    Rule(
        DirectSum,
        "(P ⊞ P')(L ⊞ L')(U ⊞ U')",
        lambda _, *parts: LU(*(DirectSum(tuple(part[k] for part in parts)) for k in range(3))),
        blocks,
        square_blocks,
    ),
    Rule(Operator, "written out, LAPACK's LU", _lu, cost=cubic),
)
