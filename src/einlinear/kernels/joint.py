"""Layers of one structure that read the same input, as one structure with an axis more."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einlinear.kernels import Plan, plan
from einlinear.links import links
from einlinear.structure import Axes, Structure

COPY = "copy"


@dataclass(frozen=True)
class Joint:
    """As many matmuls for all layers as for one: `places` say where each joint factor has the layers' own axis."""

    plan: Plan
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    matrices: tuple[tuple[int, int, int], ...]

    def __call__(self, factors: Sequence[Sequence[Tensor]], x: Tensor, biases: Sequence[Tensor] = ()) -> list[Tensor]:
        """Applies every layer, given by its factors, to `x`, `[..., d_in]`; returns views of one tensor.

        The factors are copied, so there should be more tokens than each of them has rows.
        """
        joined = [
            torch.stack([factor.reshape(shape) for factor in stack], place).reshape(matrices)
            for stack, shape, place, matrices in zip(
                zip(*factors, strict=True), self.shapes, self.places, self.matrices, strict=True
            )
        ]
        return list(self.plan(joined, x, torch.cat(list(biases)) if biases else None).chunk(len(factors), dim=-1))


def join(structure: Structure, count: int) -> Joint | str:
    """How `count` maps of one canonical structure run as one, or why they cannot.

    The first factor makes the new axis, and every later one is repeated over it.
    """
    first, *rest = structure.steps
    if structure.pad_in or structure.pad_out:
        return f"{structure} is padded"
    if any(step.passive or not step.batch for step in rest):
        return f"{structure}: a factor that is one matmul would become a batch of them"
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
        return f"{structure}: {count} of them side by side would need a copy in memory"
    return Joint(plan(joint), structure.factor_shapes, places, joint.matrix_shapes)
