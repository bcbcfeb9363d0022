"""What one run is worth: the compute that dense would take for its loss, by dense's own law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from einlinear.lab.laws.cells import Axis, Measured, cells_of, frontier_cells, log_costs
from einlinear.lab.laws.frontier import sample_of
from einlinear.lab.laws.power import fit_law

NOISE = 0.006
"""Standard deviation of ln loss of runs of one seed, which see the same data in the same order.

The scatter of dense about its law is several times as large, being mostly the law's misfit, the same for all
candidates: searches replayed with it (benchmarks/search.py) did worse than chance. A round number of the order of what
seeds 0 and 1 of benchmarks/results/search_runs_short.csv differ by once their common shift is taken off.
"""

CLOCK = 0.1  # standard deviation of ln seconds, of runs beside each other on one machine
FAILED = -3.0  # ln multiplier of a run that diverged


@dataclass(frozen=True)
class Worth:
    """ln of dense's cost at a run's loss over the run's own cost, and its variance."""

    value: float
    variance: float


class Reference:
    """Dense's law along its frontier, L = (C/C0)^-c, by which other runs are judged.

    Without a floor E: exploration has to rank, and where a fit has a floor every loss near it is worth infinitely
    much. Multipliers to report are fitted to both families, see `einlinear.lab.laws.multiplier`.

    Raises:
        ValueError: where dense's runs hold no law.
    """

    def __init__(self, runs: Sequence[Measured], axis: Axis = "flops") -> None:
        groups = cells_of(runs, axis)
        if len(groups) != 1:
            raise ValueError(
                f"Judging candidates: finished runs of one family are needed, not of {sorted(groups) or 'none'}; where "
                "dense diverged, pass smaller rates."
            )
        ((family, cells),) = groups.items()
        kept = frontier_cells(cells)
        self.axis, self._centre = axis, float(log_costs(kept).mean())
        if len(kept) < 3:
            raise ValueError(
                f"Judging candidates by {family}: {len(kept)} sizes on its lower hull hold no law; train it at more "
                "widths and horizons."
            )
        fit = fit_law(sample_of([kept], self._centre), offset=False)
        _, self._scale, self.exponent = map(float, fit.parameters)
        if self.exponent <= 0:
            raise ValueError(
                f"Judging candidates by {family}: its loss does not fall with cost; train it at more widths and for "
                "longer."
            )

    def log_cost(self, loss: float) -> float:
        """ln of dense's cost at a loss, in units of the axis."""
        return self._centre + (self._scale - math.log(loss)) / self.exponent

    def worth(self, run: Measured) -> Worth:
        """What a run is worth; where it diverged a poor value that is not certain."""
        if run.loss is None or not math.isfinite(run.loss):
            return Worth(FAILED, 1.0)
        clock = CLOCK if self.axis == "seconds" else 0.0
        value = self.log_cost(run.loss) - math.log(getattr(run, self.axis))
        return Worth(value, (NOISE / self.exponent) ** 2 + clock**2)
