"""The public names that need torch. Modules have other names than these, so that neither hides the other."""

from einlinear.contract import apply as apply
from einlinear.contract import dense as dense
from einlinear.kernels import explain as explain
from einlinear.layer import Linear as Linear
from einlinear.projection import project as project
from einlinear.projection import refine as refine
