"""Singular values and vectors, and the pseudo-inverse."""

from typing import NamedTuple

import torch
from torch import Tensor

from einlinear.linalg import iterative
from einlinear.linalg.direct import affordable, cubic, written
from einlinear.linalg.rules.predicates import blocks, body, factors, has
from einlinear.linalg.rules.spectral import EIGH, outer
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, Scaled, Zero, multiple, product
from einlinear.operators import BlockDiagonal, Circulant, Diagonal, DirectSum, Fourier, Kronecker, KroneckerSum, kron


class SVD(NamedTuple):
    """A = U diag(S) Vh with min(m, n) singular values `S`, `[..., k]`; U and Vh are operators."""

    U: Operator
    S: Tensor
    Vh: Operator


def _phase(values: Tensor) -> Tensor:
    """value / |value|, and 1 for zero."""
    return torch.where(values == 0, 1, torch.sgn(values)).to(values.dtype)


def _unit(operator: Operator) -> Identity:
    return Identity(operator.shape[-1], dtype=operator.dtype, device=operator.device)


def _diagonal(D: Diagonal) -> SVD:
    return SVD(Diagonal(_phase(D.values)), D.values.abs(), _unit(D))


def _unitary(A: Operator) -> SVD:
    real = torch.ones(A.shape[-1], dtype=A.dtype, device=A.device).real
    return SVD(A, real.expand(*A.batch_shape, -1), _unit(A))


def _hermitian(A: Operator) -> SVD:
    values, vectors = EIGH(A)
    return SVD(product(vectors, Diagonal(_phase(values))), values.abs(), vectors.H)


def _circulant(C: Circulant) -> SVD:
    values = C.eigenvalues()
    transform = Fourier(C.shape[-1], dtype=values.dtype, device=values.device)
    return SVD(product(transform.H, Diagonal(_phase(values))), values.abs(), transform)


def _scaled(cA: Scaled, A: SVD) -> SVD:
    return SVD(multiple(_phase(cA.c), A.U), cA.c.abs()[..., None] * A.S, A.Vh)


def _kronecker(_: Kronecker, *parts: SVD) -> SVD:
    return SVD(kron(*[p.U for p in parts]), outer(*[p.S for p in parts]), kron(*[p.Vh for p in parts]))


def _blocks(_: BlockDiagonal, of: SVD) -> SVD:
    return SVD(BlockDiagonal(of.U), of.S.flatten(-2), BlockDiagonal(of.Vh))


def _dense(A: Operator) -> SVD:
    u, s, vh = torch.linalg.svd(written(A), full_matrices=False)
    return SVD(Dense(u), s, Dense(vh))


def _keeps_size(A: Kronecker, *_: object) -> bool:
    """Whether all factors are wide, or all tall: else min(m, n) counts more values than the factors have."""
    return all(f.shape[-2] >= f.shape[-1] for f in A.factors) or all(f.shape[-2] <= f.shape[-1] for f in A.factors)


_RULES = (
    Rule(Diagonal, "diag(d) = diag(d/|d|) diag(|d|)", _diagonal),
    Rule(Operator, "A = A I (unitary)", _unitary, when=has("unitary")),
    Rule(Circulant, "C = (Fᴴ phase) diag(|F c|) F", _circulant),
    Rule(Scaled, "c A: singular values |c| σ", _scaled, body),
    Rule(Kronecker, "A ⊗ B: σ τ, (U ⊗ W), (V ⊗ X)ᴴ", _kronecker, factors, _keeps_size),
    Rule(KroneckerSum, "A = Aᴴ: |λ| of V Λ Vᴴ", _hermitian, when=has("hermitian")),
    Rule(BlockDiagonal, "diag(A₁, A₂, …): all", _blocks, body),
)

SINGULAR = Table(
    "singular values and vectors",
    *_RULES,
    Rule(Operator, "written out, LAPACK's SVD", _dense, cost=lambda A: 20 * cubic(A)),
)

SVDVALS = Table(
    "singular values",
    Rule(Diagonal, "|d|", lambda D: D.values.abs()),
    Rule(Operator, "ones (unitary)", lambda A: _unitary(A).S, when=has("unitary")),
    Rule(Circulant, "|F c|", lambda C: C.eigenvalues().abs()),
    Rule(Scaled, "|c| σ", lambda cA, s: cA.c.abs()[..., None] * s, body),
    Rule(Kronecker, "σ τ", lambda _, *parts: outer(*parts), factors, _keeps_size),
    Rule(BlockDiagonal, "all", lambda _, s: s.flatten(-2), body),
    Rule(
        Operator, "written out, LAPACK's SVD", lambda A: torch.linalg.svdvals(written(A)), cost=lambda A: 4 * cubic(A)
    ),
)


def _rcond(A: Operator) -> float:
    return max(A.shape[-2:]) * torch.finfo(A.dtype).eps


def pseudo_reciprocal(values: Tensor, cutoff: Tensor | float) -> Tensor:
    """1 / value, and 0 for what lies below the cutoff."""
    small = values.abs() <= cutoff
    return torch.where(small, 0, 1 / torch.where(small, 1, values))


def _pinv_diagonal(D: Diagonal) -> Diagonal:
    size = D.values.abs()
    cutoff = _rcond(D) * size.amax(-1, keepdim=True) if size.shape[-1] else 0.0
    return Diagonal(pseudo_reciprocal(D.values, cutoff))


def _pinv_circulant(C: Circulant) -> Circulant:
    values = C.eigenvalues()
    column = torch.fft.ifft(pseudo_reciprocal(values, _rcond(C) * values.abs().amax(-1, keepdim=True)))
    return Circulant(column if C.column.is_complex() else column.real)


def _pinv_spectral(A: Operator) -> Operator:
    values, vectors = EIGH(A)
    cutoff = _rcond(A) * values.abs().amax(-1, keepdim=True)
    return product(vectors, Diagonal(pseudo_reciprocal(values, cutoff)), vectors.H)


def _pinv_dense(A: Operator) -> Dense:
    matrix = written(A)
    return Dense(torch.linalg.pinv(matrix, rtol=_rcond(A), hermitian="hermitian" in A.properties))


PINV = Table(
    "pseudo-inverse",
    Rule(Identity, "I⁺ = I", lambda I: I),
    Rule(Zero, "0⁺ = 0", lambda Z: Z.T),
    Rule(Operator, "A⁺ = Aᴴ (unitary)", lambda A: A.H, when=has("unitary")),
    Rule(Scaled, "(cA)⁺ = A⁺ / c, or 0 for c = 0", lambda cA, A: multiple(pseudo_reciprocal(cA.c, 0.0), A), body),
    Rule(Diagonal, "1/d, or 0 for d = 0", _pinv_diagonal),
    Rule(Circulant, "Fᴴ diag(F c)⁺ F", _pinv_circulant),
    Rule(Kronecker, "(A ⊗ B)⁺ = A⁺ ⊗ B⁺", lambda _, *parts: kron(*parts), factors),
    Rule(KroneckerSum, "(V⊗W) diag(λ+μ)⁺ (V⊗W)ᴴ", _pinv_spectral, when=has("hermitian")),
    Rule(BlockDiagonal, "diag(A₁⁺, A₂⁺, …)", lambda _, of: BlockDiagonal(of), body),
    Rule(DirectSum, "A⁺ ⊞ B⁺", lambda _, *parts: DirectSum(parts), blocks),
    Rule(
        Operator,
        "min ‖A x − b‖ by LSMR",
        iterative.IterativePseudoInverse,
        when=lambda A: not affordable(A),
        answer="to a tolerance",
    ),
    Rule(Operator, "written out, by LAPACK's SVD", _pinv_dense, cost=lambda A: 20 * cubic(A)),
)
