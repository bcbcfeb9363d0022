"""Two factors with few blocks, of which a low rank has one, in one launch: few tokens, or few FLOPs saved.

A stock matmul onto 64 features is one column of tiles, each of which sums over the whole input by itself, and the
second one waits for it; two batched matmuls of four blocks take as long as the dense one. Here a program makes
the state that it reads, a few numbers for each token, and then its share of the output (docs/kernels.md). Of a low
rank every program makes it again; of blocks, each output slice reads a part of the state that no other one needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import einlinear.launches as launches
from einlinear.kernels.kernel import InTriton, Runner
from einlinear.kernels.stage import multiprocessors
from einlinear.launches import Blocks, Launch, Sums, tile
from einlinear.structure import Structure


class Bottleneck(InTriton):
    """Two factors with few blocks, in one launch."""

    name: ClassVar = "bottleneck"

    def prepare(self, structure: Structure) -> Runner:
        return BottleneckRunner(structure.matrix_shapes[0], structure.matrix_shapes[1])


@dataclass(frozen=True)
class BottleneckRunner:
    """`bottleneck` with factors of these shapes."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        first, second = factors
        y: Tensor = bottleneck(x, first.reshape(self.first), second.reshape(self.second), bias)[0]
        return y


blocks_of = lru_cache(maxsize=1024)(Blocks.of)


@torch.library.custom_op("einlinear::bottleneck", mutates_args=())
def bottleneck(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two block-diagonal factors with a transposition between, for each row of `x`; and the state between them.

    Args:
        x: `[tokens, g * a]`.
        first: `[g, r * f, a]`.
        second: `[f, e, g * r]`.
        bias: `[f * e]`.

    Returns:
        `[tokens, f * e]`, and the state `[tokens, f * g * r]`.
    """
    return launch_forward(x, first, second, bias, blocks_of(first.shape, second.shape))


@bottleneck.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), math.prod(second.shape[:2])), x.new_empty(len(x), math.prod(first.shape[:2]))


@torch.library.custom_op("einlinear::bottleneck_backward", mutates_args=())
def bottleneck_backward(
    grad: Tensor, x: Tensor, z: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x` and of both factors: the first is a bottleneck itself, of the factors' transposes."""
    blocks = blocks_of(first.shape, second.shape)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dx, dz = launch_forward(grad, second, first, None, blocks.mT)
    sums, _ = launches.weights(blocks.sizes, len(x))
    if sums is None:
        return dx, *stock_weights(x, z, grad, dz, blocks)
    return dx, *launch_weights(x, z, grad, dz, blocks, sums)


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
    # The kernels have no derivative.
    blocks = Blocks.of(first.shape, second.shape)
    g, a, r, f, e = blocks.sizes
    u, v, d = first.view(g, r, f, a), second.view(f, e, g, r), grad.reshape(-1, f, e)
    z = torch.einsum("tga,grfa->tfgr", x.reshape(-1, g, a), u)
    dz = torch.einsum("tfe,fegr->tgfr", d, v)
    dx = torch.einsum("tgfr,grfa->tga", dz, u)
    return dx.reshape(x.shape), *stock_weights(x, z, grad, dz, blocks), dbias


bottleneck.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.bottleneck)
def _(x: list[int], first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * (math.prod(first) + math.prod(second))


@register_flop_formula(torch.ops.einlinear.bottleneck_backward)
def _(grad: object, x: list[int], z: object, first: list[int], second: list[int], *_: object, **__: object) -> int:
    return 4 * x[0] * (math.prod(first) + math.prod(second))


def stock_weights(x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The gradients of both factors by stock matmuls."""
    g, a, r, f, e = blocks.sizes
    dfirst = torch.bmm(dz.reshape(-1, g, f * r).permute(1, 2, 0), x.reshape(-1, g, a).transpose(0, 1))
    dsecond = torch.bmm(grad.reshape(-1, f, e).permute(1, 2, 0), z.reshape(-1, f, g * r).transpose(0, 1))
    return dfirst.view(g, f, r, a).transpose(1, 2).reshape(g, r * f, a), dsecond


def launch_forward(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, blocks: Blocks, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """The result and the state; `blocks` says which factor is first, and how both lie."""
    from einlinear.kernels import tiles_bottleneck

    if x.dtype != first.dtype:
        raise ValueError(f"cannot apply factors of {first.dtype} to an input of {x.dtype}: convert one of the two")
    g, a, r, f, e = blocks.sizes
    x = x if x.stride(1) == 1 else x.contiguous()
    first, second, tokens = first.contiguous(), second.contiguous(), len(x)
    y, z = x.new_empty(tokens, f * e), x.new_empty(tokens, f * g * r)
    launch = launch or launches.forward(blocks.sizes, tokens, multiprocessors(x.device))[0]
    count, runs = -(-tokens // launch.tokens), how(x, launch)
    with torch.cuda.device_of(x):
        if launch.apart:
            _apart(x, first, second, bias, z, y, blocks, launch)
        elif blocks.is_one:
            share = -(-e // (launch.splits * launch.block_out)) * launch.block_out
            tiles_bottleneck.bottleneck_forward[(count, -(-e // share))](
                x, first, second, bias, z, y, tokens, share, x.stride(0),
                blocks.first[1], blocks.first[3], blocks.second[1], blocks.second[3],
                IN=a, RANK=r, OUT=e,
                BLOCK_IN=launch.block_in, BLOCK_RANK=tile(r), BLOCK_OUT=launch.block_out, BLOCK_TOKENS=launch.tokens,
                HAS_BIAS=bias is not None, **runs,
            )  # fmt: skip
        else:
            tiles_bottleneck.blocks_forward[(count, f, -(-e // launch.block_out))](
                x, first, second, bias, z, y, tokens, x.stride(0), *blocks.sizes, *blocks.first, *blocks.second,
                BLOCK_IN=tile(a), BLOCK_RANK=tile(r), BLOCK_OUT=launch.block_out, BLOCK_TOKENS=launch.tokens,
                HAS_BIAS=bias is not None, **runs,
            )  # fmt: skip
    return y, z


def how(x: Tensor, launch: Launch | Sums) -> dict[str, int | bool]:
    """Warps, stages, and whether launches overlap."""
    overlaps = launch.overlaps and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"num_warps": launch.warps, "num_stages": launch.stages, "OVERLAPS": overlaps, "launch_pdl": overlaps}


def _apart(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, z: Tensor, y: Tensor, blocks: Blocks, launch: Launch
) -> None:
    """Fills `z` and then `y`, each in a launch of its own."""
    from einlinear.kernels import tiles_bottleneck

    (g, a, r, f, e), (fg, fr, ff, fa), (sf, se, sg, sr) = blocks.sizes, blocks.first, blocks.second
    count, runs = -(-len(x) // launch.tokens), how(x, launch)
    common = {
        "NUMBERS": first.numel(), "OTHERS": second.numel(), "BLOCK_TOKENS": launch.tokens, "BLOCK_OUT": launch.block_out
    }  # fmt: skip
    tiles_bottleneck.factor_forward[(count, -(-f * r // launch.block_out), g)](
        x, first, second, None, z, len(x), x.stride(0), z.stride(0),
        X_SLICE=a, W_SLICE=fg, Y_SLICE=r, N=f * r, N_INNER=r, W_OUTER=ff, W_INNER=fr, Y_OUTER=g * r,
        K=a, K_INNER=a, W_SUMMED=0, W_ALONG=fa, BLOCK_IN=min(launch.block_in, tile(a)),
        HAS_BIAS=False, LEADS=True, **common, **runs,
    )  # fmt: skip
    tiles_bottleneck.factor_forward[(count, -(-e // launch.block_out), f)](
        z, second, first, bias, y, len(x), z.stride(0), y.stride(0),
        X_SLICE=g * r, W_SLICE=sf, Y_SLICE=e, N=e, N_INNER=e, W_OUTER=0, W_INNER=se, Y_OUTER=0,
        K=g * r, K_INNER=r, W_SUMMED=sg, W_ALONG=sr, BLOCK_IN=min(launch.block_in, tile(g * r)),
        HAS_BIAS=bias is not None, LEADS=False, **common, **runs,
    )  # fmt: skip


def launch_weights(x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, blocks: Blocks, sums: Sums) -> tuple[Tensor, Tensor]:
    """The gradients of both factors; of several ranges of tokens, by a launch more that adds them in order."""
    from einlinear.kernels import tiles_bottleneck

    x = x if x.stride(1) == 1 else x.contiguous()
    g, a, r, f, e = blocks.sizes
    share = -(-len(x) // (sums.splits * sums.tokens)) * sums.tokens
    splits = -(-len(x) // share) if share else 1
    kind = x.dtype if splits == 1 else torch.float32
    firsts, seconds = (x.new_empty(splits, *shape, dtype=kind) for shape in ((g, r * f, a), (f, e, g * r)))
    tiles = f * -(-e // sums.block) * -(-g * r // sums.states) + g * -(-a // sums.block) * -(-f * r // sums.states)
    with torch.cuda.device_of(x):
        tiles_bottleneck.bottleneck_weights[(tiles, splits)](
            x, z, grad, dz, firsts, seconds, len(x), share, x.stride(0), grad.stride(0),
            *blocks.sizes, *blocks.first, *blocks.second,
            BLOCK=sums.block, BLOCK_STATE=sums.states, BLOCK_TOKENS=sums.tokens, **how(x, sums),
        )  # fmt: skip
        if splits == 1:
            return firsts[0], seconds[0]
        dfirst, dsecond = x.new_empty(firsts.shape[1:]), x.new_empty(seconds.shape[1:])
        programs = -(-dfirst.numel() // 1024) + -(-dsecond.numel() // 1024)
        tiles_bottleneck.add_both[(programs,)](
            firsts, seconds, dfirst, dsecond, SPLITS=splits, FIRST=dfirst.numel(), SECOND=dsecond.numel(), num_warps=8
        )
    return dfirst, dsecond
