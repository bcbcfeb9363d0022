"""Sign and logarithm of the determinant."""

import contextlib
import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from einlinear.linalg import iterative
from einlinear.linalg.direct import InverseLU, affordable, cholesky, cubic, written
from einlinear.linalg.implicit import wanted
from einlinear.linalg.refined import Refined, detached, differentiable_logdet, with_phase
from einlinear.linalg.rules import banded
from einlinear.linalg.rules.inverse import (
    INVERSE,
    by_eigenvectors,
    eliminates,
    first_block,
    schur,
    shifted_kronecker,
)
from einlinear.linalg.rules.predicates import (
    blocks,
    body,
    conjugation,
    factors,
    middle,
    square_blocks,
    square_factors,
)
from einlinear.linalg.rules.spectral import EIGVALS, EIGVALSH
from einlinear.linalg.table import Rule, Table
from einlinear.linalg.woodbury import WoodburyInverse, capacitance, regular_base
from einlinear.operator import Identity, Operator, OperatorError, Product, Scaled, Sum
from einlinear.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Circulant,
    Diagonal,
    DirectSum,
    Fourier,
    Householder,
    Kronecker,
    KroneckerSum,
    LowRankUpdate,
    Permutation,
    Sparse,
    Toeplitz,
    Triangular,
)


class Determinant(NamedTuple):
    """det A = sign · exp(logabsdet), each `[...]`; a singular A has the sign 0 and the logarithm −∞."""

    sign: Tensor
    logabsdet: Tensor


def of_values(values: Tensor) -> Determinant:
    """Of the product of eigenvalues, `[..., n]`."""
    return Determinant(torch.sgn(values).prod(-1), values.abs().log().sum(-1))


def times(*parts: Determinant) -> Determinant:
    """Of a product of matrices."""
    return Determinant(
        reduce(torch.mul, (part.sign for part in parts)), reduce(torch.add, (part.logabsdet for part in parts))
    )


def power(part: Determinant, exponent: int) -> Determinant:
    """Of `exponent` copies."""
    if not exponent:  # 0 · −∞ has no value
        return Determinant(torch.ones_like(part.sign), torch.zeros_like(part.logabsdet))
    return Determinant(part.sign**exponent, part.logabsdet * exponent)


def _number(operator: Operator, sign: complex) -> Determinant:
    """A determinant of modulus one."""
    like = {"dtype": operator.dtype, "device": operator.device}
    one = torch.tensor(sign, **like)  # type: ignore[arg-type]
    return Determinant(one, torch.zeros_like(one.real))


def _kronecker(A: Kronecker, *parts: Determinant) -> Determinant:
    n = A.shape[-1]
    return times(*(power(part, n // max(factor.shape[-1], 1)) for part, factor in zip(parts, A.factors, strict=True)))


def _by_values(A: Operator) -> Determinant:
    if "hermitian" in A.properties:
        return of_values(EIGVALSH(A))
    constant = detached(A)
    if wanted(A) and by_eigenvectors(constant) is None:
        # Eigenvalues of a defective operator have no derivatives; their product has, where it is not zero.
        value = real_if_real(A, of_values(EIGVALS(constant)))
        with contextlib.suppress(OperatorError):
            logarithm = differentiable_logdet(A, INVERSE(constant), value.logabsdet)
            return Determinant(*with_phase(value.sign, logarithm))
    return real_if_real(A, of_values(EIGVALS(A)))


def real_if_real(operator: Operator, part: Determinant) -> Determinant:
    """The determinant of a real operator that was computed in complex numbers."""
    if operator.dtype.is_complex or not part.sign.is_complex():
        return part
    return Determinant(torch.sgn(part.sign.real.round()), part.logabsdet)


def _block_diagonal(_: BlockDiagonal, of: Determinant) -> Determinant:
    return Determinant(of.sign.prod(-1), of.logabsdet.sum(-1))


def _update(A: LowRankUpdate, base: Determinant) -> Determinant:
    _, small = capacitance(A, INVERSE(A.base))
    return times(base, SLOGDET(small))


def _eliminated(A: Block, first: Determinant) -> Determinant:
    return times(first, Determinant(*torch.linalg.slogdet(schur(A, INVERSE(A.rows[0][0])))))


def _inverse(A: Refined) -> Determinant:
    sign, logarithm = SLOGDET(A.of)
    return Determinant(sign.conj().resolve_conj(), -logarithm)


def _fourier(F: Fourier) -> Determinant:
    """Eigenvalues of the unitary transform are 1, −1, ∓i, i as often as n mod 4 says (McClellan and Parks 1972)."""
    n = F.shape[-1]
    counts = {1: n // 4 + 1, -1: (n + 2) // 4, -1j: (n + 1) // 4, 1j: (n + 3) // 4 - 1} if n else {}
    sign = complex(math.prod(value**count for value, count in counts.items()))
    sign = complex(round(sign.real), round(sign.imag))
    scale = 0.0 if F.unitary else n * math.log(n) / 2 if n else 0.0
    one = _number(F, sign.conjugate() if F.inverted else sign)
    return Determinant(one.sign, one.logabsdet + scale)


def _psd(operator: Operator) -> Determinant:
    """By Cholesky; by LU where the operator is only semi-definite."""
    try:
        diagonal = cholesky(operator).diagonal()
    except OperatorError:
        return Determinant(*torch.linalg.slogdet(written(operator)))
    return Determinant(torch.ones_like(diagonal.sum(-1)), 2 * diagonal.real.log().sum(-1))


def _estimate(A: Operator) -> Determinant:
    return Determinant(torch.ones((), dtype=A.dtype, device=A.device), iterative.logdet(A))


def _definite(A: Operator) -> bool:
    return "psd" in A.properties and affordable(A)


SLOGDET = Table(
    "determinant",
    Rule(Identity, "det I = 1", lambda I: _number(I, 1)),
    Rule(Scaled, "det cA = cⁿ det A", lambda cA, A: times(power(of_values(cA.c[..., None]), cA.shape[-1]), A), body),
    Rule(Diagonal, "det diag(d) = Π d", lambda D: of_values(D.values)),
    Rule(Triangular, "the product of the diagonal", lambda T: of_values(T.diagonal())),
    Rule(Permutation, "the parity of the permutation", lambda P: _number(P, P.sign())),
    Rule(Householder, "Π (1 − τ‖v‖²)", lambda H: of_values(H.determinant()[..., None])),
    Rule(Fourier, "the multiplicities of 1, −1, i, −i", _fourier),
    Rule(
        WoodburyInverse,
        "det A⁻¹ / det(I + VᴴA⁻¹UC)",
        lambda W, base, core: times(base, core),
        lambda W: (W.base, W.core),
    ),
    Rule(InverseLU, "det A⁻¹ = 1 / det A, from LU", lambda A: Determinant(*A.slogdet())),
    Rule(Refined, "det A⁻¹ = 1 / det A", _inverse),
    Rule(Circulant, "Π F c", lambda C: real_if_real(C, of_values(C.eigenvalues()))),
    Rule(Product, "det Q B Qᴴ = det B", lambda _, B: B, middle, conjugation),
    Rule(Product, "det AB = det A det B", lambda _, *parts: times(*parts), factors, square_factors),
    Rule(Kronecker, "det A ⊗ B = (det A)ⁿ (det B)ᵐ", _kronecker, factors, square_factors),
    Rule(KroneckerSum, "det A ⊕ B = Π (λ + μ)", _by_values, cost=lambda A: sum(2 * cubic(term) for term in A.terms)),
    Rule(Sum, "det (A ⊗ B + cI) = Π (λμ + c)", _by_values, when=shifted_kronecker),
    Rule(BlockDiagonal, "det diag(A₁, A₂, …) = Π det Aᵢ", _block_diagonal, body, square_blocks),
    Rule(DirectSum, "det A ⊞ B = det A det B", lambda _, *parts: times(*parts), blocks, square_blocks),
    Rule(
        LowRankUpdate,
        "det (A + UCVᴴ) = det A det(I + VᴴA⁻¹UC)",
        _update,
        lambda A: (A.base,),
        regular_base,
        lambda A: 4.0 * A.shape[-1] * A.left.shape[-1] ** 2,
        tentative=True,
    ),
    Rule(
        Block,
        "det A det(D − C A⁻¹ B)",
        _eliminated,
        first_block,
        eliminates,
        lambda A: 2.0 * A.shape[-1] * A.rows[0][1].shape[-1] ** 2,
        tentative=True,
    ),
    Rule(
        Banded,
        "PA = LU within the band (LAPACK, by scipy)",
        lambda A: Determinant(*banded.slogdet(A)),
        when=banded.by_band,
        cost=banded.banded_cost,
    ),
    Rule(
        Sparse,
        "PAQ = LU, sparse (SuperLU, by scipy)",
        lambda A: Determinant(*banded.slogdet(A)),
        when=banded.by_pattern,
    ),
    Rule(
        Toeplitz,
        "the product of the prediction errors of Levinson's recursion",
        lambda A: Determinant(*banded.toeplitz_slogdet(A)),
        when=banded.by_levinson,
        cost=banded.quadratic,
    ),
    Rule(Operator, "A = L Lᴴ, written out (Cholesky)", _psd, when=_definite, cost=lambda A: cubic(A) / 2),
    Rule(
        Operator,
        "PA = LU, written out",
        lambda A: Determinant(*torch.linalg.slogdet(written(A))),
        when=affordable,
        cost=cubic,
    ),
    Rule(Operator, "Lanczos quadrature", _estimate, answer="stochastic"),
)
