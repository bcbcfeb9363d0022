"""The factors whose structure lies nearest to a given dense weight.

MATH.md section 3. Splitting by singular value decomposition is exact for nested structures, all
two-factor ones among them; alternating least squares lowers the error of every other.
"""

import torch
from torch import Tensor

from einlinear.contract import Factors, einsum
from einlinear.structure import Axes, Structure, StructureError


def project(weight: Tensor, structure: Structure) -> list[Tensor]:
    """Splits off one factor at a time by a batched truncated SVD.

    With two factors this minimises the Frobenius error exactly, and specialises to the methods
    known by other names: truncated SVD (low rank), Van Loan and Pitsianis (Kronecker), the
    Monarch projection (BTT of rank 1). With more it is TT-SVD, quasi-optimal; `refine` improves it.

    Args:
        weight: `[d_out, d_in]`.
        structure: an unrouted structure of these widths; padding is filled with zeros.

    Returns:
        A tensor for each factor, shaped `structure.factor_shapes`.

    Raises:
        StructureError: if the widths differ, the weight is not finite or the structure is routed.
    """
    axes, rest = _target(weight, structure)
    factors: list[Tensor] = []
    for position, factor in enumerate(structure.factors[:-1]):
        later = {axis for other in structure.factors[position + 1 :] for axis in other}
        shared = tuple(axis for axis in factor if axis in later)
        batch = tuple(axis for axis in shared if axis in axes)
        bond = tuple(axis for axis in shared if axis not in axes)
        rows = tuple(axis for axis in factor if axis not in later and axis in axes)
        columns = tuple(axis for axis in axes if axis not in factor)
        matrix = einsum(structure, [axes], batch + rows + columns, [rest])
        left, right = _truncate(_grouped(structure, matrix, batch, rows, columns), structure.size(bond))
        factors.append(_spread(structure, left, batch + rows + bond, factor))
        axes = batch + bond + columns
        rest = right.reshape(structure.shape(axes))
    factors.append(_spread(structure, rest, axes, structure.factors[-1]))
    return [factor.to(weight.dtype) for factor in factors]


def refine(weight: Tensor, structure: Structure, factors: Factors, sweeps: int = 1) -> list[Tensor]:
    """Lowers the Frobenius error by solving for one factor at a time with the others held.

    Each solve is a linear least-squares problem, so the error never rises. Arguments and errors
    as in `project`; `factors` is where to start, and `sweeps` counts rounds over all factors.
    """
    target_axes, target = _target(weight, structure)
    found = [f.reshape(s).to(target.dtype) for f, s in zip(factors, structure.factor_shapes, strict=True)]
    for position in list(range(len(found))) * sweeps:
        factor = structure.factors[position]
        others = [axes for k, axes in enumerate(structure.factors) if k != position]
        around = {axis for axes in others for axis in axes}
        batch = tuple(axis for axis in factor if axis in target_axes and axis in around)
        rows = tuple(axis for axis in factor if axis in target_axes and axis not in around)
        bond = tuple(axis for axis in factor if axis not in target_axes)
        columns = tuple(axis for axis in target_axes if axis not in factor)
        tensors = [tensor for k, tensor in enumerate(found) if k != position]
        environment = torch.ones(structure.shape(batch + bond + columns), dtype=target.dtype, device=target.device)
        if others:
            environment = einsum(structure, others, batch + bond + columns, tensors)
        wanted = einsum(structure, [target_axes], batch + rows + columns, [target])
        known = _grouped(structure, environment, batch, bond, columns)
        solved = _grouped(structure, wanted, batch, rows, columns) @ torch.linalg.pinv(known)
        found[position] = _spread(structure, solved, batch + rows + bond, factor)
    return [factor.to(weight.dtype) for factor in found]


def _target(weight: Tensor, structure: Structure) -> tuple[Axes, Tensor]:
    """The weight with an axis for each of the structure's ends, axes common to both taken once.

    Entries off the diagonal of a common axis are no matter of the structure: it has zeros there.
    """
    if weight.shape != (structure.d_out, structure.d_in):
        raise StructureError(
            f"cannot project a weight of shape {tuple(weight.shape)} onto {structure!r}: "
            f"it needs [d_out, d_in] = [{structure.d_out}, {structure.d_in}]"
        )
    if structure.routed:
        raise StructureError(f"cannot project onto {structure!r}: a routed structure has no single matrix; unroute it")
    if not torch.isfinite(weight).all():
        raise StructureError("cannot project a weight with entries that are not finite; mend NaN or infinity first")
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    padded = torch.nn.functional.pad(exact, (0, structure.pad_in, 0, structure.pad_out))
    ends = structure.y + structure.x
    axes = tuple(dict.fromkeys(ends))
    return axes, einsum(structure, [ends], axes, [padded.reshape(structure.shape(ends))])


def _truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of rank `rank`, filled up with zeros beyond full rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = min(rank, s.shape[-1])
    root = s[..., :keep].sqrt().to(u.dtype)
    left, right = u[..., :keep] * root[..., None, :], root[..., None] * vh[..., :keep, :]
    missing = rank - keep
    return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))


def _grouped(structure: Structure, tensor: Tensor, *groups: Axes) -> Tensor:
    """`tensor`, whose axes are those of `groups` in order, with one dimension for each group."""
    return tensor.reshape([structure.size(group) for group in groups])


def _spread(structure: Structure, tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    """`tensor` with one dimension for each axis, in the order `want`; an axis it lacks is a sum of equal parts."""
    spread = einsum(structure, [have], tuple(a for a in want if a in have), [tensor.reshape(structure.shape(have))])
    for position, axis in enumerate(want):
        if axis not in have:
            size = structure.sizes[axis]
            spread = spread.unsqueeze(position).expand(*spread.shape[:position], size, *spread.shape[position:]) / size
    return spread.contiguous()
