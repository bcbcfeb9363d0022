"""Many trunks, trained by processes of this machine; every run is in the store as soon as it is finished."""

import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Self

import torch

from einlinear.lab import checkpoint
from einlinear.lab.data import Task
from einlinear.lab.parallel import World
from einlinear.lab.run import Run
from einlinear.lab.step import Execution
from einlinear.lab.store import Store
from einlinear.lab.train import Trunk, train

GRACE = 60  # seconds in which a worker without a calling process keeps its state before it ends


@dataclass(frozen=True, kw_only=True)
class Machine(Execution):
    """How to train many trunks, as far as it does not change what comes out.

    `workers` processes train a trunk each, with `threads` threads of the CPU; without any, the calling process
    trains. One thread each by default: two on a busy machine run small batched matmuls many times slower.
    """

    workers: int = 1
    threads: int = 1

    @classmethod
    def here(cls, device: str | None = None) -> "Machine":
        """All of this machine: its accelerator if there is one, else a worker for each core it may use."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device != "cpu":
            return cls(device=device, graphed=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(workers=cores or 1)


Event = int | Run
"""What training tells as it goes: steps trained since last told, or a finished run."""


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
        self._pool: ProcessPoolExecutor | None = None
        if machine.workers:
            spawned = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
            self._shared = _Shared(task, machine, spawned.Queue(), spawned.Event())
            self._pool = ProcessPoolExecutor(machine.workers, spawned, _begin, (self._shared,))

    def train(self, trunks: Sequence[Trunk]) -> list[Run]:
        """Every run of `trunks`, in their order: from the store, or trained now.

        Raises what `train` and the store raise, KeyboardInterrupt among it. By then the workers have stopped,
        kept what they were at, and what they had finished is in the store.
        """
        unfinished = [trunk for trunk in map(self._unfinished, trunks) if trunk.horizons]
        if self._pool is None:
            for trunk in unfinished:
                self._world.agreed(trunk)  # `follow` waits for it
                file, tell = self._file(trunk), partial(self._told, trunk)
                train(trunk, self._task, execution=self._machine, file=file, tell=tell)
                self._forget(trunk)
        elif unfinished:
            self._train_by_workers(self._pool, unfinished)
        return [run for trunk in trunks for run in self.stored(trunk)]

    def stored(self, trunk: Trunk) -> list[Run]:
        """Those of the trunk's runs that are in the store."""
        runs = (self._store.find(trunk.run(self._task, horizon).key) for horizon in trunk.horizons)
        return [run for run in runs if run is not None]

    def _train_by_workers(self, pool: ProcessPoolExecutor, trunks: Sequence[Trunk]) -> None:
        with _interrupts_ignored():  # by the workers, which inherit this when they are started
            futures = [pool.submit(_train, n, trunk, self._file(trunk)) for n, trunk in enumerate(trunks)]
        unfinished = set(range(len(trunks)))
        try:
            while unfinished:
                for number, event in self._received():
                    if event is None:
                        unfinished.remove(number)
                        self._forget(trunks[number])
                    else:
                        self._told(trunks[number], event)
                for future in futures:
                    if future.done():
                        future.result()  # raises what the worker raised
        except BaseException as error:
            self._shared.stop.set()
            for future in futures:
                future.cancel()
            while not all(future.done() for future in futures):
                for _, event in self._received():
                    if isinstance(event, Run):
                        with suppress(ValueError):  # a store that fails is why this stops
                            self._store.add(event)
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "Training stopped: a worker process was killed from outside, most likely for lack of memory. Give "
                    "the same command again, with fewer workers or smaller widths; all finished runs are stored."
                ) from error
            raise

    def _received(self) -> Iterator[tuple[int, Event | None]]:
        """The events that come within half a second."""
        with suppress(queue.Empty):
            yield self._shared.events.get(timeout=0.5)
            while True:
                yield self._shared.events.get_nowait()

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

    def _forget(self, trunk: Trunk) -> None:
        """Removes the state of a trunk whose runs are all stored."""
        if file := self._file(trunk):
            checkpoint.remove(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._world.agreed(None)
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if self._folder:
            with suppress(OSError):  # it still holds something, or is not there
                self._folder.rmdir()


def follow(task: Task, machine: Machine) -> None:
    """Trains every trunk that the first process's `Sweep` trains, together with it; for all others under torchrun."""
    nothing: Trunk | None = None
    while (trunk := World.here().agreed(nothing)) is not None:
        train(trunk, task, execution=machine)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class _Shared:
    """What the calling process and its workers have in common."""

    task: Task
    machine: Machine
    events: "Queue[tuple[int, Event | None]]"  # with the number of the trunk; None says that it is done
    stop: Flag


_shared: _Shared  # in a worker


def _begin(shared: _Shared) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(shared.machine.threads)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    """Where the calling process is killed, keeps the state of what the worker is at, then ends the worker too."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    multiprocessing.connection.wait([caller.sentinel])
    _shared.stop.set()
    time.sleep(GRACE)
    os._exit(1)


def _train(number: int, trunk: Trunk, file: Path | None) -> None:
    if _shared.stop.is_set():  # it was already on its way to this worker
        return
    tell = partial(_tell, number)
    train(trunk, _shared.task, file=file, tell=tell, stop=_shared.stop.is_set, execution=_shared.machine)
    tell(None)


def _tell(number: int, event: Event | None) -> None:
    _shared.events.put((number, event))
