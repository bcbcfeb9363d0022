"""How a layer of two block-diagonal factors is cut over the multiprocessors of a cluster; no tensor needed.

A tile of tokens has a state too large for one multiprocessor, and both factors fit into the registers of a few: each
of them has a part of the features, and they send each other the state (kernels/cluster.cu, docs/kernels.md).
"""

from dataclasses import dataclass
from functools import lru_cache

SIZES = (1, 2, 4, 8)
"""Multiprocessors in a cluster, up to what every GPU that has clusters allows."""

WARPS = 8
TILES = 3
"""Of the state, in shared memory; and of the input, on their way."""

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""

REGISTERS = 160
"""Of 255 that a thread has, those for factors and input: with more, some would lie in memory."""


@dataclass(frozen=True)
class Cut:
    """A layer over a cluster of `size` multiprocessors, `tokens` at a time."""

    size: int
    tokens: int
    weights: int
    """Numbers of both factors that one multiprocessor keeps."""
    line: int
    """Bytes of a token's input that it reads; some of them twice, where several warps make state of one slice."""
    memory: int
    """Bytes of shared memory."""


@lru_cache(maxsize=4096)
def cut(
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    sizes: tuple[int, ...] = SIZES,
    tiles: tuple[int, ...] = (32, 16),
) -> Cut | str:
    """The smallest cluster for factors of these shapes, `[g, r f, a]` and `[f, e, g r]`, or why there is none.

    Args:
        sizes: of clusters, in ascending order.
        tiles: how many tokens at a time, the better ones first.
    """
    slices, rows, width = first
    later, out, sums = second
    if width % 32 or rows % 16 or out % 8 or sums % 8:
        return f"blocks of {width} by {rows} and {sums} by {out} are no multiples of 32 by 16 and 8 by 8"
    found = (_cut(size, tokens, first, second) for tokens in tiles for size in sizes)
    return next(
        (each for each in found if each is not None),
        f"no cluster of up to {sizes[-1]} multiprocessors keeps {slices} blocks of {rows} by {width} and {later} of "
        f"{out} by {sums} in its registers, in equal parts",
    )


def _cut(size: int, tokens: int, first: tuple[int, int, int], second: tuple[int, int, int]) -> Cut | None:
    slices, rows, width = first
    later, out, sums = second
    if slices % size or later % size:
        return None
    slices, later = slices // size, later // size
    each = rows // 16, out // 8  # tiles of 16 rows of a slice of the first factor, and of 8 of the second one
    mine = slices * each[0] / WARPS, later * each[1] / WARPS
    if any(m % n and n % m for m, n in zip(mine, each, strict=True)) or any(m % 1 for m in mine):
        return None
    sums = -(-sums // 32) * 32
    weights = int(mine[0]) * width // 4 + int(mine[1]) * sums // 8
    line = WARPS * 2 * width * max(1, int(mine[0]) // each[0])
    memory = 128 + TILES * tokens * line + TILES * later * (sums + 1) * tokens * 2
    if weights + tokens * width // 64 > REGISTERS or weights > 128 or memory > SHARED:
        return None
    return Cut(size, tokens, weights * WARPS * 32 * 2, line, memory)
