"""Two stages for a few tokens, as where a model writes one token after another: what counts is launches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.chain import Tiles, chain_of
from einlinear.kernels.kernel import CPU, Runner, Target
from einlinear.kernels.stage import Launch, gradients, launch_forward, stage, tile
from einlinear.structure import Structure

INTO, OUT_OF = "mbk,bnk->bnm", "kbm,bnk->mbn"
"""The two stages, as contractions (`einlinear.kernels.stage.SPECS`)."""

FEW = 64
"""Tokens beyond which two ordinary launches are faster."""

AGAIN = 32768
"""Up to so many numbers of input each program makes all of the state that it reads: one launch, no wait."""


class Decode(Tiles):
    """Two block-diagonal factors of small blocks, for a few tokens."""

    name: ClassVar = "decode"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        if refusal := super().refuses(structure, target):
            return refusal
        if [(link.spec, link.tiled) for link in chain_of(structure)] != [(INTO, True), (OUT_OF, True)]:
            return "it takes two block-diagonal factors with a transposition between, both of small blocks"
        return None

    def cost(self, structure: Structure, tokens: int, target: Target = CPU) -> float:
        # Affine like all costs, one launch cheaper than Tiles and equal to it at FEW tokens.
        return super().cost(structure, tokens, target) + target.launch * (tokens / FEW - 1)

    def prepare(self, structure: Structure) -> Runner:
        return DecodeRunner(structure.matrix_shapes[0], structure.matrix_shapes[1])


@dataclass(frozen=True)
class DecodeRunner:
    """`decode` with factors of these shapes."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        first, second = factors
        made: Tensor = decode(x, first.reshape(self.first), second.reshape(self.second), bias)
        return made


@torch.library.custom_op("einlinear::decode", mutates_args=())
def decode(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Two block-diagonal factors with a transposition between, applied to few tokens.

    Args:
        x: `[tokens, slices * in]`.
        first: `[slices, out * rank, in]`.
        second: `[later slices, out, slices * rank]`.
        bias: `[later slices * out]`.

    Returns:
        `[tokens, later slices * out]`.
    """
    from einlinear.kernels import tiles

    tokens, (slices, middle, width), (later, out, state) = len(x), first.shape, second.shape
    y = x.new_empty(tokens, later, out)
    if x.numel() > AGAIN:
        overlaps = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        launch = Launch(tokens=min(64, tile(tokens)), stages=1)
        z = x.new_empty(slices, middle, tokens)
        launch_forward(_blocks(x, first), first, None, z, INTO, launch, "leads" if overlaps else "")
        z = z.view(state, later, tokens)
        return launch_forward(z, second, bias, y, OUT_OF, launch, "follows" if overlaps else "").view(tokens, -1)
    x = x.contiguous()
    with torch.cuda.device_of(x):
        tiles.pair_forward[(later, tokens)](
            x, first.contiguous(), second.contiguous(), bias, y, tokens, later, x.shape[1], later * out,
            SLICES=slices, MIDDLE=middle, IN=width, OUT=out, STATE=state,
            BLOCK_STATE=tile(state), BLOCK_IN=tile(width), BLOCK_OUT=tile(out), HAS_BIAS=bias is not None,
            num_warps=8,
        )  # fmt: skip
    return y.view(tokens, -1)


@decode.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), second.shape[0] * second.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, first, second)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second = ctx.saved_tensors
    x, (later, out, state) = _blocks(x, first), second.shape
    z = stage(x, first, None, INTO)
    dz, dsecond, dbias = gradients(grad.reshape(-1, later, out), z.view(state, later, -1), second, OUT_OF, ctx.has_bias)
    dx, dfirst, _ = gradients(dz.reshape(z.shape), x, first, INTO, False)
    return dx.reshape(len(grad), -1), dfirst, dsecond, dbias if ctx.has_bias else None


decode.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.decode)
def _(x: list[int], first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * (math.prod(first) + math.prod(second))


def _blocks(x: Tensor, first: Tensor) -> Tensor:
    """`[tokens, slices, in]`."""
    return x.reshape(-1, first.shape[0], first.shape[2])
