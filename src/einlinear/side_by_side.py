"""Several structured layers on one input, run as one: queries, keys and values read the stream once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einlinear.kernels import Plan, plan
from einlinear.layer import Linear
from einlinear.links import links
from einlinear.structure import Axes, Structure

COPY = "copy"


@dataclass(frozen=True)
class SideBySide:
    """How layers of one structure are applied to one input in as many matmuls as one of them takes.

        side_by_side = SideBySide.of(query.structure, 3)
        q, k, v = side_by_side((query, key, value), x)

    Their factors are put together as those of one structure with an axis more, which the first factor makes
    and every later one is repeated over. The layers stay what they are: their parameters, start and rates.
    Where that would need a copy in memory, `plan` is None, and the layers run one after the other; so do layers
    with a bias.
    """

    plan: Plan | None
    shapes: tuple[tuple[int, ...], ...] = ()
    places: tuple[int, ...] = ()
    matrices: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, structure: Structure, count: int) -> "SideBySide":
        """For `count` layers of one canonical structure."""
        joint = copies(structure, count)
        if joint is None:
            return cls(None)
        return cls(plan(joint[0]), structure.factor_shapes, joint[1], joint[0].matrix_shapes)

    def __call__(self, layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of `x`, `[..., d_in]`: `[..., d_out]`, possibly views of one tensor."""
        if self.plan is None or any(layer.bias is not None for layer in layers):
            return tuple(layer(x) for layer in layers)
        operands = [layer.operands(x) for layer in layers]
        stacks = zip(*(factors for factors, _, _ in operands), strict=True)
        factors = [
            torch.stack([factor.reshape(shape) for factor in stack], place).reshape(matrices)
            for stack, shape, place, matrices in zip(stacks, self.shapes, self.places, self.matrices, strict=True)
        ]
        return self.plan(factors, operands[0][1]).chunk(len(layers), dim=-1)


def copies(structure: Structure, count: int) -> tuple[Structure, tuple[int, ...]] | None:
    """`count` maps of one input as one structure, and where each factor has the axis that counts them.

    None where that would take a copy in memory, or a batch of matmuls where one of them was a single one.
    """
    first, *rest = structure.steps
    if structure.pad_in or structure.pad_out or any(step.passive or not step.batch for step in rest):
        return None
    later = rest[0].batch if rest else ()
    # Next to what the second factor is repeated over: these axes and the new one are then one stride.
    place = len(first.batch) + next((n for n, axis in enumerate(first.new) if axis in later), 0)
    places = (place, *(0 for _ in rest))
    factors: list[Axes] = [
        (*factor[:at], COPY, *factor[at:]) for factor, at in zip(structure.factors, places, strict=True)
    ]
    sizes = (*structure.axis_sizes, (COPY, count))
    joint = replace(structure, factors=tuple(factors), y=(COPY, *structure.y), axis_sizes=sizes)
    if joint.canonical.factors != joint.factors or isinstance(links(joint), str):
        return None
    return joint, places
