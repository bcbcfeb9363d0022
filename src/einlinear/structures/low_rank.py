import math
from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family
from einlinear.structure import Structure


@dataclass(frozen=True, repr=False)
class LowRank(Family):
    """W = B A through a bottleneck of `rank` features; by default the root of the smaller width."""

    rank: int | None = None
    example: ClassVar = {"rank": 8}
    source: ClassVar = "Sainath et al. 2013, ICASSP, doi:10.1109/ICASSP.2013.6638949"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        rank = self.rank or math.isqrt(max(1, min(d_in, d_out)))
        return Structure.parse("i, r i, o r -> o", i=d_in, r=rank, o=d_out)
