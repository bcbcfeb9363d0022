from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family
from einlinear.structure import Structure


@dataclass(frozen=True, repr=False)
class Dense(Family):
    """No structure at all: the baseline that every other family is measured against."""

    source: ClassVar = "Rosenblatt 1958, Psychological Review 65(6)"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        return Structure.parse("i, o i -> o", i=d_in, o=d_out)
