"""Whether something is worth more than a baseline at equal cost: compute multipliers, task by task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from einlinear.lab.laws import AXES, Axis, Multiplier, multiplier
from einlinear.lab.laws.cells import Cell, cells_of, lower_hull
from einlinear.lab.run import Run
from einlinear.lab.studies.evidence import Finding, Part, Table
from einlinear.lab.studies.figures import cost_figure
from einlinear.lab.studies.matched import matched, pooled
from einlinear.lab.studies.protocol import labelled, training_loss


@dataclass(frozen=True, kw_only=True)
class Question:
    """Runs of a task, compared by one cost and one loss.

    `claimed` is the label, or its end, of what the claim is about; None where the comparison stands beside it.
    """

    axis: Axis
    claimed: str | None
    task: str | None = None  # None where the study has one
    training: bool = False  # by the training loss in place of the validation loss
    longest: bool = False  # of every model its longest training alone, so that only the width is traded for cost
    by_width: bool = False  # with the baseline of the same width alone, and without a law (`matched`)

    @property
    def title(self) -> str:
        """For a panel."""
        task = f"{self.task}, " if self.task else ""
        loss, end = "training" if self.training else "validation", ", longest trainings" * self.longest
        end += ", at equal width" * self.by_width
        return f"{task}{loss} loss over {AXES[self.axis]}{end}"


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A multiplier of a structure, or why there is none."""

    about: str  # the structure
    at: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    check: float = math.nan
    remark: str = ""  # what a reader of the number should know
    reason: str = ""

    @property
    def name(self) -> str:
        return self.about + self.at


def worth(runs: Sequence[Run], questions: Sequence[Question], baseline: str = "dense", bound: float = 1.0) -> Finding:
    """Multipliers of everything over the baseline; the claim is that those asked for are above `bound`."""
    parts: list[Part] = []
    rows, notes, panels = [], [], {}
    for question in questions:
        chosen = _asked(runs, question)
        groups = cells_of(chosen, question.axis)
        if not question.by_width:  # else the cells are those of another panel
            panels[question.title] = [
                {"family": name, "cost": cell.cost, "loss": cell.loss, "hull": cell in lower_hull(cells)}
                for name, cells in sorted(groups.items(), key=lambda group: group[0] != baseline)
                for cell in cells
            ]
        answers = _by_width(groups, baseline) if question.by_width else _by_law(chosen, question.axis, baseline)
        claimed = [one for one in answers if question.claimed and one.about.endswith(question.claimed)]
        if question.claimed and not claimed:
            claimed = [_Answer(about=question.claimed, reason="it was not run")]
            answers += claimed
        for one in answers:
            if one.reason:
                notes.append(f"{question.title}, {one.name}: no multiplier, {one.reason}.")
            else:
                check = "–" if math.isnan(one.check) else f"{one.check:.2f}"
                notes += [f"{question.title}, {one.name}: {one.remark}."] if one.remark else []
                rows.append((question.title, one.name, f"{one.value:.2f}", f"{one.low:.2f} to {one.high:.2f}", check))
        for one in claimed:
            what = f"the multiplier of {one.name} over {baseline} ({question.title})"
            parts.append(Part(
                what=what, value=one.value, low=one.low, high=one.high, claimed="above", bound=bound, ratio=True
            ))  # fmt: skip
    failed = sum(run.status != "done" for run in runs if run.purpose == "measure")
    if failed:
        notes.append(f"{failed} measurement runs did not finish; no law uses them.")
    return Finding(
        parts=tuple(parts),
        tables=(
            Table(
                title=f"Multipliers over {baseline}",
                columns=("comparison", "structure", "multiplier", "95 % interval", "without a law"),
                rows=tuple(rows),
            ),
        ),
        figure=cost_figure({title: rows for title, rows in panels.items() if rows}),
        notes=tuple(notes),
    )


def _asked(runs: Sequence[Run], question: Question) -> list[Run]:
    """The finished runs that a question is about, with the loss that it asks for."""
    chosen = [run for run in labelled(runs) if question.task in (None, run.task) and run.purpose == "measure"]
    if question.training:
        chosen = [replace(run, loss=training_loss(run)) for run in chosen]
    chosen = [run for run in chosen if run.status == "done" and run.loss]
    return _longest(chosen) if question.longest else chosen


def _by_law(runs: Sequence[Run], axis: Axis, baseline: str) -> list[_Answer]:
    names = dict.fromkeys(run.family for run in runs)
    if baseline not in names:
        return []
    found = [multiplier(runs, name, baseline, axis, allow_mixed_data=True) for name in names if name != baseline]
    return [
        _Answer(
            about=one.family, value=one.value, low=one.low, high=one.high, check=one.crosscheck,
            remark=_not_parallel(one), reason=one.reason,
        )
        for one in found
    ]  # fmt: skip


def _not_parallel(found: Multiplier) -> str:
    if not found.trend:
        return ""
    (early, late), first, last = found.trend, found.loss_high, found.loss_low
    return (
        f"the two curves are not parallel (p = {found.exponent_p:.1g}), so that no one number is true: it goes from "
        f"{early:.2f} at a loss of {first:.2g} to {late:.2f} at {last:.2g}, and the interval covers that"
    )


def _by_width(groups: Mapping[str, Sequence[Cell]], baseline: str) -> list[_Answer]:
    noise = pooled([cell for cells in groups.values() for cell in cells])
    if noise is None:
        return []
    return [
        _Answer(about=name, at=f" at width {one.width}", value=one.value, low=one.low, high=one.high)
        for name, cells in groups.items()
        if name != baseline
        for one in matched(cells, groups.get(baseline, ()), noise)
    ]


def _longest(runs: Sequence[Run]) -> list[Run]:
    """Of each model, its longest training."""
    longest: dict[object, int] = {}
    for run in runs:
        longest[run.family, run.size] = max(run.tokens, longest.get((run.family, run.size), 0))
    return [run for run in runs if run.tokens == longest[run.family, run.size]]
