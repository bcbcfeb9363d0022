"""Singular values and vectors, and the pseudo-inverse."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einlinear.linalg import iterative
from einlinear.linalg.direct import affordable, cubic, written
from einlinear.linalg.rules.predicates import blocks, body, factors, has
from einlinear.linalg.rules.spectral import EIGH, EIGVALSH, joined, outer
from einlinear.linalg.table import Rule, Table
from einlinear.operator import Dense, Identity, Operator, Scaled, Zero, multiple, product, transformed
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
    return _alike(A.factors)


def _alike(parts: tuple[Operator, ...]) -> bool:
    """Whether all parts are wide, or all tall: else min(m, n) counts more values than the parts have."""
    return all(p.shape[-2] >= p.shape[-1] for p in parts) or all(p.shape[-2] <= p.shape[-1] for p in parts)


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
        DirectSum,
        "all",
        lambda _, *parts: joined(*parts),
        blocks,
        lambda A: _alike(A.blocks),
    ),
    Rule(Operator, "A = Aᴴ: |λ|", lambda A: EIGVALSH(A).abs(), when=has("hermitian")),
    Rule(
        Operator, "written out, LAPACK's SVD", lambda A: torch.linalg.svdvals(written(A)), cost=lambda A: 4 * cubic(A)
    ),
)


Cut = float | Tensor
"""Where a singular value counts as zero: up to this part of the largest (a number), or up to this value, `[...]`."""


def default_cut(A: Operator) -> float:
    """max(m, n) ε, as NumPy and torch have it."""
    return max(A.shape[-2:]) * torch.finfo(A.dtype).eps


def absolute(A: Operator, cut: Cut) -> Tensor:
    """The value up to which singular values of A count as zero, `[...]`."""
    if isinstance(cut, Tensor):
        return cut
    return cut * _largest(A)


@torch.no_grad()
def _largest(A: Operator) -> Tensor:
    values: Tensor = SVDVALS(A).detach()
    return values.amax(-1) if values.shape[-1] else values.sum(-1)


def pseudo_reciprocal(values: Tensor, cutoff: Tensor | float) -> Tensor:
    """1 / value, and 0 for what lies below the cutoff."""
    small = values.abs() <= cutoff
    return torch.where(small, 0, 1 / torch.where(small, 1, values))


def _of_values(values: Tensor, cut: Cut) -> Tensor:
    """The pseudo-reciprocals of all eigenvalues of a normal matrix, `[..., n]`."""
    size = values.detach().abs()
    if not size.shape[-1]:
        return values
    return pseudo_reciprocal(values, cut[..., None] if isinstance(cut, Tensor) else cut * size.amax(-1, keepdim=True))


def _pinv_unitary(A: Operator, cut: Cut) -> Operator:
    kept = cut < 1
    return multiple(kept.to(A.dtype), A.H) if isinstance(kept, Tensor) else A.H if kept else 0.0 * A.H


def _pinv_circulant(C: Circulant, cut: Cut) -> Circulant:
    column = torch.fft.ifft(_of_values(C.eigenvalues(), cut))
    return Circulant(column if C.column.is_complex() else column.real)


def _pinv_spectral(A: Operator, cut: Cut) -> Operator:
    values, vectors = EIGH(A)
    return product(vectors, Diagonal(_of_values(values, cut)), vectors.H)


def _pinv_kronecker(A: Kronecker, *parts: Any) -> Operator:
    """A⁺ ⊗ B⁺ where no product of values that both keep is below the cut; else by the singular values of the whole."""
    cut = absolute(A, parts[-1])
    with torch.no_grad():
        smallest: Any = 1.0
        for factor in A.factors:
            values = SVDVALS(factor).detach()
            kept = values > _share(A, factor, cut)[..., None]
            one = torch.where(kept, values, torch.inf)
            smallest = smallest * (one.amin(-1) if one.shape[-1] else torch.inf)
    if transformed(*A.tensors) or bool((smallest > cut).all()):
        return kron(*parts[:-1])
    u, s, vh = SINGULAR(A)
    return product(vh.H, Diagonal(pseudo_reciprocal(s, cut[..., None]).to(A.dtype)), u.H)


def _share(A: Kronecker, part: Operator, cut: Cut) -> Tensor:
    """The cut for one factor: that of the whole by the largest values of the others."""
    others = list(A.factors)
    others.pop(next(k for k, factor in enumerate(others) if factor is part))
    scale = reduce(torch.mul, [_largest(factor) for factor in others])
    return torch.where(scale == 0, torch.inf, absolute(A, cut) / torch.where(scale == 0, 1, scale))


def _scaled_cut(cA: Scaled, _: Operator, cut: Cut) -> tuple[Cut]:
    if not isinstance(cut, Tensor):
        return (cut,)
    size = cA.c.detach().abs()
    return (torch.where(size == 0, torch.inf, cut / torch.where(size == 0, 1, size)),)


def _pinv_dense(A: Operator, cut: Cut) -> Dense:
    matrix, hermitian = written(A), "hermitian" in A.properties
    limits: dict[str, Any] = {"rtol": cut}
    if isinstance(cut, Tensor):
        matrix = matrix.expand(*torch.broadcast_shapes(cut.shape, matrix.shape[:-2]), -1, -1)
        limits = {"atol": cut, "rtol": torch.zeros_like(cut)}
    return Dense(torch.linalg.pinv(matrix, hermitian=hermitian, **limits))


PINV = Table(
    "pseudo-inverse",
    Rule(Zero, "0⁺ = 0", lambda Z, cut: Z.T),
    Rule(Operator, "A⁺ = Aᴴ (unitary)", _pinv_unitary, when=lambda A, cut: "unitary" in A.properties),
    Rule(
        Scaled,
        "(cA)⁺ = A⁺ / c, or 0 for c = 0",
        lambda cA, A, cut: multiple(pseudo_reciprocal(cA.c, 0.0), A),
        body,
        passing=_scaled_cut,
    ),
    Rule(Diagonal, "1/d, or 0 for d = 0", lambda D, cut: Diagonal(_of_values(D.values, cut))),
    Rule(Circulant, "Fᴴ diag(F c)⁺ F", _pinv_circulant),
    Rule(
        Kronecker,
        "(A ⊗ B)⁺ = A⁺ ⊗ B⁺",
        _pinv_kronecker,
        factors,
        passing=lambda A, part, cut: (_share(A, part, absolute(A, cut)),),
    ),
    Rule(KroneckerSum, "(V⊗W) diag(λ+μ)⁺ (V⊗W)ᴴ", _pinv_spectral, when=has("hermitian")),
    Rule(
        BlockDiagonal,
        "diag(A₁⁺, A₂⁺, …)",
        lambda _, of, cut: BlockDiagonal(of),
        body,
        passing=lambda A, part, cut: (absolute(A, cut)[..., None],),
    ),
    Rule(
        DirectSum,
        "A⁺ ⊞ B⁺",
        lambda _, *parts: DirectSum(parts[:-1]),
        blocks,
        passing=lambda A, part, cut: (absolute(A, cut),),
    ),
    Rule(
        Operator,
        "min ‖A x − b‖ by LSMR",
        lambda A, cut: iterative.IterativePseudoInverse(A),
        when=lambda A, cut: not affordable(A),
        answer="to a tolerance",
    ),
    Rule(Operator, "written out, by LAPACK's SVD", _pinv_dense, cost=lambda A: 20 * cubic(A)),
)
