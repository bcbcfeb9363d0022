"""What is wrong with a grid of runs, said before anybody believes a law that was fitted to it."""

from collections.abc import Sequence

import numpy as np

from einlinear.lab.laws.isoflop import WINDOW, Allocation
from einlinear.lab.laws.parametric import Draws, Parametric
from einlinear.lab.laws.sensitivity import Variant
from einlinear.lab.laws.table import Table, size_labels

RATIO = 8.0  # tokens per parameter should vary by so much
DECADES = 1.5  # of compute, below which a floor E is hardly seen
DRIFT = 0.05  # in the exponent of a grid's centre against that of N*
HORIZONS = 3  # rows of one size and seed that look like points of one curve
AGREEMENT = 0.1
OUTLIER = 10.0  # standard deviations above the surface, and at least
HARDLY = 0.1  # of ln L, that no noise explains
SAME = 0.002  # exponents that differ by less are one, however small the noise


def design_warnings(table: Table) -> list[str]:
    """Of the runs themselves, and what their reader has to say."""
    warnings = list(table.warnings)
    ratio = table.tokens / table.parameters
    if len(table) > 3 and ratio.max() / ratio.min() < RATIO:
        warnings.append(
            f"Tokens per parameter vary by {ratio.max() / ratio.min():.2g} times only ({ratio.min():.3g} to "
            f"{ratio.max():.3g}): A and B are hard to tell apart; vary them by {RATIO:g} times or more."
        )
    decades = float(np.log10(table.flops.max() / table.flops.min()))
    if decades < DECADES:
        warnings.append(f"Compute spans {decades:.1f} decades; below {DECADES} a floor E is hardly seen.")
    labels = size_labels(table.parameters)
    seeds = np.zeros(len(table), dtype=np.int64)
    if table.seed is not None:
        seeds = np.unique(table.seed, return_inverse=True)[1]
    most = np.bincount(np.unique(np.stack([labels, seeds]), axis=1, return_inverse=True)[1].ravel()).max()
    if table.trunk is None and most >= HORIZONS:
        warnings.append(
            f"Up to {most} runs share one size{' and seed' if table.seed is not None else ''}, and no column says "
            "which were horizons of one training run: taken as separate runs. Points of one curve are dependent: name "
            "them in a column 'trunk'. The intervals clustered by size show what the difference could be."
        )
    return warnings


def allocation_warnings(allocation: Allocation) -> list[str]:
    """Of IsoFLOP curves: minima on an edge, grids that are too wide or drift off the optimum."""
    warnings = []
    name = f"IsoFLOP, {allocation.method}"
    for budget in allocation.budgets:
        if budget.reason:
            warnings.append(f"{name}: the budget of {budget.flops:.3g} FLOPs is not used: {budget.reason}.")
    used = allocation.used
    reach = [max(b.optimum / b.sizes[0], b.sizes[-1] / b.optimum) for b in used]
    if allocation.method == "parabola" and max(reach) > 2 * WINDOW:
        warnings.append(
            f"{name}: sizes reach {max(reach):.2g} times N*; a parabola over so much is biased (5 % at 16 times), so "
            f"it was read within {WINDOW:g} times of its vertex where five sizes are left there."
        )
    if len(used) >= 3:
        centres = np.log([np.sqrt(b.sizes[0] * b.sizes[-1]) / b.optimum for b in used])
        drift = float(np.polyfit(np.log([b.flops for b in used]), centres, 1)[0])
        if abs(drift) > DRIFT and np.ptp(centres) > np.log(1.5):
            warnings.append(
                f"{name}: the middle of the sizes drifts against N* as C^{drift:+.2f}, which biases the exponent; "
                "choose sizes around this N* and run again."
            )
    if len(used) == 2:
        warnings.append(f"{name}: two budgets make a line, and say nothing of its error.")
    return warnings


def fit_warnings(
    table: Table, fit: Parametric, draws: Draws, outliers: Sequence[Variant], windows: Sequence[Variant]
) -> list[str]:
    """Of a fitted surface: starts that do not agree, exponents without sense, choices that move it."""
    warnings, surface = [], fit.surface
    if fit.agreement < AGREEMENT:
        warnings.append(f"Only {fit.agreement:.0%} of {fit.starts} starts reached the best optimum.")
    for name, axis in (("alpha", "params"), ("beta", "tokens")):
        low, high = draws.interval(name)
        if low <= 0:
            warnings.append(
                f"{name} = {getattr(surface, name):.3g} ({low:.2g} to {high:.2g}): {axis} are not shown to help."
            )
    if fit.inside < 0.5 and fit.delta < 0.05:
        warnings.append(
            f"{fit.inside:.0%} of the residuals lie within delta = {fit.delta:g}: this is nearly a fit of least "
            "absolute deviations, and delta a choice; see the table."
        )
    spread = 1.4826 * float(np.median(np.abs(fit.residuals)))  # a normal law's standard deviation
    far = np.flatnonzero(fit.residuals > max(OUTLIER * spread, HARDLY))
    if len(far):
        worst = far[fit.residuals[far].argmax()]
        expected = table.loss[worst] * np.exp(-fit.residuals[worst])
        warnings.append(
            f"{len(far)} of {len(table)} losses lie far above the surface, the farthest {table.loss[worst]:.4g} at "
            f"{table.parameters[worst]:.3g} params and {table.tokens[worst]:.3g} tokens, where {expected:.4g} is "
            "expected: diverged, or read wrongly? Huber's loss hardly minds them; least squares and IsoFLOP curves do."
        )
    if 0.5 * table.loss.min() > surface.E:
        warnings.append(
            f"E = {surface.E:.3g} lies far below the lowest loss, {table.loss.min():.3g}: it is extrapolated, and no "
            "irreducible loss."
        )
    low, high = draws.interval("a")
    # A window leaves out the runs that tell most, so that it may move further by chance.
    for variants, what, least, room in (
        (outliers, "without the {:g} highest losses", 0.9, 0.0), (windows, "within {:g} times N*", 0.5, high - low),
    ):  # fmt: skip
        seen = [v for v in variants if v.surface is not None and v.runs >= least * len(table)]
        off = max(seen, key=lambda v: abs(v.surface.a - surface.a) if v.surface else 0.0, default=None)
        if off is not None and off.surface is not None and not low - room - SAME <= off.surface.a <= high + room + SAME:
            warnings.append(
                f"a = {surface.a:.3f} becomes {off.surface.a:.3f} {what.format(off.choice)}, outside its interval "
                f"{low:.3f} to {high:.3f}: that choice matters more than chance."
            )
    return warnings
