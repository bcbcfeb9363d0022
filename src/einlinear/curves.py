"""Error curves of a weight: what each candidate structure would cost, and lose."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import product

from torch import Tensor

from einlinear.allocation import Curve, Point
from einlinear.contract import dense
from einlinear.cost import flops, parameters
from einlinear.family import Family, families
from einlinear.family import structure as family_of
from einlinear.moments import Moments, second_moments
from einlinear.projection import project
from einlinear.structure import StructureError

RANKS = 256
"""Ranks that are offered at most for one choice of blocks."""
AUTO = ("dense", "low_rank", "block_diagonal", "kronecker", "tensor_train", "monarch", "btt")
"""Families that `"auto"` offers: those whose nearest member has a closed form."""


def candidates(family: str, d_in: int, d_out: int) -> tuple[Family, ...]:
    """Settings of a family at many costs, cheapest first, none dearer than a dense layer.

    Args:
        family: a family's short name such as `"btt"`, which offers its ranks and blocks; one with settings, such
            as `"btt(rank=4)"`, which offers that alone; or `"auto"`, which offers the families of `AUTO`.
        d_in, d_out: widths of the layer.

    Raises:
        StructureError: for an unknown family, or one with no setting that fits the widths.
    """
    if family == "auto":
        offered = [c for name in AUTO for c in _settings(name, d_in, d_out)]
    elif family.isidentifier():
        offered = _settings(family, d_in, d_out)
    else:
        offered = [family_of(family)]
    costs = {}
    for candidate in offered:
        try:
            costs[candidate] = parameters(candidate(d_in, d_out))
        except StructureError:
            continue
    kept = [c for c, cost in costs.items() if cost <= d_in * d_out]
    if not kept:
        raise StructureError(
            f"cannot offer candidates of '{family}' for {d_in} -> {d_out}: none fits and costs less than dense"
        )
    return tuple(sorted(kept, key=lambda c: costs[c]))


def _settings(name: str, d_in: int, d_out: int) -> list[Family]:
    known = {str(f).partition("(")[0]: type(f) for f in families()}
    if name not in known:
        family_of(name)  # says which names there are
    cls = known[name]
    options = {field.name for field in fields(cls)}
    small = min(d_in, d_out)
    grids: dict[str, Iterable[object]] = {}
    counts = [b for b in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if b * b <= 4 * small]
    if "blocks" in options:
        pair = name == "btt"
        grids["blocks"] = [None, *((b, b) for b in counts)] if pair else counts
    if "radix" in options:
        grids["radix"] = [2, 4, 8, 16]
    if "theta" in options:
        return [cls(**cls.example)]
    found: list[Family] = []
    for values in product(*grids.values()):
        settings = dict(zip(grids, values, strict=True))
        if "rank" not in options:
            found.append(cls(**settings))
            continue
        try:
            unit = parameters(cls(**settings, **{"rank": 1})(d_in, d_out))
        except StructureError:
            continue
        top = max(1, min(small, d_in * d_out // unit))
        found += [
            cls(**settings, **{"rank": r}) for r in sorted({1 + (top - 1) * k // (RANKS - 1) for k in range(RANKS)})
        ]
    return found


def error_curve(weight: Tensor, candidates: Sequence[Family], moments: Tensor | Moments | None = None) -> Curve:
    """The squared error of the nearest member of each candidate.

    Args:
        weight: `[d_out, d_in]`.
        candidates: families with settings, as from `candidates`.
        moments: second moments of inputs, `[d_in, d_in]` or `Moments`.
    """
    d_out, d_in = weight.shape
    exact = weight.detach().double()
    gram = None if moments is None else second_moments(moments, exact)

    def squared(error: Tensor) -> float:
        return float((error * (error if gram is None else error @ gram)).sum())

    points = []
    for family in candidates:
        structure = family(d_in, d_out)
        lost = squared(exact - dense(structure, project(exact, structure, moments)))
        points.append(Point(family, parameters(structure), flops(structure), max(lost, 0.0)))
    return Curve(d_in, d_out, squared(exact), tuple(sorted(points, key=lambda p: p.parameters)))
