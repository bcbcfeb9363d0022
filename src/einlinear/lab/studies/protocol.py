"""What is trained for a claim, as data, and its runs as a small table."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from einlinear.lab import compare
from einlinear.lab.crew import Event
from einlinear.lab.data import Sequences, Task, load
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.studies.evidence import Finding
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Trunk

LEFT_OUT = {"curve", "spec", "created", "routers"}
"""Of a run, in the table: long, or derived from the rest. Of the curve its last value stays."""

LAST = "training_loss"

NAIVE = ", naive rates"
"""At the end of the label of what is trained without structure-aware rates."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A comparison that a study takes, on a task. What is not tuned has one rate, as in every `Plan`."""

    task: str
    plan: compare.Plan
    paths: tuple[str, ...] = ()

    @property
    def data(self) -> Task:
        """The task, in sequences of the plan's length."""
        return _data(self.task, self.paths, self.plan.context)

    @property
    def sample(self) -> Task:
        """A task whose models and costs are the same, without files: texts are sequences of bytes like any other."""
        return _data("bytes" if self.task == "text" else self.task, (), self.plan.context)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim, where it was made, what is trained at each scale, and how runs are judged.

    `claim` is the sentence under test and `measure` what is compared with what; both are for readers. `judge` must be a
    function of the runs alone.
    """

    name: str
    title: str
    claim: str
    source: str
    measure: str
    scales: Mapping[str, tuple[Experiment, ...]]
    judge: Callable[[Sequence[Run]], Finding] = field(repr=False)
    priced: bool = False  # whether seconds are part of the claim, and so measured again (`pricing`)

    def experiments(self, scale: str, paths: Sequence[str] = ()) -> tuple[Experiment, ...]:
        """What is trained at a scale, on these files where its task is a text.

        Raises ValueError where there is no such scale.
        """
        if scale not in self.scales:
            raise ValueError(f"Running the study {self.name!r}: no scale {scale!r}; it has {', '.join(self.scales)}.")
        given = tuple(paths)
        return tuple(replace(one, paths=given) if one.task == "text" else one for one in self.scales[scale])


@cache  # costs of models are kept by task
def _data(task: str, paths: tuple[str, ...], context: int | None) -> Task:
    found = load(task, paths=paths)
    return replace(found, context=context) if context and isinstance(found, Sequences) else found


def label(run: Run) -> str:
    """The family of a run, with how it was trained where that is not as usual."""
    setup = json.loads(run.setup)
    share, aware = setup.get("finish_dense", 0.0), setup.get("structure_aware", True)
    return run.family + (f", last {share:.0%} dense" if share else "") + ("" if aware else NAIVE)


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The runs with their labels for families, so that laws tell them apart."""
    return [replace(run, family=label(run)) for run in runs]


Tell = Callable[[Run, int, int], object]
"""Called with a finished run, how many are by now, and how many are wanted as far as it is known."""


def measure(
    experiments: Sequence[Experiment],
    store: Store,
    machine: Machine,
    folder: Path | None = None,
    tell: Tell = lambda run, done, wanted: None,
) -> list[Run]:
    """Every run of a study, from the store or trained now; interrupted, the same call goes on where it stopped.

    All experiments on a task are trained together: first every trial of a rate, then what is measured, one seed after
    the other and from narrow to wide, so that what a study has that is cut short compares.
    """
    runs: dict[object, Run] = {}
    for task, plans in _by_task(experiments).items():
        runs |= {run.key: run for run in _measured(plans, task, store, machine, folder, tell)}
    return list(runs.values())


def _measured(
    plans: Sequence[compare.Plan], task: Task, store: Store, machine: Machine, folder: Path | None, tell: Tell
) -> list[Run]:
    """The runs of plans on one task."""
    wanted = done = 0

    def observe(trunk: Trunk, event: Event) -> None:
        nonlocal done
        if isinstance(event, Run):
            done += 1
            tell(event, done, wanted)

    with Sweep(task, store, machine, folder, observe) as sweep:

        def train(trunks: Sequence[Trunk]) -> list[Run]:
            nonlocal wanted
            wanted += sum(len(trunk.horizons) - len(sweep.stored(trunk)) for trunk in trunks)
            return sweep.train(trunks)

        tuning, rates = compare.tune(plans, task, train)
        trunks = [trunk for plan, own in zip(plans, rates, strict=True) for trunk in plan.trunks(task, own)]
        return tuning + train(sorted(trunks, key=lambda trunk: (trunk.seed, trunk.width, -trunk.run(task, 1).flops)))


def collect(experiments: Sequence[Experiment], store: Store) -> list[Run]:
    """Those runs of a study that a store has, whatever is missing; the study's data are not needed.

    Trials of a rate that a grid grew by are among them.
    """
    wanted = {place_of(run) for experiment in experiments for run in (*trials(experiment), *measured(experiment))}
    return [run for run in store.runs() if place_of(run) in wanted or place_of(replace(run, rate=TUNED)) in wanted]


TUNED = 0.0
"""Stands for a rate that tuning finds."""


def place_of(run: Run) -> tuple[object, ...]:
    """Where a run stands in a protocol: its key, but for the fingerprint of the data."""
    return run.task, run.setup, run.purpose, run.family, run.width, run.depth, run.tokens, run.seed, run.rate


def measured(experiment: Experiment) -> list[Run]:
    """The measurements that an experiment asks for, with nothing measured yet; rates that it tunes are `TUNED`."""
    rates = experiment.plan.rates
    rate = rates[0] if len(rates) == 1 else TUNED
    return _blank(experiment, experiment.plan.trunks(experiment.sample, dict.fromkeys(experiment.plan.families, rate)))


def trials(experiment: Experiment) -> list[Run]:
    """The trials by which an experiment tunes, one for all rates."""
    found = _blank(experiment, experiment.plan.trials(experiment.sample))
    return list(dict.fromkeys(replace(run, rate=TUNED, trunk="") for run in found))


def _blank(experiment: Experiment, trunks: Sequence[Trunk]) -> list[Run]:
    runs = [trunk.run(experiment.sample, horizon) for trunk in trunks for horizon in trunk.horizons]
    return [replace(run, task=experiment.task) for run in runs]


def _by_task(experiments: Sequence[Experiment]) -> dict[Task, list[compare.Plan]]:
    found: dict[Task, list[compare.Plan]] = {}
    for one in experiments:
        found.setdefault(one.data, []).append(one.plan)
    return found


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """The runs as CSV, without their curves: of each the training loss at its end stays.

    Raises OSError where the file cannot be written.
    """
    names = [one.name for one in fields(Run) if one.name not in LEFT_OUT]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, LAST])
        for run in runs:
            curve = json.loads(run.curve)
            values = (getattr(run, name) for name in names)
            writer.writerow([*("" if value is None else value for value in values), curve[-1][1] if curve else ""])


def read_runs(path: Path) -> list[Run]:
    """The runs of such a table.

    Raises ValueError for a file that is not one.
    """
    readers: dict[object, Callable[[str], object]] = {
        int: int, float: float, str: str, float | None: lambda text: float(text) if text else None
    }  # fmt: skip
    kinds = {one.name: readers[one.type] for one in fields(Run) if one.name not in LEFT_OUT}
    runs = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            last = row.pop(LAST, None)
            if last is None or not row.keys() <= kinds.keys():
                raise ValueError(f"Reading the runs of a study: {path} has other columns; write it by write_runs.")
            values = {name: kinds[name](text) for name, text in row.items()}
            curve = json.dumps([[values["tokens"], float(last)]] if last else [])
            runs.append(Run(**values, curve=curve))  # type: ignore[arg-type]
    return runs


def training_loss(run: Run) -> float | None:
    """The training loss at the end of a run, over its last ten batches."""
    curve = json.loads(run.curve)
    return float(curve[-1][1]) if curve and run.status == "done" else None
