"""Scaling laws from finished runs: of a store, or of anybody's table.

from einlinear.lab.laws import fit_surface, law_card, read_table
card = law_card(read_table("runs.csv"))     # everything, as plain data
fit_surface(parameters, tokens, loss)       # one law
"""

from einlinear.lab.laws.card import law_card as law_card
from einlinear.lab.laws.cells import AXES as AXES
from einlinear.lab.laws.cells import Axis as Axis
from einlinear.lab.laws.cells import Cell as Cell
from einlinear.lab.laws.cells import hull as hull
from einlinear.lab.laws.cells import measured as measured
from einlinear.lab.laws.frontier import Frontier as Frontier
from einlinear.lab.laws.frontier import fit_frontier as fit_frontier
from einlinear.lab.laws.frontier import frontiers as frontiers
from einlinear.lab.laws.interpolated import interpolated_multiplier as interpolated_multiplier
from einlinear.lab.laws.isoflop import envelope as envelope
from einlinear.lab.laws.isoflop import isoflop as isoflop
from einlinear.lab.laws.multiplier import Multiplier as Multiplier
from einlinear.lab.laws.multiplier import compare_cells as compare_cells
from einlinear.lab.laws.multiplier import expected_error as expected_error
from einlinear.lab.laws.multiplier import multiplier as multiplier
from einlinear.lab.laws.multiplier import multiplier_at as multiplier_at
from einlinear.lab.laws.multiplier import times as times
from einlinear.lab.laws.parametric import NoFit as NoFit
from einlinear.lab.laws.parametric import Parametric as Parametric
from einlinear.lab.laws.parametric import bootstrap as bootstrap
from einlinear.lab.laws.parametric import fit_surface as fit_surface
from einlinear.lab.laws.printed import print_card as print_card
from einlinear.lab.laws.reading import from_frame as from_frame
from einlinear.lab.laws.reading import read_table as read_table
from einlinear.lab.laws.rows import from_runs as from_runs
from einlinear.lab.laws.scaled import scaled_surface as scaled_surface
from einlinear.lab.laws.separable import variable_projection as variable_projection
from einlinear.lab.laws.surface import Surface as Surface
from einlinear.lab.laws.table import Table as Table
from einlinear.lab.laws.table import TableError as TableError
