"""What a study takes before it is run, and what its runs would have taken on a quiet machine."""

import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch

from einlinear.lab.forecast import forecast
from einlinear.lab.machine import Machine
from einlinear.lab.provenance import provenance
from einlinear.lab.run import Run
from einlinear.lab.studies.protocol import Experiment
from einlinear.lab.train import CHUNK, Recipe, Training, Trunk

ROUNDS = 7  # in which all models are timed in turns


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
    """Runs, steps and FLOPs, tuning that has to grow aside."""
    runs = steps = flops = 0
    for one in experiments:
        plan, task = one.plan, one.sample
        trunks = [*plan.trials(task), *plan.trunks(task, dict.fromkeys(plan.families, 1.0))]
        runs += sum(len(trunk.horizons) for trunk in trunks)
        steps += sum(trunk.steps for trunk in trunks)
        flops += sum(trunk.run(task, trunk.steps).flops for trunk in trunks)
    return f"{runs} runs, {steps:,} steps, {flops:.2g} training FLOPs."


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a step of a model takes on a machine where nothing else runs."""

    task: str
    family: str
    width: int
    depth: int
    batch: int
    seconds: float = 0.0  # the median of rounds in which all models were timed in turns
    device: str = ""


def timed(
    experiments: Sequence[Experiment], machine: Machine, tell: Callable[[Timed], object] = lambda timed: None
) -> list[Timed]:
    """Seconds of a step of every model of a study, dense finishes included.

    All models are timed in turns, so that whatever else the machine does meets them alike; on one thread of a CPU the
    thread's own time counts, which others do not slow down much.
    """
    found = []
    for one in dict.fromkeys(replace(one, plan=replace(one.plan, seeds=one.plan.seeds[:1])) for one in experiments):
        for trunk in one.plan.trunks(one.data, dict.fromkeys(one.plan.families, one.plan.rates[0])):
            found += [(_model(one.task, part), part, one.data) for part in (trunk, trunk.finish)]
    trainings = {}
    for model, trunk, task in found:
        if model not in trainings:
            trainings[model] = Training(trunk, task, machine)
    own_time = machine.device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_time else time.perf_counter
    taken: dict[Timed, list[float]] = {model: [] for model in trainings}
    for _ in range(ROUNDS):
        for model, training in trainings.items():
            started = clock()
            steps = sum(training.advance(training.step + CHUNK))
            taken[model].append((clock() - started) / steps)
    device = provenance(machine.device, 1)["device"]
    results = [replace(model, seconds=statistics.median(times), device=device) for model, times in taken.items()]
    for result in results:
        tell(result)
    return results


def priced(runs: Sequence[Run], steps: Sequence[Timed]) -> list[Run]:
    """The runs, their seconds replaced by steps times the seconds of a step.

    Raises ValueError for a run of a model that was not timed.
    """
    seconds = {replace(one, seconds=0.0, device=""): one.seconds for one in steps}
    found = []
    for run in runs:
        trunk = _trunk(run)
        models = [_model(run.task, part) for part in (trunk, trunk.finish)]
        if missing := [model for model in models if model not in seconds]:
            raise ValueError(
                f"Pricing the run of {run.family} at width {run.width}: no step of {missing[0]} was timed."
            )
        (horizon,) = trunk.horizons
        first, (own, after) = trunk.branch(horizon), (seconds[model] for model in models)
        found.append(replace(run, seconds=first * own + (horizon - first) * after))
    return found


def write_steps(steps: Sequence[Timed], path: Path) -> None:
    """Times of steps as CSV. Raises OSError where the file cannot be written."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(one.name for one in fields(Timed))
        writer.writerows(astuple(one) for one in steps)


def read_steps(path: Path) -> list[Timed]:
    """The times of such a file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Timed(
                task=row["task"], family=row["family"], width=int(row["width"]), depth=int(row["depth"]),
                batch=int(row["batch"]), seconds=float(row["seconds"]), device=row["device"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def _trunk(run: Run) -> Trunk:
    """The trunk of a run, by its setup."""
    setup = json.loads(run.setup)
    context = setup.pop("context", 1)
    recipe = Recipe(**setup)
    return Trunk(
        family=run.family, width=run.width, depth=run.depth, rate=run.rate, seed=run.seed,
        horizons=(run.tokens // (recipe.batch * context),), recipe=recipe,
    )  # fmt: skip


def _model(task: str, trunk: Trunk) -> Timed:
    """What the time of a step depends on, as a time that was not measured."""
    return Timed(task=task, family=trunk.family, width=trunk.width, depth=trunk.depth, batch=trunk.recipe.batch)
