"""A low rank, two plain matrices, in one launch, for tokens so few that launches and latency are what counts.

A stock matmul onto 64 features is one column of tiles, each of which sums over the whole input by itself,
and the second one waits for it. Here every program makes anew the state that it reads, a few numbers for
each token, and then its share of the output (docs/kernels.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from einlinear.clock import SUMMED
from einlinear.kernels.kernel import CPU, Kernel, Runner, Target
from einlinear.kernels.stage import multiprocessors, tile
from einlinear.structure import Structure


class Bottleneck(Kernel):
    """Two plain factors with few features between, in one launch."""

    name: ClassVar = "bottleneck"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        refusal = super().refuses(structure, target)
        if refusal is None and find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        return refusal

    def prepare(self, structure: Structure) -> Runner:
        (_, rank, d_in), (_, d_out, _) = structure.matrix_shapes
        return BottleneckRunner((rank, d_in), (d_out, rank))


@dataclass(frozen=True)
class BottleneckRunner:
    """`bottleneck` with factors of these shapes."""

    first: tuple[int, int]
    second: tuple[int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        first, second = factors
        y: Tensor = bottleneck(x, first.reshape(self.first), second.reshape(self.second), bias)[0]
        return y


@dataclass(frozen=True)
class Launch:
    """Tokens of a program, features read and made at a time, into how many parts the output is cut."""

    tokens: int
    block_in: int
    block_out: int
    splits: int
    warps: int = 4
    stages: int = 4


@torch.library.custom_op("einlinear::bottleneck", mutates_args=())
def bottleneck(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`second @ (first @ x) + bias` for each row of `x`, and the state `first @ x`.

    Args:
        x: `[tokens, d_in]`.
        first: `[rank, d_in]`, any strides.
        second: `[d_out, rank]`, any strides.
        bias: `[d_out]`.
    """
    return launch_forward(x, first, second, bias, forward_launch(len(x), second, x.device))


@bottleneck.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(second)), x.new_empty(len(x), len(first))


@torch.library.custom_op("einlinear::bottleneck_backward", mutates_args=())
def bottleneck_backward(
    grad: Tensor, x: Tensor, z: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x` and of both factors: the first is a bottleneck itself, of the factors' transposes."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dx, dz = launch_forward(grad, second.mT, first.mT, None, forward_launch(len(x), first.mT, x.device))
    if len(x) > SUMMED:
        return dx, dz.mT @ x, grad.mT @ z
    return dx, *launch_weights(x, z, grad, dz, first, second)


@bottleneck_backward.register_fake
def _(grad: Tensor, x: Tensor, z: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), first.new_empty(first.shape), second.new_empty(second.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second, bias = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], first, second)


def _backward(  # type: ignore[no-untyped-def]
    ctx,  # noqa: ANN001
    grad: Tensor,
    _: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, z, first, second = ctx.saved_tensors
    dbias = grad.sum(0) if ctx.has_bias else None
    if not torch.is_grad_enabled():
        return *bottleneck_backward(grad, x, z, first, second), dbias
    dz = grad @ second  # the kernels have no derivative
    return dz @ first, dz.mT @ x, grad.mT @ linear(x, first), dbias


bottleneck.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.bottleneck)
def _(x: list[int], first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * (math.prod(first) + math.prod(second))


@register_flop_formula(torch.ops.einlinear.bottleneck_backward)
def _(grad: object, x: list[int], z: object, first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 4 * x[0] * (math.prod(first) + math.prod(second))


def launch_forward(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, launch: Launch
) -> tuple[Tensor, Tensor]:
    """The result and the state."""
    from einlinear.kernels import tiles_bottleneck

    if x.dtype != first.dtype:
        raise ValueError(f"cannot apply factors of {first.dtype} to an input of {x.dtype}: convert one of the two")
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, d_in), (d_out, rank) = x.shape, second.shape
    y, z = x.new_empty(tokens, d_out), x.new_empty(tokens, rank)
    share = -(-d_out // (launch.splits * launch.block_out)) * launch.block_out
    with torch.cuda.device_of(x):
        tiles_bottleneck.bottleneck_forward[(-(-tokens // launch.tokens), -(-d_out // share))](
            x, first, second, bias, z, y, tokens, share, x.stride(0), *first.stride(), *second.stride(),
            IN=d_in, RANK=rank, OUT=d_out,
            BLOCK_IN=launch.block_in, BLOCK_RANK=tile(rank), BLOCK_OUT=launch.block_out, BLOCK_TOKENS=launch.tokens,
            HAS_BIAS=bias is not None, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return y, z


def launch_weights(
    x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, first: Tensor, second: Tensor, block: int = 64, tokens: int = 64
) -> tuple[Tensor, Tensor]:
    """The gradients of both factors."""
    from einlinear.kernels import tiles_bottleneck

    x = x if x.stride(1) == 1 else x.contiguous()
    (rank, d_in), d_out = first.shape, len(second)
    dfirst, dsecond = first.new_empty(first.shape), second.new_empty(second.shape)
    with torch.cuda.device_of(x):
        tiles_bottleneck.bottleneck_weights[(-(-d_out // block) + -(-d_in // block),)](
            x, z, grad, dz, dfirst, dsecond, len(x), x.stride(0), grad.stride(0),
            IN=d_in, RANK=rank, OUT=d_out, BLOCK=block, BLOCK_RANK=tile(rank), BLOCK_TOKENS=tokens,
            num_warps=4, num_stages=4,
        )  # fmt: skip
    return dfirst, dsecond


def forward_launch(tokens: int, second: Tensor, device: torch.device) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md): small tiles of tokens, while they are few."""
    many = multiprocessors(device)
    size = next((size for size in (16, 32, 64) if tokens <= many * size), 128)
    splits = max(1, min(len(second) // 64, many * size // max(1, tokens)))
    wide = size == 128
    return Launch(tokens=size, block_in=64 if size > 32 else 128, block_out=64, splits=splits, warps=8 if wide else 4)
