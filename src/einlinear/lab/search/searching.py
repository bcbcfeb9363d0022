"""The search itself: dense, exploration, confirmation; every run from the store, or trained and stored at once."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from einlinear.lab.compare import Plan, Progress, compare
from einlinear.lab.crew import Event
from einlinear.lab.data import Task
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.search.plan import SearchPlan
from einlinear.lab.search.strategy import Found, Outcome, guided_search
from einlinear.lab.search.surrogate import features
from einlinear.lab.search.worth import Reference
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Trunk
from einlinear.space import Candidate

Tell = Callable[[str, Progress], object]
"""Called with the part of a search that is under way, and how far that has come."""


@dataclass(frozen=True)
class Explored:
    """What exploration found. No number of it is an estimate to report: the best of many noisy ones are too good."""

    plan: SearchPlan
    task: Task
    pool: tuple[Candidate, ...]
    reference: Reference
    rate: float  # of all candidates: the best of dense
    found: Found
    runs: dict[tuple[int, int], Run]  # by candidate and rung

    @property
    def winners(self) -> tuple[str, ...]:
        """The families to confirm, the most hopeful first."""
        return tuple(self.pool[number].family for number in self.found.ranking[: self.plan.winners])

    @property
    def controls(self) -> tuple[str, ...]:
        """Families at random from the pool, which say what choosing was worth."""
        order = random.Random(self.plan.seed).sample(range(len(self.pool)), len(self.pool))
        families = [self.pool[number].family for number in order]
        return tuple([family for family in families if family not in self.winners][: self.plan.controls])

    @property
    def counts(self) -> list[int]:
        """How many candidates were trained to each horizon."""
        rungs = [rung for _, rung in self.runs]
        return [rungs.count(rung) for rung in range(len(self.plan.rungs(self.task)))]


@dataclass(frozen=True)
class Searched:
    """A whole search: how it explored, and the runs that confirm what it chose, tuning included."""

    explored: Explored
    runs: list[Run]


def search(
    plan: SearchPlan,
    task: Task,
    store: Store,
    *,
    machine: Machine | None = None,
    folder: Path | None = None,
    progress: Tell = lambda part, progress: None,
) -> Searched:
    """Searches as planned. Interrupted or killed, the same call goes on where it stopped.

    Dense comes first: its tuning gives the rate, its runs the law by which candidates are judged. Each choice of the
    exploration follows from the plan's seed and the runs before, so that a search that goes on makes the same ones.

    Args:
        plan: what to do.
        task: on what.
        store: where runs are found and kept.
        machine: how to train; by default with all of this machine.
        folder: where runs in progress are kept; None to lose them, and to train each horizon from the start.
        progress: called after every run, and several times a second.

    Raises:
        ValueError: before any training for a plan that cannot be; where dense's runs hold no law.
        KeyboardInterrupt, OSError: once the runs in progress have been kept.
    """
    machine = machine or Machine.here()
    common = {"machine": machine, "folder": folder}
    plan.pool(machine.device)  # refuses before anything is trained
    dense = compare(plan.finalists(), task, store, **common, progress=partial(progress, "dense"))  # type: ignore[arg-type]
    explored = explore(plan, task, store, dense, **common, progress=partial(progress, "exploring"))  # type: ignore[arg-type]
    finalists = plan.finalists(*explored.winners, *explored.controls)
    runs = compare(finalists, task, store, **common, progress=partial(progress, "confirming"))  # type: ignore[arg-type]
    return Searched(explored, runs)


def explore(
    plan: SearchPlan,
    task: Task,
    store: Store,
    dense: Sequence[Run],
    *,
    machine: Machine | None = None,
    folder: Path | None = None,
    progress: Callable[[Progress], object] = lambda progress: None,
) -> Explored:
    """The exploration alone, given the runs of the confirmation's comparison for dense."""
    machine = machine or Machine.here()
    task = plan.confirmation.cut(task)
    meter = _Meter(progress, lambda run: _paid(plan, task, run) / (plan.budget * _unit(plan, task, dense)))
    with Sweep(task, store, machine, folder, meter.observe) as sweep:
        explored = _explored(plan, task, dense, machine, sweep.train, meter.spent)
        for number, rung in explored.runs:
            sweep.forget(plan.trunk(task, explored.pool[number].family, explored.rate, rung))
    return explored


def recalled(plan: SearchPlan, task: Task, store: Store, *, machine: Machine | None = None) -> Searched:
    """A search as far as the store has it: nothing is trained, and exploration must be there in full.

    Raises:
        ValueError: where it is not.
    """
    machine, task = machine or Machine.here(), plan.confirmation.cut(task)
    missing = f"Recalling a search of {task.name}: the store does not hold all of it; give the same command to go on."

    def stored(trunks: Sequence[Trunk]) -> list[Run]:
        runs = [store.find(trunk.run(task, horizon).key) for trunk in trunks for horizon in trunk.horizons]
        if None in runs:
            raise ValueError(missing)
        return [run for run in runs if run is not None]

    dense = _confirming(plan.finalists(), task, store)
    if not any(run.purpose == "measure" for run in dense):
        raise ValueError(missing)
    explored = _explored(plan, task, dense, machine, stored, lambda share: None)
    families = plan.finalists(*explored.winners, *explored.controls)
    return Searched(explored, _confirming(families, task, store))


def _explored(
    plan: SearchPlan,
    task: Task,
    dense: Sequence[Run],
    machine: Machine,
    train: Callable[[Sequence[Trunk]], list[Run]],
    told: Callable[[float], object],
) -> Explored:
    pool = plan.pool(machine.device)
    dense = [run for run in dense if run.family == "dense" and run.purpose == "measure" and run.status == "done"]
    reference = Reference(dense, plan.objective)
    rate, runs, unit = dense[0].rate, dict[tuple[int, int], Run](), _unit(plan, task, dense)

    def measure(asked: Sequence[tuple[int, int]]) -> list[Outcome]:
        trunks = [plan.trunk(task, pool[number].family, rate, rung) for number, rung in asked]
        outcomes = []
        for pair, run in zip(asked, train(trunks), strict=True):
            runs[pair] = run
            worth = reference.worth(run)
            outcomes.append(Outcome(worth.value, worth.variance, _paid(plan, task, run)))
        return outcomes

    found = guided_search(
        features(pool), plan.costs(task, pool, unit), measure, plan.budget * unit, seed=plan.seed, told=told
    )
    return Explored(plan, task, tuple(pool), reference, rate, found, runs)


def _confirming(plan: Plan, task: Task, store: Store) -> list[Run]:
    """The runs of a comparison, as far as they are stored."""
    like = plan.trial(task, "dense", plan.rates[0]).run(task, 1)
    tokens = {plan.steps(task, horizon) * plan.recipe.tokens(task) for horizon in plan.horizons}
    found = [
        run
        for run in store.runs(task=task.name, fingerprint=task.fingerprint, depth=plan.depth, setup=like.setup)
        if run.family in plan.families
        and (
            run.purpose == "tune"
            or (
                run.purpose == "measure"
                and run.width in plan.widths
                and run.tokens in tokens
                and run.seed in plan.seeds
            )
        )
    ]
    return found


class _Meter:
    """Tells how far an exploration has come, and how long it will take by what it has taken."""

    def __init__(self, progress: Callable[[Progress], object], paid: Callable[[Run], float]) -> None:
        """Also given the share of the budget that a run takes."""
        self._progress, self._paid, self._runs, self._share = progress, paid, 0, 0.0
        self._begun: tuple[float, float] | None = None  # when training began, and the share that was spent by then

    def observe(self, trunk: Trunk, event: Event) -> None:
        """Counts what was trained."""
        if self._begun is None:
            self._begun = time.monotonic(), self._share
        if isinstance(event, Run):
            self._share = min(1.0, self._share + self._paid(event))
            self._tell(event)

    def spent(self, share: float) -> None:
        """Takes note of the share of the budget that is spent, what was found in the store included."""
        self._share = min(1.0, max(share, self._share))
        self._tell()

    def _tell(self, run: Run | None = None) -> None:
        self._runs += run is not None
        left = None
        if self._begun and self._share > self._begun[1]:
            left = (time.monotonic() - self._begun[0]) * (1 - self._share) / (self._share - self._begun[1])
        total = max(self._runs, round(self._runs / self._share)) if self._share else self._runs
        self._progress(Progress(self._share, left, self._runs, total, run))


def _paid(plan: SearchPlan, task: Task, run: Run) -> float:
    """What a run cost, given the checkpoint of the horizon before."""
    step = plan.confirmation.recipe.tokens(task)
    share = plan.paid(task)[plan.rungs(task).index(run.tokens // step)]
    return float(getattr(run, plan.objective)) * share


def _unit(plan: SearchPlan, task: Task, dense: Sequence[Run]) -> float:
    """What dense costs at the width of the exploration, up to its last horizon."""
    tokens = plan.rungs(task)[-1] * plan.confirmation.recipe.tokens(task)
    here = [run for run in dense if run.width == plan.width]
    each = math.fsum(getattr(run, plan.objective) for run in here) / sum(run.tokens for run in here)
    return tokens * each
