"""Error curves of a weight: what each candidate structure would cost, and lose."""

import math
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product

from torch import Tensor

from einlinear.compression.allocation import Curve, Point
from einlinear.cost import flops, parameters
from einlinear.family import Family, families
from einlinear.family import structure as family_of
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import discarded, project
from einlinear.projection.refinement import Target
from einlinear.structure import Structure, StructureError
from einlinear.structures import Dense

TINY = 1e-14
"""Relative squared error below which a weight counts as recovered."""
AUTO = ("dense", "low_rank", "block_diagonal", "tensor_train", "btt")
"""Families that `"auto"` offers."""
BLOCKS = (2, 4, 8, 16, 32, 64)
RADICES = (2, 4, 8, 16)
RANKS = 256
"""Ranks that are offered at most for one choice of blocks."""
NODES = (0.0, 1 / 3, 2 / 3, 1.0)
"""Ranks that are tried for one choice of blocks without a closed form: shares of the way, in logarithms."""
GUIDED = (1 / 4, 3 / 4)
"""The same where the closed form without moments between blocks leads the way."""


def layer_candidates(family: str, d_in: int, d_out: int) -> tuple[Family, ...]:
    """Settings of a family at many costs, cheapest first, none dearer than a dense layer.

    Args:
        family: a family's short name such as `"btt"`, which offers its ranks and blocks; one with settings, such
            as `"btt(rank=4)"`, which offers that alone; or `"auto"`, which offers the families of `AUTO`.
        d_in, d_out: widths of the layer.

    Example:
        >>> print(*layer_candidates("block_diagonal", 64, 64)[-3:])
        block_diagonal(blocks=8) block_diagonal(blocks=4) block_diagonal(blocks=2)

    Raises:
        StructureError: for an unknown family, or one with no setting that fits the widths.
    """
    if family == "auto":
        offered = [candidate for name in AUTO for candidate in _settings(name, d_in, d_out)]
    elif family.isidentifier():
        offered = _settings(family, d_in, d_out)
    else:
        offered = [family_of(family)]
    costs = {candidate: _cost(candidate, d_in, d_out) for candidate in offered}
    kept = [candidate for candidate, cost in costs.items() if cost <= d_in * d_out]
    if not kept:
        raise StructureError(
            f"cannot offer candidates of '{family}' for a layer {d_in} -> {d_out}: none fits its widths "
            f"and takes no more parameters than a dense layer; name another family or settings of your own"
        )
    return tuple(sorted(kept, key=lambda candidate: costs[candidate]))


def error_curve(
    weight: Tensor, candidates: Sequence[Family], moments: Tensor | Moments | None = None, *, sweeps: int = 3
) -> Curve:
    """The cost and the squared error of the nearest member of each candidate.

    All ranks that differ in nothing else come from one batched singular value decomposition, where splitting is the
    optimum (`project`): two factors without moments, low rank with them. Elsewhere a few ranks are projected
    with few sweeps, and the others follow the closed form there would be without moments between blocks, scaled to
    meet those: an estimate for an allocation, not a measurement.

    Args:
        weight: `[d_out, d_in]`.
        candidates: families with settings, as from `layer_candidates`.
        moments: second moments of inputs, `[d_in, d_in]` or `Moments`; errors are then E‖(W − Ŵ) x‖².
        sweeps: rounds of alternating least squares for a point without a closed form.

    Raises:
        StructureError: as `project`; for a candidate that does not fit the widths.
    """
    if weight.ndim != 2:
        raise StructureError(f"cannot draw the error curve of a weight of shape {tuple(weight.shape)}: it is no matrix")
    d_out, d_in = weight.shape
    groups: dict[Structure, list[tuple[Family, Structure]]] = {}
    for family in candidates:
        structure = family(d_in, d_out)
        groups.setdefault(_without_rank(structure), []).append((family, structure))
    points: list[Point] = []
    for members in groups.values():
        errors = _errors(weight, [structure for _, structure in members], moments, sweeps)
        points += [
            Point(family, parameters(structure), flops(structure), error)
            for (family, structure), error in zip(members, errors, strict=True)
        ]
    target = Target(weight, Dense()(d_in, d_out), moments)
    total = target.norm(target.weight) ** 2
    return Curve(d_in, d_out, total, tuple(sorted(points, key=lambda point: (point.parameters, point.error))))


def _settings(name: str, d_in: int, d_out: int) -> list[Family]:
    """A grid over the settings of a family, known by their names: blocks, radix, rank."""
    known = {alias: type(f) for f in families() for alias in (str(f).partition("(")[0], type(f).__name__)}
    if name not in known:
        family_of(name)  # refuses it, naming the nearest one
    cls = known[name]
    options = {field.name: field for field in fields(cls)}
    grids: dict[str, Sequence[object]] = {}
    if "blocks" in options:
        pairs = "tuple" in str(options["blocks"].type)
        counts: list[object] = [(b, b) if pairs else b for b in BLOCKS]
        grids["blocks"] = [None, *counts] if options["blocks"].default is None else counts
    if "radix" in options:
        grids["radix"] = RADICES
    if "theta" in options:  # a continuum, of which the example must do
        grids["theta"] = [cls.example["theta"]]
    found: list[Family] = []
    for values in product(*grids.values()):
        settings = dict(zip(grids, values, strict=True))
        if "rank" in options:
            unit = _cost(cls(**settings, **{"rank": 1}), d_in, d_out)
            ranks = _ranks(int(min(d_in, d_out, d_in * d_out // unit)))
            found += [cls(**settings, **{"rank": rank}) for rank in ranks]
        else:
            found.append(cls(**settings))
    return found


def _ranks(top: int) -> list[int]:
    """From 1 to `top`, all or evenly spaced."""
    return sorted({1 + (top - 1) * k // (RANKS - 1) for k in range(RANKS)}) if top else []


def _cost(family: Family, d_in: int, d_out: int) -> float:
    """Parameters, infinitely many where the widths do not fit."""
    try:
        return parameters(family(d_in, d_out))
    except StructureError:
        return math.inf


def _bonds(structure: Structure) -> dict[str, int]:
    """The axes between factors, with their sizes."""
    ends = {*structure.x, *structure.y}
    return {axis: size for axis, size in structure.sizes.items() if axis not in ends}


def _without_rank(structure: Structure) -> Structure:
    """What structures have in common that differ in the sizes of their bonds."""
    bonds = _bonds(structure)
    return replace(structure, axis_sizes=tuple((axis, 0 if axis in bonds else n) for axis, n in structure.axis_sizes))


def _errors(
    weight: Tensor, structures: Sequence[Structure], moments: Tensor | Moments | None, sweeps: int
) -> list[float]:
    """The squared error of each of some structures that differ in their ranks."""
    ranks = [math.prod(_bonds(structure).values()) for structure in structures]
    lost, exact = discarded(Target(weight, structures[0], moments))
    guessed = {rank: 1.0 if lost is None else float(lost[min(rank, len(lost) - 1)]) for rank in ranks}
    if exact:
        return [guessed[rank] for rank in ranks]
    known = dict(zip(ranks, structures, strict=True))
    tried: dict[int, float] = {}
    for rank in _nodes(sorted(known), NODES if lost is None else GUIDED):
        target = Target(weight, known[rank], moments)
        found = project(target.weight, known[rank], moments, sweeps=sweeps)
        floor = max(TINY * target.norm(target.weight) ** 2, sys.float_info.min)
        guessed = {other: max(guess, floor) for other, guess in guessed.items()}
        tried[rank] = max(target.error(found) ** 2, floor) / guessed[rank]
    return [guessed[rank] * _between(tried, rank) for rank in ranks]


def _nodes(ranks: list[int], shares: Sequence[float]) -> list[int]:
    """Of ascending ranks, those nearest to shares of the way from the first to the last, in logarithms."""
    ideal = [ranks[0] * (ranks[-1] / ranks[0]) ** share for share in shares]
    return sorted({min(ranks, key=lambda rank: abs(math.log(rank / aim))) for aim in ideal})


def _between(tried: dict[int, float], rank: int) -> float:
    """What was found at the ranks around, as a power of the rank; beyond them, what was found at the last."""
    low = max((r for r in tried if r <= rank), default=min(tried))
    high = min((r for r in tried if r >= rank), default=max(tried))
    share = math.log(rank / low) / math.log(high / low) if low < rank < high else 0.0
    return math.exp((1 - share) * math.log(tried[low]) + share * math.log(tried[high]))
