from dataclasses import dataclass
from typing import ClassVar

from einlinear.family import Family, structure
from einlinear.structure import Structure, StructureError


@dataclass(frozen=True, repr=False)
class Mixture(Family, listed=False):
    """`experts` maps of the family `of`, of which each token passes through the `active` that a router chooses.

    Not among `families()`: it is no map until a gate says which experts run.
    """

    of: str
    experts: int
    active: int
    example: ClassVar = {"of": "btt", "experts": 4, "active": 2}
    source: ClassVar = (
        "Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; of BTT: Potapczynski et al. 2024, "
        "https://arxiv.org/abs/2410.02117, section 5"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_experts(self.of)
        if self.active > self.experts:
            raise StructureError(
                f"cannot make a mixture of {self.experts} experts of which {self.active} are active: "
                f"choose active between 1 and {self.experts}"
            )

    def __call__(self, d_in: int, d_out: int) -> Structure:
        return structure(self.of)(d_in, d_out).mixture(self.experts, active=self.active)


def refuse_experts(of: str) -> None:
    """Refuses to make experts of a family that has experts itself."""
    if hasattr(structure(of), "experts"):
        raise StructureError(
            f"cannot make a mixture of '{of}': that has experts already; name what one expert is, such as 'btt'"
        )
