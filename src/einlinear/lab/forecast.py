"""What a comparison will take, and how sharp an answer it can give, before any of it is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]

from einlinear.lab.compare import Plan, work
from einlinear.lab.data import Task
from einlinear.lab.laws.cells import cells_of, lower_hull, slope
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.train import CHUNK, Training

NOISE, SLOPE = 0.02, 0.09
"""Standard deviation of ln loss between seeds, less what a seed does to all structures alike, and the fall of ln loss
with ln compute along a hull: measured on byte-level GPTs of widths 16 to 128 after 80 to 320 thousand tokens (in all
seeds differed by .026, of which all structures shared .018)."""

RESOLVED = 1.4
"""The multiplier that a plan should tell from 1, unless another is asked for."""

NEAR = 2.0
"""Stored runs tell about a plan whose widths and horizons they miss by this factor or less."""

FREEDOM = 4
"""Degrees of freedom that the noise of stored runs should have; with fewer it is known too badly."""

CELLS = 5
"""Sizes of two families together that a shared law needs."""


@dataclass(frozen=True)
class Expected:
    """What the width of an interval is foretold from."""

    noise: float = NOISE
    slope: float = SLOPE
    noise_from: str = "small byte models"
    slope_from: str = "small byte models"

    def factor(self, widths: int, seeds: int) -> float:
        """The factor of a multiplier's expected 95 % interval, for two families at so many widths and seeds.

        The standard error of the logarithm is noise · √(2 / trunks) / slope. Only trunks count: horizons of one are
        not independent. Seeds are averaged before a shared law with a shift, four parameters, is fitted: they make the
        error smaller, and not the number of its degrees of freedom larger.
        """
        error = self.noise * math.sqrt(2 / (widths * seeds)) / self.slope
        return math.exp(min(50.0, float(stats.t.ppf(0.975, max(1, 2 * widths - 4))) * error))


def expected(plan: Plan, task: Task, runs: Sequence[Run]) -> Expected:
    """Noise and slope as stored runs of the task have them, near the plan's widths and horizons; else the constants.

    The noise is what is left of ln loss at a trunk's longest horizon once each structure and width has its mean and
    each seed its own: a seed settles the order of the data, which is the same for all structures and cancels.
    """
    near = [
        run for run in runs
        if run.purpose == "measure" and run.status == "done" and run.loss is not None and run.loss > 0
        and (run.task, run.fingerprint, run.depth) == (task.name, task.fingerprint, plan.depth)
        and min(plan.widths) / NEAR <= run.width <= max(plan.widths) * NEAR
        and min(plan.horizons) / NEAR <= run.tokens <= max(plan.horizons) * NEAR
    ]  # fmt: skip
    known = Expected()
    if noise := _noise(near):
        known = replace(known, noise=noise[0], noise_from=f"{noise[1]} stored runs")
    hulls = [lower_hull(cells) for cells in cells_of(near).values()]
    slopes = [-slope(cells[0], cells[-1]) for cells in hulls if len(cells) > 2]
    if slopes:
        known = replace(known, slope=float(np.mean(slopes)), slope_from=f"the hulls of {len(slopes)} stored structures")
    return known


def _noise(runs: Sequence[Run]) -> tuple[float, int] | None:
    """Standard deviation of ln loss between seeds, and the runs it is from; None where too few were repeated."""
    last: dict[tuple[object, ...], dict[int, Run]] = {}  # by cell, by seed
    for run in sorted(runs, key=lambda run: run.tokens):
        last.setdefault((run.family, run.width, run.rate, run.setup), {})[run.seed] = run
    kept = [
        (cell, run) for cell, seeds in last.items() for run in seeds.values()
        if run.tokens == max(other.tokens for other in seeds.values()) and len(seeds) > 1
    ]  # fmt: skip
    if not kept:
        return None
    means = [[cell == other for other in dict.fromkeys(cell for cell, _ in kept)] for cell, _ in kept]
    alike = [[run.seed == seed for seed in {run.seed for _, run in kept}] for _, run in kept]
    design = np.concatenate([np.array(means, dtype=float), np.array(alike, dtype=float)], axis=1)
    loss = np.log([run.loss for _, run in kept if run.loss is not None])
    solution, _, rank, _ = np.linalg.lstsq(design, loss)
    freedom = len(kept) - int(rank)
    if freedom < FREEDOM:
        return None
    return float(np.sqrt(((loss - design @ solution) ** 2).sum() / freedom)), len(kept)


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
    expected: Expected = Expected()

    @property
    def minutes(self) -> float:
        """On this machine, by all its processes."""
        return sum(part.seconds for part in self.parts) / self.machine.at_once / 60

    @property
    def factor(self) -> float:
        """The multiplier's expected 95 % interval is it over this factor to it times this factor."""
        return self.expected.factor(len(self.plan.widths), len(self.plan.seeds))

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
        widths = len(plan.widths)
        seeds = next((n for n in range(1, 1000) if self.expected.factor(widths, n) <= resolved), None)
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
                f"of {self.expected.noise:.2g} in ln loss ({self.expected.noise_from}) and a slope of "
                f"{self.expected.slope:.2g} over ln FLOPs ({self.expected.slope_from})",
            ]
        )


def forecast(plan: Plan, task: Task, machine: Machine | None = None, runs: Sequence[Run] = ()) -> Forecast:
    """What a plan takes on this machine, going by ten steps of each structure, and how sharp it will be.

    `runs` are those of a store; where they are near enough, noise and slope are taken from them.
    """
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
    return Forecast(plan, machine, tuple(parts), expected(plan, task, runs))


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
