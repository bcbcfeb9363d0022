"""Layers of two block-diagonal factors in one launch: the multiprocessors of a cluster send each other the state.

Input is read once and the result written once (cluster.cu); two launches also write the state, and read it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.clusters import TILES, WARPS, Cut, cut
from einlinear.kernels import nvrtc
from einlinear.kernels.kernel import CPU, InTriton, Runner, Target
from einlinear.kernels.pair import by_stages, gradients_again
from einlinear.structure import Structure

SOURCES = tuple(Path(__file__).with_name(name) for name in ("hopper.cuh", "cluster.cuh", "cluster.cu"))


class Cluster(InTriton):
    """Two block-diagonal factors that fit into the registers of up to eight multiprocessors.

    Gradients are those of `pair`, by Triton.
    """

    name: ClassVar = "cluster"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        return super().refuses(structure, target) or nvrtc.refusal()

    def prepare(self, structure: Structure) -> Runner:
        return ClusterRunner(structure.matrix_shapes[0], structure.matrix_shapes[1])


@dataclass(frozen=True)
class ClusterRunner:
    """`cluster` with factors of these shapes."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        made: Tensor = cluster(x, factors[0].reshape(self.first), factors[1].reshape(self.second), bias)
        return made


@torch.library.custom_op("einlinear::cluster", mutates_args=())
def cluster(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """A layer of two block-diagonal factors with a transposition between.

    Args:
        x: `[tokens, slices * in]`.
        first: `[slices, rank * later slices, in]`.
        second: `[later slices, out, slices * rank]`.
        bias: `[later slices * out]`.

    Returns:
        `[tokens, later slices * out]`.
    """
    if any(x.dtype != each.dtype for each in (first, second)):
        raise ValueError(f"cannot apply factors of {first.dtype} to an input of {x.dtype}: convert one of the two")
    y = x.new_empty(len(x), second.shape[0] * second.shape[1])
    found = cut(tuple(first.shape), tuple(second.shape))
    if isinstance(found, str) or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        by_stages(_read(x, 1), first, second, bias, y.view(len(x), *second.shape[:2]))
    elif len(x):
        with torch.cuda.device_of(x):
            _launch(found, x, first, second, bias, y)
    return y


@cluster.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), second.shape[0] * second.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, first, second)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second = ctx.saved_tensors
    made = gradients_again([grad], x, [first], [second], ctx.has_bias)
    return made[0], made[1], made[2], made[3] if ctx.has_bias else None


cluster.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.cluster)
def _(x: list[int], first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * (math.prod(first) + math.prod(second))


def _launch(found: Cut, x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, y: Tensor) -> None:
    run = nvrtc.function(
        SOURCES, "layer", defines(found, first.shape, second.shape, bias is not None, x.dtype),
        found.size, 32 * WARPS, found.memory, torch.cuda.current_device(),
    )  # fmt: skip
    x, tiles = _read(x, 8), -(-len(x) // found.tokens)
    factors = [_aligned(each.contiguous(), 16) for each in (first, second)]
    added = None if bias is None else _aligned(bias.contiguous(), 4)
    run(min(run.resident, tiles), [x, *factors, added, y, len(x), x.stride(0)])


def defines(
    found: Cut, first: Sequence[int], second: Sequence[int], has_bias: bool, dtype: torch.dtype
) -> nvrtc.Defines:
    """What cluster.cuh is compiled with."""
    (slices, _, width), (later, out, sums) = first, second
    letters = (("G", slices), ("A", width), ("R", sums // slices), ("F", later), ("E", out))
    tiles = (("CLUSTER", found.size), ("WARPS", WARPS), ("TOKENS", found.tokens), ("STAGES", TILES), ("STATES", TILES))
    return (*letters, *tiles, ("ACTIVE", 1), ("BIAS", int(has_bias)), ("BFLOAT16", int(dtype == torch.bfloat16)))


def _read(x: Tensor, step: int) -> Tensor:
    """`x` such that rows lie anywhere, `step` numbers or a multiple of it apart."""
    lies = x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % (2 * step) == 0
    return x if lies else _aligned(x.contiguous(), 2 * step)


def _aligned(tensor: Tensor, to: int) -> Tensor:
    return tensor if tensor.data_ptr() % to == 0 else tensor.clone()
