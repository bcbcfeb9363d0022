"""How two factors with few blocks are launched on a GPU, and what that takes; no tensor needed.

Read off variants of these launches on one H200 in 16 bits, weights beyond the cache (benchmarks/NOTES.md). What counts
there is how often a program waits for memory, so it takes in few large pieces, as many at once as fit; and that
launches that overlap do not meet two to a multiprocessor, so each program takes more than half of its shared memory.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

SHARED = 227 * 1024
"""Bytes of shared memory that a multiprocessor has for programs."""

MANY = 132
"""Multiprocessors."""

SUMMED = 2048
"""Tokens up to which one launch makes the gradients of a low rank's weights; beyond, stock matmuls do."""

SUMMED_BLOCKS = 8192
"""The same for several blocks."""

FUSED = 128
"""The widest block of which one launch makes the state and what comes of it; factors of wider ones run apart."""


@dataclass(frozen=True)
class Blocks:
    """The sizes of g, a, r, f and e in factors `[g, (r f), a]` and `[f, e, (g r)]`, and how far apart each lies there.

    Args:
        sizes: of g, a, r, f and e.
        first: the first factor's strides along g, r, f and a.
        second: the second one's along f, e, g and r.
    """

    sizes: tuple[int, int, int, int, int]
    first: tuple[int, int, int, int]
    second: tuple[int, int, int, int]

    @classmethod
    def of(cls, first: tuple[int, ...], second: tuple[int, ...]) -> "Blocks":
        """Of contiguous factors with these shapes."""
        (g, made, a), (f, e, _) = first, second
        r = made // f
        return cls((g, a, r, f, e), (made * a, f * a, a, 1), (e * g * r, g * r, r, 1))

    @property
    def mT(self) -> "Blocks":
        """Of the layer's transpose: the second factor is the first one there."""
        (g, a, r, f, e), (fg, fr, ff, fa), (sf, se, sg, sr) = self.sizes, self.first, self.second
        return Blocks((f, e, r, g, a), (sf, sr, sg, se), (fg, fa, ff, fr))

    @property
    def is_one(self) -> bool:
        """Whether it is a low rank."""
        return self.sizes[0] == self.sizes[3] == 1


@dataclass(frozen=True)
class Launch:
    """Tokens of a program, features read and made at a time, into how many parts a low rank's output is cut.

    `apart`: each factor by a launch of its own, the second one waiting for the state. `overlaps`: it begins while what
    comes before still runs, asks memory for its weights, and then waits.
    """

    tokens: int
    block_in: int
    block_out: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    apart: bool = False
    overlaps: bool = True


@dataclass(frozen=True)
class Sums:
    """Features, numbers of the state and tokens of a tile, and into how many ranges the tokens are cut."""

    block: int = 64
    states: int = 64
    tokens: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 4
    overlaps: bool = True


def tile(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, at least what the matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


@lru_cache(maxsize=4096)
def forward(sizes: tuple[int, int, int, int, int], tokens: int, many: int = MANY) -> tuple[Launch, float]:
    """How the layer with these sizes of g, a, r, f and e is launched for so many tokens, and the modelled seconds."""
    g, a, r, f, _ = sizes
    if g == f == 1:
        return _low_rank(sizes, tokens, many)
    if max(a, tile(r)) <= FUSED:
        return _together(sizes, tokens, many)
    return _apart(sizes, tokens, many)


@lru_cache(maxsize=4096)
def weights(sizes: tuple[int, int, int, int, int], tokens: int) -> tuple[Sums | None, float]:
    """How the gradients of both factors are made, None by stock matmuls (whose time is not told), and the seconds."""
    g, a, r, f, e = sizes
    low = g == f == 1
    if tokens > (SUMMED if low else SUMMED_BLOCKS):
        return None, math.nan
    state, numbers = g * r * f, g * r * f * (a + e)
    if low:
        sums = Sums(states=tile(r))
    elif tokens <= 256:
        sums = Sums(block=128 if numbers > 2**20 else 64)
    elif tokens > 2048 and min(a, e, g * r) >= 256:
        sums = Sums(128, 128, 64, splits=tokens // 1024, warps=8)
    else:
        sums = Sums(tokens=256, stages=3, splits=max(1, tokens // 1024))
    programs = f * -(-e // sums.block) * -(-g * r // sums.states) + g * -(-a // sums.block) * -(-f * r // sums.states)
    share = -(-tokens // sums.splits)
    if low:  # fitted to launches that did not overlap
        return sums, 1.6e-6 + 3.5e-9 * tokens
    taken = 2 * max(share, sums.tokens) * (sums.block + sums.states)
    waves = -(-programs * sums.splits // MANY)
    adding = 1.3e-6 + 8 * sums.splits * numbers / 8e12 if sums.splits > 1 else 0.0
    moved = 2 * (numbers + tokens * (g * a + f * e + 2 * state))
    return sums, 2e-6 + waves * taken / 1e11 + moved / 8e12 + adding


def _low_rank(sizes: tuple[int, int, int, int, int], tokens: int, many: int) -> tuple[Launch, float]:
    """Every program makes the state of its tokens anew and then its part of the output."""
    _, a, r, _, e = sizes
    size = next((size for size in (16, 32, 64) if tokens <= many * size), 128)
    splits = max(1, min(e // 64, many * size // max(1, tokens)))
    if size == 16:
        piece = min(256, tile(a))
        stages = min(4, max(2, SHARED // 2 // (2 * piece * (tile(r) + size)) + 1))
        launch = Launch(size, piece, 64, splits, stages=stages)
    else:
        wide = size == 128
        launch = Launch(size, 128 if size == 32 else 64, 64, splits, warps=8 if wide else 4, overlaps=False)
    waves = math.ceil(-(-tokens // size) * splits / many)
    each = 2 * (tile(r) + size) * (a + e / splits)
    moved = 2 * (r + tokens) * (a + e)
    waiting = (0.2e-9 if launch.overlaps else 1e-9) * a
    return launch, 2.2e-6 + waiting + waves * each / 1.35e11 + moved / 4.2e12


def _together(sizes: tuple[int, int, int, int, int], tokens: int, many: int) -> tuple[Launch, float]:
    """A program goes over all input slices for one output slice, making the state that it reads."""
    g, a, r, f, e = sizes
    out = min(128, tile(e))
    programs = f * -(-e // out)
    size, stages = next(
        ((size, stages) for size, stages in ((16, 4), (64, 5)) if -(-tokens // size) * programs <= many), (128, 3)
    )
    piece = 2 * (size * tile(a) + tile(a) * tile(r) + tile(r) * out)
    programs *= -(-tokens // size)
    stages = max(1, min(stages, (SHARED - 2 * size * out) // piece))
    launch = Launch(size, tile(a), out, warps=8 if size == 128 else 4, stages=stages, overlaps=programs <= many)
    moved = 2 * (g * r * f * (a + e) + tokens * (g * a + g * r * f + f * e))
    return launch, 2.45e-6 + math.ceil(programs / many) * g * piece / 1.2e11 + moved / 5e12


def _apart(sizes: tuple[int, int, int, int, int], tokens: int, many: int) -> tuple[Launch, float]:
    """Each factor by a launch, about as many programs as multiprocessors, the state in the cache between."""
    g, a, r, f, e = sizes
    state = g * r * f
    area = tokens * max(state, f * e) / many
    if tokens <= 64:
        size, out, piece = 64, min(128, max(16, tile(max(state, f * e) // 64))), 128
    elif area <= 64 * 128:
        size, out, piece = 64, 64, 128
    else:
        size, out, piece = 128, 128 if area <= 128 * 128 else 256, 64
    taken = 2 * piece * (size + out)
    stages = 3 if taken > SHARED // 5 else min(6, SHARED // 2 // taken + 1)
    if size == 64 < tokens:
        stages = 3
    elif size == 128:
        stages = 4 if out == 128 else 3
    launch = Launch(size, piece, out, warps=8 if size == 128 else 4, stages=stages, apart=True)
    total = 0.0
    for slices, made, summed in ((g, f * r, a), (f, e, g * r)):
        programs = -(-tokens // size) * -(-made // out) * slices
        each = math.ceil(programs / many) * 2 * -(-summed // piece) * piece * (size + out)
        moved = 2 * slices * (made * summed + tokens * (made + summed))
        work = 2 * tokens * slices * made * summed
        total += 1.75e-6 + max(each / 1e11 + moved / 8e12, work / 4.5e14)
    return launch, total
