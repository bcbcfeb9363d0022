"""What a study found, in one object for the terminal, the report and the files: `summary(runs)`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from einlinear.lab.laws import AXES, Axis, Frontier, Multiplier, frontiers, measured, multiplier
from einlinear.lab.run import Run

FAR = 1.5  # an extrapolation beyond the measured costs worth a note


@dataclass(frozen=True, kw_only=True)
class FamilySummary:
    """One family's part. Ranges are (smallest, largest) over its finished measurement runs."""

    family: str
    runs: int  # finished measurement runs
    failed: tuple[Run, ...]  # measurement runs that diverged or ran out of memory
    tuning: tuple[Run, ...]
    rates: tuple[float, ...]  # base rates of the measurement runs
    tuned: str  # how the base rate was found, in words
    rate_at_edge: bool  # the best rate tried was the smallest or largest one: better may lie outside
    best_loss: float  # nats
    widths: tuple[int, int]
    parameters: tuple[float, float]
    flops: tuple[float, float]
    seconds: tuple[float, float]
    linear_share: tuple[float, float]  # of the training FLOPs, spent in the replaceable linear layers
    frontiers: dict[Axis, Frontier]
    multipliers: dict[Axis, Multiplier]  # empty for the baseline


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study: its families in the order of first appearance, the baseline first."""

    baseline: str
    families: tuple[FamilySummary, ...]
    runs: tuple[Run, ...] = field(repr=False)
    excluded: tuple[tuple[Run, str], ...]  # measurement runs that no law uses, and why
    notes: tuple[str, ...]  # what a careful reader should know before believing the numbers

    def multipliers(self, axis: Axis) -> list[Multiplier]:
        """Those that exist, best first."""
        found = [family.multipliers[axis] for family in self.families if axis in family.multipliers]
        return sorted((m for m in found if not m.reason), key=lambda m: -m.value)


def summary(runs: Sequence[Run], baseline: str = "dense", *, allow_mixed_data: bool = False) -> Summary:
    """Fit everything there is to fit. Raises ValueError where runs do not compare, see `laws.measured`.

    Runs by which a search explored are left out: see `einlinear.lab.search.looked`.
    """
    runs = [run for run in runs if run.purpose != "search"]
    finished = measured(runs, allow_mixed_data=allow_mixed_data)
    used = {run.key for run in finished}
    excluded = tuple(
        (run, f"{run.status}: {run.reason}" if run.reason else run.status if run.status != "done" else "no loss")
        for run in runs
        if run.purpose == "measure" and run.key not in used
    )
    laws = {axis: frontiers(finished, axis, allow_mixed_data=allow_mixed_data) for axis in AXES}
    names = sorted(dict.fromkeys(run.family for run in runs), key=lambda name: name != baseline)
    families = []
    for name in names:
        own = [run for run in finished if run.family == name]
        compared = name != baseline and baseline in names
        tuning = tuple(run for run in runs if run.family == name and run.purpose == "tune")
        tuned, at_edge = _tuned(tuning)
        families.append(
            FamilySummary(
                family=name,
                runs=len(own),
                failed=tuple(run for run, _ in excluded if run.family == name),
                tuning=tuning,
                rates=tuple(sorted({run.rate for run in own})),
                tuned=tuned,
                rate_at_edge=at_edge,
                best_loss=min((run.loss for run in own if run.loss is not None), default=math.nan),
                widths=(min((run.width for run in own), default=0), max((run.width for run in own), default=0)),
                parameters=_range([run.parameters for run in own]),
                flops=_range([run.flops for run in own]),
                seconds=_range([run.seconds for run in own]),
                linear_share=_range([run.linear_flops / run.flops for run in own if run.flops]),
                frontiers={axis: laws[axis][name] for axis in AXES if name in laws[axis]},
                multipliers={
                    axis: multiplier(runs, name, baseline, axis, allow_mixed_data=allow_mixed_data)
                    for axis in AXES
                    if compared
                },
            )
        )
    return Summary(
        baseline=baseline,
        families=tuple(families),
        runs=tuple(runs),
        excluded=excluded,
        notes=tuple(_notes(families, finished, baseline)),
    )


def answer(summary: Summary) -> str:
    """Which structure spends compute best, in words and numbers; undecided where an interval holds 1."""
    return " ".join(sentences(summary))


def sentences(summary: Summary) -> list[str]:
    """The answer as one to three sentences, the most important first."""
    by_flops, by_seconds = summary.multipliers("flops"), summary.multipliers("seconds")
    baseline = summary.baseline
    if not any(family.runs for family in summary.families):
        return ["No measurement run has finished yet, so there is nothing to compare."]
    if not by_flops:
        return [f"The runs so far do not allow a comparison with {baseline}: {_why_not(summary)}"]
    said = []
    better = [m for m in by_flops if m.verdict == "better"]
    if better:
        first, *others = better
        said.append(
            f"At equal loss, {baseline} needs {first.value:.2f} times the training compute of {first.family} "
            f"(95 % interval {first.low:.2f} to {first.high:.2f})"
            + "".join(f", and {m.value:.2f} times that of {m.family} ({m.low:.2f} to {m.high:.2f})" for m in others)
            + "."
        )
    else:
        said.append(f"No structure tried is shown to spend training compute better than {baseline}.")
    if rest := [m for m in by_flops if m.verdict != "better"]:
        said.append(f"By training compute, {_by_verdict(rest, baseline)}.")
    if by_seconds:
        device = "; ".join(sorted({run.device for run in summary.runs if run.device}))
        said.append(f"By measured seconds{f' ({device})' if device else ''}, {_by_verdict(by_seconds, baseline)}.")
    return said


def _by_verdict(multipliers: Sequence[Multiplier], baseline: str) -> str:
    groups = {"better": f"better than {baseline}", "undecided": "undecided", "worse": f"worse than {baseline}"}
    return "; ".join(
        f"{words}: " + ", ".join(f"{m.family} {m}" for m in multipliers if m.verdict == verdict)
        for verdict, words in groups.items()
        if any(m.verdict == verdict for m in multipliers)
    )


def _why_not(summary: Summary) -> str:
    reasons = [m.reason for family in summary.families for m in family.multipliers.values() if m.axis == "flops"]
    if reasons:
        return "; ".join(dict.fromkeys(reasons)) + "."
    if any(family.family == summary.baseline for family in summary.families):
        return f"only {summary.baseline} was run; add another structure."
    return f"{summary.baseline} was not run; add it."


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values, default=math.nan), max(values, default=math.nan)


def _tuned(tuning: Sequence[Run]) -> tuple[str, bool]:
    """How the base rate was found, and whether the best one lies at an edge of the rates tried."""
    finished = [run for run in tuning if run.status == "done" and run.loss is not None]
    rates = {run.rate for run in tuning}
    if not finished:
        return "not tuned: the rate was given" if not tuning else "no tuning run finished", False
    sizes = {(run.width, run.tokens) for run in finished}
    best = [min((r for r in finished if (r.width, r.tokens) == size), key=lambda r: r.loss or 0.0) for size in sizes]
    edges = [run.rate for run in best if run.rate in (min(rates), max(rates))]
    return f"best of {len(rates)} in {len(tuning)} runs", bool(edges)


def _notes(families: Sequence[FamilySummary], finished: Sequence[Run], baseline: str) -> list[str]:
    notes = []
    if not any(family.family == baseline and family.runs for family in families):
        notes.append(f"There is no finished run of the baseline {baseline}, hence no multiplier.")
    if len(devices := sorted({run.device for run in finished})) > 1:
        notes.append(f"Runs come from different devices ({', '.join(devices)}): their seconds do not compare.")
    if finished and len({run.seed for run in finished}) == 1:
        notes.append("One seed per size: the noise is judged from the scatter around the law alone.")
    for family in families:
        if family.rate_at_edge:
            notes.append(f"{family.family}: the best base rate is the smallest or largest one tried; widen its grid.")
        if family.runs and not family.tuning and any(other.tuning for other in families):
            notes.append(f"{family.family}: its base rate was not tuned, while that of others was.")
        if family.failed:
            widths = ", ".join(str(width) for width in sorted({run.width for run in family.failed}))
            failed = "1 run" if len(family.failed) == 1 else f"{len(family.failed)} runs"
            notes.append(f"{family.family}: {failed} did not finish (width {widths}); no law uses them.")
        for m in family.multipliers.values():
            if m.reason:
                notes.append(f"{family.family}, {AXES[m.axis]}: no multiplier, {m.reason}.")
            elif m.trend:
                notes.append(
                    f"{family.family}, {AXES[m.axis]}: its curve is not parallel to that of {baseline}; the multiplier "
                    f"goes from {m.trend[0]:.2f} at loss {m.loss_high:.3g} to {m.trend[1]:.2f} at {m.loss_low:.3g}."
                )
            if m.extrapolation > FAR:
                notes.append(
                    f"{family.family}, {AXES[m.axis]}: {baseline} would need {m.extrapolation:.1f} times its largest "
                    "measured cost to reach the same best loss; that part is extrapolated."
                )
            if not math.isnan(m.crosscheck) and not m.low <= m.crosscheck <= m.high:
                notes.append(
                    f"{family.family}, {AXES[m.axis]}: reading {baseline}'s hull without a law gives "
                    f"{m.crosscheck:.2f}, outside the interval {m.low:.2f} to {m.high:.2f}."
                )
    return notes
