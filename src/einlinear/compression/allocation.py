"""How much each layer gets: structures chosen for all layers at once, from their error curves, within one budget."""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.structure import StructureError
from einlinear.structures import Dense

Cost = Literal["parameters", "flops"]

STATES = 1024
"""Partial choices that are kept beside each other while the last bit of a budget is filled."""


@dataclass(frozen=True)
class Point:
    """A layer's cost and error with one structure."""

    family: Family
    parameters: int
    flops: int  # for one token
    error: float  # E ‖(W − Ŵ) x‖², or ‖W − Ŵ‖² where there were no moments

    def cost(self, cost: Cost) -> int:
        return self.parameters if cost == "parameters" else self.flops


@dataclass(frozen=True)
class Curve:
    """What can become of one layer, each possibility with its cost and its error."""

    d_in: int
    d_out: int
    total: float  # the error of Ŵ = 0
    points: tuple[Point, ...]

    def dense(self, cost: Cost) -> int:
        """What the layer costs dense."""
        return self.d_in * self.d_out * (1 if cost == "parameters" else 2)


@dataclass(frozen=True)
class Allocation:
    """A structure for each layer; prints as a table.

    `error` is the sum that was minimised, and `bound` one that no choice within the budget can go below: where
    the two agree, the choice is the best there is. `plan` is the text of a file for people to edit, which
    `read_plan` reads; `rules` go into `einlinear.convert`.
    """

    chosen: Mapping[str, Point]
    curves: Mapping[str, Curve]
    budget: float
    cost: Cost
    error: float
    bound: float

    @property
    def rules(self) -> dict[str, Family | None]:
        """What becomes of each layer, None where it stays as it is."""
        return {name: _rule(point.family) for name, point in self.chosen.items()}

    @property
    def share(self) -> float:
        """The cost of all layers, relative to all of them dense."""
        dense = sum(curve.dense(self.cost) for curve in self.curves.values())
        return sum(point.cost(self.cost) for point in self.chosen.values()) / dense

    @property
    def plan(self) -> str:
        """A TOML file that `read_plan` reads, with the reasons as comments."""
        lines = [
            f"# {self.share:.4f} of the dense {self.cost}; asked for: {self.budget:g}",
            '# A layer that is "dense" stays as it is.',
            "[layers]",
        ]
        width = max((len(json.dumps(name)) for name in self.chosen), default=0)
        for name, point in self.chosen.items():
            text = json.dumps(str(point.family))
            lines.append(f"{json.dumps(name):{width}} = {text:36} # {self._comment(name)}")
        return "\n".join(lines) + "\n"

    def _comment(self, name: str) -> str:
        point, curve = self.chosen[name], self.curves[name]
        return f"{point.cost(self.cost) / curve.dense(self.cost):.3f} of dense, error {_relative(point, curve):.3f}"

    def __str__(self) -> str:
        rows = [["layer", "structure", self.cost, "of dense", "error"]]
        for name, point in self.chosen.items():
            curve, cost = self.curves[name], point.cost(self.cost)
            share = cost / curve.dense(self.cost)
            rows.append([name, str(point.family), f"{cost:,}", f"{share:.3f}", f"{_relative(point, curve):.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        gap = self.error - self.bound
        best = "the best there is" if gap <= 1e-9 * self.error else f"at most {gap / self.error:.1e} above the best"
        return "\n".join([*table, f"{self.share:.4f} of dense, of {self.budget:g} asked; summed error {best}"])


def allocate(
    curves: Mapping[str, Curve],
    budget: float,
    cost: Cost = "parameters",
    *,
    relative: bool = False,
    weights: Mapping[str, float] | None = None,
    floor: float = 0.0,
) -> Allocation:
    """Chooses a point of every curve so that the summed error is least within the budget.

    A budget is a share of what these layers cost dense, in parameters or in FLOPs per token: 0.5 halves them.
    Points on the convex hulls are taken greedily, steepest first, which is optimal wherever a step ends; what is left
    of the budget is then filled exactly, by dynamic programming over the few choices that a duality bound
    leaves open (thinned to `STATES` of them on a grid of costs if there are more: `Allocation.bound` then says how
    far from the optimum the result can be at most). More budget never means more error.

    Args:
        curves: an error curve for each layer, from `einlinear.error_curve`.
        budget: above 0, at most 1.
        cost: what the budget counts.
        relative: sum each layer's share of its own output lost, instead of squared errors.
        weights: what a layer's squared error counts for, in place of `relative`, such as how much the model's output
            moves with the layer's.
        floor: the least that a layer gets, as a share of what the budget would give it if all got alike; 0 to 1.
            With one, more budget can mean more error, by less than a step between neighbouring settings.

    Raises:
        StructureError: for a budget outside (0, 1], no layers, or a budget below the cheapest choice of all.
    """
    if not 0 < budget <= 1:
        raise StructureError(
            f"cannot allocate a budget of {budget!r}: it is a share of the dense {cost}, above 0 and at most 1"
        )
    if cost not in ("parameters", "flops"):
        raise StructureError(f"cannot allocate a budget of {cost!r}: it counts 'parameters' or 'flops'")
    if not curves or not all(curve.points for curve in curves.values()):
        raise StructureError("cannot allocate a budget to no layers, or to one without candidates; pass some curves")
    if not 0 <= floor <= 1:
        raise StructureError(f"cannot allocate with a floor of {floor!r}: it is a share of an even budget, from 0 to 1")
    if weights is None:
        scales = [1 / curve.total if relative and curve.total else 1.0 for curve in curves.values()]
    else:
        scales = [weights[name] for name in curves]
    fronts = [_frontier(curve.points, cost, scale) for curve, scale in zip(curves.values(), scales, strict=True)]
    dense = sum(curve.dense(cost) for curve in curves.values())
    asked = budget * dense
    least = [floor * budget * curve.dense(cost) for curve in curves.values()]
    raised = [_above(front, share) for front, share in zip(fronts, least, strict=True)]
    if sum(front[0].cost for front in raised) <= asked:  # some layers may have nothing as cheap as their share
        fronts = raised
    left = asked * (1 + 1e-12) - sum(front[0].cost for front in fronts)
    if left < 0:
        raise StructureError(
            f"cannot allocate {budget:g} of the dense {cost}: the cheapest candidates of all layers take "
            f"{sum(front[0].cost for front in fronts) / dense:.4f}; ask for that much or offer cheaper candidates"
        )
    at = [0] * len(fronts)
    bound_slope = 0.0
    for step in _steps(fronts):
        if step.cost > left:
            bound_slope = step.slope
            at = _fill(fronts, at, step, left)
            break
        at[step.layer] = step.to
        left -= step.cost
    error = sum(front[k].error for front, k in zip(fronts, at, strict=True))
    # By duality: no choice within `asked` has less error than the least of error + slope · (cost - asked).
    bound = sum(min(p.error + bound_slope * p.cost for p in front) for front in fronts) - bound_slope * asked
    chosen = {name: front[k].point for name, front, k in zip(curves, fronts, at, strict=True)}
    return Allocation(chosen, dict(curves), budget, cost, error, min(bound, error))


def read_plan(path: Path | str) -> dict[str, Family | None]:
    """The rules for `einlinear.convert` in a plan, as written by `Allocation.plan` and edited since.

    Raises:
        StructureError: for a file that is no plan, naming the layer at fault.
    """
    doing = f"cannot read the plan '{path}'"
    try:
        found = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StructureError(f"{doing}: {error}") from None
    layers = found.pop("layers", None)
    if found or not isinstance(layers, dict) or not layers:
        raise StructureError(f'{doing}: expected one table [layers], with lines such as "h.0.mlp" = "btt(rank=4)"')
    rules: dict[str, Family | None] = {}
    for name, text in layers.items():
        if not isinstance(text, str):
            raise StructureError(f"{doing}: the structure of '{name}' is no text in quotes; quote the layer's name too")
        try:
            rules[name] = _rule(family_of(text))
        except StructureError as error:
            raise StructureError(f"{doing}: layer '{name}': {error}") from None
    return rules


def _rule(family: Family) -> Family | None:
    return None if isinstance(family, Dense) else family


def _relative(point: Point, curve: Curve) -> float:
    return (max(point.error, 0) / curve.total) ** 0.5 if curve.total else 0.0


class _Place(NamedTuple):
    """A point as the allocation sees it."""

    cost: int
    error: float
    point: Point


class _Step(NamedTuple):
    """From one corner of a layer's hull to the next."""

    slope: float  # error saved for each unit of cost
    layer: int
    to: int
    cost: int


def _frontier(points: Iterable[Point], cost: Cost, scale: float) -> list[_Place]:
    """The points that no other beats in both cost and error, cheapest first."""
    front: list[_Place] = []
    for place in sorted((_Place(p.cost(cost), scale * p.error, p) for p in points), key=lambda place: place[:2]):
        if not front or place.error < front[-1].error:
            front.append(place)
    return front


def _above(front: list[_Place], least: float) -> list[_Place]:
    """The places from the dearest one within `least` on: a floor that an even split of the budget can always pay."""
    return front[max((k for k, place in enumerate(front) if place.cost <= least), default=0) :]


def _steps(fronts: Sequence[list[_Place]]) -> list[_Step]:
    """The edges of all lower convex hulls, steepest first."""
    steps: list[_Step] = []
    for layer, front in enumerate(fronts):
        hull: list[int] = []
        for k in range(len(front)):
            while len(hull) > 1 and _slope(front, hull[-2], hull[-1]) <= _slope(front, hull[-1], k):
                hull.pop()
            hull.append(k)
        steps += [_Step(_slope(front, a, b), layer, b, front[b].cost - front[a].cost) for a, b in pairwise(hull)]
    return sorted(steps, key=lambda step: -step.slope)  # stable: a layer's own edges stay in order


def _slope(front: list[_Place], a: int, b: int) -> float:
    return (front[a].error - front[b].error) / (front[b].cost - front[a].cost)


class _State(NamedTuple):
    """Some layers moved away from where the greedy walk stands."""

    cost: int
    error: float
    moved: tuple["_State", int, int] | None  # the state before, the layer and its new place


def _fill(fronts: Sequence[list[_Place]], at: list[int], blocked: _Step, left: float) -> list[int]:
    """The best places within `left` of the cost at `at`, which the step `blocked` would exceed.

    Nothing but the last line depends on `left`: a larger budget chooses from a larger part of the same states.
    """
    # A move's regret is its error less what its cost is worth. Moves that regret more than the whole step would save
    # cannot lead to anything better than standing still.
    allowed = blocked.slope * blocked.cost * (1 + 1e-9)
    states = [_State(0, 0.0, None)]
    for layer, (front, here) in enumerate(zip(fronts, at, strict=True)):
        moves = [(k, place.cost - front[here].cost, place.error - front[here].error) for k, place in enumerate(front)]
        moves = [move for move in moves if move[0] != here and move[2] + blocked.slope * move[1] <= allowed]
        states += [
            _State(state.cost + cost, state.error + error, (state, layer, k))
            for state in states
            for k, cost, error in moves
            if state.error + error + blocked.slope * (state.cost + cost) <= allowed
        ]
        states = _thinned(states, blocked.slope)
    places = list(at)
    best = min((s for s in [*states, _State(0, 0.0, None)] if s.cost <= left), key=lambda state: state.error)
    while best.moved:
        best, layer, k = best.moved
        places[layer] = k
    return places


def _thinned(states: list[_State], slope: float) -> list[_State]:
    """The states that no other beats; where there are too many, the one of least regret in each cell of cost."""
    front: list[_State] = []
    for state in sorted(states, key=lambda state: state[:2]):
        if not front or state.error < front[-1].error:
            front.append(state)
    if len(front) <= STATES:
        return front
    low, width = front[0].cost, (front[-1].cost - front[0].cost + 1) / STATES
    cells: dict[int, _State] = {}
    for state in front:
        cell = int((state.cost - low) / width)
        if cell not in cells or state.error + slope * state.cost < cells[cell].error + slope * cells[cell].cost:
            cells[cell] = state
    return list(cells.values())
