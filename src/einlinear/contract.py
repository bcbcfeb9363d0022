"""The reference contraction: short, slow, and right for every structure."""

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.structure import Axes, Structure, StructureError

Factors = Sequence[Tensor]
"""One tensor for each factor of a structure, shaped as `structure.factor_shapes` or, where the
structure is canonical, as `structure.matrix_shapes`: two views of the same memory."""


def apply(structure: Structure, factors: Factors, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """Applies the map to every vector of `x`.

    Args:
        structure: the map.
        factors: its factors.
        x: `[..., d_in]`.
        gate: `[..., entries of the routed axis]`, the weight of each entry for each vector; required
            exactly when the structure is routed.

    Returns:
        `[..., d_out]`.

    Raises:
        StructureError: if the last dimension of `x` is not `d_in`, or a factor or the gate does not fit.
    """
    check(structure, factors, x)
    if (gate is None) != (structure.routed is None):
        found = f"the structure routes its axis '{structure.routed}' but no gate" if gate is None else "an unrouted"
        raise StructureError(
            f"cannot apply {structure}: {found} was given; pass gate=[..., entries] with a structure "
            f"that was routed by .route(axis, active=k), and only then"
        )
    batch = x.shape[:-1]
    if gate is not None and structure.routed and gate.shape != (*batch, structure.sizes[structure.routed]):
        raise StructureError(
            f"cannot apply {structure} to an input of shape {tuple(x.shape)} with a gate of shape "
            f"{tuple(gate.shape)}: it needs {(*batch, structure.sizes[structure.routed])}, one weight for each "
            f"entry of the axis '{structure.routed}'"
        )
    state = pad_last(x, structure.pad_in).reshape(*batch, *structure.shape(structure.x))
    gated_at = max((k for k, axes in enumerate(structure.factors) if structure.routed in axes), default=-1)
    for position, (step, factor) in enumerate(zip(structure.steps, shaped(structure, factors), strict=True)):
        weigh = gate if position == gated_at else None
        state = _apply_step(structure, step.state, step.factor, step.result, state, factor, weigh)
    return state.reshape(*batch, structure.size(structure.y))[..., : structure.d_out]


def dense(structure: Structure, factors: Factors, gate: Tensor | None = None) -> Tensor:
    """The weight matrix, `[d_out, d_in]` as in `torch.nn.Linear`.

    `gate`, `[entries of the routed axis]`, weighs the entries of a routed structure.
    """
    eye = torch.eye(structure.d_in, dtype=factors[0].dtype, device=factors[0].device)
    spread = None if gate is None else gate.expand(structure.d_in, -1)
    return apply(structure, factors, eye, spread).mT


def shaped(structure: Structure, factors: Factors) -> list[Tensor]:
    """The factors with one dimension for each axis."""
    return [factor.reshape(shape) for factor, shape in zip(factors, structure.factor_shapes, strict=True)]


def pad_last(x: Tensor, count: int) -> Tensor:
    """`x` with `count` zeros after the last dimension; `x` itself when there is nothing to add."""
    return torch.nn.functional.pad(x, (0, count)) if count else x


def einsum(structure: Structure, operands: Sequence[Axes], result: Axes, tensors: Sequence[Tensor]) -> Tensor:
    """`torch.einsum` over named axes; dimensions before those named are shared by all tensors that have them."""
    lead = [tensor.ndim > len(axes) for axes, tensor in zip(operands, tensors, strict=True)]
    return torch.einsum(equation(structure, operands, result, lead), *tensors)


def equation(structure: Structure, operands: Sequence[Axes], result: Axes, lead: Sequence[bool]) -> str:
    """The text that `torch.einsum` reads; `lead` marks the operands with dimensions before those named."""
    letter = dict(zip(dict.fromkeys(axis for axes in operands for axis in axes), string.ascii_letters, strict=False))
    spelled = ["".join(letter[axis] for axis in axes) for axes in (*operands, result)]
    *left, right = ["..." * dots + axes for dots, axes in zip((*lead, any(lead)), spelled, strict=True)]
    return f"{','.join(left)}->{right}"


def check(structure: Structure, factors: Factors, x: Tensor) -> None:
    """Refuses what does not fit the structure, in a sentence."""
    if x.ndim == 0 or x.shape[-1] != structure.d_in:
        raise StructureError(
            f"cannot apply {structure} to an input of shape {tuple(x.shape)}: "
            f"its last dimension must be d_in = {structure.d_in}"
        )
    found = [tuple(factor.shape) for factor in factors]
    fitting = [{shape} for shape in structure.factor_shapes]
    if structure == structure.canonical:
        fitting = [{*views} for views in zip(structure.factor_shapes, structure.matrix_shapes, strict=True)]
    if len(found) != len(fitting) or any(shape not in views for shape, views in zip(found, fitting, strict=True)):
        raise StructureError(
            f"cannot apply {structure}: it has factors of shapes {structure.factor_shapes}, found {tuple(found)}"
        )


def _apply_step(
    structure: Structure, state: Axes, factor: Axes, result: Axes, x: Tensor, weight: Tensor, gate: Tensor | None
) -> Tensor:
    if gate is None:
        return einsum(structure, [state, factor], result, [x, weight])
    routed = (structure.routed or "",)
    if routed[0] in state:  # weigh what goes in: the sum over the routed axis then stays one matmul
        x = einsum(structure, [state, routed], state, [x, gate])
        return einsum(structure, [state, factor], result, [x, weight])
    wide = (*result, *(axis for axis in routed if axis not in result))
    y = einsum(structure, [state, factor], wide, [x, weight])
    return einsum(structure, [wide, routed], result, [y, gate])
