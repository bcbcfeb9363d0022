"""The structures worth a try at a width: points of θ, ranks, block counts and experts, each linear map once."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from einlinear.clock import seconds
from einlinear.cost import flops, parameters
from einlinear.equivalence import canonical
from einlinear.family import Family
from einlinear.structure import Structure, StructureError
from einlinear.structures import BTT, BlockDiagonal, Dense, LowRank, Mixture, Monarch, Theta
from einlinear.taxonomy import taxonomy

SHAPES = {(1, 1): 4, (1, 4): 1, (4, 1): 1}  # of the maps of a transformer's block, in widths, and how many there are
BONDS = (0.0, 0.5)  # exponents of the four bonds of three factors
PARTS = (2, 3)  # exponents of two factors are multiples of a half or of a third
ACTIVE = 2  # of a mixture's experts
TOKENS = 1024  # for which times are modelled


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A structure that may be trained, and what is known of it without training.

    Costs are of the maps of a transformer's block, in those of dense ones, at the width that was asked for.
    """

    family: str
    psi: float
    nu: float
    omega: float
    flops: float
    parameters: float
    seconds: float | None  # modelled, of a training step on the device asked for; None for experts, which have no model
    equivalent: tuple[str, ...] = field(default=(), repr=False)  # others that are the same maps, at no lower cost


def candidates(
    width: int,
    *,
    exponents: Sequence[int] = (7, 10),
    experts: Sequence[int] = (),
    costliest: float = 1.0,
    least_rank: float = 0.0,
    most_sharing: float = 1.0,
    slowest: float = math.inf,
    device: str = "cpu",
    refused: Callable[[str, str], object] = lambda family, reason: None,
) -> list[Candidate]:
    """Every structure that is worth a try at a width, cheapest first, dense left out.

    Structures that are the same linear maps in other words (`equivalence.canonical`) are one, the cheapest of them.
    Pruned are those that cost more than `costliest` of dense's FLOPs or `slowest` of its modelled seconds, and those
    outside the corner of the taxonomy that is asked for: ψ below `least_rank`, ω above `most_sharing`. Large ψ and
    small ω scale best (Potapczynski et al. 2024, "Searching for Efficient Linear Layers", section 4).

    Args:
        width: of the model; its maps are width → width, width → 4 width and back.
        exponents: which spaces of θ: 7 (two factors), 10 (three factors) or both.
        experts: also mixtures of so many of each structure, and of dense maps, of which two are active.
        costliest: FLOPs, in those of dense; the router of a mixture is not counted.
        least_rank: smallest ψ.
        most_sharing: largest ω.
        slowest: modelled seconds of a training step, in those of dense.
        device: whose seconds: "cpu" or "cuda".
        refused: called with every structure that is left out, and why in a few words.
    """
    dense, dense_seconds = _cost(_maps(Dense(), width)), _seconds(_maps(Dense(), width), device)
    plain = tuple(map(canonical, _maps(Dense(), width)))
    groups: dict[object, list[tuple[int, int, Family]]] = {}
    for family in _every(width, exponents, experts):
        try:
            maps = _maps(family, width)
        except StructureError:
            refused(str(family), "cannot be had at this width")
            continue
        work, size = _cost(maps)
        if not work <= costliest * dense[0]:  # of no number at all, too
            refused(str(family), f"costs more than {costliest:g} of dense's FLOPs")
        elif (form := tuple(map(canonical, maps))) == plain:
            refused(str(family), "is dense in other words")
        else:
            groups.setdefault(form, []).append((work, size, family))
    found = []
    for group in groups.values():
        # Of equal costs, a named family says more than a point of θ.
        group.sort(key=lambda one: (one[0], isinstance(one[2], Theta), len(str(one[2]))))
        work, size, family = group[0]
        for *_, other in group[1:]:
            refused(str(other), "is another one in other words")
        psi, nu, omega = taxonomy(family)
        taken = _seconds(_maps(family, width), device)
        if not psi >= least_rank:
            refused(str(family), f"has a rank whose exponent ψ is below {least_rank:g}")
        elif not omega <= most_sharing:
            refused(str(family), f"has a sharing whose exponent ω is above {most_sharing:g}")
        elif taken and dense_seconds and taken > slowest * dense_seconds:
            refused(str(family), f"is modelled to take more than {slowest:g} of dense's seconds")
        else:
            found.append(Candidate(
                family=str(family), psi=psi, nu=nu, omega=omega, flops=work / dense[0], parameters=size / dense[1],
                seconds=taken / dense_seconds if taken and dense_seconds else None,
                equivalent=tuple(str(other) for *_, other in group[1:]),
            ))  # fmt: skip
    return sorted(found, key=lambda candidate: (candidate.flops, candidate.family))


def _maps(family: Family, width: int) -> list[Structure]:
    return [family(a * width, b * width) for a, b in SHAPES]


def _cost(maps: Sequence[Structure]) -> tuple[int, int]:
    counted = list(zip(SHAPES.values(), maps, strict=True))
    return sum(n * flops(one) for n, one in counted), sum(n * parameters(one) for n, one in counted)


def _seconds(maps: Sequence[Structure], device: str) -> float | None:
    if any(structure.routed for structure in maps):
        return None
    counted = zip(SHAPES.values(), maps, strict=True)
    return sum(n * seconds(one, TOKENS, device, mode="training") for n, one in counted)


def _every(width: int, exponents: Sequence[int], experts: Sequence[int]) -> Iterator[Family]:
    alone = list(_unmixed(width, exponents))
    yield from alone
    for count, family in product(experts, [Dense(), *alone]):
        yield Mixture(of=str(family), experts=count, active=ACTIVE)


def _unmixed(width: int, exponents: Sequence[int]) -> Iterator[Family]:
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
