"""What a study takes before it is run, and what its runs would have taken on a quiet machine."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

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
    thread's own time counts, which others do not slow down much.
    """
    trunks: dict[tuple[object, ...], tuple[Trunk, Experiment]] = {}
    horizons: dict[object, tuple[Trunk, int, Experiment]] = {}
    for one in experiments:
        for run in runs:
            recipe, task = one.plan.recipe, one.data
            setup = json.loads(run.setup)
            if run.task != task.name or any(setup.get(name) != value for name, value in recipe.setup.items()):
                continue
            if len(recipe.setup) != len(setup) - ("context" in setup):
                continue
            horizon = run.tokens // recipe.tokens(task)
            trunk = Trunk(
                family=run.family, width=run.width, depth=run.depth, rate=run.rate, seed=run.seed, horizons=(horizon,),
                recipe=recipe,
            )  # fmt: skip
            horizons[run.key] = trunk, horizon, one
            for part in (trunk, trunk.finish):
                trunks.setdefault(_model(part, one), (part, one))
    seconds = _timed(trunks, machine)
    found = []
    for run in runs:
        trunk, horizon, one = horizons[run.key]
        first, own, after = trunk.branch(horizon), _model(trunk, one), _model(trunk.finish, one)
        found.append(replace(run, seconds=first * seconds[own] + (horizon - first) * seconds[after]))
    return found


def _model(trunk: Trunk, experiment: Experiment) -> tuple[object, ...]:
    return trunk.family, trunk.width, trunk.depth, experiment.task


def _timed(
    trunks: dict[tuple[object, ...], tuple[Trunk, Experiment]], machine: Machine
) -> dict[tuple[object, ...], float]:
    """Median seconds of a step of each model."""
    own_time = machine.device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    trainings = {model: Training(trunk, one.data, machine) for model, (trunk, one) in trunks.items()}
    taken: dict[tuple[object, ...], list[float]] = {model: [] for model in trainings}
    for _ in range(ROUNDS):
        for model, training in trainings.items():
            started = clock()
            steps = sum(training.advance(training.step + CHUNK))
            taken[model].append((clock() - started) / steps)
    return {model: statistics.median(times) for model, times in taken.items()}
