from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, block_size
from einlinear.structure import Structure


@dataclass(frozen=True, repr=False)
class BLAST(Family):
    """A grid of blocks that share row and column bases and differ in `rank` weights each.

    Block (i, j) is U_i diag(s_ij) V_jᵀ: U is shared along a block row and V along a block column.
    """

    blocks: int
    rank: int
    example: ClassVar = {"blocks": 4, "rank": 6}
    source: ClassVar = "Lee et al. 2024, https://arxiv.org/abs/2410.21262"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        b = self.blocks
        n, m = block_size(d_in, b), block_size(d_out, b)
        full = Structure.parse("j n, j r n, r i j, i m r -> i m", i=b, j=b, n=n, m=m, r=self.rank)
        return full.pad(d_in=d_in, d_out=d_out)
