"""The inverse, as an operator: solving is applying it, its determinant is known with it."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg import iterative
from einlinear.linalg.direct import InverseLU, affordable, cholesky, cubic, lu_inverse, warn_if_singular
from einlinear.linalg.refined import Refined, detached
from einlinear.linalg.result import NearlySingular
from einlinear.linalg.rules import banded
from einlinear.linalg.rules.predicates import (
    blocks,
    body,
    factors,
    has,
    shifted,
    square_blocks,
    square_factors,
    unshifted,
)
from einlinear.linalg.rules.spectral import EIG, EIGH, Spectrum
from einlinear.linalg.sylvester import by_schur, sylvester
from einlinear.linalg.table import Rule, Table
from einlinear.linalg.woodbury import WoodburyInverse, capacitance, regular_base, symmetric
from einlinear.operator import (
    Dense,
    Identity,
    Operator,
    OperatorError,
    Product,
    Scaled,
    Sum,
    Zero,
    multiple,
    product,
    remembered,
    transformed,
)
from einlinear.operators import (
    Banded,
    Block,
    BlockDiagonal,
    Circulant,
    Diagonal,
    DirectSum,
    Fourier,
    Kronecker,
    KroneckerSum,
    LowRankUpdate,
    Sparse,
    Toeplitz,
    Triangular,
    kron,
)


def nonzero(operator: Operator, values: Tensor) -> Tensor:
    """`values`, refused where one is exactly zero; a warning where one is so to working precision."""
    size = values.detach().abs()
    if not transformed(values) and size.numel():
        if bool((size == 0).any()):
            where = int((size == 0).nonzero()[0, -1])
            raise OperatorError(
                f"cannot invert {operator!r}: it is singular (entry or eigenvalue {where} of {values.shape[-1]} is "
                f"zero); pinv and lstsq answer in the sense of least squares"
            )
        ratio = float((size.amin(-1) / size.amax(-1)).min())
        if ratio < torch.finfo(size.dtype).eps:
            warnings.warn(
                f"{operator!r} is singular to working precision (its eigenvalues span {1 / ratio:.2g}): the answer "
                f"may have no correct digit; pinv and lstsq answer in the sense of least squares",
                NearlySingular,
                stacklevel=2,
            )
    return values


def _diagonal(D: Diagonal) -> Diagonal:
    return Diagonal(1 / nonzero(D, D.values))


def _triangular(T: Triangular) -> Triangular:
    if not T.unit and not T.inverted:
        nonzero(T, T.diagonal())
    return T.inverse()


def _scaled(cA: Scaled, inverse: Operator) -> Operator:
    nonzero(cA, cA.c[..., None])
    return multiple(1 / cA.c, inverse)


def _circulant(C: Circulant) -> Circulant:
    if C.shape[-1] == 0:
        return C
    column = torch.fft.ifft(1 / nonzero(C, C.eigenvalues()))
    return Circulant(column if C.column.is_complex() else column.real)


def by_spectrum(operator: Operator, spectrum: Spectrum) -> Operator:
    """V diag(1/λ) V⁻¹."""
    values = Diagonal(1 / nonzero(operator, spectrum.values))
    return product(spectrum.vectors, values, INVERSE(spectrum.vectors))


def _by_eigh(operator: Operator) -> Operator:
    constant = detached(operator)
    return Refined(operator, by_spectrum(constant, EIGH(constant)))


def _by_eig(operator: Operator) -> Operator:
    """By eigenvectors where they are well conditioned, else by Schur's form, or by LU."""
    constant = detached(operator)
    by = by_eigenvectors(constant)
    if by is not None:
        return Refined(operator, by if constant.dtype.is_complex else RealPart(by))
    if isinstance(constant, KroneckerSum) and by_schur(constant):
        values, inverse = sylvester(constant)
        nonzero(operator, values)
        return Refined(operator, inverse)
    return _densified(operator)


def by_eigenvectors(operator: Operator) -> Operator | None:
    """V diag(1/λ) V⁻¹, or None where V is ill conditioned, as far as values may be looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vectors without a good inverse are what is looked for
        try:
            spectrum: Spectrum = EIG(operator)
            by = by_spectrum(operator, spectrum)
        except OperatorError:
            return None
    if transformed(*operator.tensors):
        return by
    if not backward_error(operator, by) < accepted(operator):
        return None
    nonzero(operator, spectrum.values)  # for its warning
    return by


def accepted(operator: Operator) -> float:
    """The backward error up to which a rule's inverse counts as one: about 1e-12 in float64, 1e-5 in float32."""
    return float(torch.finfo(operator.dtype).eps) ** 0.75


@torch.no_grad()
def backward_error(operator: Operator, inverse: Operator) -> float:
    """The largest ‖b − A x‖ / (‖A‖ ‖x‖ + ‖b‖), x = A⁻¹ b, of two random b, which tell ‖A‖ too."""
    if not operator.shape[-1]:
        return 0.0
    b = torch.randn(operator.shape[-1], 2, dtype=operator.dtype, device=operator.device)
    x = inverse.matmul(b)
    x = x if operator.dtype.is_complex else x.real
    length = b.norm(dim=-2)
    size = operator.matmul(b).norm(dim=-2) / length
    error = (b - operator.matmul(x)).norm(dim=-2) / (size * x.norm(dim=-2) + length)
    return float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0


@dataclass(eq=False, repr=False)
class RealPart(Operator):
    """The real part of an operator that is real but for rounding."""

    of: Operator

    @remembered
    def shape(self) -> torch.Size:
        return self.of.shape

    @remembered
    def dtype(self) -> torch.dtype:
        return self.of.dtype.to_real()

    def _matmul(self, x: Tensor) -> Tensor:
        return self.of.matmul(x).real

    def _transpose(self) -> "RealPart":
        return RealPart(self.of.T)


def _woodbury(A: LowRankUpdate, inverse: Operator) -> Operator:
    solved, small = capacitance(A, inverse)
    right = solved if symmetric(A) else inverse.H.matmul(A.V)
    made = WoodburyInverse(A, inverse, solved, right, INVERSE(small))
    by_entry = isinstance(A.base.of if isinstance(A.base, Scaled) else A.base, Identity | Diagonal)
    if not by_entry and not transformed(*A.tensors) and not backward_error(A, made) < accepted(A):
        raise NearlySingular(f"{A.base!r} is nearly singular")
    return made


def eliminates(A: Block, *_: object) -> bool:
    """Whether A is 2 × 2 in blocks, and the first of them is one that a rule inverts."""
    if len(A.rows) != 2 or len(A.rows[0]) != 2:
        return False
    first, last = A.rows[0][0], A.rows[1][1]
    easy = first.square and last.square and not isinstance(first, Zero | Dense) and regular(first)
    return easy and last.shape[-1] <= first.shape[-1]


def regular(operator: Operator) -> bool:
    """Whether a rule inverts an operator without writing it out."""
    return all(rule.kind is not Operator or rule.when is _unitary for _, _, rule, _ in INVERSE.plan(operator))


def schur(A: Block, inverse: Operator) -> Tensor:
    """D − C A⁻¹ B of a block operator (A, B; C, D)."""
    (_, b), (c, d) = A.rows
    return d.dense() - c.matmul(inverse.matmul(b.dense()))


def first_block(A: Block) -> tuple[Operator, ...]:
    """A of (A, B; C, D)."""
    return (A.rows[0][0],)


def _eliminate(A: Block, inverse: Operator) -> Operator:
    (_, b), (c, _) = A.rows
    m, p = b.shape[-2:]
    like = {"dtype": A.dtype, "device": A.device}
    one, two = Identity(m, **like), Identity(p, **like)  # type: ignore[arg-type]
    nil, lin = Zero(m, p, **like), Zero(p, m, **like)  # type: ignore[arg-type]
    up = Block(((one, -product(inverse, b)), (lin, two)))
    down = Block(((one, nil), (-product(c, inverse), two)))
    return Product((up, DirectSum((inverse, lu_inverse(Dense(schur(A, inverse))))), down))


def _psd(operator: Operator) -> Operator:
    try:
        lower = cholesky(operator)
    except OperatorError as error:
        raise OperatorError(
            f"cannot invert {operator!r}: it is singular, or not positive definite for all that is claimed; pinv and "
            f"lstsq answer in the sense of least squares"
        ) from error
    if not transformed(lower.matrix):
        warn_if_singular(operator, lower.diagonal().square())
    return Product((lower.H.inverse(), lower.inverse())).claim("psd")  # type: ignore[attr-defined]


def _densified(operator: Operator) -> Operator:
    inverse = lu_inverse(operator)
    return inverse.claim("hermitian") if "hermitian" in operator.properties else inverse


def shifted_kronecker(operator: Sum, *_: object) -> bool:
    """Whether the sum is A ⊗ B + cI."""
    return shifted(operator) and any(
        isinstance(part, Kronecker) and square_factors(part) for part in unshifted(operator)
    )


def _spectral_cost(operator: Operator) -> float:
    """Of the eigenvectors of every factor."""
    part = unshifted(operator)[0] if isinstance(operator, Sum) else operator
    smaller = part.terms if isinstance(part, KroneckerSum) else part.factors  # type: ignore[attr-defined]
    return sum(9 * cubic(one) for one in smaller)


_unitary = has("unitary")


INVERSE = Table(
    "inverse",
    Rule(Identity, "I⁻¹ = I", lambda I: I),
    Rule(Operator, "A⁻¹ = Aᴴ (unitary)", lambda A: A.H, when=_unitary),
    Rule(Scaled, "(cA)⁻¹ = A⁻¹ / c", _scaled, body),
    Rule(Diagonal, "diag(d)⁻¹ = diag(1/d)", _diagonal),
    Rule(Triangular, "substitution", _triangular),
    Rule(InverseLU, "(A⁻¹)⁻¹ = A", lambda A: A.original()),
    Rule(Refined | WoodburyInverse, "(A⁻¹)⁻¹ = A", lambda A: A.of),
    Rule(Fourier, "F⁻¹ = Fᴴ / n", lambda F: F.H / F.shape[-1]),
    Rule(Circulant, "C⁻¹ = Fᴴ diag(1 / F c) F", _circulant),
    Rule(Product, "(AB)⁻¹ = B⁻¹A⁻¹", lambda _, *parts: product(*parts[::-1]), factors, square_factors),
    Rule(Kronecker, "(A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹", lambda _, *parts: kron(*parts), factors, square_factors),
    Rule(
        KroneckerSum,
        "(A ⊕ B)⁻¹ = (V⊗W) diag(1/(λ+μ)) (V⊗W)ᴴ",
        _by_eigh,
        when=has("hermitian"),
        cost=_spectral_cost,
    ),
    Rule(
        KroneckerSum,
        "(A ⊕ B)⁻¹ = (V⊗W) diag(1/(λ+μ)) (V⊗W)⁻¹; by Schur's form where V, W are ill conditioned",
        _by_eig,
        cost=_spectral_cost,
    ),
    Rule(
        Sum,
        "(A ⊗ B + cI)⁻¹ = (V⊗W) diag(1/(λμ+c)) (V⊗W)ᴴ",
        _by_eigh,
        when=lambda A: shifted_kronecker(A) and "hermitian" in A.properties,
        cost=_spectral_cost,
    ),
    Rule(
        Sum,
        "(A ⊗ B + cI)⁻¹ = (V⊗W) diag(1/(λμ+c)) (V⊗W)⁻¹; LU where V, W are ill conditioned",
        _by_eig,
        when=shifted_kronecker,
        cost=_spectral_cost,
    ),
    Rule(
        BlockDiagonal, "diag(A₁, A₂, …)⁻¹ = diag(A₁⁻¹, A₂⁻¹, …)", lambda _, of: BlockDiagonal(of), body, square_blocks
    ),
    Rule(DirectSum, "(A ⊞ B)⁻¹ = A⁻¹ ⊞ B⁻¹", lambda _, *parts: DirectSum(parts), blocks, square_blocks),
    Rule(
        LowRankUpdate,
        "(A + UCVᴴ)⁻¹ = A⁻¹ − A⁻¹UC (I + VᴴA⁻¹UC)⁻¹ VᴴA⁻¹ (Woodbury)",
        _woodbury,
        lambda A: (A.base,),
        regular_base,
        lambda A: 4.0 * A.shape[-1] * A.left.shape[-1] ** 2,
        tentative=True,
    ),
    Rule(
        Block,
        "block elimination through the Schur complement D − C A⁻¹ B",
        _eliminate,
        first_block,
        eliminates,
        lambda A: 2.0 * A.shape[-1] * A.rows[0][1].shape[-1] ** 2,
        tentative=True,
    ),
    Rule(
        Banded,
        "PA = LU within the band (LAPACK, by scipy)",
        banded.inverse,
        when=banded.by_band,
        cost=banded.banded_cost,
    ),
    Rule(Sparse, "PAQ = LU, sparse (SuperLU, by scipy)", banded.inverse, when=banded.by_pattern),
    Rule(
        Toeplitz,
        "T⁻¹ = (L(x)L(x)ᴴ − L(y)L(y)ᴴ) / x₀ (Gohberg and Semencul), x by Levinson's recursion",
        banded.toeplitz_inverse,
        when=banded.by_levinson,
        cost=banded.quadratic,
    ),
    Rule(
        Operator,
        "A = L Lᴴ, written out (Cholesky)",
        _psd,
        when=lambda A: "psd" in A.properties and affordable(A),
        cost=lambda A: cubic(A) / 2,
    ),
    Rule(Operator, "PA = LU, written out", _densified, when=affordable, cost=cubic),
    Rule(
        Operator,
        "A x = b by conjugate gradients (definite), MINRES (Hermitian) or GMRES",
        iterative.inverse,
        answer="to a tolerance",
    ),
)
