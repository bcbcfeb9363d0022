"""Where a family stands in the space of all einsums: rank, density and sharing as exponents of the width."""

import math
from collections.abc import Callable

from einlinear.cost import flops, generic_rank, parameters
from einlinear.family import Family
from einlinear.structure import Structure, StructureError

WIDTHS = (2**60, 2**120, 2**240)
"""Widths that measure an exponent, each the square of the one before; lower orders vanish at them."""


def taxonomy(family: Family) -> tuple[float, float, float]:
    """(ψ, ν, ω) of a family: rank = Θ(d^ψ), FLOPs = Θ(d^(1+ν)), FLOPs/parameters = Θ(d^ω).

    Exponents are read off the specs at three astronomically large widths d_in = d_out = d; nothing
    is allocated. Source: Searching for Efficient Linear Layers (2024), section 3; small ω and
    large ψ scale best there, and ν can vary with little harm. Logarithms count as exponent 0.

    Raises StructureError for what is no family: a `Structure` has one width, and no exponents.
    """
    if not isinstance(family, Family):
        said = f"el.structure({family!r})" if isinstance(family, str) else "el.BTT(rank=2)"
        kind = f"of type {type(family).__name__}"
        if isinstance(family, Structure):
            kind = "a structure of one width, and exponents take a family of all widths"
        if isinstance(family, type) and issubclass(family, Family):
            kind, said = "a class", f"el.{family.__name__}()"
        raise StructureError(f"cannot place {family!r} in the taxonomy: it is {kind}; pass a family, as {said}")
    structures = [family(width, width) for width in WIDTHS]
    unit = math.log2(WIDTHS[0])

    def exponent(measure: Callable[[Structure], int]) -> float:
        # Of c · d^e · log(d)^k, as d is squared twice, this difference keeps e alone.
        small, medium, large = (math.log2(measure(structure)) for structure in structures)
        return (large - 2 * medium + small) / unit

    # A minimal cut is a product of sizes, without logarithms, so the two cheaper widths suffice.
    small, medium = (math.log2(generic_rank(structure)) for structure in structures[:2])
    work, size = exponent(flops), exponent(parameters)
    psi, nu, omega = (round(value, 2) + 0.0 for value in ((medium - small) / unit, work - 1, work - size))
    return psi, nu, omega
