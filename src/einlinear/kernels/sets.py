"""The sort of tokens by their set of experts, without waiting for the device (docs/experts.md)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.kernels.stage import tile

CHUNK = 64
"""Tokens counted, and put into their places, by one program; so many are routed by one, which counts them too."""

RUN = 256
"""Tokens of one set that one program takes, one block after another, without loading weights again."""

TILE = 32
"""Tokens of one set that a cluster takes at once: half as many take nearly as long (benchmarks/NOTES.md)."""

PIECE = 128
"""Slots whose numbers lie side by side in the state; the slots of an expert start at a multiple of it."""

ALIGN = 16
"""The slots of a set start at a multiple of it, so that loads and stores are wide; the first stage fills the gaps."""

MOST_SLOTS = 1 << 25
"""What the tables have room for."""

MOST_SETS = 256
"""Of experts; beyond, runs of one set would be few tokens each."""


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
        return max(1, -(-self.tokens // CHUNK))

    @property
    def runs(self) -> int:
        """The most runs."""
        return -(-self.tokens // RUN) + self.filled

    @property
    def tiles(self) -> int:
        """The most tiles."""
        return -(-self.tokens // TILE) + self.filled

    @property
    def filled(self) -> int:
        """The most sets that can have tokens."""
        return min(math.comb(self.experts, self.active), max(1, self.tokens))

    @property
    def slots(self) -> int:
        """The most slots, gaps between sets and between experts included."""
        slots = self.active * (self.tokens + (ALIGN - 1) * self.filled)
        return (slots // PIECE + min(self.experts, self.active * max(1, self.tokens)) + 1) * PIECE

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of: first slots of experts; their slots, and how many runs and tiles there are; sets of runs; runs;
        tokens of slots; sets of tiles; tiles."""
        runs, tiles = self.runs, self.tiles
        return self.experts, self.experts + 2, runs, self.active * runs, self.slots, tiles, self.active * tiles

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
        The tables of `Sizes`, and the weight of each slot.
    """
    from einlinear.kernels import tiles_route

    sizes, index = Sizes(len(index), experts, index.shape[1]), index.contiguous()
    counts = empty_counts(index, sizes)
    with torch.cuda.device_of(index):
        tiles_route.count_sets[(sizes.chunks,)](
            index, counts, sizes.tokens,
            EXPERTS=experts, ACTIVE=sizes.active, SETS=sizes.sets, BLOCK_SETS=tile(sizes.sets), CHUNK=CHUNK,
        )  # fmt: skip
    return lay_out(index, weight.contiguous(), counts, sizes)


@set_layout.register_fake
def _(index: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return _empty_layout(index, weight, Sizes(index.shape[0], experts, index.shape[1]))


def empty_counts(like: Tensor, sizes: Sizes) -> Tensor:
    """Memory for how many tokens of each chunk have each set, and for a counter.

    Raises:
        ValueError: for more tokens than can be sorted.
    """
    if sizes.slots >= MOST_SLOTS:
        raise ValueError(f"cannot sort {sizes.tokens} tokens by their experts: at most {MOST_SLOTS} slots at once")
    return like.new_empty(sizes.chunks * sizes.sets + 1, dtype=torch.int32)


def lay_out(index: Tensor, weight: Tensor, counts: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """`set_layout` of what has been counted, `index` and `weight` contiguous."""
    from einlinear.kernels import tiles_route

    layout, gates = _empty_layout(index, weight, sizes)
    before = torch.empty_like(counts)
    size, first_run, first_tile, *place = index.new_empty(3 + sizes.active, sizes.sets, dtype=torch.int32)
    starts, rooms, run_set, runs, token_of, tile_set, tiles = sizes.split(layout)
    shape = {"EXPERTS": sizes.experts, "ACTIVE": sizes.active, "SETS": sizes.sets}
    shape |= {"RUN": RUN, "TILE": TILE, "ALIGN": ALIGN}
    with torch.cuda.device_of(index):
        tiles_route.lay_out[(-(-sizes.sets // 16),)](
            counts, before, size, place[0], first_run, first_tile, starts, rooms, sizes.chunks,
            **shape, BLOCK_SETS=tile(sizes.sets), SOME_SETS=16, BLOCK_CHUNKS=min(128, tile(sizes.chunks)),
            BLOCK_EXPERTS=tile(sizes.experts), PIECE=PIECE, num_warps=8,
        )  # fmt: skip
        tiles_route.fill_in[(sizes.chunks + sizes.sets,)](
            index, weight, before, size, place[0], first_run, first_tile, run_set, runs, tile_set, tiles,
            token_of, gates, sizes.tokens, sizes.chunks, sizes.runs, sizes.tiles, **shape, CHUNK=CHUNK,
        )  # fmt: skip
    return layout, gates


def _empty_layout(index: Tensor, weight: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    return index.new_empty(sum(sizes.parts), dtype=torch.int32), weight.new_empty(sizes.slots)
