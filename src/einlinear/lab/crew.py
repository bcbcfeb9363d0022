"""Those who train the trunks of a sweep, one each at a time: processes of this machine."""

import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Protocol

import torch

from einlinear.lab.data import Task
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.train import Trunk, train

GRACE = 60  # seconds in which a worker without a calling process keeps its state before it ends
LISTENING = 0.5  # seconds that `Crew.received` waits at most

Event = int | Run
"""What training tells as it goes: steps trained since last told, or a finished run."""

Message = tuple[int, Event | None]
"""The number of a trunk and what happened to it; None says that it is done."""


class Crew(Protocol):
    """What a sweep asks of those who train for it."""

    def start(self, number: int, trunk: Trunk, file: Path | None) -> None:
        """Has a trunk trained as soon as somebody is free; its state is kept in the file, and resumed from there."""

    def received(self) -> Iterator[Message]:
        """What has happened within half a second. Raises what a worker raised."""

    def stop(self) -> Iterator[Message]:
        """Has everyone keep the state of what they are at, and end; gives what happens until then."""

    def close(self) -> None:
        """Lets them go."""


class Processes:
    """Worker processes of this machine, as long as the calling one lives."""

    def __init__(self, task: Task, machine: Machine) -> None:
        spawned = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
        self._shared = _Shared(task, machine, spawned.Queue(), spawned.Event())
        self._pool = ProcessPoolExecutor(machine.workers, spawned, _begin, (self._shared,))
        self._futures: list[Future[None]] = []

    def start(self, number: int, trunk: Trunk, file: Path | None) -> None:
        with _interrupts_ignored():  # by the workers, which inherit this when they are started
            self._futures.append(self._pool.submit(_train, number, trunk, file))

    def received(self) -> Iterator[Message]:
        yield from self._told()
        for future in [future for future in self._futures if future.done()]:
            self._futures.remove(future)
            try:
                future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "Training stopped: a worker process was killed from outside, most likely for lack of memory. Give "
                    "the same command again, with fewer workers or smaller widths; all finished runs are stored."
                ) from error

    def stop(self) -> Iterator[Message]:
        self._shared.stop.set()
        for future in self._futures:
            future.cancel()
        while not all(future.done() for future in self._futures):
            yield from self._told()
        yield from self._told(wait=0.0)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _told(self, wait: float = LISTENING) -> Iterator[Message]:
        with suppress(queue.Empty):
            yield self._shared.events.get(timeout=wait)
            while True:
                yield self._shared.events.get_nowait()


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


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Whether there was an interrupt: the first one ends nothing, so that a training can keep its state first."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return

    def note(*_: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)  # the second one does what it always does

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class _Shared:
    """What the calling process and its workers have in common."""

    task: Task
    machine: Machine
    events: "Queue[Message]"
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
    train(trunk, _shared.task, execution=_shared.machine, file=file, tell=tell, stop=_shared.stop.is_set)
    tell(None)


def _tell(number: int, event: Event | None) -> None:
    _shared.events.put((number, event))
