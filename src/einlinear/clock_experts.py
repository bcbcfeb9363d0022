"""What a routed layer takes on one CPU core, as the FLOPs of a large matmul that takes as long: a sum of terms.

The factors were read off measured cases by non-negative least squares (`benchmarks/cpu_experts.py --fit`);
benchmarks/NOTES.md says how well they choose at other widths, and tests/test_clock.py holds them to it.
"""

from einlinear.cost import flops, parameters
from einlinear.structure import Structure

TERMS = ("call", "step", "expert", "weight", "flop", "state", "end", "gate")
"""What is counted:

* call: one;
* step: the factors;
* expert: matmuls of single experts, of those that any token chose;
* weight: their weights, which are read whatever the number of tokens;
* flop: FLOPs;
* state: numbers between two factors;
* end: numbers of each input and output;
* gate: weights of all experts, most of them zero.
"""

COSTS = {
    "all experts": (4.04e6, 3.48e6, 0.0, 83.6, 1.07, 291.0, 0.0, 306.0),
    "expert-sorted": (7.12e6, 1.0e7, 1.92e6, 71.4, 1.0, 228.0, 91.8, 0.0),
}
"""FLOPs for one of each of `TERMS`, by way."""


def cost(way: str, structure: Structure, tokens: int) -> float:
    """The modelled time of a routed structure run by `way`."""
    return sum(each * count for each, count in zip(COSTS[way], terms(way, structure, tokens), strict=True))


def terms(way: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """How many of each of `TERMS` there are, where tokens choose evenly."""
    expert, experts, active = structure.expert, structure.sizes[structure.routed or ""], structure.active
    everyone = way == "all experts"
    chosen = experts * (1.0 if everyone else 1 - (1 - active / experts) ** tokens)
    rows = tokens * (experts if everyone else active)
    steps = len(expert.steps)
    return (
        1,
        steps,
        0 if everyone else chosen * steps,
        chosen * parameters(expert),
        rows * flops(expert),
        rows * sum(expert.size(step.result) for step in expert.steps[:-1]),
        (tokens if everyone else rows) * (expert.size(expert.x) + expert.size(expert.y)),
        tokens * experts if everyone else 0,
    )
