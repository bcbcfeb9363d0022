"""Where a family stands in the space of all einsums: rank, density and sharing as exponents of the width."""

import math
from collections.abc import Callable

from einlinear.cost import flops, generic_rank, parameters
from einlinear.family import Family
from einlinear.structure import Structure

WIDTHS = (2**60, 2**120)
"""Widths that measure an exponent: constants cancel between them and lower orders vanish."""


def taxonomy(family: Family) -> tuple[float, float, float]:
    """(ψ, ν, ω) of a family: rank = Θ(d^ψ), FLOPs = Θ(d^(1+ν)), FLOPs/parameters = Θ(d^ω).

    Exponents are read off the specs at two astronomically large widths d_in = d_out = d; nothing
    is allocated. Source: Searching for Efficient Linear Layers (2024), section 3; small ω and
    large ψ scale best there, and ν can vary with little harm. Logarithms count as exponent 0.
    """
    small, large = (family(width, width) for width in WIDTHS)

    def exponent(measure: Callable[[Structure], int]) -> float:
        return (math.log2(measure(large)) - math.log2(measure(small))) / math.log2(WIDTHS[1] // WIDTHS[0])

    work, size, rank = exponent(flops), exponent(parameters), exponent(generic_rank)
    psi, nu, omega = (round(value, 2) + 0.0 for value in (rank, work - 1, work - size))
    return psi, nu, omega
