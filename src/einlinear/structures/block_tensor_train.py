import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import ClassVar

from einlinear.clock import seconds
from einlinear.cost import generic_rank, parameters
from einlinear.family import Family, block_size, check_width, equal_split, prime_factors
from einlinear.structure import Structure, StructureError

FAST = "fast"
TILE, WIDEST = 16, 1 << 17
"""Matrix units multiply so many rows or columns at a time; beyond so many features times mean nothing."""

TIE = 1.02
"""Modelled times whose ratio is less are one: the model's median error is several times that."""


@dataclass(frozen=True, repr=False)
class BTT(Family):
    """Block Tensor-Train: block-diagonal maps with transpositions between, joined by `rank` channels.

    With two cores, the input is cut into `in_blocks` blocks and the output into `out_blocks`, and
    every input block reaches every output block through a matrix of rank `rank`. `blocks=None` is
    the balanced split: the largest divisor below the root of each width (11008 into 86 blocks of
    128), or its cofactor on one side where otherwise rank 1 could not reach full rank. More
    `cores` cut the widths into more parts of equal size.

    `blocks="fast"` takes the FLOPs of the balanced split of that rank, within a tenth, and the block counts that
    are modelled fastest for them in training on a GPU (`einlinear.seconds`), and of equals in the forward pass, with as
    high a rank of W: few large blocks instead of many channels between small ones.
    """

    rank: int = 1
    blocks: tuple[int, int] | str | None = None
    cores: int = 2
    example: ClassVar = {"rank": 2}
    source: ClassVar = "Qiu et al. 2024 (Compute Better Spent), https://arxiv.org/abs/2406.06248"

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = isinstance(self.blocks, tuple) and len(self.blocks) == 2
        if not (pair or self.blocks in (None, FAST)):
            raise StructureError(
                f"cannot make a BTT with blocks={self.blocks!r}: pass (in_blocks, out_blocks), such as (16, 16), "
                f'or "{FAST}"'
            )
        if self.cores < 2 or (self.blocks and self.cores != 2):
            raise StructureError(
                f"cannot make a BTT with cores={self.cores} and blocks={self.blocks}: it needs at least 2 cores, "
                f"and explicit blocks are those of 2 cores; leave one of the two out"
            )

    def __call__(self, d_in: int, d_out: int) -> Structure:
        ins: tuple[int, ...]
        outs: tuple[int, ...]
        if self.blocks == FAST:
            return _fast(d_in, d_out, self.rank)
        if isinstance(self.blocks, tuple):
            g, f = self.blocks
            ins, outs = (block_size(d_in, g), g), (f, block_size(d_out, f))
        elif self.cores == 2:
            ins, outs = _full_rank_blocks(equal_split(d_in, 2), equal_split(d_out, 2))
        else:
            ins, outs = equal_split(d_in, self.cores)[::-1], equal_split(d_out, self.cores)
        return _block_chain(ins, outs, self.rank).pad(d_in=d_in, d_out=d_out)


@dataclass(frozen=True, repr=False)
class Monarch(Family):
    """Two block-diagonal maps of `blocks` blocks each with a permutation between.

    `blocks=b` is `BTT(blocks=(b, b))` of rank ⌈min(d_in, d_out) / b²⌉, the layer of the Monarch
    paper; `blocks=None` is the balanced split with rank 1.
    """

    blocks: int | None = None
    example: ClassVar = {"blocks": 4}
    source: ClassVar = "Dao et al. 2022, https://arxiv.org/abs/2204.00595"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.blocks is None or isinstance(self.blocks, int)):
            raise StructureError(
                f"cannot make a Monarch with blocks={self.blocks!r}: it is one number, for input and output alike; "
                f"BTT(blocks=(in_blocks, out_blocks)) takes two"
            )

    def __call__(self, d_in: int, d_out: int) -> Structure:
        if self.blocks is None:
            return BTT()(d_in, d_out)
        for width in (d_in, d_out):
            check_width(width)
        rank = max(1, -(-min(d_in, d_out) // self.blocks**2))
        return BTT(rank, blocks=(self.blocks, self.blocks))(d_in, d_out)


@dataclass(frozen=True, repr=False)
class Butterfly(Family):
    """About log(width) / log(radix) sparse factors, each mixing groups of `radix` features or a few more.

    Widths are padded to the next product of 2s, 3s and 5s, and split into equally many groups.
    """

    radix: int = 2
    source: ClassVar = "Dao et al. 2019, https://arxiv.org/abs/1903.05895"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        ins, outs = (_radices(width, self.radix) for width in (d_in, d_out))
        stages = min(len(ins), len(outs))
        pairs = _never_too_narrow(list(zip(_merge(ins, stages), _merge(outs, stages), strict=True)))
        ins, outs = [i for i, _ in pairs], [o for _, o in pairs]
        return _block_chain(ins, outs, None).pad(d_in=d_in, d_out=d_out)


def _block_chain(ins: Sequence[int], outs: Sequence[int], rank: int | None) -> Structure:
    """Factor k takes (i_k, r_k-1) to (r_k, o_k) separately for all later i and earlier o.

    New axes are written rank first, and the earliest output block last: the state between two
    factors, kept with tokens innermost, is then read by the next one without a copy (docs/kernels.md).
    Two factors take the customary letters: "g a, g r f a, f e g r -> f e".
    """
    last = len(ins) - 1
    letters = {"i0": "a", "i1": "g", "o0": "f", "o1": "e", "r0": "r"} if last == 1 else {}
    sizes = {f"i{k}": size for k, size in enumerate(ins)} | {f"o{k}": size for k, size in enumerate(outs)}
    if rank is not None:
        sizes |= {f"r{k}": rank for k in range(last)}
    operands = [[f"i{k}" for k in range(last, -1, -1)]]
    for k in range(last + 1):
        batch = [f"o{j}" for j in range(k)] + [f"i{j}" for j in range(last, k, -1)]
        operands.append([*batch, f"r{k}", f"o{k}", f"i{k}", f"r{k - 1}"])
    operands.append([f"o{k}" for k in range(last + 1)])
    *left, y = (" ".join(letters.get(axis, axis) for axis in axes if axis in sizes) for axes in operands)
    named = {letters.get(axis, axis): size for axis, size in sizes.items()}
    return Structure.parse(f"{', '.join(left)} -> {y}", **named)


def _full_rank_blocks(ins: tuple[int, ...], outs: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(α, γ) and (φ, ε) with few blocks γ, φ; the cheapest orders that reach full rank at rank 1.

    The rank is at most γφ: with 2048 = 32 · 64 on both sides, 32 blocks each would halve it.
    """
    full = min(math.prod(ins), math.prod(outs))
    (g, a), (f, e) = ins, outs
    orders = [((a, g), (f, e)), ((a, g), (e, f)), ((g, a), (f, e))]
    reaching = [order for order in orders if order[0][1] * order[1][0] >= full]
    cost = {order: order[0][1] * order[1][0] * (order[0][0] + order[1][1]) for order in reaching}
    return min(cost, key=lambda order: cost[order])


@lru_cache(maxsize=1024)
def _fast(d_in: int, d_out: int, rank: int, tokens: int = 16384) -> Structure:
    """The fastest of the splits into equal blocks that have the FLOPs and the rank of the balanced one."""
    balanced = BTT(rank)(d_in, d_out)
    if max(d_in, d_out) > WIDEST:
        return balanced
    budget, needed = parameters(balanced), generic_rank(balanced)
    candidates = [balanced]
    for g, f in product(_divisors(d_in), _divisors(d_out)):
        each = f * d_in + g * d_out
        channels = budget // each
        whole = channels * f % TILE == 0 == channels * g % TILE
        if whole and channels * each >= 0.9 * budget and channels * g * f >= needed:
            candidates.append(_block_chain((d_in // g, g), (f, d_out // f), channels))
    training = {structure: seconds(structure, tokens, "cuda", mode="training") for structure in candidates}
    bound = min(TIE * min(training.values()), training[balanced])
    tied = [structure for structure in candidates if training[structure] <= bound]
    return min(tied, key=lambda structure: seconds(structure, tokens, "cuda"))


def _divisors(width: int) -> list[int]:
    """Numbers of blocks of whole tiles."""
    return [blocks for blocks in range(2, width // TILE + 1) if width % (blocks * TILE) == 0]


def _radices(width: int, radix: int) -> list[int]:
    check_width(width)
    odd = (3**m * 5**n for m in range(width.bit_length()) for n in range(width.bit_length()))
    smooth = min(part << (-(-width // part) - 1).bit_length() for part in odd)
    groups: list[int] = []
    for prime in sorted(prime_factors(smooth), reverse=True):
        if groups and groups[-1] * prime <= radix:
            groups[-1] *= prime
        else:
            groups.append(prime)
    return groups or [1]


def _merge(groups: list[int], count: int) -> list[int]:
    """`count` groups with the same product, made by joining the smallest."""
    while len(groups) > count:
        *groups, second, first = sorted(groups, reverse=True)
        groups = [*groups, first * second]
    return sorted(groups, reverse=True)


def _never_too_narrow(stages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Orders stages i -> o so that the state is as small as can be, yet never narrower than both ends.

    A narrower state would limit the rank.
    """
    ratio = {stage: Fraction(stage[1], stage[0]) for stage in stages}
    narrowest = min(Fraction(1), math.prod((ratio[stage] for stage in stages), start=Fraction(1)))
    ordered: list[tuple[int, int]] = []
    width, left = Fraction(1), sorted(stages, key=lambda stage: ratio[stage])
    while left:
        stage = next(stage for stage in left if width * ratio[stage] >= narrowest)
        left.remove(stage)
        ordered.append(stage)
        width *= ratio[stage]
    return ordered
