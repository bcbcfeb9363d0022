"""What a structure costs and what it can express, from its spec alone."""

import math
from dataclasses import replace
from itertools import permutations

from einlinear.structure import Structure, no_structure

Network = dict[object, dict[object, float]]
EMPTY = 1e-9
"""Residual capacity, in bits, that counts as none."""


def parameters(structure: Structure) -> int:
    """The number of entries in all factors.

    Raises StructureError for what is no `Structure`, as all counts do.
    """
    _need(structure, "count the parameters of")
    return sum(math.prod(shape) for shape in structure.factor_shapes)


def flops(structure: Structure) -> int:
    """Floating-point operations to apply the map to one vector, a multiply-add counting as two.

    Factors are applied in the order written; padding counts; a routed axis costs only its active
    entries. docs/mathematics.md section 1.
    """
    _need(structure, "count the FLOPs of")
    sizes = {**structure.sizes}
    if structure.routed:
        sizes[structure.routed] = structure.active
    return sum(
        # An inner axis is a sum over weights, done once and not per vector, unless it is routed.
        2 * math.prod(sizes[axis] for axis in {*step.state, *step.factor} - ({*step.inner} - {structure.routed}))
        for step in structure.steps
    )


def generic_rank(structure: Structure) -> int:
    """The network's minimal cut: the rank of the matrix for almost all values of the factors, with rare exceptions.

    The cut separates the input's axes from the output's; cutting an axis costs its size, once,
    however many operands carry it (a block axis is a copy tensor). For two factors this is
    min(n_in, n_out, |βδργφ|, |αεργφ|), docs/mathematics.md section 1. No matrix has more. Where not all
    sizes are powers of two, the best there is may fall short of it by a little (two blocks of 3 × 2 ⊗ 3 × 2 side by
    side reach 7 of 8): Cui et al. 2016, Quantum max-flow/min-cut, https://arxiv.org/abs/1508.04644.

    A routed axis counts with its active entries.
    """
    _need(structure, "find the rank of")
    sizes = {**structure.sizes}
    if structure.routed:
        sizes[structure.routed] = structure.active
    cut = math.prod(sizes[axis] for axis in _minimal_cut(structure, sizes))
    return min(cut, structure.d_in, structure.d_out)


def _need(structure: Structure, doing: str) -> None:
    if not isinstance(structure, Structure):
        no_structure(doing, structure)


def _minimal_cut(structure: Structure, sizes: dict[str, int]) -> set[str]:
    """The axes of a minimal cut, by maximal flow over log sizes (Edmonds and Karp).

    Operands are nodes; each axis is an arc of capacity log2(size) between two nodes of its own
    that every operand carrying the axis enters and leaves freely.
    """
    source, sink = 0, len(structure.operands) - 1
    capacity: Network = {operand: {} for operand in range(sink + 1)}
    for axis, size in sizes.items():
        enter, leave = ("enter", axis), ("leave", axis)
        capacity[enter], capacity[leave] = {leave: math.log2(size)}, {enter: 0.0}
        for operand, axes in enumerate(structure.operands):
            if axis in axes:
                capacity[operand][enter] = capacity[leave][operand] = math.inf
                capacity[enter][operand] = capacity[operand][leave] = 0.0
    while sink in (came_from := _reachable(capacity, source)):
        for node in came_from:  # every node of one search tree that touches the sink may end a path
            if capacity[node].get(sink, 0.0) > EMPTY:
                _augment(capacity, came_from, node, sink)
    reached = _reachable(capacity, source)
    return {axis for axis in sizes if ("enter", axis) in reached and ("leave", axis) not in reached}


def _augment(capacity: Network, came_from: dict[object, object], node: object, sink: object) -> None:
    arcs = [(node, sink)]
    while came_from[node] != node:
        arcs.append((came_from[node], node))
        node = came_from[node]
    flow = min(capacity[a][b] for a, b in arcs)
    for a, b in arcs:
        capacity[a][b] -= flow
        capacity[b][a] += flow


def _reachable(capacity: Network, source: object) -> dict[object, object]:
    """The nodes that residual capacity leads to, each with the node before it."""
    came_from: dict[object, object] = {source: source}
    queue = [source]
    for node in queue:
        for following, free in capacity[node].items():
            if free > EMPTY and following not in came_from:
                came_from[following] = node
                queue.append(following)
    return came_from


def cheapest(structure: Structure, exhaustive: int = 6) -> Structure:
    """The order of the same factors that needs the fewest FLOPs: another structure.

    Nothing reorders in silence: initialisation and rates belong to the order, so a structure is
    run as it is written. Up to `exhaustive` factors every order is tried, beyond that only the
    given one and its reverse.
    """
    _need(structure, "reorder the factors of")
    count = len(structure.factors)
    orders = permutations(range(count)) if count <= exhaustive else [range(count), range(count)[::-1]]
    candidates = (replace(structure, factors=tuple(structure.factors[k] for k in order)) for order in orders)
    return min(candidates, key=flops)
