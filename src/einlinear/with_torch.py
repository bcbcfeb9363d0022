"""The public names that need torch. Modules have other names than these, so that neither hides the other."""

from einlinear.contract import apply as apply
from einlinear.contract import dense as dense
from einlinear.conversion import Report as Report
from einlinear.conversion import convert as convert
from einlinear.kernels import explain as explain
from einlinear.layer import Linear as Linear
from einlinear.projection import project as project
from einlinear.projection import refine as refine
