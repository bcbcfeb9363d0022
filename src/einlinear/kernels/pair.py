"""Layers of two block-diagonal factors for a few tokens, as where a model writes one token after another.

What counts then is launches: every program makes anew what it reads of the state, or the second launch
begins while the first still runs (docs/kernels.md). Layers that read the same input run in one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.clock import AGAIN
from einlinear.kernels.chain import Tiles
from einlinear.kernels.kernel import Runner
from einlinear.kernels.stage import Launch, gradients, launch_forward, padded, stage, tile
from einlinear.links import INTO, OUT_OF
from einlinear.structure import Structure


class Pair(Tiles):
    """Two block-diagonal factors of small blocks, for a few tokens."""

    name: ClassVar = "pair"

    def prepare(self, structure: Structure) -> Runner:
        return PairRunner(structure.matrix_shapes[0], structure.matrix_shapes[1])


@dataclass(frozen=True)
class PairRunner:
    """`pair` with factors of these shapes."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        first, second = factors
        added = [] if bias is None else [bias]
        made: Tensor = pair(x, [first.reshape(self.first)], [second.reshape(self.second)], added)[0]
        return made


@torch.library.custom_op("einlinear::pair", mutates_args=())
def pair(x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Layers of two block-diagonal factors with a transposition between, applied to the same input.

    Args:
        x: `[tokens, slices * in]`.
        firsts: of each layer, `[slices, rank * later slices, in]`.
        seconds: of each layer, `[later slices, out, slices * rank]`.
        biases: of each layer, `[later slices * out]`, or none at all.

    Returns:
        For each layer, `[tokens, later slices * out]`.
    """
    tokens = len(x)
    ys = [x.new_empty(tokens, second.shape[0], second.shape[1]) for second in seconds]
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.numel() <= AGAIN:
        _by_token(x, firsts, seconds, biases, ys)
    else:
        for p, (first, second, y) in enumerate(zip(firsts, seconds, ys, strict=True)):
            by_stages(x, first, second, biases[p] if biases else None, y)
    return [y.flatten(1) for y in ys]


@pair.register_fake
def _(x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), second.shape[0] * second.shape[1]) for second in seconds]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, firsts, seconds, biases = inputs
    ctx.has_bias = len(biases) > 0
    ctx.save_for_backward(x, *firsts, *seconds)


def _backward(ctx, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, *factors = ctx.saved_tensors
    firsts, seconds = factors[: len(grads)], factors[len(grads) :]
    dx, *rest = gradients_again(grads, x, firsts, seconds, ctx.has_bias)
    each = 3 if ctx.has_bias else 2
    return dx, rest[::each], rest[1::each], rest[2::each] if ctx.has_bias else []


pair.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.pair)
def _(x: list[int], firsts: list[list[int]], seconds: list[list[int]], *_: object, **__: object) -> int:
    return 2 * x[0] * sum(math.prod(factor) for factor in (*firsts, *seconds))


def _by_token(
    x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor], ys: Sequence[Tensor]
) -> None:
    from einlinear.kernels import tiles_pair

    laters, outs, states = zip(*(second.shape for second in seconds), strict=True)
    slices, _, width = firsts[0].shape
    with torch.cuda.device_of(x):
        tiles_pair.pair_token[(max(laters), len(x), len(firsts))](
            x, tuple(first.contiguous() for first in firsts), tuple(second.contiguous() for second in seconds),
            tuple(biases), tuple(ys), x.stride(0),
            G=slices, A=width, RS=tuple(state // slices for state in states), FS=laters, ES=outs,
            BLOCK_STATES=tuple(map(tile, states)), BLOCK_A=tile(width), BLOCK_ES=tuple(map(tile, outs)), num_warps=8,
        )  # fmt: skip


def by_stages(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Two launches, of which the second loads its weights while the first still runs."""
    overlaps = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    tokens, launch = len(x), Launch(tokens=min(64, tile(len(x))), stages=1)
    z = x.new_empty(*first.shape[:2], padded(tokens))
    launch_forward(_blocks(x, first), [first], None, [z], INTO, tokens, launch, "leads" if overlaps else "")
    z = z.view(second.shape[2], second.shape[0], -1)
    launch_forward(z, [second], bias, [y], OUT_OF, tokens, launch, "follows" if overlaps else "")


def gradients_again(
    grads: Sequence[Tensor], x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], has_bias: bool
) -> list[Tensor]:
    """Of `x`, then of each layer's factors and bias, if any. The state is made again by the first stage."""
    tokens, blocks = len(x), _blocks(x, firsts[0])
    dzs, rest = [], []
    for grad, z, second in zip(grads, stage(blocks, firsts, None, INTO, tokens), seconds, strict=True):
        later, out, state = second.shape
        made = gradients(
            [grad.reshape(tokens, later, out)], z.view(state, later, -1), [second], OUT_OF, tokens, has_bias
        )
        dzs.append(made[0].reshape(z.shape))
        rest.append(made[1:])
    dx, *dfirsts = gradients(dzs, blocks, firsts, INTO, tokens, False)
    return [dx.reshape(x.shape), *(t for dfirst, made in zip(dfirsts, rest, strict=True) for t in (dfirst, *made))]


def _blocks(x: Tensor, first: Tensor) -> Tensor:
    """`[tokens, slices, in]`."""
    return x.reshape(-1, first.shape[0], first.shape[2])
