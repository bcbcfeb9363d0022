"""What a search may try: points of θ, ranks and block counts, each linear map once, none that is lost from the start."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

import einlinear as el
from einlinear.equivalence import canonical
from einlinear.lab.laws.minimise import Floats

SHAPES = ((1, 1), (1, 4), (4, 1))  # of the maps of a transformer's block, in widths
BONDS = (0.0, 0.5)
PARTS = (2, 3)  # exponents of θ are multiples of a half or of a third
COSTLIEST = 1.0  # FLOPs, in those of dense
LEAST_RANK = 0.0  # ψ
MOST_SHARING = 1.0  # ω


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A structure that may be trained, and what is known of it without training."""

    family: str
    psi: float
    nu: float
    omega: float
    flops: float  # of a block's maps, in those of dense, at the width of the search
    parameters: float
    equivalent: tuple[str, ...] = field(default=(), repr=False)  # others that are the same maps, at no lower cost

    @property
    def features(self) -> tuple[float, ...]:
        """What a model of the search's results may go by."""
        return (self.psi, self.nu, self.omega, math.log(self.flops), math.log(self.parameters))


def candidates(
    width: int,
    *,
    exponents: Sequence[int] = (7, 10),
    costliest: float = COSTLIEST,
    least_rank: float = LEAST_RANK,
    most_sharing: float = MOST_SHARING,
) -> list[Candidate]:
    """Every structure that is worth a try at a width, cheapest first, dense left out.

    Structures that are the same linear maps in other words are one, the cheapest of them. Pruned are those that cost
    more than `costliest` of dense, and those outside the corner of the taxonomy that is asked for: ψ below
    `least_rank`, ω above `most_sharing`.
    """
    dense = _cost(el.Dense(), width)
    groups: dict[object, list[tuple[int, int, el.Family]]] = {}
    for family in _every(width, exponents):
        try:
            form = tuple(canonical(family(a * width, b * width)) for a, b in SHAPES)
            flops, parameters = _cost(family, width)
        except el.StructureError:  # not to be had at this width
            continue
        if flops <= costliest * dense[0]:
            groups.setdefault(form, []).append((flops, parameters, family))
    groups.pop(tuple(canonical(el.Dense()(a * width, b * width)) for a, b in SHAPES), None)
    pool = []
    for group in groups.values():
        # Of equal costs, a named family says more than a point of θ.
        group.sort(key=lambda one: (one[0], isinstance(one[2], el.Theta), len(str(one[2]))))
        flops, parameters, family = group[0]
        psi, nu, omega = el.taxonomy(family)
        if psi >= least_rank and omega <= most_sharing:
            pool.append(Candidate(
                family=str(family), psi=psi, nu=nu, omega=omega, flops=flops / dense[0],
                parameters=parameters / dense[1], equivalent=tuple(str(other) for *_, other in group[1:]),
            ))  # fmt: skip
    return sorted(pool, key=lambda candidate: (candidate.flops, candidate.family))


def features(pool: Sequence[Candidate]) -> Floats:
    """`[candidates, 5]`, each column of mean 0 and deviation 1."""
    table = np.array([candidate.features for candidate in pool])
    return np.asarray((table - table.mean(axis=0)) / np.maximum(table.std(axis=0), 1e-9))


def _cost(family: el.Family, width: int) -> tuple[int, int]:
    structures = [family(a * width, b * width) for a, b in SHAPES]
    return sum(map(el.flops, structures)), sum(map(el.parameters, structures))


def _every(width: int, exponents: Sequence[int]) -> Iterator[el.Family]:
    powers = [2**k for k in range(1, int(math.log2(width)))]
    yield from (el.LowRank(rank=rank) for rank in powers if rank <= width // 2)
    yield from (el.Monarch(blocks=blocks) for blocks in powers if blocks <= width // 2)
    yield from (el.BlockDiagonal(blocks=blocks) for blocks in powers if blocks <= width // 2)
    yield from (el.BTT(rank=rank) for rank in powers[:3])
    if 7 in exponents:
        for parts in PARTS:
            shares = _compositions(parts)
            bonds = [k / parts for k in range(parts)]
            yield from (_theta(*left, *right, bond) for left, right, bond in product(shares, shares, bonds))
    if 10 in exponents:
        shares = _compositions(2)
        yield from (_theta(*left, *right, *bonds) for left, right, *bonds in product(shares, shares, *[BONDS] * 4))


def _compositions(parts: int) -> list[tuple[float, ...]]:
    """All triples of multiples of 1 / parts whose sum is 1."""
    whole = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    return [tuple(round(k / parts, 4) for k in triple) for triple in whole]


def _theta(*shares: float) -> el.Family:
    return el.Theta(tuple(round(share, 4) for share in shares))
