"""Set-sorted tiles: BTT experts, whose sum over a token's experts never leaves an accumulator.

An expert of two block-diagonal factors is a slice of the state between them. Tokens are sorted by
their set of experts, so that a tile of tokens has the same experts throughout: the first stage reads
each row of x once for all of them, the second sums over them on the chip and writes each row of y
once. No partial results, no atomics, no padding but to a multiple of 16 tokens a set (docs/experts.md).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.stage import add_partials, multiprocessors, tile

CHUNK = 128
"""Tokens sorted by one program."""

RUN = 256
"""Tokens of one set that one program takes, one block after another, without loading weights again."""

MOST_POSITIONS = 1 << 24
"""What the tables have room for."""

MOST_SETS = 256
"""Of experts; beyond, tiles of one set would be few tokens each."""


@dataclass(frozen=True)
class Sizes:
    """Of a layout: a vector of integers that holds several tables one after another."""

    tokens: int
    experts: int
    active: int

    @property
    def sets(self) -> int:
        """Numbers of `active` digits to the base `experts`, one of them for each set."""
        return int(self.experts**self.active)

    @property
    def chunks(self) -> int:
        return -(-self.tokens // CHUNK)

    @property
    def tile(self) -> int:
        """Tokens of a tile: few where sets have few."""
        return 128 if self.tokens >= 192 * self.filled else 64

    @property
    def runs(self) -> int:
        """The most runs."""
        return -(-self.tokens // RUN) + self.filled

    @property
    def filled(self) -> int:
        """The most sets that can have tokens."""
        return min(math.comb(self.experts, self.active), max(1, self.tokens))

    @property
    def tiles(self) -> int:
        """The most tiles."""
        return -(-self.tokens // self.tile) + self.filled

    @property
    def positions(self) -> int:
        """The most tokens, gaps between sets included."""
        return -(-(self.tokens + 15 * self.filled) // 16) * 16

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of: totals; start, count, first run and place of sets; tokens; sets of runs, runs; experts' tiles."""
        counts = (self.experts + 1, self.sets, self.sets, self.sets, self.experts * self.sets, self.positions)
        return (*counts, self.runs, self.runs, self.experts * self.tiles)

    def split(self, layout: Tensor) -> list[Tensor]:
        """The tables."""
        return list(layout.split(self.parts))


def fits(first: tuple[int, ...], second: tuple[int, ...], experts: int, active: int) -> bool:
    """Whether factors `[slices, out, in]` of one expert and the number of sets are small enough."""
    return experts**active <= MOST_SETS and all(8 <= side <= 128 for side in (*first[1:], *second[1:]))


@torch.library.custom_op("einlinear::set_layout", mutates_args=())
def set_layout(index: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorts tokens by their sets of experts without waiting for the device.

    Args:
        index: `[tokens, active]`, the experts of each token, all different.
        weight: `[tokens, active]`, float32.
        experts: how many there are.

    Returns:
        The tables of `Sizes`, and the weight of each expert of a set at each position, `[active, positions]`.
    """
    from einlinear.kernels import tiles_route

    sizes = Sizes(len(index), experts, index.shape[1])
    if sizes.positions >= MOST_POSITIONS:
        raise ValueError(f"cannot sort {sizes.tokens} tokens by their experts: at most {MOST_POSITIONS} at once")
    index, weight = index.contiguous(), weight.contiguous()
    layout, gates = _empty_layout(index, weight, sizes)
    counts, before = index.new_empty(2, sizes.chunks, sizes.sets, dtype=torch.int32)
    totals, start, count, first_run, place, token_of, run_set, runs, listed = sizes.split(layout)
    shape = {"EXPERTS": experts, "ACTIVE": sizes.active, "SETS": sizes.sets}
    block, cut = tile(sizes.sets), {"RUN": RUN, "TILE": sizes.tile}
    with torch.cuda.device_of(index):
        tiles_route.count_sets[(sizes.chunks,)](index, counts, sizes.tokens, **shape, BLOCK_SETS=block, CHUNK=CHUNK)
        tiles_route.add_chunks[(-(-sizes.sets // 16),)](
            counts, before, count, sizes.chunks,
            SETS=sizes.sets, SOME_SETS=16, BLOCK_CHUNKS=min(128, tile(sizes.chunks)),
        )  # fmt: skip
        tiles_route.lay_out[(1,)](
            count, start, first_run, place, totals, **shape, **cut, BLOCK_SETS=block, BLOCK_EXPERTS=tile(experts)
        )
        tiles_route.fill_in[(sizes.chunks + sizes.sets,)](
            index, weight, before, start, count, first_run, place, token_of, gates, run_set, runs, listed,
            sizes.tokens, sizes.chunks, sizes.tiles, sizes.positions, **shape, **cut, CHUNK=CHUNK,
        )  # fmt: skip
    return layout, gates


@set_layout.register_fake
def _(index: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return _empty_layout(index, weight, Sizes(index.shape[0], experts, index.shape[1]))


def _empty_layout(index: Tensor, weight: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    gates = weight.new_empty(sizes.active, sizes.positions)
    return index.new_empty(sum(sizes.parts), dtype=torch.int32), gates


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
    from einlinear.kernels import tiles_sets

    sizes, x = Sizes(len(x), len(first), index.shape[1]), x.contiguous()
    y, z = _empty(x, first, second, sizes)
    totals, *_, token_of, run_set, runs, _ = sizes.split(layout)
    tables = (totals, run_set, runs, token_of, sizes.positions)
    with torch.cuda.device_of(x):
        tiles_sets.into_forward[(first.shape[1], sizes.runs)](
            x, first.contiguous(), z, *tables, x.shape[1], **_first(first, sizes), **_run_launch(first, 128, 1)
        )
        tiles_sets.out_forward[(second.shape[1], sizes.runs)](
            z, second.contiguous(), bias, y, gates, *tables, y.shape[1],
            **_second(second, sizes), HAS_BIAS=bias is not None, **_run_launch(second, 64, stages=2),
        )  # fmt: skip
    return y, z


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
    from einlinear.kernels import tiles_sets

    sizes = Sizes(len(x), len(first), index.shape[1])
    x, grad, index = x.contiguous(), grad.contiguous(), index.contiguous()
    first, second = first.contiguous(), second.contiguous()
    dz, dx = torch.empty_like(z), torch.empty_like(x)
    dgate = x.new_empty(second.shape[1], sizes.active, sizes.positions, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape)
    totals, *_, token_of, run_set, runs, listed = sizes.split(layout)
    by_run = (totals, run_set, runs, token_of, sizes.positions)
    by_expert = (totals, listed, token_of, sizes.positions, sizes.tiles)
    splits = [_splits(factor, sizes) for factor in (first, second)]
    dfirst, dsecond = (
        x.new_empty(count, factor.numel(), dtype=torch.float32)
        for count, factor in zip(splits, (first, second), strict=True)
    )
    with torch.cuda.device_of(x):
        tiles_sets.out_backward[(second.shape[1], sizes.experts, splits[1])](
            grad, z, second, gates, dz, dgate, dsecond, *by_expert, grad.shape[1],
            **_second(second, sizes), SPLITS=splits[1], TILE=sizes.tile, **_tile_launch(second),
        )  # fmt: skip
        tiles_sets.add_gates[(sizes.runs,)](
            dgate, index, dweight, *by_run,
            SLICES=second.shape[1], EXPERTS=sizes.experts, ACTIVE=sizes.active, RUN=RUN,
        )  # fmt: skip
        tiles_sets.into_backward_input[(first.shape[1], sizes.runs)](
            dz, first, dx, *by_run, x.shape[1], **_first(first, sizes), **_run_launch(first, 128, stages=1)
        )
        tiles_sets.into_backward_weight[(first.shape[1], sizes.experts, splits[0])](
            dz, x, dfirst, *by_expert, x.shape[1],
            **_first(first, sizes), SPLITS=splits[0], TILE=sizes.tile, **_tile_launch(first),
        )  # fmt: skip
    return (
        dx,
        add_partials(dfirst, first).view(first.shape),
        add_partials(dsecond, second).view(second.shape),
        dweight,
    )


@set_pair_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor,
    index: Tensor, weight: Tensor, layout: Tensor, gates: Tensor, z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        first.new_empty(first.shape),
        second.new_empty(second.shape),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, first, second, bias, *routing = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, first, second, *routing, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    dx, dfirst, dsecond, dweight = set_pair_backward(grad, *ctx.saved_tensors)
    return dx, dfirst, dsecond, grad.sum(0) if ctx.has_bias else None, None, dweight, None, None


set_pair.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.set_pair)
def _(
    x: list[int], first: list[int], second: list[int], bias: object, index: list[int], *_: object, **__: object
) -> int:
    return 2 * x[0] * index[1] * (math.prod(first) + math.prod(second)) // first[0]


@register_flop_formula(torch.ops.einlinear.set_pair_backward)
def _(
    grad: object, x: list[int], first: list[int], second: list[int], index: list[int], *_: object, **__: object
) -> int:
    return 4 * x[0] * index[1] * (math.prod(first) + math.prod(second)) // first[0]


def _empty(x: Tensor, first: Tensor, second: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], second.shape[1] * second.shape[2])
    return y, x.new_empty(sizes.active, first.shape[1] * first.shape[2], sizes.positions)


def _splits(factor: Tensor, sizes: Sizes) -> int:
    """Programs that share the tiles of one slice of one expert."""
    programs = factor.shape[0] * factor.shape[1]
    tiles = max(1, sizes.tokens * sizes.active // (sizes.experts * sizes.tile))
    return max(1, min(tiles, -(-4 * multiprocessors(factor.device) // programs)))


def _first(first: Tensor, sizes: Sizes) -> dict[str, int]:
    _, slices, out, width = first.shape
    blocks = {"BLOCK_OUT": tile(out), "BLOCK_IN": tile(width)}
    return {"SLICES": slices, "OUT": out, "IN": width, **blocks, "EXPERTS": sizes.experts, "ACTIVE": sizes.active}


def _second(second: Tensor, sizes: Sizes) -> dict[str, int]:
    _, slices, out, state = second.shape
    blocks = {"BLOCK_OUT": tile(out), "BLOCK_STATE": tile(state)}
    return {"SLICES": slices, "OUT": out, "STATE": state, **blocks, "EXPERTS": sizes.experts, "ACTIVE": sizes.active}


def _run_launch(factor: Tensor, block: int, stages: int) -> dict[str, int]:
    """Tokens at once, warps and stages: the fastest of those measured; larger blocks of weights need more registers."""
    if _large(factor):
        return {"BLOCK": 64, "num_warps": 8, "num_stages": 1}
    return {"BLOCK": block, "num_warps": 4, "num_stages": stages}


def _tile_launch(factor: Tensor) -> dict[str, int]:
    return {"num_warps": 8 if _large(factor) else 4, "num_stages": 3}


def _large(factor: Tensor) -> bool:
    return tile(factor.shape[2]) * tile(factor.shape[3]) > 64 * 128
