"""Many trunks, trained by processes of this machine or of a cluster; every run is stored as soon as it is finished."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from einlinear.lab import checkpoint
from einlinear.lab.crew import Crew, Event, Processes, interrupts_noted
from einlinear.lab.data import Task
from einlinear.lab.machine import Machine
from einlinear.lab.parallel import World
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.train import Trunk, train


class Sweep:
    """Trains trunks, as far as their runs are not in the store yet.

        with Sweep(task, store, Machine.here(), folder) as sweep:
            runs = sweep.train(trunks)

    Without workers the calling process trains, or under torchrun all processes together: the first one has the
    sweep, the others `follow`.

    Args:
        task: what to train on.
        store: where runs are looked up and stored, by the calling process alone.
        machine: how to train.
        folder: where interrupted trunks are kept until they are finished; None to keep none.
        observe: called with a trunk and what happened to it, after a run was stored.
    """

    def __init__(
        self,
        task: Task,
        store: Store,
        machine: Machine,
        folder: Path | None = None,
        observe: Callable[[Trunk, Event], object] = lambda trunk, event: None,
    ) -> None:
        self._task, self._store, self._machine, self._folder, self._observe = task, store, machine, folder, observe
        self._world = World.here()
        self._crew: Crew | None = None
        if machine.workers and machine.engine == "ray":
            from einlinear.lab.cluster import Cluster

            self._crew = Cluster(task, machine)
        elif machine.workers:
            self._crew = Processes(task, machine)

    def train(self, trunks: Sequence[Trunk]) -> list[Run]:
        """Every run of `trunks`, in their order: from the store, or trained now.

        Raises what `train` and the store raise, KeyboardInterrupt among it. By then the workers have stopped,
        kept what they were at, and what they had finished is in the store.
        """
        unfinished = []
        for trunk in map(self._unfinished, trunks):
            if trunk.horizons:
                unfinished.append(trunk)
            else:
                self._forget(trunk)  # killed between storing the last run and this
        if self._crew is None:
            for trunk in unfinished:
                self._world.agreed(trunk)  # `follow` waits for it
                file, tell = self._file(trunk), partial(self._told, trunk)
                with interrupts_noted() as stop:
                    train(trunk, self._task, execution=self._machine, file=file, tell=tell, stop=stop)
                self._forget(trunk)
        elif unfinished:
            self._train_by(self._crew, unfinished)
        return [run for trunk in trunks for run in self.stored(trunk)]

    def stored(self, trunk: Trunk) -> list[Run]:
        """Those of the trunk's runs that are in the store."""
        runs = (self._store.find(trunk.run(self._task, horizon).key) for horizon in trunk.horizons)
        return [run for run in runs if run is not None]

    def _train_by(self, crew: Crew, trunks: Sequence[Trunk]) -> None:
        unfinished = set(range(len(trunks)))
        try:
            for number, trunk in enumerate(trunks):
                crew.start(number, trunk, self._file(trunk))
            while unfinished:
                for number, event in crew.received():
                    if event is None:
                        unfinished.remove(number)
                        self._forget(trunks[number])
                    else:
                        self._told(trunks[number], event)
        except BaseException:
            for _, event in crew.stop():
                if isinstance(event, Run):
                    with suppress(ValueError):  # a store that fails is why this stops
                        self._store.add(event)
            raise

    def _told(self, trunk: Trunk, event: Event) -> None:
        if isinstance(event, Run):
            self._store.add(event)
        self._observe(trunk, event)

    def _unfinished(self, trunk: Trunk) -> Trunk:
        """The trunk with only those horizons whose runs are missing."""
        found = {run.key for run in self.stored(trunk)}
        missing = (horizon for horizon in trunk.horizons if trunk.run(self._task, horizon).key not in found)
        return replace(trunk, horizons=tuple(missing))

    def _file(self, trunk: Trunk) -> Path | None:
        return self._folder and self._folder / f"{trunk.run(self._task, 0).trunk}.safetensors"

    def forget(self, trunk: Trunk) -> None:
        """Removes what is kept of a trunk that was `continued` and now is not."""
        self._forget(replace(trunk, continued=False))

    def _forget(self, trunk: Trunk) -> None:
        """Removes the state of a trunk whose runs are all stored, unless it is to be continued."""
        if not trunk.continued and (file := self._file(trunk)):
            checkpoint.remove(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._world.agreed(None)
        if self._crew:
            self._crew.close()
        if self._folder:
            with suppress(OSError):  # it still holds something, or is not there
                self._folder.rmdir()


def follow(task: Task, machine: Machine) -> None:
    """Trains every trunk that the first process's `Sweep` trains, together with it; for all others under torchrun."""
    nothing: Trunk | None = None
    while (trunk := World.here().agreed(nothing)) is not None:
        train(trunk, task, execution=machine)
