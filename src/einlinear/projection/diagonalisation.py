"""Recovers sums of outer products with shared bases, such as BLAST, by simultaneous diagonalisation."""

import torch
from torch import Tensor

from einlinear.projection.network import contract
from einlinear.structure import Axes, Structure

NONSENSE = 1e8
"""Condition number of eigenvectors beyond which nothing was found."""


def diagonalised(structure: Structure, axes: Axes, blocks: Tensor) -> list[Tensor] | None:
    """Factors of the matrix whose blocks are W_ij = L_i diag(c_ij) R_jᵀ, if there are such; else a guess, or None.

    In bases of the block rows and columns, W_ij W_kj⁻¹ = X_i diag(c_ij / c_kj) X_k⁻¹: two combinations of
    these over j are diagonalised together by X_i (Jennrich's method; Harshman 1970, Leurgans et al. 1993). It needs
    at least two block rows and columns, and blocks no narrower than their rank.

    Args:
        structure: one factor without axes of its own between two that share its axes.
        axes, blocks: the matrix with an axis for each end of the structure.
    """
    parts = _parts(structure)
    if parts is None:
        return None
    left, core, right, (rows, own_rows, columns, own_columns, bond) = parts
    rank, sizes = structure.size(bond), [structure.size(group) for group in (rows, own_rows, columns, own_columns)]
    if rank > min(sizes[1], sizes[3]) or min(sizes[0], sizes[2]) < 2:
        return None
    tensor = contract([axes], [blocks], rows + own_rows + columns + own_columns).reshape(sizes)
    # Bases of what the blocks of one row, and of one column, span together.
    p = _basis(tensor.permute(0, 1, 2, 3), rank)
    q = _basis(tensor.permute(2, 3, 0, 1), rank)
    small = torch.einsum("ipa,ipjq,jqc->ijac", p.conj(), tensor, q.conj())
    x = _eigenvectors(small)
    if x is None:
        return None
    # W_0j = X_0 diag(c_0j) Y_jᵀ gives the rows of Y_jᵀ but for their lengths, and those the rest.
    y = torch.linalg.solve(x, small[0]).mT
    y = q @ (y / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
    outer = torch.einsum("ipjq,jrq->irpj", tensor, torch.linalg.pinv(y))
    u, s, vh = torch.linalg.svd(outer, full_matrices=False)
    root = s[..., 0].sqrt()
    found = {
        left: (rows + bond + own_rows, u[..., 0] * root[..., None]),
        core: (rows + bond + columns, vh[..., 0, :] * root[..., None]),
        right: (columns + own_columns + bond, y),
    }
    factors = []
    for position, wanted in enumerate(structure.factors):
        have, factor = found[position]
        factors.append(contract([have], [factor.reshape(structure.shape(have))], wanted))
    return factors if all(torch.isfinite(factor).all() for factor in factors) else None


def _parts(structure: Structure) -> tuple[int, int, int, tuple[Axes, Axes, Axes, Axes, Axes]] | None:
    """Which factor is which, and the axes: block rows, rows, block columns, columns, bond."""
    if len(structure.factors) != 3:
        return None
    ends = {*structure.x, *structure.y}
    for core, (left, right) in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        c, a, b = (structure.factors[k] for k in (core, left, right))
        bond = tuple(axis for axis in c if axis not in ends)
        rows = tuple(axis for axis in c if axis in a and axis in ends)
        columns = tuple(axis for axis in c if axis in b and axis in ends)
        own_rows = tuple(axis for axis in a if axis not in c)
        own_columns = tuple(axis for axis in b if axis not in c)
        apart = not {*rows, *own_rows} & {*columns, *own_columns}
        if (
            apart
            and {*c} == {*rows, *columns, *bond}
            and {*bond} == ({*a} - ends) == ({*b} - ends)
            and {*own_rows, *own_columns} <= ends
        ):
            return left, core, right, (rows, own_rows, columns, own_columns, bond)
    return None


def _basis(tensor: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of `tensor` `[batch, rows, ...]`, `[batch, rows, rank]`."""
    matrix = tensor.flatten(2)
    _, vectors = torch.linalg.eigh(matrix @ matrix.mH)
    leading: Tensor = vectors[..., -rank:]
    return leading


def _eigenvectors(small: Tensor) -> Tensor | None:
    """X_0 of blocks X_i diag(c_ij) Y_jᵀ, `[i, j, rank, rank]`: of several attempts the best conditioned."""
    weights = torch.randn(2, small.shape[1], generator=torch.Generator().manual_seed(53), dtype=torch.float64)
    best, least = None, NONSENSE
    for k in range(1, len(small)):
        quotients = small[0] @ torch.linalg.pinv(small[k])
        one, two = torch.einsum("wj,jab->wab", weights.to(small), quotients)
        pencil = one @ torch.linalg.pinv(two)
        if not torch.isfinite(pencil).all():
            continue
        values, x = torch.linalg.eig(pencil)
        if not small.is_complex():  # a pair of conjugate vectors spans a real plane
            x = torch.where(values.imag < 0, x.imag, x.real)
        condition = float(torch.linalg.cond(x))
        if condition < least:
            best, least = x, condition
    return best
