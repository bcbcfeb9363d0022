"""To and from the operators of other libraries. Each needs its library, and says so where it is missing."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear.linalg.borrowed import scipy, to_csr
from einlinear.operator import (
    Dense,
    Fixed,
    Identity,
    Operator,
    OperatorError,
    Product,
    Scaled,
    Sum,
    product,
    remembered,
    total,
)
from einlinear.operators import (
    BlockDiagonal,
    Diagonal,
    DirectSum,
    Jacobian,
    Kronecker,
    KroneckerSum,
    Permutation,
    Sparse,
    Triangular,
    block_diag,
    kron,
    kronsum,
)


def to_scipy(A: Operator) -> Any:
    """A `scipy.sparse.linalg.LinearOperator` of the same matrix; a `Sparse` operator becomes a CSR matrix.

    Works on the CPU, without gradients; `A` has no batch.
    """
    linalg = scipy("sparse.linalg", "convert an operator to scipy")
    if A.batch_shape:
        raise OperatorError(f"cannot convert {A!r} to scipy: it has a batch, and scipy's operators have none")
    if isinstance(A, Sparse):
        return to_csr(A)
    numpy_dtype = torch.empty(0, dtype=A.dtype).numpy().dtype

    def by(operator: Operator) -> Any:
        def columns(x: Any) -> Any:
            wide = torch.as_tensor(x.reshape(x.shape[0], -1).astype(numpy_dtype, copy=False), device=A.device)
            with torch.no_grad():
                return operator.matmul(wide).resolve_conj().cpu().numpy().reshape(-1, *x.shape[1:])

        return columns

    forward, backward = by(A), by(A.H)
    return linalg.LinearOperator(
        tuple(A.shape), matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=numpy_dtype
    )


@dataclass(eq=False, repr=False)
class Foreign(Fixed):
    """An operator of another library, by what multiplies NumPy columns with it and with its adjoint; no gradients."""

    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]
    rows: int
    columns: int

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.columns))

    def _matmul(self, x: Tensor) -> Tensor:
        flat = x.movedim(-2, 0).reshape(self.columns, -1)
        y = torch.as_tensor(self.forward(flat.detach().resolve_conj().numpy()))
        return y.reshape(self.rows, *x.shape[:-2], x.shape[-1]).movedim(0, -2)

    def _transpose(self) -> Operator:
        forward, backward = (_conjugated(apply) for apply in (self.backward, self.forward))
        return Foreign(forward, backward, self.columns, self.rows, dtype=self.dtype)

    def _conj(self) -> Operator:
        forward, backward = (_conjugated(apply) for apply in (self.forward, self.backward))
        return Foreign(forward, backward, self.rows, self.columns, dtype=self.dtype)


def _conjugated(apply: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: apply(x.conj()).conj()


def from_scipy(A: Any) -> Operator:
    """An array, a sparse matrix or a `LinearOperator` as an operator; arrays are copied, not shared."""
    numpy = importlib.import_module("numpy")
    if isinstance(A, numpy.ndarray):
        return Dense(torch.tensor(A))
    if scipy("sparse", "convert an operator of scipy").issparse(A):
        coo = A.tocoo()
        rows, columns = (torch.tensor(index, dtype=torch.int64) for index in (coo.row, coo.col))
        return Sparse(torch.tensor(coo.data), rows, columns, coo.shape)
    dtype = torch.as_tensor(numpy.zeros(1, dtype=A.dtype)).dtype
    return Foreign(A.matmat, A.rmatmat, *A.shape, dtype=dtype)


def to_linear_operator(A: Operator) -> Any:
    """A `linear_operator.LinearOperator` (GPyTorch's) of a positive semi-definite operator."""
    library = importlib.import_module("linear_operator.operators")
    if "psd" not in A.properties:
        raise OperatorError(
            f"cannot convert {A!r} to linear_operator: that library solves definite systems alone; claim 'psd'"
        )
    match A:
        case Diagonal(values=values):
            return library.DiagLinearOperator(values)
        case Kronecker(factors=factors):
            return library.KroneckerProductLinearOperator(*map(to_linear_operator, factors))
        case BlockDiagonal(of=of):
            return library.BlockDiagLinearOperator(library.to_linear_operator(of.dense()))
        case Sum(terms=terms) if all("psd" in term.properties for term in terms):
            return library.PsdSumLinearOperator(*map(to_linear_operator, terms))
    return library.to_linear_operator(A.dense())


def to_cola(A: Operator) -> Any:
    """A `cola.ops.LinearOperator`: exact for the compositions that CoLA has, by products for all others.

    Never `cola.ops.Sparse`, whose matrix is another than the one it was given.
    """
    ops = importlib.import_module("cola.ops")
    backend = importlib.import_module("cola.backends.torch_fns")
    match A:
        case Dense(matrix=matrix):
            return ops.Dense(matrix)
        case Identity():
            return ops.Identity(tuple(A.shape), A.dtype)
        case Diagonal(values=values):
            return ops.Diagonal(values)
        case Scaled(c=c, of=of):
            return c * to_cola(of)
        case Permutation(index=index):
            return ops.Permutation(index, dtype=A.dtype)
        case Kronecker(factors=parts) | Product(factors=parts) | KroneckerSum(terms=parts) | Sum(terms=parts):
            return getattr(ops, {"KroneckerSum": "KronSum"}.get(type(A).__name__, type(A).__name__))(
                *map(to_cola, parts)
            )
        case DirectSum(blocks=parts):
            return ops.BlockDiag(*map(to_cola, parts))
    made = ops.LinearOperator(A.dtype, tuple(A.shape), matmat=A.matmul)
    made.xnp = backend
    return made


def from_cola(A: Any) -> Operator:
    """An operator of CoLA on torch: the composition where this library has it, the matrix where not.

    Annotations become claims; the entries of a `Sparse` are those of its matrix as CoLA multiplies by it.
    """
    ops, annotations = (importlib.import_module(f"cola.{name}") for name in ("ops", "annotations"))
    parts = [from_cola(part) for part in getattr(A, "Ms", ())]
    made: Operator
    match A:
        case ops.ScalarMul() if A.shape[0] == A.shape[1]:
            made = torch.as_tensor(A.c) * Identity(A.shape[0], dtype=A.dtype, device=A.device)
        case ops.Identity() if A.shape[0] == A.shape[1]:
            made = Identity(A.shape[0], dtype=A.dtype, device=A.device)
        case ops.Diagonal():
            made = Diagonal(A.diag)
        case ops.Triangular():
            made = Triangular(A.A, upper=not A.lower)
        case ops.Permutation():
            made = Permutation(A.perm, dtype=A.dtype)
        case ops.Kronecker():
            made = kron(*parts)
        case ops.KronSum():
            made = kronsum(*parts)
        case ops.BlockDiag():
            made = block_diag(*(p for p, count in zip(parts, A.multiplicities, strict=True) for _ in range(count)))
        case ops.Product():
            made = product(*parts)
        case ops.Sum():
            made = total(*parts)
        case ops.Transpose():
            made = from_cola(A.A).T
        case ops.Adjoint():
            made = from_cola(A.A).H
        case _:
            made = Dense(A.to_dense())
    known = {"psd": annotations.PSD, "hermitian": annotations.SelfAdjoint, "unitary": annotations.Unitary}
    claims = [name for name, annotation in known.items() if made.square and A.isa(annotation)]
    return made.claim(*claims) if {*claims} - made.properties else made


def to_lineax(A: Operator) -> Any:
    """A `lineax` operator: a matrix, a diagonal, or a function of JAX arrays that calls back into torch."""
    jax, lineax = (importlib.import_module(name) for name in ("jax", "lineax"))
    as_jax = jax.numpy.asarray
    tags = [lineax.positive_semidefinite_tag] if "psd" in A.properties else []
    tags += [lineax.symmetric_tag] if "hermitian" in A.properties and not A.dtype.is_complex else []
    if isinstance(A, Diagonal):
        return lineax.DiagonalLinearOperator(as_jax(A.values.detach().resolve_conj().numpy()))
    if isinstance(A, Jacobian):
        raise OperatorError(
            f"cannot convert {A!r} to lineax: its function is one of torch; use lineax.JacobianLinearOperator"
        )
    return lineax.MatrixLinearOperator(as_jax(A.dense().detach().resolve_conj().numpy()), tags)
