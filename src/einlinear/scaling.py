"""How each factor is drawn and trained, so that one learning rate serves every structure and width.

One rule stands behind everything here (the spectral condition of Yang, Simon and Bernstein 2023,
https://arxiv.org/abs/2310.17813): with RMS-to-RMS norm sqrt(d_in/d_out)·σ_max, a factor and each of
its updates have norm Θ(1). For factors of an einsum the widths are those of the factor's own
batched matmul: Compute Better Spent 2024, https://arxiv.org/abs/2406.06248, section 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from einlinear.structure import Axes, Structure


@dataclass(frozen=True)
class Scale:
    """How one factor is drawn and trained.

    `fan_in` and `fan_out` are the widths of each of its `slices` matrices, applied to `shared`
    parts of a token alike. `std` is the standard deviation of its entries at initialisation, and
    `lr` multiplies the learning rate that a dense layer of the same `d_in` and `d_out` would use.
    """

    fan_in: int
    fan_out: int
    slices: int
    shared: int
    std: float
    lr: float


@dataclass(frozen=True)
class Rule:
    """A learning rate as a function of a matrix's fans, up to a constant.

    `of_matrix(fan_in, fan_out, slices)` makes the update of a stack of matrices a map of norm
    Θ(1); the rate of a factor is this, over that of the dense layer it replaces, over the number
    of factors. `of_vector(width_mult)` is the multiplier of a vector, an embedding or a readout
    whose width is `width_mult` times the tuned one, in the form of microsoft/mup (Tensor Programs
    V, table 8).
    """

    of_matrix: Callable[[float, float, int], float]
    of_vector: Callable[[float], float]


# SGD's gradient is spread over all slices, so its update needs their number; published code omits it
# and its updates then shrink with width.
RULES = {
    "adamw": Rule(lambda fan_in, fan_out, slices: 1 / fan_in, lambda width_mult: 1.0),
    "sgd": Rule(lambda fan_in, fan_out, slices: slices * fan_out / fan_in, lambda width_mult: width_mult),
    "muon": Rule(lambda fan_in, fan_out, slices: math.sqrt(fan_out / fan_in), lambda width_mult: 1.0),
}
"""The optimizers with a rule. "adamw" stands for every optimizer whose raw update has entries Θ(1)."""


def rule(optimizer: str) -> Rule:
    """The rule of an optimizer, by name."""
    if optimizer not in RULES:
        raise ValueError(
            f"cannot scale learning rates for the optimizer '{optimizer}': known are {', '.join(RULES)}; "
            f"use 'adamw' for any optimizer whose update entries do not depend on the gradient's scale"
        )
    return RULES[optimizer]


def spectral(structure: Structure, optimizer: str = "adamw") -> tuple[Scale, ...]:
    """Initialisation and learning rate of each factor. docs/mathematics.md section 2.

    Raises:
        ValueError: for an optimizer without a rule.
    """
    rate = rule(optimizer).of_matrix
    scales: list[Scale] = []
    for step in structure.steps:
        fan_in, fan_out = _fan(structure, step.summed), _fan(structure, step.new)
        slices, shared = _fan(structure, step.batch), _fan(structure, step.passive)
        std = math.sqrt(min(fan_in, fan_out)) / fan_in
        lr = rate(fan_in, fan_out, slices) / rate(structure.d_in, structure.d_out, 1) / len(structure.factors)
        scales.append(Scale(fan_in, fan_out, slices, shared, std, lr))
    return tuple(scales)


def residual_scale(depth_mult: float, alpha: float = 1.0) -> float:
    """The factor of every residual branch in a model `depth_mult` times as deep as the tuned one.

    Source: CompleteP (2025), https://arxiv.org/abs/2505.01618: α = 1 is advised; α = 1/2 is
    Depth-μP (Tensor Programs VI).
    """
    if depth_mult <= 0:
        raise ValueError(f"cannot scale residual branches for depth_mult={depth_mult}: pass a positive number")
    return float(depth_mult**-alpha)


def _fan(structure: Structure, axes: Axes) -> int:
    """The size of `axes` for one expert: a routed axis is neither fan nor slice."""
    return structure.size(axis for axis in axes if axis != structure.routed)
