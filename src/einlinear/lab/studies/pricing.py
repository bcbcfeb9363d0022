"""What a study takes before it is run, and what its runs would have taken on a quiet machine."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from einlinear.lab.data import Task
from einlinear.lab.forecast import forecast
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.studies.protocol import Experiment
from einlinear.lab.train import CHUNK, Training, Trunk

ROUNDS = 7  # in which all models are timed in turns

H200_RATE = 0.25 * 728e12  # FLOPs a second: a quarter of what large matmuls reach in bfloat16
H200_STEP = 3e-3  # seconds that a step takes at least, as a CUDA graph


def foretold(experiments: Sequence[Experiment], machine: Machine) -> str:
    """Runs, FLOPs and minutes on this machine, going by ten steps of each structure; an experiment a line."""
    lines, minutes = [], 0.0
    known: dict[object, tuple[str, float]] = {}
    for one in experiments:
        rates = one.plan.rates
        same = (one.task, replace(one.plan, rates=(1.0,) if len(rates) == 1 else rates))
        if same not in known:
            found = forecast(one.plan, one.data, machine)
            runs = sum(part.trials + part.runs for part in found.parts)
            flops = sum(part.flops for part in found.parts)
            known[same] = f"{runs} runs, {flops:.2g} FLOPs, {found.minutes:.1f} minutes", found.minutes
        text, took = known[same]
        minutes += took
        rule = "" if one.plan.recipe.structure_aware else ", naive rates"
        share = one.plan.recipe.finish_dense
        lines.append(f"{one.task}, rates {rates[0]:.3g} to {rates[-1]:.3g}{rule}, dense finish {share:g}: {text}")
    return "\n".join([*lines, f"in all about {minutes:.1f} minutes on {machine.device}, tuning that has to grow aside"])


def expected(experiments: Sequence[Experiment]) -> str:
    """Runs, steps and FLOPs, tuning that has to grow aside, and a guess of the minutes on an H200.

    Texts are not read: their models are those of the bytes of any other.
    """
    runs = steps = flops = 0
    seconds = 0.0
    for one in experiments:
        plan = one.plan
        task = one.data if one.task != "text" else replace(one, task="bytes").data
        trunks = [*plan.trials(task), *plan.trunks(task, dict.fromkeys(plan.families, 1.0))]
        runs += sum(len(trunk.horizons) for trunk in trunks)
        for trunk in trunks:
            of_step = trunk.run(task, 1000).flops / 1000
            steps += trunk.steps
            flops += round(of_step * trunk.steps)
            seconds += trunk.steps * max(H200_STEP, of_step / H200_RATE)
    return (
        f"{runs} runs, {steps:,} steps, {flops:.2g} training FLOPs; on an H200 a guess of {seconds / 60:.0f} minutes."
    )


def priced(runs: Sequence[Run], experiments: Sequence[Experiment], machine: Machine) -> list[Run]:
    """The runs, their seconds replaced by steps times the median seconds of a step.

    All models are timed in turns, so that whatever else the machine does meets them alike; on one thread of a CPU the
    thread's own time counts, which others do not slow down much. The experiments are of one task.
    """
    placed = [_placed(run, experiments) for run in runs]
    models = {_model(part): (part, task) for trunk, task in placed for part in (trunk, trunk.finish)}
    seconds = _timed(models, machine)
    found = []
    for run, (trunk, _) in zip(runs, placed, strict=True):
        (horizon,) = trunk.horizons
        first = trunk.branch(horizon)
        own, after = seconds[_model(trunk)], seconds[_model(trunk.finish)]
        found.append(replace(run, seconds=first * own + (horizon - first) * after))
    return found


def _placed(run: Run, experiments: Sequence[Experiment]) -> tuple[Trunk, Task]:
    """The trunk and the task of a run, by its setup."""
    setup = {name: value for name, value in json.loads(run.setup).items() if name != "context"}
    one = next(one for one in experiments if one.data.name == run.task and one.plan.recipe.setup == setup)
    recipe = one.plan.recipe
    trunk = Trunk(
        family=run.family, width=run.width, depth=run.depth, rate=run.rate, seed=run.seed,
        horizons=(run.tokens // recipe.tokens(one.data),), recipe=recipe,
    )  # fmt: skip
    return trunk, one.data


Model = tuple[str, int, int, int]
"""What the time of a step depends on, within one task."""


def _model(trunk: Trunk) -> Model:
    return trunk.family, trunk.width, trunk.depth, trunk.recipe.batch


def _timed(models: Mapping[Model, tuple[Trunk, Task]], machine: Machine) -> dict[Model, float]:
    """Median seconds of a step of each model."""
    own_time = machine.device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    trainings = {model: Training(*placed, machine) for model, placed in models.items()}
    taken: dict[Model, list[float]] = {model: [] for model in trainings}
    for _ in range(ROUNDS):
        for model, training in trainings.items():
            started = clock()
            steps = sum(training.advance(training.step + CHUNK))
            taken[model].append((clock() - started) / steps)
    return {model: statistics.median(times) for model, times in taken.items()}
