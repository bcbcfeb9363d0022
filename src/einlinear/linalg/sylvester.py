"""Kronecker sums of matrices that eigenvectors do not split: by Schur's form, which every matrix has."""

import importlib
from typing import Any

import torch
from torch import Tensor

from einlinear.linalg.borrowed import Borrowed, has_scipy, scipy
from einlinear.operator import transformed
from einlinear.operators import KroneckerSum


def by_schur(operator: KroneckerSum, *_: object) -> bool:
    """Whether Schur's form serves: one operator, its values at hand, and scipy is there."""
    return not operator.batch_shape and has_scipy() and not transformed(*operator.tensors)


def sylvester(operator: KroneckerSum) -> tuple[Tensor, Borrowed]:
    """The eigenvalues of A ⊕ B ⊕ …, `[n]`, and its inverse, without gradients.

    Every term is U T Uᴴ with T upper triangular, so the sum is too: substitution, one index of all terms but the
    largest at a time, costs n times the sum of the terms' sizes. For two terms this solves Sylvester's equation
    A X + X Bᵀ = C (Bartels and Stewart 1972).
    """
    linalg, numpy = scipy("linalg", "find Schur's form"), importlib.import_module("numpy")
    matrices = [term.dense().detach().cpu().resolve_conj().numpy() for term in operator.terms]
    forms = [linalg.schur(matrix, output="complex") for matrix in matrices]
    sizes = [len(matrix) for matrix in matrices]
    last = sizes.index(max(sizes))
    order = [*(k for k in range(len(sizes)) if k != last), last]
    triangles = [numpy.asfortranarray(forms[k][0]) for k in order]
    values = numpy.zeros(1, triangles[0].dtype)
    for triangle, _ in forms:
        values = numpy.add.outer(values, triangle.diagonal()).reshape(-1)

    def turned(x: Any, side: str, back: bool) -> Any:
        """Uᴴ x, or U y `back`, on every index; conjugated for the transpose."""
        for k, (_, unitary) in enumerate(forms):
            matrix = unitary if back else unitary.conj().T
            matrix = matrix.conj() if side == "T" else matrix
            x = numpy.moveaxis(numpy.tensordot(matrix, x, (1, k)), 0, k)
        return x

    def substitute(b: Any, side: str) -> Any:
        x = turned(b.reshape(*sizes, -1), side, False)
        x = numpy.moveaxis(x, last, -2)
        x = numpy.moveaxis(_substituted(triangles, x, 0.0, side), -2, last)
        x = turned(x, side, True).reshape(b.shape)
        return x if operator.dtype.is_complex else x.real

    n = operator.shape[-1]
    inverse = Borrowed(n, substitute, work=8.0 * n * sum(sizes), dtype=operator.dtype, device=operator.device)
    return torch.as_tensor(values).to(operator.device), inverse


def _substituted(triangles: list[Any], x: Any, shift: Any, side: str) -> Any:
    """(T₁ ⊕ T₂ ⊕ … + shift)⁻¹ x for upper triangles, or its transpose or adjoint; x `[n₁, n₂, …, k]`."""
    numpy, blas = importlib.import_module("numpy"), scipy("linalg.blas", "substitute")
    first, *rest = triangles
    n = len(first)
    if not rest:
        shifted = first.copy(order="F")
        shifted[range(n), range(n)] += shift
        (solve,) = blas.get_blas_funcs(("trsm",), (shifted, x))
        return solve(1.0, shifted, x, trans_a={"N": 0, "T": 1, "H": 2}[side])
    matrix = {"N": first, "T": first.T, "H": first.T.conj()}[side]
    done = numpy.empty_like(x)
    for i in range(n) if side != "N" else reversed(range(n)):
        known = slice(i + 1, None) if side == "N" else slice(0, i)
        right = x[i] - numpy.tensordot(matrix[i, known], done[known], 1)
        done[i] = _substituted(rest, right, shift + first[i, i], side)
    return done
