from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, equal_split
from einlinear.structure import Structure


@dataclass(frozen=True, repr=False)
class TensorTrain(Family):
    """A chain of `cores` small maps, each acting on its own part of the width, joined by `rank` channels."""

    rank: int = 1
    cores: int = 2
    example: ClassVar = {"rank": 3, "cores": 3}
    source: ClassVar = "Novikov et al. 2015, https://arxiv.org/abs/1509.06569"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        return _chain(d_in, d_out, self.cores, self.rank)


@dataclass(frozen=True, repr=False)
class Kronecker(Family):
    """W = A ⊗ B (⊗ C ...): a tensor train without channels between its `cores`."""

    cores: int = 2
    source: ClassVar = "Van Loan and Pitsianis 1993, doi:10.1007/978-94-015-8196-7_17"

    def __call__(self, d_in: int, d_out: int) -> Structure:
        return _chain(d_in, d_out, self.cores, rank=None)


def _chain(d_in: int, d_out: int, cores: int, rank: int | None) -> Structure:
    sizes: dict[str, int] = {}
    for k, (i, o) in enumerate(zip(equal_split(d_in, cores), equal_split(d_out, cores), strict=True)):
        sizes |= {f"i{k}": i, f"o{k}": o}
    if rank is not None:
        sizes |= {f"r{k}": rank for k in range(1, cores)}
    x, y = ([f"{side}{k}" for k in range(cores)] for side in "io")
    # Core k takes (r_k, i_k) to (o_k, r_k+1); the ends have no bond, a Kronecker product none at all.
    # In this order the axes a core makes stand in the state where those it sums over stood.
    factors = [[axis for axis in (f"o{k}", f"r{k + 1}", f"r{k}", f"i{k}") if axis in sizes] for k in range(cores)]
    expression = ", ".join(" ".join(axes) for axes in [x, *factors])
    return Structure.parse(f"{expression} -> {' '.join(y)}", **sizes).pad(d_in=d_in, d_out=d_out)
