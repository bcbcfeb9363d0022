import math
from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, check_width
from einlinear.structure import Structure

ALIGNED = 8
"""Numbers of 16 bits in 16 bytes."""


@dataclass(frozen=True, repr=False)
class LowRank(Family):
    """W = B A through a bottleneck of `rank` features; by default the root of the smaller width.

    From a root of 8 on, the default is a multiple of 8, the next one above the root: rows of a bottleneck of
    45 features begin at odd addresses, and take a GPU four times as long as those of 48 (benchmarks/NOTES.md).
    """

    rank: int | None = None
    example: ClassVar = {"rank": 8}
    source: ClassVar = "Sainath et al. 2013, ICASSP, doi:10.1109/ICASSP.2013.6638949"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        for width in (d_in, d_out):
            check_width(width)
        root = math.isqrt(min(d_in, d_out))
        rank = self.rank or (root if root < ALIGNED else -(-root // ALIGNED) * ALIGNED)
        return Structure.parse("i, r i, o r -> o", i=d_in, r=rank, o=d_out)
