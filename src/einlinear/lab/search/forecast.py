"""What a search will take, before any of it is trained."""

import time
from dataclasses import dataclass

import torch

from einlinear.lab.data import Task
from einlinear.lab.forecast import Forecast
from einlinear.lab.forecast import forecast as forecast_comparison
from einlinear.lab.machine import Machine
from einlinear.lab.search.plan import SearchPlan
from einlinear.lab.search.strategy import shares
from einlinear.lab.train import Training


@dataclass(frozen=True)
class SearchForecast:
    """Trainings, FLOPs and minutes of a search; its winners are not known yet, so others of the pool stand in."""

    plan: SearchPlan
    candidates: int
    begun: tuple[float, ...]  # candidates that are expected to be trained to each horizon
    flops: float  # of the exploration
    seconds: float  # of the exploration, by one process
    evaluation: float  # seconds that evaluating all runs takes
    confirmation: Forecast

    @property
    def minutes(self) -> float:
        """On this machine, by all its processes."""
        at_once = self.confirmation.machine.at_once
        return self.confirmation.minutes + (self.seconds + self.evaluation) / at_once / 60

    def __str__(self) -> str:
        plan, confirmed = self.plan, self.confirmation
        trials, runs = (sum(getattr(part, name) for part in confirmed.parts) for name in ("trials", "runs"))
        flops = sum(part.flops for part in confirmed.parts)
        factor = f"expected 95 % interval of a multiplier: over and times {confirmed.factor:.2f}"
        grid = f"{len(plan.confirmation.widths)} widths, {len(plan.confirmation.horizons)} horizons"
        counts = ", ".join(
            f"{count:.0f} to {tokens:,}" for count, tokens in zip(self.begun, plan.horizons, strict=False)
        )
        return "\n".join(
            [
                f"exploring at width {plan.width} with seed {plan.seed}, by {plan.objective}: of {self.candidates} "
                f"candidates about {counts} tokens ({self.flops:.2g} FLOPs, {self.seconds:.0f} s of a process)",
                f"confirming {plan.winners} winners, {', '.join(plan.confirmation.families)} and {plan.controls} at "
                f"random, each tuned, at {grid} and {len(plan.confirmation.seeds)} fresh seeds "
                f"({trials} + {runs} runs, {flops:.2g} FLOPs); {factor}",
                f"in all about {self.minutes:.1f} minutes by {confirmed.machine.workers or 1} process(es) on "
                f"{confirmed.machine.device}, more where a grid of rates has to grow",
            ]
        )


def forecast(plan: SearchPlan, task: Task, machine: Machine | None = None) -> SearchForecast:
    """What a search takes on this machine, going by a few steps of dense and of candidates cheap to costly."""
    machine, task = machine or Machine.here(), plan.confirmation.cut(task)
    pool = plan.pool(machine.device)
    count = plan.winners + plan.controls
    stand_ins = [pool[(2 * n + 1) * len(pool) // (2 * count)].family for n in range(count)]
    confirmation = forecast_comparison(plan.finalists(*stand_ins), task, machine)

    rungs = plan.rungs(task)
    unit = float(plan.trunk(task, "dense", plan.confirmation.rates[0], 0).run(task, rungs[-1]).flops)
    mine = [part for part in confirmation.parts if part.family in stand_ins]
    pace = sum(part.seconds / part.flops for part in mine) / len(mine)
    if plan.objective == "seconds":
        plain = next(part for part in confirmation.parts if part.family == "dense")
        unit *= plain.seconds / plain.flops
    costs = plan.costs(task, pool, unit)
    spent = min(plan.budget * unit, costs.sum())
    begun = spent * shares(costs, plan.budget * unit) / costs.mean(axis=0)
    spread = tuple(min(float(len(pool)), count) for count in begun)
    seconds = spent if plan.objective == "seconds" else spent * pace
    flops = seconds / pace
    runs = sum(spread) + sum(part.trials + part.runs for part in confirmation.parts)
    return SearchForecast(
        plan, len(pool), spread, flops, seconds, runs * _evaluating(plan, task, machine), confirmation
    )


def _evaluating(plan: SearchPlan, task: Task, machine: Machine) -> float:
    """Seconds of one evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(machine.threads)
    try:
        training = Training(plan.trunk(task, "dense", plan.confirmation.rates[0], 0), task, machine)
        started = time.perf_counter()
        training.evaluate()
        return time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
