"""Whether something is worth more than a baseline at equal cost: compute multipliers, task by task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from einlinear.lab.laws import AXES, Axis, multiplier
from einlinear.lab.laws.cells import cells_of, lower_hull
from einlinear.lab.run import Run
from einlinear.lab.studies.evidence import Finding, Part, Table
from einlinear.lab.studies.figures import cost_figure
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

    @property
    def title(self) -> str:
        """For a panel."""
        task = f"{self.task}, " if self.task else ""
        loss, end = "training" if self.training else "validation", ", longest trainings" if self.longest else ""
        return f"{task}{loss} loss over {AXES[self.axis]}{end}"


def worth(runs: Sequence[Run], questions: Sequence[Question], baseline: str = "dense", bound: float = 1.0) -> Finding:
    """Multipliers of everything over the baseline; the claim is that those asked for are above `bound`."""
    parts: list[Part] = []
    rows, notes, panels = [], [], {}
    for question in questions:
        chosen = [run for run in labelled(runs) if question.task in (None, run.task)]
        if question.training:
            chosen = [replace(run, loss=training_loss(run)) for run in chosen]
        if question.longest:
            chosen = _longest(chosen)
        finished = [run for run in chosen if run.purpose == "measure" and run.status == "done" and run.loss]
        groups = cells_of(finished, question.axis)
        names = sorted(groups, key=lambda name: name != baseline)
        panels[question.title] = [
            {"family": name, "cost": cell.cost, "loss": cell.loss, "hull": cell in lower_hull(groups[name])}
            for name in names
            for cell in groups[name]
        ]
        for name in (name for name in names if name != baseline):
            found = multiplier(chosen, name, baseline, question.axis, allow_mixed_data=True)
            if found.reason:
                notes.append(f"{question.title}, {name}: no multiplier, {found.reason}.")
            check = "–" if math.isnan(found.crosscheck) else f"{found.crosscheck:.2f}"
            interval = "–" if found.reason else f"{found.low:.2f} to {found.high:.2f}"
            rows.append((question.title, name, "–" if found.reason else f"{found.value:.2f}", interval, check))
            if question.claimed and name.endswith(question.claimed):
                what = f"the multiplier of {name} over {baseline} ({question.title})"
                parts.append(Part(
                    what=what, value=found.value, low=found.low, high=found.high, claimed="above", bound=bound,
                    ratio=True,
                ))  # fmt: skip
        if question.claimed and not any(name.endswith(question.claimed) for name in names if name != baseline):
            what = f"the multiplier of {question.claimed} over {baseline} ({question.title})"
            parts.append(Part(what=what, value=math.nan, low=math.nan, high=math.nan, claimed="above", bound=bound))
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
        figure=cost_figure(panels),
        notes=tuple(notes),
    )


def _longest(runs: Sequence[Run]) -> list[Run]:
    """Of each model, its longest training."""
    longest: dict[object, int] = {}
    for run in runs:
        longest[run.family, run.size] = max(run.tokens, longest.get((run.family, run.size), 0))
    return [run for run in runs if run.tokens == longest[run.family, run.size]]
