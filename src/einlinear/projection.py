"""The factors whose structure lies nearest to a given dense weight.

docs/mathematics.md section 3. Splitting by singular value decomposition is exact for nested structures, all
two-factor ones among them; alternating least squares lowers the error of every other.
"""

import torch
from torch import Tensor

from einlinear.contract import Factors, dense, einsum, shaped
from einlinear.moments import Moments
from einlinear.structure import Axes, Structure, StructureError


def project(weight: Tensor, structure: Structure, moments: Tensor | Moments | None = None) -> list[Tensor]:
    """Splits off one factor at a time by a batched truncated SVD.

    With two factors this minimises the Frobenius error exactly, and specialises to the methods
    known by other names: truncated SVD (low rank), Van Loan and Pitsianis (Kronecker), the
    Monarch projection (BTT of rank 1). With more it is TT-SVD (Oseledets 2011), which recovers
    chains such as a tensor train or a butterfly; `refine` lowers its error elsewhere.

    Padding is filled with zeros. That costs nothing where a padded side gives each factor a
    rectangle of every block (low rank, BTT and Monarch with two cores, block-diagonal). Elsewhere
    (Kronecker, tensor train) the result is optimal for the matrix with its padding, not for the
    part that is used, and even a member of the family is missed; `refine` does not count padding.

    Args:
        weight: `[d_out, d_in]`, real or complex; computed in float32 at least.
        structure: an unrouted structure of these widths.

    Returns:
        A tensor for each factor, shaped `structure.factor_shapes`, in the weight's dtype.

    Raises:
        StructureError: if the widths differ, the structure is routed, or the weight is not finite
            or not of floating point.
    """
    axes, rest = _blocks(_checked(weight, structure), structure)
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


def refine(
    weight: Tensor,
    structure: Structure,
    factors: Factors,
    sweeps: int = 1,
    tolerance: float = 0.0,
    moments: Tensor | Moments | None = None,
) -> list[Tensor]:
    """Lowers the Frobenius error by solving for one factor at a time with the others held.

    The matrix is linear in each factor, so each solve is a batched linear least-squares problem
    and the error never rises, but for rounding to the weight's dtype. Entries that only padding
    has are asked to stay as they are: the error of the others still falls, in smaller steps.
    Arguments and errors as in `project`; `factors` is where to start, and `sweeps` counts rounds
    over all factors.

    A solve holds the product of the other factors: as many entries as the weight, times the sizes
    of the axes that bind its factor to the others.
    """
    target = _checked(weight, structure)
    found = [_exact(factor) for factor in factors]
    for position in list(range(len(found))) * sweeps:
        # A correction, not a new factor: what the weight cannot determine, padding above all, then stays as it is.
        axes, residual = _blocks(target - dense(structure, found), structure)
        found = shaped(structure, found)
        factor = structure.factors[position]
        others = [other for k, other in enumerate(structure.factors) if k != position]
        around = {axis for other in others for axis in other}
        batch = tuple(axis for axis in factor if axis in axes and axis in around)
        rows = tuple(axis for axis in factor if axis in axes and axis not in around)
        bond = tuple(axis for axis in factor if axis not in axes and axis in around)
        columns = tuple(axis for axis in axes if axis not in factor)
        environment = target.new_ones(())
        if others:
            tensors = [tensor for k, tensor in enumerate(found) if k != position]
            environment = einsum(structure, others, batch + bond + columns, tensors)
        known = _grouped(structure, environment, batch, bond, columns)
        wanted = einsum(structure, [axes], batch + rows + columns, [residual])
        correction = _grouped(structure, wanted, batch, rows, columns) @ torch.linalg.pinv(known)
        found[position] = found[position] + _spread(structure, correction, batch + rows + bond, factor)
    return [factor.to(weight.dtype) for factor in found]


def _checked(weight: Tensor, structure: Structure) -> Tensor:
    """The weight in the precision of the computation."""
    if weight.shape != (structure.d_out, structure.d_in):
        raise StructureError(
            f"cannot project a weight of shape {tuple(weight.shape)} onto {structure!r}: "
            f"it needs [d_out, d_in] = [{structure.d_out}, {structure.d_in}]"
        )
    if structure.routed:
        raise StructureError(f"cannot project onto {structure!r}: a routed structure has no single matrix; unroute it")
    if weight.is_meta or not (weight.is_floating_point() or weight.is_complex()):
        raise StructureError(
            f"cannot project a weight of {weight.dtype} on the device '{weight.device}': "
            f"it needs entries of floating point; load or dequantise the weight first"
        )
    if not torch.isfinite(weight).all():
        raise StructureError("cannot project a weight with entries that are not finite; mend NaN or infinity first")
    return _exact(weight)


def _exact(tensor: Tensor) -> Tensor:
    """`tensor` without its history, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(matrix: Tensor, structure: Structure) -> tuple[Axes, Tensor]:
    """A matrix with an axis for each of the structure's ends, axes common to both taken once.

    Entries off the diagonal of a common axis are no matter of the structure: it has zeros there.
    """
    padded = torch.nn.functional.pad(matrix, (0, structure.pad_in, 0, structure.pad_out))
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
