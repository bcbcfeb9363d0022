from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, block_size
from einlinear.structure import Structure


@dataclass(frozen=True, repr=False)
class BlockDiagonal(Family):
    """`blocks` independent dense maps side by side, also known as a grouped linear layer."""

    blocks: int
    example: ClassVar = {"blocks": 4}
    source: ClassVar = "Krizhevsky et al. 2012, NeurIPS (grouped layers)"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        i, o = block_size(d_in, self.blocks), block_size(d_out, self.blocks)
        full = Structure.parse("g i, g o i -> g o", g=self.blocks, i=i, o=o)
        return full.pad(d_in=d_in, d_out=d_out)
