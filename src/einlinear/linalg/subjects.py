"""What a question may be asked of, brought into the form in which rules take it, or refused in a sentence."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.layer import Linear
from einlinear.linalg.adapters import from_cola, from_scipy
from einlinear.operator import Dense, Operator, OperatorError, lift, refute, transformed
from einlinear.operators import Sparse, Structured
from einlinear.structure import Structure

Subject = Operator | Tensor | nn.Module


def operator(subject: Any, factors: Any = None) -> Operator:
    """The operator that something stands for.

    A tensor, dense or torch-sparse; a `Structure` with its factors; the weight of an
    `einlinear.Linear` or `torch.nn.Linear` (the bias is no part of it); a matrix, sparse matrix or
    `LinearOperator` of NumPy or scipy; an operator of CoLA.
    """
    match subject:
        case Operator():
            return subject
        case Structure() if factors is not None:
            return Structured(subject, tuple(factors))
        case Linear():
            return Structured(subject.structure, tuple(subject.effective_factors()))
        case nn.Linear():
            return Dense(subject.weight)
        case Tensor():
            return lift(subject) if subject.layout == torch.strided else Sparse.of(subject)
    library = type(subject).__module__.partition(".")[0]
    if library in ("numpy", "scipy"):
        return from_scipy(subject)
    if library == "cola":
        return from_cola(subject)
    raise OperatorError(
        f"cannot make an operator of a {type(subject).__name__}: pass an Operator, a tensor, a Structure with its "
        f"factors, a linear layer, or a matrix of NumPy or scipy"
    )


def ready(subject: Subject, doing: str, square: bool = False) -> Operator:
    """The operator, in at least 32 bits, refused where it cannot be square or finite."""
    A = operator(subject)
    if square and not A.square:
        m, n = A.shape[-2:]
        raise OperatorError(f"cannot {doing} {A!r}: it is {m}×{n}, and this needs a square operator")
    finite(doing, A)
    return A.to(torch.float32) if A.dtype in (torch.float16, torch.bfloat16) else A


def finite(doing: str, A: Operator, *others: Tensor) -> None:
    tensors = (*A.tensors, *others)
    if transformed(*tensors):
        return
    for tensor in tensors:
        # The sum of finite numbers is finite or too large; only then are all of them looked at.
        if not math.isfinite(abs(tensor.detach().sum().item())) and not bool(tensor.isfinite().all()):
            raise OperatorError(f"cannot {doing} {A!r}: there are NaN or infinite entries in its input")


def hermitian(subject: Subject, doing: str) -> Operator:
    A = ready(subject, doing, square=True)
    if "hermitian" in A.properties:
        return A
    if not transformed(*A.tensors):
        try:
            refute(A, "hermitian")
        except OperatorError:
            raise OperatorError(f"cannot {doing} {A!r}: it is not Hermitian; use eig, svd or lu") from None
    return A.claim("hermitian")


def fitting(A: Operator, b: Tensor, rows: int, doing: str) -> None:
    """Raises where b is no right-hand side of so many rows."""
    if not isinstance(b, Tensor) or b.ndim == 0 or b.shape[-2 if b.ndim > 1 else -1] != rows:
        found = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
        raise OperatorError(
            f"cannot {doing} {A!r}: the right-hand side is {found}, it must be a vector [{rows}] or columns "
            f"[..., {rows}, k]"
        )
    if A.tensors and A.device != b.device:
        raise OperatorError(
            f"cannot {doing} {A!r}, which is on {A.device}, for a right-hand side on {b.device}: move one by "
            f".to(device)"
        )
    finite("solve with", A, b)
