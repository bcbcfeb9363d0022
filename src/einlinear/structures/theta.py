import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, split
from einlinear.structure import Structure, StructureError

# For 7 and for 10 exponents: the input's axes, the output's axes, the bonds; then every operand with
# its axes in storage order (slices, out, in). Greek letters of the paper are spelled by their initials,
# phi by f. With three factors, bonds are named by the factors they join.
TWO_FACTORS = ("a b g", "d e f", "r", "g b a, g r f d a, f e g r b -> f e d")
THREE_FACTORS = ("a b c", "d e f", "ab ac abc bc", "c b a, ab ac abc d a, abc bc e ab b, f ac abc bc c -> f e d")


@dataclass(frozen=True, repr=False)
class Theta(Family):
    """A point θ of the continuous space of all einsums of two factors (7 exponents) or three (10).

    Seven: (θα, θβ, θγ, θδ, θε, θφ, θρ), docs/mathematics.md section 1. The sizes of α, β, γ are d_in to the
    power of their exponents, those of δ, ε, φ are powers of d_out, and ρ is a power of the smaller
    width; exponents of the input sum to 1, and so do those of the output. Ten: three parts of the
    input and three of the output, one for each factor A, B, C, then the bonds AB, AC, ABC, BC. An
    axis with exponent 0 is left out.
    """

    theta: tuple[float, ...]
    example: ClassVar = {"theta": (0.4, 0.2, 0.4, 0.2, 0.4, 0.4, 0.1)}
    source: ClassVar = (
        "Potapczynski et al. 2024 (Searching for Efficient Linear Layers), https://arxiv.org/abs/2410.02117"
    )

    def __post_init__(self) -> None:
        theta = self.theta
        if not isinstance(theta, Sequence) or len(theta) not in (7, 10):
            raise StructureError(f"cannot make a Theta of {theta!r}: pass a tuple of 7 exponents, or 10 for 3 factors")
        object.__setattr__(self, "theta", tuple(theta))
        if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in theta):
            raise StructureError(f"cannot make a Theta of {theta!r}: every exponent lies between 0 and 1")
        for side, shares in (("input", theta[:3]), ("output", theta[3:6])):
            if abs(sum(shares) - 1) > 1e-2:
                raise StructureError(
                    f"cannot make a Theta of {theta!r}: the exponents of the {side} sum to {sum(shares):.3g}; make it 1"
                )

    def __call__(self, d_in: int, d_out: int) -> Structure:
        ins, outs, bonds, expression = TWO_FACTORS if len(self.theta) == 7 else THREE_FACTORS
        sizes = [*split(d_in, self.theta[:3]), *split(d_out, self.theta[3:6])]
        sizes += [_power(min(d_in, d_out), share) for share in self.theta[6:]]
        axes = f"{ins} {outs} {bonds}".split()
        kept = {a: n for a, n, share in zip(axes, sizes, self.theta, strict=True) if share > 0 or n > 1}
        left, y = expression.split(" -> ")
        operands = [" ".join(axis for axis in operand.split() if axis in kept) for operand in (*left.split(","), y)]
        x, *factors, y = [operand for operand in operands if operand]
        return Structure.parse(f"{', '.join([x, *factors])} -> {y}", **kept).pad(d_in=d_in, d_out=d_out)


def _power(width: int, share: float) -> int:
    """`width ** share`, rounded, for widths of any magnitude."""
    exponent = share * math.log2(width)
    return round(2**exponent) if exponent < 50 else 1 << round(exponent)
