"""Structured linear layers that turn saved FLOPs into saved seconds.

What needs no tensor is imported at once; the names of `einlinear.with_torch` when first used, so
that describing a structure, and the command line's help, need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from einlinear.clock import seconds as seconds
from einlinear.compression.allocation import Allocation as Allocation
from einlinear.compression.allocation import Curve as Curve
from einlinear.compression.allocation import Point as Point
from einlinear.compression.allocation import allocate as allocate
from einlinear.compression.allocation import read_plan as read_plan
from einlinear.cost import cheapest as cheapest
from einlinear.cost import flops as flops
from einlinear.cost import generic_rank as generic_rank
from einlinear.cost import parameters as parameters
from einlinear.family import Family as Family
from einlinear.family import families as families
from einlinear.family import structure as structure
from einlinear.hf import registration
from einlinear.scaling import Scale as Scale
from einlinear.scaling import residual_scale as residual_scale
from einlinear.scaling import spectral as spectral
from einlinear.space import candidates as candidates
from einlinear.structure import Structure as Structure
from einlinear.structure import StructureError as StructureError
from einlinear.structures import BLAST as BLAST
from einlinear.structures import BTT as BTT
from einlinear.structures import BlockDiagonal as BlockDiagonal
from einlinear.structures import Butterfly as Butterfly
from einlinear.structures import Dense as Dense
from einlinear.structures import Kronecker as Kronecker
from einlinear.structures import LowRank as LowRank
from einlinear.structures import Mixture as Mixture
from einlinear.structures import Monarch as Monarch
from einlinear.structures import TensorTrain as TensorTrain
from einlinear.structures import Theta as Theta
from einlinear.taxonomy import taxonomy as taxonomy

__version__ = "0.1.0"

registration.register()

if TYPE_CHECKING:
    from einlinear.with_torch import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(f"module 'einlinear' has no attribute '{name}'")
        # Not `from einlinear import ...`: that would ask this function for the module first.
        names = vars(import_module("einlinear.with_torch"))
        if name not in names:
            raise AttributeError(f"module 'einlinear' has no attribute '{name}'")
        return names[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *vars(import_module("einlinear.with_torch"))})
