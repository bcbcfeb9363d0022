"""The structures worth a try at a width: points of θ, ranks and block counts, each linear map once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from einlinear.cost import flops, parameters
from einlinear.equivalence import canonical
from einlinear.family import Family
from einlinear.structure import StructureError
from einlinear.structures import BTT, BlockDiagonal, Dense, LowRank, Monarch, Theta
from einlinear.taxonomy import taxonomy

SHAPES = ((1, 1), (1, 4), (4, 1))  # of the maps of a transformer's block, in widths
BONDS = (0.0, 0.5)  # exponents of the four bonds of three factors
PARTS = (2, 3)  # exponents of two factors are multiples of a half or of a third


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A structure that may be trained, and what is known of it without training."""

    family: str
    psi: float
    nu: float
    omega: float
    flops: float  # of a block's maps, in those of dense, at the width asked for
    parameters: float
    equivalent: tuple[str, ...] = field(default=(), repr=False)  # others that are the same maps, at no lower cost


def candidates(
    width: int,
    *,
    exponents: Sequence[int] = (7, 10),
    costliest: float = 1.0,
    least_rank: float = 0.0,
    most_sharing: float = 1.0,
) -> list[Candidate]:
    """Every structure that is worth a try at a width, cheapest first, dense left out.

    Structures that are the same linear maps in other words (`equivalence.canonical`) are one, the cheapest of them.
    Pruned are those that cost more than `costliest` of dense's FLOPs, and those outside the corner of the taxonomy
    that is asked for: ψ below `least_rank`, ω above `most_sharing`. Large ψ and small ω scale best (Potapczynski et
    al. 2024, "Searching for Efficient Linear Layers", section 4).

    Args:
        width: of the model; its maps are width → width, width → 4 width and back.
        exponents: which spaces of θ: 7 (two factors), 10 (three factors) or both.
        costliest: FLOPs, in those of dense.
        least_rank: smallest ψ.
        most_sharing: largest ω.
    """
    dense = _cost(Dense(), width)
    groups: dict[object, list[tuple[int, int, Family]]] = {}
    for family in _every(width, exponents):
        try:
            form = tuple(canonical(family(a * width, b * width)) for a, b in SHAPES)
            work, size = _cost(family, width)
        except StructureError:  # not to be had at this width
            continue
        if work <= costliest * dense[0]:
            groups.setdefault(form, []).append((work, size, family))
    groups.pop(tuple(canonical(Dense()(a * width, b * width)) for a, b in SHAPES), None)
    found = []
    for group in groups.values():
        # Of equal costs, a named family says more than a point of θ.
        group.sort(key=lambda one: (one[0], isinstance(one[2], Theta), len(str(one[2]))))
        work, size, family = group[0]
        psi, nu, omega = taxonomy(family)
        if psi >= least_rank and omega <= most_sharing:
            found.append(Candidate(
                family=str(family), psi=psi, nu=nu, omega=omega, flops=work / dense[0], parameters=size / dense[1],
                equivalent=tuple(str(other) for *_, other in group[1:]),
            ))  # fmt: skip
    return sorted(found, key=lambda candidate: (candidate.flops, candidate.family))


def _cost(family: Family, width: int) -> tuple[int, int]:
    structures = [family(a * width, b * width) for a, b in SHAPES]
    return sum(map(flops, structures)), sum(map(parameters, structures))


def _every(width: int, exponents: Sequence[int]) -> Iterator[Family]:
    powers = [2**k for k in range(1, math.floor(math.log2(width)))]
    yield from (LowRank(rank=rank) for rank in powers)
    yield from (Monarch(blocks=blocks) for blocks in powers)
    yield from (BlockDiagonal(blocks=blocks) for blocks in powers)
    yield from (BTT(rank=rank) for rank in (1, *powers[:3]))
    if 7 in exponents:
        for parts in PARTS:
            shares, bonds = _compositions(parts), [round(k / parts, 4) for k in range(parts)]
            yield from (Theta((*left, *right, bond)) for left, right, bond in product(shares, shares, bonds))
    if 10 in exponents:
        shares, fours = _compositions(2), list(product(BONDS, repeat=4))
        yield from (Theta((*left, *right, *four)) for left, right, four in product(shares, shares, fours))


def _compositions(parts: int) -> list[tuple[float, ...]]:
    """All triples of multiples of 1 / parts whose sum is 1."""
    whole = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    return [tuple(round(k / parts, 4) for k in triple) for triple in whole]
