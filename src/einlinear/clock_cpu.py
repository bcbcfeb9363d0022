"""What each way to run a layer takes on one CPU core, in seconds: a sum of terms, each so much for everything counted.

The factors were read off measured cases by non-negative least squares (`benchmarks/cpu_ways.py --fit`);
benchmarks/NOTES.md says how well they foretell other widths, and tests/test_clock.py holds them to it.
"""

import math

from einlinear.structure import Structure

TERMS = ("step", "block", "entry", "weight", "few", "flop", "narrow", "number", "wide", "apart")
"""What is counted of a chain of matmuls on so many tokens:

* step: matmuls; each starts an operator or more;
* block: blocks of tokens, of the ways that cut them so;
* entry: small matmuls in batches;
* weight: weights, which are read whatever the number of tokens;
* few: weights times tokens, up to four: beyond, they are packed first and then used again;
* flop: FLOPs;
* narrow: of blocks, beyond a few tokens, FLOPs over the root of a block's area;
* number: numbers in each matmul's input and result;
* wide: numbers between two matmuls, where there are more than at either end;
* apart: FLOPs of blocks, beyond a few tokens: their rows do not lie together.
"""

Cost = tuple[float, ...]

COSTS: dict[tuple[str, int, bool], Cost] = {
    ("dense", 4, False): (0, 0, 0, 5.76e-11, 4.51e-11, 1.15e-11, 0, 0, 0, 0),
    ("rows", 4, False): (1e-05, 0, 2.17e-07, 2.18e-10, 0, 9.79e-12, 3.45e-10, 6.04e-10, 1.16e-09, 1.11e-12),
    ("columns", 4, False): (8.95e-06, 0, 2.91e-07, 1.15e-10, 2.02e-11, 1.38e-11, 2.34e-10, 5.26e-12, 6.11e-10, 0),
    ("blocked", 4, False): (9.79e-06, 7.06e-05, 1.75e-07, 3.17e-10, 0, 1.16e-11, 2.07e-10, 1.67e-10, 1.5e-10, 1.2e-12),
    ("turned", 4, False): (3.06e-05, 5.46e-05, 0, 1.08e-09, 0, 0, 5.98e-10, 0, 0, 1.24e-11),
    ("native", 4, False): (8e-06, 0, 0, 1.0e-10, 0, 1.2e-11, 0, 0, 0, 0),
    ("dense", 4, True): (0, 0, 0, 4.07e-10, 2.15e-10, 3.27e-11, 0, 1.08e-09, 0, 0),
    ("rows", 4, True): (9.58e-05, 0, 2.03e-07, 1.1e-09, 5.12e-11, 2.93e-11, 1.57e-09, 2.01e-09, 2.03e-09, 0),
    ("columns", 4, True): (5.08e-05, 0, 1e-06, 1.37e-09, 3.45e-11, 3.2e-11, 3.48e-10, 1.41e-09, 5.61e-10, 9.37e-13),
    ("blocked", 4, True): (0.000137, 0.000471, 1.02e-06, 1.72e-09, 1.81e-10, 2.89e-11, 0, 1.93e-09, 0, 9.39e-12),
    ("turned", 4, True): (7.52e-05, 0.000623, 2.8e-06, 4.33e-09, 0, 0, 2.63e-09, 0, 0, 3.5e-11),
    ("native", 4, True): (4e-05, 0, 0, 5e-10, 0, 4.5e-11, 0, 0, 0, 0),
    ("dense", 2, False): (2.65e-05, 0, 0, 1.23e-10, 0, 4.71e-12, 0, 3.29e-10, 0, 0),
    ("rows", 2, False): (4.34e-05, 0, 8.4e-08, 5.86e-11, 2.54e-11, 2.38e-12, 1.94e-10, 3.8e-10, 9.24e-10, 1.84e-12),
    ("columns", 2, False): (4.18e-05, 0, 1.5e-07, 1.34e-10, 1.04e-12, 6.09e-12, 1.06e-09, 7.26e-12, 1.78e-09, 7.07e-13),
    ("blocked", 2, False): (4.98e-05, 0.000117, 1.12e-07, 1.36e-10, 1.02e-11, 6.93e-12, 7.01e-10, 0, 0, 0),
    ("turned", 2, False): (5.33e-05, 0.000123, 9.25e-08, 1.04e-10, 2.35e-11, 4.39e-12, 2.76e-10, 2.03e-10, 0, 1.11e-12),
    ("native", 2, False): (8e-06, 0, 0, 1.0e-10, 0, 1.2e-11, 0, 0, 0, 0),
    ("dense", 2, True): (0.00016, 0, 0, 6.73e-10, 0, 1.37e-11, 0, 1.53e-09, 0, 0),
    ("rows", 2, True): (0.000252, 0, 0, 6.42e-10, 0, 1.27e-11, 1.24e-09, 9.68e-10, 1.58e-09, 1.1e-12),
    ("columns", 2, True): (0.000215, 0, 2.93e-07, 6.18e-10, 0, 1.23e-11, 1.2e-09, 8.64e-10, 1.59e-09, 4.3e-12),
    ("blocked", 2, True): (0.000338, 0.000725, 0, 5.82e-10, 2.79e-11, 2.02e-11, 1.86e-09, 7.22e-10, 0, 4.54e-12),
    ("turned", 2, True): (0.000411, 0.000549, 0, 7.81e-10, 5.28e-11, 5.7e-12, 1.03e-09, 1.39e-09, 0, 1.26e-11),
    ("native", 2, True): (4e-05, 0, 0, 5e-10, 0, 4.5e-11, 0, 0, 0, 0),
}
"""Seconds for one of each of `TERMS`, by way, bytes of a number, and whether gradients are taken too."""

MEASURED = ("dense", "rows", "columns", "blocked", "turned", "native")
"""Ways with factors of their own."""

AGAIN = 1.15
"""By how much an operator of our own is slower than torch's matmuls on a CPU; for few tokens it is more."""


def seconds(way: str, structure: Structure, tokens: int, size: int, training: bool) -> float:
    """The modelled time of a canonical structure run by `way`, one of those measured, on numbers of `size` bytes."""
    return sum(
        cost * count for cost, count in zip(COSTS[way, size, training], terms(way, structure, tokens), strict=True)
    )


def terms(way: str, structure: Structure, tokens: int) -> Cost:
    """How many of each of `TERMS` there are."""
    found = dict.fromkeys(TERMS, 0.0)
    ends, last = max(structure.size(structure.x), structure.size(structure.y)), structure.steps[-1]
    if way in ("blocked", "turned"):
        found["block"] = math.ceil(tokens / block(structure))
    for step, (slices, made, summed) in zip(structure.steps, structure.matrix_shapes, strict=True):
        passive, result = structure.size(step.passive), structure.size(step.result)
        weights, repeated = slices * made * summed, way == "columns" and passive > 1
        work = 2.0 * weights * passive * tokens
        found["step"] += 1
        found["entry"] += tokens if repeated else slices if slices > 1 else 0
        found["weight"] += weights
        found["few"] += weights * min(passive * tokens, 4)
        found["flop"] += work
        if tokens > 16 and slices > 1:
            found["narrow"] += work / math.sqrt(made * summed)
            found["apart"] += work
        found["number"] += tokens * (structure.size(step.state) + result)
        found["wide"] += tokens * result if step is not last and result > ends else 0
    return tuple(found.values())


def block(structure: Structure) -> int:
    """Tokens of a block: states then mostly stay in a core's cache (benchmarks/NOTES.md)."""
    return 256 if max(structure.size(step.state) for step in structure.steps) <= 1024 else 128
