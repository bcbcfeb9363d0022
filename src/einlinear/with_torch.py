"""The public names that need torch. Modules have other names than these, so that neither hides the other."""

from einlinear.contract import apply as apply
from einlinear.contract import dense as dense
from einlinear.conversion import Report as Report
from einlinear.conversion import convert as convert
from einlinear.curves import candidates as candidates
from einlinear.curves import error_curve as error_curve
from einlinear.kernels import explain as explain
from einlinear.layer import Linear as Linear
from einlinear.mlp import StructuredMLP as StructuredMLP
from einlinear.moments import Moments as Moments
from einlinear.muon import Muon as Muon
from einlinear.muon import orthogonalize as orthogonalize
from einlinear.optim import parameter_groups as parameter_groups
from einlinear.projection import project as project
from einlinear.refinement import refine as refine
from einlinear.skeleton import Skeleton as Skeleton
from einlinear.skeleton import cur as cur
from einlinear.transfer import CheckReport as CheckReport
from einlinear.transfer import check as check
from einlinear.transfer import default_model as default_model
