"""Training a trunk to its end, interrupted or not: its branches, its runs, and what is kept in between."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from einlinear.lab import checkpoint
from einlinear.lab.data import Task
from einlinear.lab.failure import Failure, failed
from einlinear.lab.parallel import World
from einlinear.lab.provenance import provenance
from einlinear.lab.run import Run
from einlinear.lab.step import PLAIN, Execution
from einlinear.lab.training import CHUNK as CHUNK
from einlinear.lab.training import Training as Training
from einlinear.lab.training import schedule as schedule
from einlinear.lab.trunk import Recipe as Recipe
from einlinear.lab.trunk import Trunk as Trunk


def train(
    trunk: Trunk,
    task: Task,
    *,
    execution: Execution = PLAIN,
    file: Path | None = None,
    tell: Callable[[int | Run], object] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Trains a trunk and, from it, a branch for each horizon that cools down and is evaluated.

    The result is a function of trunk and task: on a CPU the same numbers bit by bit, whether it was interrupted
    or not, and whichever other horizons branch off before. Under torchrun all processes call this alike, and
    only the first one's `file`, `tell` and `stop` are used.

    Args:
        trunk: what to train.
        task: on what.
        execution: how.
        file: where the state is kept in between and when stopped, and resumed from; the caller removes it.
        tell: called with each run as soon as it is finished, diverged ones included, and in between with the
            number of steps trained since last told.
        stop: asked every ten steps; once it answers True the state is kept and KeyboardInterrupt raised.

    Returns:
        A run for each horizon.

    Raises:
        KeyboardInterrupt: if told to stop.
        OSError, ValueError: if the state cannot be kept, the file is damaged, or a batch cannot be cut as asked.
    """
    if execution.graphed:
        _give_back()
    runs: list[Run] = []
    waiting = sorted(trunk.horizons)
    world = World.here()
    first = world.rank == 0
    training: Training | None = None
    kept = world.agreed(checkpoint.load(file) if file and first else {})
    saved = time.monotonic()

    def advance(training: Training, name: str, until: int, cooldown: int | None = None) -> None:
        nonlocal saved
        for steps in training.advance(until, cooldown):
            if first:
                tell(steps)
            told, due = world.agreed((stop(), file is not None and time.monotonic() - saved > execution.patience))
            if told or due:
                states = kept | {name: training.state()}
                if file and first:
                    checkpoint.save(file, states)
                saved = time.monotonic()
            if told:
                raise KeyboardInterrupt

    def record(training: Training | None, horizon: int, **results: object) -> None:
        measured = {} if training is None else training.measured()
        facts = provenance(execution.device, world.size) | measured | results
        runs.append(replace(trunk.run(task, horizon), **facts))  # type: ignore[arg-type]
        if first:
            tell(runs[-1])

    try:
        training = Training(trunk, task, execution)
        if "trunk" in kept and kept["trunk"].step <= trunk.branch(waiting[0]):
            training.load(kept["trunk"])
        else:
            kept = {}
        while waiting:
            horizon, branch = waiting[0], trunk.branch(waiting[0])
            advance(training, "trunk", branch)
            kept["trunk"] = training.state()
            finish = training
            try:
                finish = training.finish() if trunk.recipe.finish_dense else training
                name = f"horizon {horizon}"
                if name in kept:
                    finish.load(kept[name])
                advance(finish, name, horizon, trunk.cooldown(horizon))
                results: dict[str, object] = {"loss": finish.evaluate()}
            except (Failure, RuntimeError) as error:
                results = failed(error)
            record(finish, waiting.pop(0), **results)
            kept = {"trunk": kept["trunk"]}
            training.load(kept["trunk"])
        if trunk.continued and file and first:
            checkpoint.save(file, kept)
    except (Failure, RuntimeError) as error:
        for horizon in waiting:
            record(training, horizon, **failed(error))
    return runs


def _give_back() -> None:
    """Frees what earlier trainings of this process left on the device, for other processes that train on it.

    Memory of CUDA graphs is not used again by later ones, and another process that lacks it cannot ask for it.
    """
    gc.collect()  # models and their optimizers refer to each other
    torch.cuda.empty_cache()
