"""Set-sorted tiles: BTT experts, whose sum over a token's experts never leaves an accumulator.

An expert of two block-diagonal factors is a slice of the state between them. Tokens are sorted by
their set of experts (`sets.py`), so that a tile of tokens has the same experts throughout: the first stage reads
each row of x once for all of them, the second sums over them on the chip and writes each row of y
once. No partial results, no atomics, no padding but to a multiple of 16 tokens a set (docs/experts.md).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.select import choose, route
from einlinear.kernels.set_cluster import clustered
from einlinear.kernels.sets import PIECE, RUN, Sizes, empty_counts, lay_out, set_layout
from einlinear.kernels.stage import multiprocessors, tile

LAUNCHES = {
    "into_forward": ((64, 4, 1), (64, 4, 1), (64, 8, 1)),
    "out_forward": ((64, 4, 3), (64, 8, 3), (64, 8, 1)),
    "out_backward": ((64, 4, 5), (128, 4, 4), (64, 8, 3)),
    "into_backward_input": ((64, 4, 2), (64, 4, 2), (64, 8, 1)),
    "into_backward_weight": ((128, 4, 2), (128, 4, 2), (64, 8, 3)),
}
"""Tokens at once, warps and pipeline stages: the fastest of those measured, for weights of up to 32 x 32, of up to
64 x 128, and for larger ones, which need more registers."""


@torch.library.custom_op("einlinear::set_pair", mutates_args=())
def set_pair(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None,
    index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two block-diagonal factors of each expert with a transposition between, weighed and summed.

    Args:
        x: `[tokens, slices * in]`.
        first: `[experts, slices, rank * later slices, in]`.
        second: `[experts, later slices, out, slices * rank]`.
        bias: `[later slices * out]`.
        index: `[tokens, active]`, the experts of each token, all different.
        weight: `[tokens, active]`, float32, whose gradient is made.
        layout, gates: `set_layout(index, weight, experts)`.

    Returns:
        `[tokens, later slices * out]`, and the state, for the backward pass.
    """
    return forward(x, first, second, bias, layout, gates, Sizes(len(x), len(first), index.shape[1]))


@set_pair.register_fake
def _(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None,
    index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(x, first, second, Sizes(x.shape[0], first.shape[0], index.shape[1]))


@torch.library.custom_op("einlinear::set_pair_backward", mutates_args=())
def set_pair_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor,
    index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor, z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `x`, `first`, `second` and `weight`."""
    saved = _Saved(x.contiguous(), first.contiguous(), second.contiguous(), index, weight, layout, gates, z)
    dx, dweight, dfirst, dsecond = _backward(grad.contiguous(), saved)
    return dx, dfirst, dsecond, dweight


@set_pair_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor,
    index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor, z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (x, first, second, weight)
    return tuple(one.new_empty(one.shape) for one in like)  # type: ignore[return-value]


def _setup_pair(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second, bias, *routing = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, first, second, *routing, output[1])
    ctx.set_materialize_grads(False)


def _pair_backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    dx, dfirst, dsecond, dweight = set_pair_backward(grad, *ctx.saved_tensors)
    return dx, dfirst, dsecond, grad.sum(0) if ctx.has_bias else None, None, dweight, None, None


set_pair.register_autograd(_pair_backward, setup_context=_setup_pair)


@torch.library.custom_op("einlinear::routed_pair", mutates_args=())
def routed_pair(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`set_pair` with the choices of a router of its own: the gradient of `x` is then written once for both.

    Args:
        x: `[tokens, slices * in]`.
        router, scale, router_bias, active: as in `einlinear.kernels.select.route`.
        first, second, bias: as in `set_pair`.

    Returns:
        The output, the logits, which have gradients too; the chosen experts; and weights, layout, gates and state,
        for the backward pass.
    """
    sizes = Sizes(len(x), len(first), active)
    counts = empty_counts(x, sizes)
    logits, index, weight = choose(x, router, scale, router_bias, active, counts)
    layout, gates = lay_out(index, weight, counts, sizes)
    y, z = forward(x, first, second, bias, layout, gates, sizes)
    return y, logits, index, weight, layout, gates, z


@routed_pair.register_fake
def _(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits, index, weight = route(x, router, scale, router_bias, active)
    layout, gates = set_layout(index, weight, first.shape[0])
    y, z = _empty(x, first, second, Sizes(x.shape[0], first.shape[0], active))
    return y, logits, index, weight, layout, gates, z


@torch.library.custom_op("einlinear::routed_pair_backward", mutates_args=())
def routed_pair_backward(
    grad: Tensor | None, dlogits: Tensor | None, x: Tensor, router: Tensor, scale: float, first: Tensor,
    second: Tensor, index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor, z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `x`, `router`, `first` and `second`."""
    saved = _Saved(x.contiguous(), first.contiguous(), second.contiguous(), index, weight, layout, gates, z)
    grad = x.new_zeros(len(x), second.shape[1] * second.shape[2]) if grad is None else grad.contiguous()
    return _backward(grad, saved, _Own(router, scale, None if dlogits is None else dlogits.contiguous()))


@routed_pair_backward.register_fake
def _(
    grad: Tensor | None, dlogits: Tensor | None, x: Tensor, router: Tensor, scale: float, first: Tensor,
    second: Tensor, index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor, z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (x, router, first, second)
    return tuple(one.new_empty(one.shape) for one in like)  # type: ignore[return-value]


def _setup_routed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, router, ctx.scale, _, first, second, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, router, first, second, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _routed_backward(ctx, grad: Tensor | None, dlogits: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, router, *saved = ctx.saved_tensors
    dx, drouter, dfirst, dsecond = routed_pair_backward(grad, dlogits, x, router, ctx.scale, *saved)
    dbias = grad.sum(0) if ctx.has_bias and grad is not None else None
    return dx, drouter, None, None, dfirst, dsecond, dbias, None


routed_pair.register_autograd(_routed_backward, setup_context=_setup_routed)


@register_flop_formula(torch.ops.einlinear.set_pair)
def _(
    x: list[int], first: list[int], second: list[int], bias: object, index: list[int], *_: object, **__: object
) -> int:
    return _flops(x, first, second, index[1])


@register_flop_formula(torch.ops.einlinear.set_pair_backward)
def _(
    grad: object, x: list[int], first: list[int], second: list[int], index: list[int], *_: object, **__: object
) -> int:
    return 2 * _flops(x, first, second, index[1])


@register_flop_formula(torch.ops.einlinear.routed_pair)
def _(
    x: list[int], router: list[int], scale: float, _: object, first: list[int], second: list[int], bias: object,
    active: int, **__: object,
) -> int:  # fmt: skip
    return _flops(x, first, second, active) + 2 * x[0] * math.prod(router)


@register_flop_formula(torch.ops.einlinear.routed_pair_backward)
def _(
    grad: object, dlogits: object, x: list[int], router: list[int], scale: float, first: list[int],
    second: list[int], index: list[int], *_: object, **__: object,
) -> int:  # fmt: skip
    return 2 * _flops(x, first, second, index[1]) + 4 * x[0] * math.prod(router)


def _flops(x: list[int], first: list[int], second: list[int], active: int) -> int:
    return 2 * x[0] * active * (math.prod(first) + math.prod(second)) // first[0]


@dataclass(frozen=True)
class _Saved:
    """What the backward pass knows, contiguous."""

    x: Tensor
    first: Tensor
    second: Tensor
    index: Tensor
    weight: Tensor
    layout: Tensor
    gates: Tensor
    z: Tensor

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.x), len(self.first), self.index.shape[1])


@dataclass(frozen=True)
class _Own:
    """A router of the layer's own, and the gradient that its logits have beside their softmax's."""

    weight: Tensor
    scale: float
    dlogits: Tensor | None


def _empty(x: Tensor, first: Tensor, second: Tensor, sizes: Sizes, kept: bool = True) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], second.shape[1] * second.shape[2])
    return y, x.new_empty(sizes.slots // PIECE if kept else 0, first.shape[1] * first.shape[2], PIECE)


def forward(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, layout: Tensor, gates: Tensor, sizes: Sizes,
    kept: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the state, which holds nothing unless it is to be `kept`."""
    from einlinear.kernels import tiles_sets

    x = x.contiguous()
    y, z = _empty(x, first, second, sizes, kept)
    if clustered(x, first, second, bias, layout, gates, sizes, y, z if kept else None):
        return y, z
    z = z if kept else _empty(x, first, second, sizes)[1]
    _, *tables, _, _ = sizes.split(layout)
    with torch.cuda.device_of(x):
        tiles_sets.into_forward[(first.shape[1], sizes.runs)](
            x, first.contiguous(), z, *tables, sizes.runs, x.shape[1],
            **_first(first, sizes), **_launch("into_forward", first),
        )  # fmt: skip
        tiles_sets.out_forward[(second.shape[1], sizes.runs)](
            z, second.contiguous(), bias, y, gates, *tables, sizes.runs, y.shape[1],
            **_second(second, sizes), HAS_BIAS=bias is not None, **_launch("out_forward", second),
        )  # fmt: skip
    return y, z


def _backward(grad: Tensor, saved: _Saved, own: _Own | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `x`, of the router (of `weight`, where that is given), of `first` and of `second`."""
    from einlinear.kernels import tiles_sets

    x, first, second, sizes = saved.x, saved.first, saved.second, saved.sizes
    starts, *tables, _, _ = sizes.split(saved.layout)
    rooms, token_of = tables[0], tables[-1]
    dz, dx, dweight = torch.empty_like(saved.z), torch.empty_like(x), torch.empty_like(saved.weight)
    dgate = saved.gates.new_empty(second.shape[1], sizes.slots)
    splits = _splits(first, sizes), _splits(second, sizes)
    dfirst, dsecond = (saved.gates.new_empty(n, f.numel()) for n, f in zip(splits, (first, second), strict=True))
    parts, likes, factors = [dfirst, dsecond], [first, second], [1.0, 1.0]
    router, scale, dlogits, total, drouter = None, 1.0, None, None, None
    if own:
        router, scale, dlogits = own.weight.to(x.dtype).contiguous(), own.scale, own.dlogits
        total = x.new_empty(len(x), sizes.experts)
        drouter = saved.gates.new_empty(splits[0] * sizes.experts, router.numel())
        # Each of a token's experts has added x dlogitsᵀ.
        parts, likes, factors = [*parts, drouter], [*likes, own.weight], [*factors, scale / sizes.active]
    into = {**_first(first, sizes), "BLOCK_EXPERTS": tile(sizes.experts), "HAS_ROUTER": own is not None}
    with torch.cuda.device_of(x):
        tiles_sets.out_backward[(second.shape[1], sizes.experts, splits[1])](
            grad, saved.z, second, saved.gates, dz, dgate, dsecond, starts, rooms, token_of, sizes.slots, grad.shape[1],
            **_second(second, sizes), SPLITS=splits[1], **_launch("out_backward", second),
        )  # fmt: skip
        tiles_sets.add_gates[(sizes.runs,)](
            dgate, saved.index.contiguous(), saved.gates, dlogits, dweight if total is None else total,
            *tables, sizes.runs, sizes.slots,
            SLICES=second.shape[1], EXPERTS=sizes.experts, ACTIVE=sizes.active, RUN=RUN, SOME_SLICES=16,
            BLOCK_EXPERTS=tile(sizes.experts), HAS_ROUTER=own is not None, HAS_LOGITS=dlogits is not None, num_warps=8,
        )  # fmt: skip
        tiles_sets.into_backward_input[(first.shape[1], sizes.runs)](
            dz, first, router, scale, total, dx, *tables, sizes.runs, x.shape[1],
            **into, **_launch("into_backward_input", first),
        )  # fmt: skip
        tiles_sets.into_backward_weight[(first.shape[1], sizes.experts, splits[0])](
            dz, x, total, dfirst, drouter, starts, rooms, token_of, x.shape[1],
            **into, SPLITS=splits[0], **_launch("into_backward_weight", first),
        )  # fmt: skip
        made = [torch.empty_like(like) for like in likes]
        counts = [like.numel() for like in likes]
        tiles_sets.add_sums[(sum(-(-count // 1024) for count in counts),)](
            tuple(parts), tuple(made), tuple(counts), tuple(factors),
            SPLITS=tuple(len(part) for part in parts), BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return dx, made[2] if own else dweight, made[0], made[1]


def _splits(factor: Tensor, sizes: Sizes) -> int:
    """Programs that share the slots of one slice of one expert."""
    programs = factor.shape[0] * factor.shape[1]
    tiles = max(1, sizes.tokens * sizes.active // (sizes.experts * 64))
    return max(1, min(tiles, -(-4 * multiprocessors(factor.device) // programs)))


def _first(first: Tensor, sizes: Sizes) -> dict[str, int]:
    _, slices, out, width = first.shape
    blocks = {"BLOCK_OUT": tile(out), "BLOCK_IN": tile(width)}
    return {"SLICES": slices, "OUT": out, "IN": width, **blocks, **_whole(sizes)}


def _second(second: Tensor, sizes: Sizes) -> dict[str, int]:
    _, slices, out, state = second.shape
    blocks = {"BLOCK_OUT": tile(out), "BLOCK_STATE": tile(state)}
    return {"SLICES": slices, "OUT": out, "STATE": state, **blocks, **_whole(sizes)}


def _whole(sizes: Sizes) -> dict[str, int]:
    return {"EXPERTS": sizes.experts, "ACTIVE": sizes.active, "PIECE": PIECE}


def _launch(kernel: str, factor: Tensor) -> dict[str, int]:
    """Tokens at once, warps and pipeline stages."""
    tokens, warps, stages = LAUNCHES[kernel][_size(factor)]
    across = "TILE" if kernel in ("out_backward", "into_backward_weight") else "BLOCK"
    return {across: tokens, "num_warps": warps, "num_stages": stages}


def _size(factor: Tensor) -> int:
    weights = tile(factor.shape[2]) * tile(factor.shape[3])
    return (weights > 32 * 32) + (weights > 64 * 128)
