"""Those who train the trunks of a sweep as workers of a Ray cluster, here or on many machines.

    machine = Machine(workers=8, engine="ray")  # instead of Machine(workers=8)

Workers need no disk in common with the caller: states of trunks under way come to it as they are saved, and go
from it to whoever takes a trunk over from a worker that died.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from einlinear.lab.crew import LISTENING, Message
from einlinear.lab.data import Task
from einlinear.lab.extras import extra
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.train import Trunk, train

with extra("ray"):
    ray: Any = import_module("ray")  # no annotations of its own here: it need not be installed to check ours

DEATHS = 3  # of workers, one after the other without a word, after which a trunk is given up


class Cluster:
    """Ray tasks: at most `machine.workers` at once, each with `machine.threads` CPUs, and a GPU where it trains on one.

    Joins the cluster that RAY_ADDRESS names, or starts one on this machine and ends it when closed.
    """

    def __init__(self, task: Task, machine: Machine) -> None:
        self._started = not ray.is_initialized()
        if self._started:
            here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": machine.workers * machine.threads}
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **here)
        cuda = torch.device(machine.device).type == "cuda"
        # A task that dies is started again from its last state, which Ray would not know.
        needs: dict[str, Any] = {"num_cpus": machine.threads, "num_gpus": int(cuda), "max_retries": 0}
        self._task, self._machine = task, machine
        self._train, self._given = ray.remote(**needs)(_train), ray.put((task, machine))
        self._post = ray.remote(num_cpus=0)(_Post).remote()
        self._trunks: dict[int, tuple[Trunk, Path | None]] = {}
        self._waiting: list[int] = []
        self._running: dict[Any, int] = {}
        self._deaths: dict[int, int] = {}

    def start(self, number: int, trunk: Trunk, file: Path | None) -> None:
        self._trunks[number] = trunk, file
        self._waiting.append(number)

    def received(self) -> Iterator[Message]:
        self._submit()
        done, _ = ray.wait(list(self._running), timeout=LISTENING) if self._running else ([], [])
        yield from self._told()
        for future in done:
            number = self._running.pop(future)
            try:
                ray.get(future)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
                self._deaths[number] = self._deaths.get(number, 0) + 1
                if self._deaths[number] >= DEATHS:
                    raise ChildProcessError(
                        f"Training stopped: {DEATHS} workers of the Ray cluster died one after the other on the same "
                        f"trunk ({self._trunks[number][0].family}, width {self._trunks[number][0].width}), most likely "
                        f"for lack of memory. All finished runs are stored."
                    ) from None
                self._waiting.insert(0, number)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

    def stop(self) -> Iterator[Message]:
        self._waiting.clear()
        ray.get(self._post.stop.remote())
        while self._running:
            done, _ = ray.wait(list(self._running), timeout=LISTENING)
            for future in done:
                del self._running[future]
            yield from self._told()
        yield from self._told()

    def close(self) -> None:
        if self._started:
            ray.shutdown()

    def _submit(self) -> None:
        while self._waiting and len(self._running) < max(1, self._machine.workers):
            number = self._waiting.pop(0)
            trunk, file = self._trunks[number]
            state = file.read_bytes() if file and file.exists() else None
            self._running[self._train.remote(number, trunk, state, self._given, self._post)] = number

    def _told(self) -> Iterator[Message]:
        for number, event in ray.get(self._post.take.remote()):
            self._deaths.pop(number, None)
            trunk, file = self._trunks[number]
            if isinstance(event, bytes):
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    partial = file.with_suffix(".partial")
                    partial.write_bytes(event)
                    partial.replace(file)
                continue
            if isinstance(event, Run):
                left = tuple(h for h in trunk.horizons if trunk.run(self._task, h).key != event.key)
                self._trunks[number] = replace(trunk, horizons=left), file
            yield number, event


class _Post:
    """Where workers leave what they have to tell, in a process of its own."""

    def __init__(self) -> None:
        self._left: list[tuple[int, Any]] = []
        self._stopped = False

    def leave(self, number: int, event: Any) -> None:
        self._left.append((number, event))

    def take(self) -> list[tuple[int, Any]]:
        left, self._left = self._left, []
        return left

    def stop(self) -> None:
        self._stopped = True

    def stopped(self) -> bool:
        return self._stopped


def _train(number: int, trunk: Trunk, state: bytes | None, given: tuple[Task, Machine], post: Any) -> None:
    task, machine = given
    torch.set_num_threads(machine.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trunk.safetensors")
        if state:
            file.write_bytes(state)
        sent = file.stat().st_mtime_ns if state else 0

        def keep() -> None:
            nonlocal sent
            if file.exists() and (written := file.stat().st_mtime_ns) != sent:
                ray.get(post.leave.remote(number, file.read_bytes()))
                sent = written

        def tell(event: int | Run | None) -> None:
            keep()
            ray.get(post.leave.remote(number, event))

        try:
            stop = lambda: ray.get(post.stopped.remote())  # noqa: E731
            train(trunk, task, execution=machine, file=file, tell=tell, stop=stop)
            tell(None)
        except KeyboardInterrupt:
            keep()
