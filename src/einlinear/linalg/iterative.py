"""Where no rule answers and the matrix is too large to write out: products alone, to a tolerance or by estimate.

The algorithms are in `einlinear.linalg.krylov` and `.stochastic`, their gradients in `.implicit`; here an operator
meets the one that its properties allow.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear.linalg import implicit, spectral
from einlinear.linalg.borrowed import banded_eigenpairs
from einlinear.linalg.krylov.cg import cg
from einlinear.linalg.krylov.eigen import eigenpairs
from einlinear.linalg.krylov.functions import apply_function
from einlinear.linalg.krylov.gmres import gmres
from einlinear.linalg.krylov.lsmr import lsmr
from einlinear.linalg.krylov.minres import minres
from einlinear.linalg.result import NotConverged, Result
from einlinear.linalg.stochastic.probes import probes
from einlinear.linalg.stochastic.slq import slq, slq_logdet
from einlinear.operator import Operator, OperatorError, known, remembered
from einlinear.operators import Banded, Circulant, Diagonal, Sparse, Toeplitz

SAMPLES = 32
"""Probes of an estimate."""


@dataclass(eq=False, repr=False)
class IterativeInverse(Operator):
    """A⁻¹, solved for anew at each product: by CG where A is definite, MINRES where Hermitian, GMRES otherwise."""

    of: Operator
    preconditioner: Operator | None = None

    @remembered
    def shape(self) -> torch.Size:
        return self.of.shape

    def _facts(self) -> set[str]:
        return {*self.of.properties & {"hermitian", "psd"}}

    def _matmul(self, b: Tensor) -> Tensor:
        return implicit.solve(self.of, b, self._solved)

    def _solved(self, a: Any, b: Tensor) -> Tensor:
        """`a` is A or its adjoint, on the leaves that a gradient is taken at."""
        precondition = None
        if self.preconditioner is not None:
            precondition = self.preconditioner.matmul
        if "psd" in self.of.properties:
            return cg(a.matmul, b, preconditioner=precondition).value
        if "hermitian" in self.of.properties:
            return minres(a.matmul, b).value
        return gmres(a.matmul, b, preconditioner=precondition).value

    def _transpose(self) -> Operator:
        return IterativeInverse(self.of.T, None if self.preconditioner is None else self.preconditioner.T)

    def _conj(self) -> Operator:
        preconditioner = None if self.preconditioner is None else self.preconditioner.conj()
        return IterativeInverse(self.of.conj(), preconditioner, claims=self.claims)

    def _text(self) -> str:
        return f"({self.of!r})⁻¹"


@dataclass(eq=False, repr=False)
class IterativePseudoInverse(Operator):
    """A⁺, by LSMR at each product."""

    of: Operator

    @remembered
    def shape(self) -> torch.Size:
        *batch, m, n = self.of.shape
        return torch.Size((*batch, n, m))

    def _matmul(self, b: Tensor) -> Tensor:
        return implicit.least_squares(self.of, b, lambda a, rhs: lsmr(a.matmul, a.H.matmul, rhs).value)

    def _transpose(self) -> Operator:
        return IterativePseudoInverse(self.of.T)

    def _conj(self) -> Operator:
        return IterativePseudoInverse(self.of.conj())

    def _text(self) -> str:
        return f"({self.of!r})⁺"


@dataclass(eq=False, repr=False)
class IterativeFunction(Operator):
    """f(A) of a Hermitian A, from the Krylov space of each column that it is applied to."""

    of: Operator
    function: Any

    @remembered
    def shape(self) -> torch.Size:
        return self.of.shape

    def _facts(self) -> set[str]:
        return {"hermitian"}

    def _matmul(self, b: Tensor) -> Tensor:
        return spectral.apply_function(self.of, b, self.function, run)

    def _transpose(self) -> Operator:
        return IterativeFunction(self.of.T, self.function)

    def _conj(self) -> Operator:
        return IterativeFunction(self.of.conj(), self.function)

    def _text(self) -> str:
        return f"f({self.of!r})"


def run(a: Any, b: Tensor, function: Any) -> Tensor:
    """f(A) b in two passes: no basis is kept."""
    return apply_function(a.matmul, b, function, two_pass=True).value


def preconditioner(A: Operator) -> Operator | None:
    """What is cheap to invert and near to A: the circulant part of a Toeplitz matrix, the diagonal of a sparse one."""
    if isinstance(A, Toeplitz):
        # The nearest circulant matrix in Frobenius norm (T. Chan 1988), definite where A is.
        n = A.shape[-1]
        k = torch.arange(n, device=A.device)
        column, row = A.first_column.detach(), A.first_row.detach()
        wrapped = torch.cat([torch.zeros_like(row[..., :1]), row[..., 1:].flip(-1)], -1)
        values = Circulant(((n - k) * column + k * wrapped) / n).eigenvalues()
        if known(values != 0):
            inverse = torch.fft.ifft(1 / values)
            return Circulant(inverse if A.dtype.is_complex else inverse.real)
    if isinstance(A, Sparse):
        diagonal = A.diagonal().detach()
        if known(diagonal.real > 0):
            return Diagonal(1 / diagonal)
    return None


def inverse(A: Operator) -> Operator:
    """A⁻¹ by products with A."""
    return IterativeInverse(A, preconditioner(A))


class Estimate(UserWarning):
    """An answer is a random estimate; its standard error is in the text."""


def _tell(what: str, A: Operator, error: Tensor) -> None:
    warnings.warn(
        f"{what} of {A!r} is an estimate from {SAMPLES} probes, with a standard error of {float(error.max()):.2g}; "
        f"einlinear.linalg.stochastic has the functions that take more",
        Estimate,
        stacklevel=2,
    )


def logdet(A: Operator) -> Tensor:
    """An estimate of log det A, by Lanczos quadrature; A positive definite."""
    if "psd" not in A.properties:
        raise OperatorError(
            f"cannot find the determinant of {A!r}: no rule splits it, it is too large to write out, and an estimate "
            f"needs it to be positive definite; claim 'psd' where it is"
        )
    probe = probes((A.shape[-1], SAMPLES), kind="sphere", dtype=A.dtype, device=A.device)
    found = slq_logdet(A.matmul, tuple(A.shape), probe=probe, dtype=A.dtype, device=A.device)
    _tell("the log-determinant", A, _error(found))
    return implicit.logdet(found.value.real, A, probe, lambda a, b: cg(a.matmul, b).value)


def trace_of(A: Operator, f: Any) -> Tensor:
    """An estimate of tr f(A) for a Hermitian A, by Lanczos quadrature."""
    probe = probes((A.shape[-1], SAMPLES), kind="sphere", dtype=A.dtype, device=A.device)
    found = slq(A.matmul, tuple(A.shape), f, probe=probe, dtype=A.dtype, device=A.device)
    _tell("the trace of a function", A, _error(found))
    return spectral.trace_function(found.value, A, probe, f, run)


def _error(found: Result[Tensor]) -> Tensor:
    assert found.standard_error is not None
    return found.standard_error


def extreme(A: Operator, k: int, which: str, products: int | None = None) -> tuple[Tensor, Tensor] | None:
    """k extreme eigenvalues of a Hermitian A with their vectors, `[..., n, k]`; 2k for "LM" of a band matrix.

    None where so many `products` were not enough; without a number, not to converge is a warning.
    The caller sees to it that a band matrix has one that LAPACK takes: `rules.banded.by_band`.
    """
    if isinstance(A, Banded):
        return spectral.eigenpairs(A, *banded_eigenpairs(A, k, which), lambda a, b: minres(a.matmul, b).value)
    names = {"LA": "largest", "SA": "smallest", "LM": "magnitude"}
    options: Any = {"which": names[which], "dtype": A.dtype, "device": A.device}
    if products is None:
        values, vectors = eigenpairs(A.matmul, tuple(A.shape), k, **options).value
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)  # the caller has another way
            found = eigenpairs(A.matmul, tuple(A.shape), k, max_iterations=products, **options)
        if not found.converged:
            return None
        values, vectors = found.value
    return spectral.eigenpairs(A, values.real, vectors, lambda a, b: minres(a.matmul, b).value)
