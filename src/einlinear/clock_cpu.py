"""What each way to run a layer takes on one CPU core, in seconds: a sum of terms, each so much for everything counted.

The factors were read off measured cases by non-negative least squares (`benchmarks/cpu_ways.py --fit`), on two
processors; benchmarks/NOTES.md says how well they foretell other widths, and tests/test_clock.py holds them to it.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

from einlinear.structure import Structure
from einlinear.toolchain import processor

TERMS = (
    "call",
    "step",
    "block",
    "entry",
    "weight",
    "few",
    "flop",
    "narrow",
    "number",
    "wide",
    "apart",
    "packed",
    "far",
    "fresh",
)
"""What is counted of a chain of matmuls on so many tokens:

* call: one;
* step: matmuls; each starts an operator or more;
* block: blocks of tokens, of the ways that cut them so;
* entry: small matmuls in batches;
* weight: weights, which are read whatever the number of tokens;
* few: weights times tokens, up to four: beyond, they are packed first and then used again;
* flop: FLOPs;
* narrow: of blocks, beyond a few tokens, FLOPs over the root of a block's area;
* number: numbers in each matmul's input and result;
* wide: numbers between two matmuls, where there are more than at either end;
* apart: FLOPs of blocks, beyond a few tokens: their rows do not lie together;
* packed: weights, beyond a few tokens, which are brought into another order first;
* far: weights beyond 2^18 of them, which no longer stay in the second-level cache;
* fresh: bytes of results so large that the system may be asked for them in every call.
"""

Cost = tuple[float, ...]

COSTS = Path(__file__).with_name("clock_cpu.json")
"""Seconds for one of each of `TERMS`, by processor and then by way, bytes of a number and mode."""

MEASURED = ("dense", "rows", "columns", "blocked", "turned", "native")
"""Ways with factors of their own."""

FEW, FAR = 5, 2**18
"""Tokens up to which weights are used as they lie; weights that the second-level cache holds."""

PIECE = 2**21
"""Bytes from which on memory may come from the system: what is larger than the second-level cache."""

AGAIN = 1.15
"""By how much an operator of our own is slower than torch's matmuls on a CPU; for few tokens it is more."""


@lru_cache
def kind() -> str:
    """Which of the processors that were measured this one is like."""
    return "amx" if "amx_bf16" in processor() else "avx512"


@lru_cache
def costs() -> dict[str, dict[str, Cost]]:
    """What `COSTS` holds."""
    found: dict[str, dict[str, Cost]] = json.loads(COSTS.read_text())
    return found


def seconds(way: str, structure: Structure, tokens: int, size: int, training: bool) -> float:
    """The modelled time of a canonical structure run by `way`, one of those measured, on numbers of `size` bytes."""
    mode = "training" if training else "forward"
    each = costs()[kind()][f"{way} {size} {mode}"]
    return sum(cost * count for cost, count in zip(each, terms(way, structure, tokens, size), strict=True))


def terms(way: str, structure: Structure, tokens: int, size: int) -> Cost:
    """How many of each of `TERMS` there are, for numbers of `size` bytes."""
    found = dict.fromkeys(TERMS, 0.0)
    found["call"] = 1
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
        found["packed"] += weights if tokens > FEW else 0
        if tokens > 16 and slices > 1:
            found["narrow"] += work / math.sqrt(made * summed)
            found["apart"] += work
        found["number"] += tokens * (structure.size(step.state) + result)
        found["wide"] += tokens * result if step is not last and result > ends else 0
    found["far"] = max(0.0, found["weight"] - FAR)
    found["fresh"] = fresh(way, structure, tokens * size)
    return tuple(found.values())


def fresh(way: str, structure: Structure, bytes_of_one: int) -> int:
    """Bytes of results so large that the system may be asked for them."""
    kept = way in ("blocked", "turned", "native")  # their states are small, or in memory of their own
    made = structure.steps[-1:] if kept else structure.steps
    pieces = [bytes_of_one * structure.size(step.result) for step in made]
    return sum(piece for piece in pieces if piece >= PIECE)


def block(structure: Structure) -> int:
    """Tokens of a block: states then mostly stay in a core's cache (benchmarks/NOTES.md)."""
    return 256 if max(structure.size(step.state) for step in structure.steps) <= 1024 else 128
