"""CUR: a weight approximated by some of its own columns and rows, joined by a small matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from einlinear.projection.moments import Moments, second_moments
from einlinear.structure import Structure, StructureError


class Skeleton(NamedTuple):
    """W ≈ C U R. `factors` are R, U and C, those of `structure`, in the order they are applied."""

    structure: Structure
    factors: list[Tensor]
    columns: Tensor
    """Which columns of W are C, `[rank]`: the input features read, most telling first."""
    rows: Tensor
    """Which rows of W are R, `[rank]`."""


def cur(weight: Tensor, rank: int, moments: Tensor | Moments | None = None) -> Skeleton:
    """W ≈ C U R with `rank` columns C and rows R of W itself, chosen by DEIM, and the best U between.

    Columns and rows are chosen by discrete empirical interpolation on the leading singular vectors
    of W, each column weighed by the root mean square of its input feature if `moments` are given
    (CURing, https://arxiv.org/abs/2501.04211). U minimises the (weighted) error for that choice.

    Example:
        >>> skeleton = cur(torch.randn(64, 48), 8)
        >>> skeleton.structure
        Structure.parse('i, k i, l k, o l -> o', i=48, k=8, l=8, o=64)

    Args:
        weight: `[d_out, d_in]`, finite, of floating point.
        rank: how many columns, and how many rows.
        moments: second moments of inputs, `[d_in, d_in]` or `Moments`.

    Raises:
        StructureError: for a rank that the weight does not have room for, or moments that do not fit.
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise StructureError(
            f"cannot take {rank} columns and rows of a weight of shape {tuple(weight.shape)}: "
            f"pass a matrix and a rank from 1 to the smaller of its widths"
        )
    if not torch.isfinite(weight).all():
        raise StructureError("cannot project a weight with entries that are not finite; mend NaN or infinity first")
    exact = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
    gram = None if moments is None else second_moments(moments, weight)
    weighed = exact if gram is None else exact * gram.diagonal().real.clamp(min=0).sqrt()
    u, _, vh = torch.linalg.svd(weighed, full_matrices=False)
    columns, rows = _interpolation_points(vh[:rank].mH), _interpolation_points(u[:, :rank])
    c, r = exact[:, columns], exact[rows]
    # min over U of ‖(W − C U R) S‖, S Sᴴ the moments: C⁺ W (S Sᴴ) Rᴴ (R S Sᴴ Rᴴ)⁺.
    right = r.mH if gram is None else gram @ r.mH
    middle = torch.linalg.pinv(c) @ exact @ right @ torch.linalg.pinv(r @ right, hermitian=True)
    structure = Structure.parse("i, k i, l k, o l -> o", i=weight.shape[1], k=rank, l=rank, o=weight.shape[0])
    return Skeleton(structure, [factor.to(weight.dtype) for factor in (r, middle, c)], columns, rows)


def _interpolation_points(vectors: Tensor) -> Tensor:
    """DEIM (Chaturantabut and Sorensen 2010): a row for each column of `vectors`, `[n, rank]`, in turn.

    The next row is where the next vector differs most from its interpolation at the rows so far:
    exactly the pivots of Gaussian elimination.
    """
    _, pivots = torch.linalg.lu_factor(vectors)
    order = list(range(len(vectors)))
    for position, pivot in enumerate((pivots - 1).tolist()):
        order[position], order[pivot] = order[pivot], order[position]
    return torch.tensor(order[: vectors.shape[1]], device=vectors.device)
