"""Functions of an operator: exp, log, sqrt, powers, and any function of its eigenvalues."""

import warnings
from functools import reduce

import torch
from torch import Tensor

from einlinear.linalg.direct import affordable, cubic, written
from einlinear.linalg.iterative import IterativeFunction, trace_of
from einlinear.linalg.matrix_functions import BySchur, OfHermitian
from einlinear.linalg.rules.inverse import INVERSE, RealPart, nonzero
from einlinear.linalg.rules.predicates import (
    blocks,
    body,
    conjugation,
    factors,
    has,
    is_multiple_of_unit,
    middle,
    shift,
    shifted,
    square_blocks,
    square_factors,
)
from einlinear.linalg.rules.spectral import EIG, EIGH, EIGVALSH
from einlinear.linalg.rules.trace import TRACE
from einlinear.linalg.scalar import EXP, LOG, Function
from einlinear.linalg.table import Rule, Table
from einlinear.operator import (
    Dense,
    Identity,
    Operator,
    OperatorError,
    Product,
    Scaled,
    Sum,
    multiple,
    product,
    transformed,
)
from einlinear.operators import BlockDiagonal, Circulant, Diagonal, DirectSum, Kronecker, KroneckerSum, kron


def is_exp(_: Operator, f: Function) -> bool:
    return f is EXP


def _whole(operator: Operator, f: Function) -> bool:
    return f.exponent is not None and float(f.exponent).is_integer()


def _power_of_kronecker(operator: Kronecker, f: Function) -> bool:
    """(A ⊗ B)ᵖ = Aᵖ ⊗ Bᵖ: for whole p, and for any p of semi-definite factors, whose roots are unique."""
    psd = all("psd" in factor.properties for factor in operator.factors)
    return f.exponent is not None and square_factors(operator) and (psd or _whole(operator, f))


def _shifted_exp(operator: Operator, f: Function) -> bool:
    return f is EXP and isinstance(operator, Sum) and shifted(operator)


def _exp_shift(S: Sum, *parts: Operator) -> Operator:
    unit = shift(S)
    c = unit.c if isinstance(unit, Scaled) else torch.ones((), dtype=S.dtype, device=S.device)
    return multiple(c.exp(), parts[0])


def _unshifted(S: Sum) -> tuple[Operator, ...]:
    return tuple(term for term in S.terms if not is_multiple_of_unit(term))


def _conjugated(P: Product, B: Operator, *_: object) -> Operator:
    return Product((P.factors[0], B, P.factors[-1]))


def _of_unit(cI: Scaled, f: Function) -> Operator:
    return multiple(f(cI.c), cI.of)


def _circulant(C: Circulant, f: Function) -> Operator:
    values = C.eigenvalues()
    hermitian = "hermitian" in C.properties
    image = f.at(values.real if hermitian else values, C.dtype)
    column = torch.fft.ifft(image)
    hermitian = hermitian and not image.is_complex()
    if not C.dtype.is_complex and (hermitian or f is EXP or _whole(C, f)):
        column = column.real
    made = Circulant(column)
    return made.claim("hermitian") if hermitian else made


def by_eigh(operator: Operator, f: Function) -> Operator:
    """V f(Λ) Vᴴ, in the structure of V."""
    values, vectors = EIGH(operator)
    return product(vectors, Diagonal(f.at(values, operator.dtype)), vectors.H)


def _by_eig(operator: Operator, f: Function) -> Operator:
    """V f(Λ) V⁻¹ in the structure of V; written out where V Λ V⁻¹ is another operator (a Jordan block)."""
    values, vectors = EIG(operator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vectors without a good inverse are looked for just below
        try:
            inverse = INVERSE(vectors)
        except OperatorError:
            inverse = None
    unit = Identity(operator.shape[-1], dtype=operator.dtype, device=operator.device)
    split = inverse is not None and _reproduced(unit, product(vectors, inverse))
    if inverse is None or not split or not _reproduced(operator, product(vectors, Diagonal(values), inverse)):
        found: Operator = APPLY(Dense(written(operator)), f)
        return found
    made = product(vectors, Diagonal(f.at(values, operator.dtype)), inverse)
    return RealPart(made) if not operator.dtype.is_complex and _is_real(made, operator, f) else made


def _reproduced(operator: Operator, made: Operator) -> bool:
    """Whether V Λ V⁻¹ is the operator, as two random probes say."""
    if transformed(*operator.tensors):
        return True
    x = torch.randn(operator.shape[-1], 2, dtype=operator.dtype, device=operator.device)
    with torch.no_grad():
        wanted = operator.matmul(x)
        # As for inverses: the square root of rounding, and two digits more.
        return bool((made.matmul(x) - wanted).norm() <= 1e-2 * torch.finfo(operator.dtype).eps ** 0.5 * wanted.norm())


def _is_real(made: Operator, of: Operator, f: Function) -> bool:
    """Whether f(A) of a real A is real: always for exp and whole powers, else as two random probes say."""
    if f is EXP or _whole(of, f) or transformed(*of.tensors):
        return True
    image = made.matmul(torch.randn(of.shape[-1], 2, dtype=of.dtype, device=of.device))
    return bool(image.imag.norm() <= 1e-6 * image.norm())


def _dense_hermitian(operator: Operator, f: Function) -> Operator:
    matrix = written(operator)
    if f.slope is None:
        return by_eigh(operator, f)
    made = Dense(OfHermitian.apply(matrix, f)) if torch.is_grad_enabled() and needs_gradient(matrix) else None
    return by_eigh(operator, f) if made is None else made


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a derivative with respect to the tensor may be asked for."""
    return tensor.requires_grad or transformed(tensor)


def _dense_power(operator: Operator, f: Function) -> Operator:
    assert f.exponent is not None
    matrix, p = written(operator), int(f.exponent)
    if p < 0:
        return Dense(torch.linalg.matrix_power(INVERSE(operator).dense(), -p))
    return Dense(torch.linalg.matrix_power(matrix, p))


def _dense_general(operator: Operator, f: Function) -> Operator:
    """By eigenvectors where these are well conditioned, else by Schur's form (scipy)."""
    matrix = written(operator)
    values, vectors = torch.linalg.eig(matrix)
    image = f.at(values, matrix.dtype)
    if f.domain == "positive":
        nonzero(operator, values)
    if not transformed(matrix) and not _reliable(vectors):
        return Dense(_by_schur(operator, matrix, f))
    made = torch.linalg.solve(vectors, vectors * image[..., None, :], left=False)
    real = not matrix.is_complex() and (transformed(made) or bool(made.imag.norm() <= 1e-6 * made.norm()))
    return Dense(made.real if real else made)


def _reliable(vectors: Tensor) -> bool:
    size = torch.linalg.cond(vectors.detach()).amax() if vectors.numel() else torch.zeros(())
    return bool(size < torch.finfo(vectors.dtype).eps ** -0.35)


def _by_schur(operator: Operator, matrix: Tensor, f: Function) -> Tensor:
    name = "log" if f is LOG else "power" if f.exponent is not None else None
    if name is None:
        raise OperatorError(
            f"cannot take the {f.name} of {operator!r}: its eigenvectors are dependent to working precision "
            f"(a Jordan block), and only exp, log, sqrt and powers are known there"
        )
    made: Tensor = BySchur.apply(matrix, name, f.exponent)
    if not bool(made.isfinite().all()) or not _is_root(made.detach(), matrix.detach(), f):
        raise OperatorError(f"cannot take the {f.name} of {operator!r}: it has none, or none that is finite")
    return made


def _is_root(made: Tensor, matrix: Tensor, f: Function) -> bool:
    """Whether a logarithm or a square root is one: of a singular matrix Schur's form may give numbers that are not."""
    if f is not LOG and f.exponent != 0.5:
        return True
    back = torch.linalg.matrix_exp(made) if f is LOG else made @ made
    return bool((back - matrix).norm() <= torch.finfo(matrix.dtype).eps ** 0.4 * matrix.norm())


APPLY = Table(
    "function",
    Rule(Identity, "f(I) = f(1) I", lambda I, f: multiple(f(torch.ones((), dtype=I.dtype, device=I.device)), I)),
    Rule(Scaled, "f(cI) = f(c) I", _of_unit, when=lambda A, f: is_multiple_of_unit(A)),
    Rule(Diagonal, "f(diag(d)) = diag(f(d))", lambda D, f: Diagonal(f(D.values))),
    Rule(KroneckerSum, "exp(A ⊕ B) = exp A ⊗ exp B", lambda A, *parts: kron(*parts[:-1]), lambda A: A.terms, is_exp),
    Rule(Sum, "exp(A + cI) = eᶜ exp A", _exp_shift, _unshifted, _shifted_exp),
    Rule(Kronecker, "(A ⊗ B)ᵖ = Aᵖ ⊗ Bᵖ", lambda A, *parts: kron(*parts[:-1]), factors, _power_of_kronecker),
    Rule(Circulant, "f(C) = Fᴴ diag(f(F c)) F", _circulant),
    Rule(
        BlockDiagonal,
        "f(diag(A₁, A₂, …)) = diag(f(A₁), f(A₂), …)",
        lambda A, of, f: BlockDiagonal(of),
        body,
        square_blocks,
    ),
    Rule(DirectSum, "f(A ⊞ B) = f(A) ⊞ f(B)", lambda A, *parts: DirectSum(parts[:-1]), blocks, square_blocks),
    Rule(Product, "f(Q B Qᴴ) = Q f(B) Qᴴ", _conjugated, middle, conjugation),
    Rule(Kronecker | KroneckerSum, "f(A) = (V⊗W) f(Λ) (V⊗W)ᴴ", by_eigh, when=has("hermitian")),
    Rule(Kronecker | KroneckerSum, "f(A) = (V⊗W) f(Λ) (V⊗W)⁻¹", _by_eig, when=lambda A, f: A.square),
    Rule(
        Operator,
        "f(A) b from the Krylov space of b (Lanczos)",
        lambda A, f: IterativeFunction(A, f.of),
        when=lambda A, f: "hermitian" in A.properties and not affordable(A),
        answer="to a tolerance",
    ),
    Rule(Operator, "V f(Λ) Vᴴ, written out", _dense_hermitian, when=has("hermitian"), cost=lambda A: 9 * cubic(A)),
    Rule(
        Operator,
        "scaling and squaring, written out",
        lambda A, f: Dense(torch.linalg.matrix_exp(written(A))),
        when=is_exp,
        cost=lambda A: 20 * cubic(A),
    ),
    Rule(Operator, "repeated squaring, written out", _dense_power, when=_whole, cost=lambda A: 3 * cubic(A)),
    Rule(
        Operator,
        "V f(Λ) V⁻¹, written out, or Schur's form where V is ill conditioned",
        _dense_general,
        cost=lambda A: 30 * cubic(A),
    ),
)


def _by_values(A: Operator, f: Function) -> Tensor:
    values: Tensor = EIGVALSH(A)
    return f.at(values, A.dtype).sum(-1)


def _by_diagonal(A: Operator, f: Function) -> Tensor:
    found: Tensor = TRACE(APPLY(A, f))
    return found


TRACE_OF = Table(
    "trace of a function",
    Rule(
        KroneckerSum,
        "tr exp(A ⊕ B) = tr exp A tr exp B",
        lambda _, *parts: reduce(torch.mul, parts[:-1]),
        lambda A: A.terms,
        is_exp,
    ),
    Rule(BlockDiagonal, "tr f(diag(A₁, A₂, …)) = Σ tr f(Aᵢ)", lambda _, of, f: of.sum(-1), body, square_blocks),
    Rule(
        DirectSum,
        "tr f(A ⊞ B) = tr f(A) + tr f(B)",
        lambda _, *parts: reduce(torch.add, parts[:-1]),
        blocks,
        square_blocks,
    ),
    Rule(Kronecker | KroneckerSum | Circulant | Diagonal, "Σ f(λ)", _by_values, when=has("hermitian")),
    Rule(
        Operator,
        "Lanczos quadrature",
        lambda A, f: trace_of(A, f.of),
        when=lambda A, f: "hermitian" in A.properties and not affordable(A),
        answer="stochastic",
    ),
    Rule(Operator, "Σ f(λ), written out", _by_values, when=has("hermitian"), cost=lambda A: 2 * cubic(A)),
    Rule(Operator, "the diagonal of f(A)", _by_diagonal, cost=lambda A: 30 * cubic(A)),
)
