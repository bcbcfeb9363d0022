"""Which structure spends compute best: a grid of structures and widths on one task, each at its own best rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import einlinear as el
from einlinear.lab.crew import Event
from einlinear.lab.data import Sequences, Task
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

OVERHEAD = 500_000  # FLOPs in whose time a CPU does what a token costs besides; it only serves to predict times


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison trains.

    Every family is first tuned: each of `rates` is tried at the recipe's base width, up to `tuning` tokens; where
    the best one lies on the edge of the grid, the grid grows by one in its direction, up to `extensions` times. A
    single rate is taken as it is, without a trial.
    muP takes the best rate to every other width, but nothing takes it to other lengths: after a much shorter
    training the best rate is too high. Then each family is measured at each width, seed and horizon.

    Horizons and `tuning` are in tokens (or examples), and are rounded to whole steps. Horizons are those of the
    recipe's base width: a model of r times the width is trained r ** `growth` times as long, since with one set of
    horizons for all widths the narrow ones are trained far beyond, and the wide ones far below, what is best for
    their compute. `context` is the length of sequences, None for the task's own.

    Narrow models are trained first, all families of a width together, so that a comparison that ends early compares.
    With `wide_first` it is the other way round: for many processes in a short time, which then all end with small
    models, and lose little of what they are at.

    Raises:
        ValueError: for a family that does not exist, and for numbers that make no comparison.
    """

    families: tuple[str, ...]
    widths: tuple[int, ...]
    depth: int
    horizons: tuple[int, ...]
    rates: tuple[float, ...]
    tuning: int
    recipe: Recipe
    context: int | None = None
    seeds: tuple[int, ...] = (0,)
    extensions: int = 3
    growth: float = 0.0
    wide_first: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers, and writes each family as the store does."""
        object.__setattr__(self, "families", tuple(dict.fromkeys(str(el.structure(text)) for text in self.families)))
        for name in ("families", "widths", "horizons", "rates", "seeds"):
            values = getattr(self, name)
            if not values or any(value <= 0 for value in values if name not in ("families", "seeds")):
                raise ValueError(f"Planning a comparison: {name}={values!r}; give at least one, and positive numbers.")
            object.__setattr__(self, name, tuple(sorted(set(values))) if name != "families" else values)

    def cut(self, task: Task) -> Task:
        """The task in sequences of the plan's length; its data stay the same, and so does their fingerprint."""
        return replace(task, context=self.context) if self.context and isinstance(task, Sequences) else task

    def steps(self, task: Task, tokens: int) -> int:
        """A number of tokens as whole steps."""
        return max(1, round(tokens / self.recipe.tokens(task)))

    def trials(self, task: Task) -> list[Trunk]:
        """The trials of the grid as it is at first; none for a single rate."""
        if len(self.rates) == 1:
            return []
        return [self.trial(task, family, rate) for family in self.families for rate in self.rates]

    def trial(self, task: Task, family: str, rate: float) -> Trunk:
        """One trial of a base rate."""
        return Trunk(
            family=family, width=self.recipe.base_width, depth=self.depth, rate=rate, seed=self.seeds[0],
            horizons=(self.steps(task, self.tuning),), recipe=self.recipe, purpose="tune",
        )  # fmt: skip

    def trunks(self, task: Task, rates: Mapping[str, float]) -> list[Trunk]:
        """What to measure for the families that have a rate: width by width, and there the costliest first."""
        trunks = [
            Trunk(
                family=family, width=width, depth=self.depth, rate=rates[family], seed=seed,
                horizons=self.lengths(task, width), recipe=self.recipe,
            )
            for family, width, seed in product(self.families, self.widths, self.seeds)
            if family in rates
        ]  # fmt: skip
        sign = -1 if self.wide_first else 1
        return sorted(trunks, key=lambda trunk: (sign * trunk.width, trunk.seed, -trunk.run(task, 1).flops))

    def lengths(self, task: Task, width: int) -> tuple[int, ...]:
        """The horizons of models of a width, in steps, ascending."""
        factor = (width / self.recipe.base_width) ** self.growth
        return tuple(sorted({self.steps(task, round(factor * tokens)) for tokens in self.horizons}))


@dataclass(frozen=True)
class Progress:
    """How far a comparison has come."""

    share: float  # of all the work that is foreseen
    seconds_left: float | None  # None until there is a run to go by
    runs: int  # finished, those found in the store included
    total: int  # foreseen; the grid of rates may still grow
    run: Run | None = None  # the one just finished


def compare(
    plan: Plan,
    task: Task,
    store: Store,
    *,
    machine: Machine | None = None,
    folder: Path | None = None,
    progress: Callable[[Progress], object] = lambda progress: None,
) -> list[Run]:
    """Trains what a plan asks for and the store does not have yet; returns all its runs, tuning included.

    Each run is stored when it is finished. Interrupted, the same call goes on where it stopped: finished runs
    are found in the store, and a run in progress in `folder`.

    Args:
        plan: what to train.
        task: on what.
        store: where runs are found and kept.
        machine: how to train; by default with all of this machine.
        folder: where runs in progress are kept; None to lose them.
        progress: called after every run, and several times a second.

    Raises:
        ValueError: before any training, where a family cannot be had at a width of the plan.
        KeyboardInterrupt, OSError: once the runs in progress have been kept.
    """
    task, machine = plan.cut(task), machine or Machine.here()
    # It counts the costs of every model, and so refuses a family at a width where it cannot be had.
    meter = _Meter(plan, task, machine, progress)
    with Sweep(task, store, machine, folder, meter.observe) as sweep:

        def train(trunks: Sequence[Trunk]) -> list[Run]:
            meter.foresee(trunks, sweep)
            return sweep.train(trunks)

        tuning, (rates,) = tune([plan], task, train)
        return tuning + train(plan.trunks(task, rates))


def tune(
    plans: Sequence[Plan], task: Task, train: Callable[[Sequence[Trunk]], list[Run]]
) -> tuple[list[Run], list[dict[str, float]]]:
    """The trials of plans on one task, and for each plan the best rate of every family that does not always diverge.

    Those of all plans and families are trained together, by `train`, which gives the runs of trunks; then what their
    grids grow by.
    """
    grids = [_Grid(plan, family, plan.rates) for plan in plans for family in plan.families]
    runs: dict[object, Run] = {}
    growing = True
    while growing:
        trials = dict.fromkeys(trial for grid in grids for trial in grid.trials(task))
        runs |= {run.key: run for run in train(list(trials))}
        growing = any([grid.grow(task, runs) for grid in grids])
    rates = [{grid.family: grid.best for grid in grids if grid.plan is plan and grid.best} for plan in plans]
    return list(runs.values()), rates


@dataclass
class _Grid:
    """The rates that a plan tries for a family, and the best one so far; None where the model always diverges."""

    plan: Plan
    family: str
    rates: tuple[float, ...]
    best: float | None = None

    def trials(self, task: Task) -> list[Trunk]:
        """What is to be tried; nothing for a single rate."""
        return [self.plan.trial(task, self.family, rate) for rate in self.rates if len(self.rates) > 1]

    def grow(self, task: Task, runs: Mapping[object, Run]) -> bool:
        """Finds the best rate by the runs of all trials, by key; True if there are more to try."""
        if len(self.rates) == 1:
            (self.best,) = self.rates
            return False
        self.best = _best([runs[trial.run(task, *trial.horizons).key] for trial in self.trials(task)])
        before = self.rates
        if len(before) < len(self.plan.rates) + self.plan.extensions:
            self.rates = _grown(before, self.best)
        return self.rates != before


def _best(trials: Sequence[Run]) -> float | None:
    losses = {run.rate: run.loss for run in trials if run.loss is not None}
    return min(losses, key=lambda rate: losses[rate], default=None)


def _grown(rates: tuple[float, ...], best: float | None) -> tuple[float, ...]:
    """The grid, with one more rate where the best lies on its edge; where all diverged, a smaller one."""
    ratio = rates[1] / rates[0]
    if best is None or best == rates[0]:
        return (rates[0] / ratio, *rates)
    return (*rates, rates[-1] * ratio) if best == rates[-1] else rates


@dataclass
class _Ahead:
    """What is ahead of one trunk."""

    step: float  # work of one step
    total: float
    left: float
    runs: int
    missing: int

    def finish(self) -> None:
        """One run less; with the last one nothing is left."""
        self.missing -= 1
        self.left = self.left if self.missing else 0.0


class _Meter:
    """Foresees how long is left, from what each family has taken so far for as much work."""

    def __init__(self, plan: Plan, task: Task, machine: Machine, progress: Callable[[Progress], object]) -> None:
        self._task, self._workers, self._progress = task, max(1, machine.workers), progress
        self._runs: dict[object, Run] = {}  # finished, by key
        self._ahead = self._all_of(plan.trials(task)) | self._all_of(
            plan.trunks(task, dict.fromkeys(plan.families, 0.0))
        )

    def foresee(self, trunks: Sequence[Trunk], sweep: Sweep) -> None:
        """Takes these for all trunks of their purpose, and counts their runs that are in the store already."""
        purposes = {trunk.purpose for trunk in trunks}
        others = {slot: ahead for slot, ahead in self._ahead.items() if slot.purpose not in purposes}
        self._ahead = others | self._all_of(trunks)
        for trunk in trunks:
            for run in sweep.stored(trunk):
                self._runs[run.key] = run
                self._ahead[_slot(trunk)].finish()

    def observe(self, trunk: Trunk, event: Event) -> None:
        """Counts what was done, and tells of it."""
        ahead, run = self._ahead[_slot(trunk)], None
        if isinstance(event, Run):
            run = self._runs[event.key] = event
            ahead.finish()
        else:
            ahead.left = max(0.0, ahead.left - event * ahead.step)
        every = self._ahead.values()
        share = 1 - sum(a.left for a in every) / sum(a.total for a in every)
        runs, missing = sum(a.runs for a in every), sum(a.missing for a in every)
        self._progress(Progress(share, self._seconds_left(), runs - missing, runs, run))

    def _all_of(self, trunks: Sequence[Trunk]) -> dict[Trunk, _Ahead]:
        found = {}
        for trunk in trunks:
            step, runs = work(trunk.run(self._task, 1)), len(trunk.horizons)
            found[_slot(trunk)] = _Ahead(step, trunk.steps * step, trunk.steps * step, runs, runs)
        return found

    def _seconds_left(self) -> float | None:
        if not self._runs:
            return None
        seconds = 0.0
        for trunk, ahead in self._ahead.items():
            own = [run for run in self._runs.values() if run.family == trunk.family]
            known = own or list(self._runs.values())
            seconds += ahead.left * sum(run.seconds for run in known) / sum(map(work, known))
        return seconds / self._workers


def _slot(trunk: Trunk) -> Trunk:
    """What a trunk is in the plan, whichever of its runs are missing; rates to measure at are not known yet."""
    return replace(trunk, rate=trunk.rate if trunk.purpose == "tune" else 0.0, horizons=())


def work(run: Run) -> float:
    """What a run takes, as FLOPs of large matmuls, to predict times; in small models the rest is of their order."""
    return run.flops + OVERHEAD * run.tokens


def default_plan(task: Task, device: str = "cpu") -> Plan:
    """A comparison that says something, in some minutes of two idle cores or of one GPU (`--plan` says how many).

    On a CPU widths are those near the frontier of so short trainings: of the compute spent at width 96 and 128 nearly
    all went into cells above it. Seeds differ by 2 to 3 % of the loss, as much as a multiplier of 1.3, so that three of
    them say more than a wider range. Low rank grows with the width, as √d: a fixed rank is another structure, and
    another bottleneck, at every width.
    """
    window, context = 4, None  # sets of examples are small, and so are their batches
    if isinstance(task, Sequences):
        window = task.context
        if device == "cpu" and task.record is None:  # half the context needs half the attention, and learns faster
            window = context = min(64, task.context)
    if device == "cpu":
        return Plan(
            families=("dense", "low_rank", "monarch(blocks=4)", "btt(rank=2)"),
            widths=(16, 32, 48, 64),
            depth=2,
            horizons=(80_000, 160_000, 320_000),
            rates=(2**-8, 2**-7, 2**-6),
            tuning=320_000,
            recipe=Recipe(batch=max(1, 1024 // window), base_width=64, base_depth=2),
            context=context,
            seeds=(0, 1, 2),
        )
    return Plan(
        families=("dense", "low_rank(rank=64)", "monarch(blocks=16)", "btt(rank=4)"),
        widths=(128, 256, 512, 1024),
        depth=4,
        horizons=(2**20, 2**21, 2**22),
        rates=(2**-9, 2**-8, 2**-7),
        tuning=2**22,
        recipe=Recipe(batch=max(1, 8192 // window), base_width=256, base_depth=4, head=64, precision="bfloat16"),
        context=context,
        seeds=(0, 1),
    )
