"""What a comparison will take, and how sharp an answer it can give, before any of it is trained."""

import math
from dataclasses import dataclass

import torch
from scipy import stats  # type: ignore[import-untyped]

from einlinear.lab.compare import Plan, work
from einlinear.lab.data import Task
from einlinear.lab.machine import Machine
from einlinear.lab.train import CHUNK, Training

NOISE, SLOPE = 0.014, 0.2
"""Standard deviation of ln loss between seeds, and of ln loss against ln compute: measured on byte-level GPTs of width
128 (seeds at 8 million tokens, and horizons of 8 to 33 million)."""

RESOLVED = 1.25
"""The multiplier that a plan should tell from 1, unless another is asked for."""

CELLS = 5
"""Sizes of two families together that a shared law needs."""


@dataclass(frozen=True)
class Part:
    """What one structure takes."""

    family: str
    trials: int
    runs: int
    flops: int
    seconds: float  # by one process


@dataclass(frozen=True)
class Forecast:
    """Runs, FLOPs and seconds of a plan, and the interval that its multipliers can be expected to have."""

    plan: Plan
    machine: Machine
    parts: tuple[Part, ...]

    @property
    def minutes(self) -> float:
        """On this machine, by all its processes."""
        return sum(part.seconds for part in self.parts) / max(1, self.machine.workers) / 60

    @property
    def factor(self) -> float:
        """The multiplier's expected 95 % interval is it over this factor to it times this factor."""
        return interval(len(self.plan.widths) * len(self.plan.seeds))

    def refusal(self, resolved: float = RESOLVED) -> str | None:
        """Why the plan cannot tell a multiplier of `resolved` from 1, and what to change; None where it can."""
        plan = self.plan
        cells = 2 * len(plan.widths) * len(plan.horizons)
        if len(plan.families) < 2:
            return "This plan has one structure and nothing to compare it with: name another one, such as dense."
        if cells < CELLS or len(plan.widths) < 2:
            return (
                f"This plan gives two structures {cells} sizes together, at {len(plan.widths)} width(s), and a law "
                f"needs {CELLS} at 2 widths or more: add widths or horizons."
            )
        if self.factor <= resolved:
            return None
        seeds = next((n for n in range(1, 1000) if interval(len(plan.widths) * n) <= resolved), None)
        remedy = f"take {seeds} seeds, or more widths" if seeds else "ask for a larger one"
        return (
            f"This plan cannot tell a multiplier of {resolved:g} from 1: its interval is expected to reach from 1/"
            f"{self.factor:.2f} to {self.factor:.2f} times the value; {remedy}, or pass --resolve {self.factor:.2f}."
        )

    def __str__(self) -> str:
        plan, machine, parts = self.plan, self.machine, self.parts
        count = sum(part.trials for part in parts)
        tuned = f"each tuned at width {plan.recipe.base_width} over {len(plan.rates)} rates ({count} runs), then "
        grown = ", more where a grid of rates has to grow"
        flops, runs = sum(part.flops for part in parts), sum(part.runs for part in parts)
        width = max(len(part.family) for part in parts)
        return "\n".join(
            [
                f"{len(parts)} structures, {tuned if count else ''}measured at widths {_listed(plan.widths)}, "
                f"{len(plan.horizons)} horizons and {len(plan.seeds)} seed(s) ({runs} runs)",
                *(
                    f"  {part.family:{width}}  {part.trials + part.runs:3} runs  {part.flops:.2g} FLOPs  "
                    f"{part.seconds:.0f} s of a process"
                    for part in parts
                ),
                f"in all {flops:.2g} training FLOPs, about {self.minutes:.1f} minutes by {machine.workers or 1} "
                f"process(es) on {machine.device}{grown if count else ''}",
                f"expected 95 % interval of a multiplier: its value over and times {self.factor:.2f}, going by noise "
                f"of {NOISE:g} and a slope of {SLOPE:g} in ln loss",
            ]
        )


def forecast(plan: Plan, task: Task, machine: Machine | None = None) -> Forecast:
    """What a plan takes on this machine, going by ten steps of each structure."""
    task, machine = plan.cut(task), machine or Machine.here()
    parts = []
    threads = torch.get_num_threads()
    torch.set_num_threads(machine.threads)
    try:
        for family in plan.families:
            trials = [trunk for trunk in plan.trials(task) if trunk.family == family]
            trunks = plan.trunks(task, {family: 0.0})
            training = Training(plan.trial(task, family, plan.rates[0]), task, machine)
            steps = sum(training.advance(CHUNK))
            speed = work(training.trunk.run(task, steps)) / training.seconds
            whole = [trunk.run(task, trunk.steps) for trunk in (*trials, *trunks)]
            parts.append(
                Part(
                    family,
                    len(trials),
                    sum(len(trunk.horizons) for trunk in trunks),
                    sum(run.flops for run in whole),
                    sum(map(work, whole)) / speed,
                )
            )
    finally:
        torch.set_num_threads(threads)
    return Forecast(plan, machine, tuple(parts))


def interval(trunks: int) -> float:
    """The factor of a multiplier's expected 95 % interval where each of two families has so many trunks.

    The standard error of the logarithm is noise · √(2 / n) / slope. Only trunks count: horizons of one are not
    independent. A shared law with a shift has four parameters.
    """
    error = NOISE * math.sqrt(2 / trunks) / SLOPE
    return math.exp(min(50.0, float(stats.t.ppf(0.975, max(1, 2 * trunks - 4))) * error))


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
