"""Sweeps that are killed at any moment, and sweeps on a cluster: every run once, and the same numbers."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from einlinear.lab.data import Sequences
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk, train

SCRIPT = """
import os, random, signal, sys, threading, torch
from pathlib import Path
from einlinear.lab.data import Sequences
from einlinear.lab.machine import Machine
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

tokens = torch.arange(3000) * 5 % 13
TASK = Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=400)
RECIPE = Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5)
TRUNKS = [
    Trunk(family=family, width=16, depth=1, rate=rate, seed=0, horizons=(40, 80), recipe=RECIPE)
    for family in ("dense", "btt(rank=2)") for rate in (0.02, 1e9)
]

if __name__ == "__main__":
    place, workers, attempt = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)

    def observe(trunk, event):
        # Once something was trained: after a random share of a second, or not at all.
        if attempt and not timers:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            timers.append(threading.Timer(random.Random(attempt).uniform(0.0, 0.4), kill))
            timers[0].start()

    timers = []
    machine = Machine(workers=workers, patience=0.0)
    with Store(place / "runs.sqlite") as store, Sweep(TASK, store, machine, place / "kept", observe) as sweep:
        sweep.train(TRUNKS)
    os._exit(0)  # before a timer that is late
"""

RECIPE = Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5)


@pytest.fixture(scope="module")
def task() -> Sequences:
    torch.set_num_threads(1)
    tokens = torch.arange(3000) * 5 % 13
    return Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=400)


def trunks(horizons: tuple[int, ...] = (40, 80)) -> list[Trunk]:
    return [
        Trunk(family=family, width=16, depth=1, rate=rate, seed=0, horizons=horizons, recipe=RECIPE)
        for family in ("dense", "btt(rank=2)")
        for rate in (0.02, 1e9)
    ]


def outcome(runs: list[Run]) -> list[tuple[object, ...]]:
    return sorted((run.key, run.status, run.loss or 0.0, run.curve) for run in runs)


@pytest.fixture(scope="module")
def whole(task: Sequences) -> list[tuple[object, ...]]:
    """What comes out of the trunks, uninterrupted; those of rate 1e9 diverge."""
    return outcome([run for trunk in trunks() for run in train(trunk, task)])


@pytest.mark.parametrize(("workers", "kills"), [(0, 3), (2, 1)])
def test_a_sweep_killed_again_and_again_loses_and_repeats_nothing(
    whole: list[tuple[object, ...]], tmp_path: Path, workers: int, kills: int
) -> None:
    """SIGKILL at random moments, then once to the end: the numbers are those of one go."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    seen: list[tuple[object, ...]] = []
    codes = []
    for attempt in (*range(1, kills + 1), 0):
        done = subprocess.run([sys.executable, script, tmp_path, str(workers), str(attempt)], timeout=250)
        codes.append(done.returncode)
        stored = rows(tmp_path / "runs.sqlite")
        assert stored[: len(seen)] == seen  # nothing that was stored is lost, or another afterwards
        seen = stored
    assert codes[-1] == 0
    assert -signal.SIGKILL in codes  # or this showed nothing
    with Store(tmp_path / "runs.sqlite") as store:
        assert outcome(store.runs()) == whole
    assert not list(tmp_path.glob("kept/*"))


def test_the_state_of_a_finished_trunk_does_not_stay(task: Sequences, tmp_path: Path) -> None:
    """Killed between storing its last run and removing its state, a sweep removes that the next time."""
    kept = tmp_path / "kept"
    with Store(tmp_path / "runs.sqlite") as store, Sweep(task, store, Machine(workers=0), kept) as sweep:
        runs = sweep.train(trunks()[:1])
        left = kept / f"{runs[0].trunk}.safetensors"
        left.parent.mkdir(exist_ok=True)
        left.touch()
        assert sweep.train(trunks()[:1]) == runs and not left.exists()
        left.touch()
        sweep.train([replace(trunks()[0], continued=True)])
        assert left.exists()  # it is to be gone on from


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_processes_that_share_a_gpu_train_what_one_trains(task: Sequences, tmp_path: Path) -> None:
    found = []
    for workers in (0, 3):
        machine = Machine(device="cuda", graphed=True, workers=workers)
        with Store(tmp_path / f"{workers}.sqlite") as store, Sweep(task, store, machine, tmp_path / "kept") as sweep:
            found.append(outcome(sweep.train(trunks())))
    assert found[0] == found[1]


def test_an_interrupt_keeps_the_state_of_what_this_process_trains(
    whole: list[tuple[object, ...]], task: Sequences, tmp_path: Path
) -> None:
    """Long before the state would have been kept by the clock."""

    def observe(trunk: Trunk, event: object) -> None:
        if isinstance(event, int):
            signal.raise_signal(signal.SIGINT)

    machine, store = Machine(workers=0, patience=1e9), tmp_path / "runs.sqlite"
    with (
        Store(store) as opened,
        Sweep(task, opened, machine, tmp_path / "kept", observe) as sweep,
        pytest.raises(KeyboardInterrupt),
    ):
        sweep.train(trunks())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [*tmp_path.glob("kept/*.safetensors")]
    with Store(store) as opened, Sweep(task, opened, Machine(workers=0), tmp_path / "kept") as sweep:
        assert outcome(sweep.train(trunks())) == whole


def rows(path: Path) -> list[tuple[object, ...]]:
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM runs ORDER BY id").fetchall()


# ---- on a Ray cluster -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


RAY = Machine(workers=2, engine="ray", patience=0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_the_same_runs(task: Sequences, whole: list[tuple[object, ...]], tmp_path: Path) -> None:
    with Store(tmp_path / "runs.sqlite") as store, Sweep(task, store, RAY, tmp_path / "kept") as sweep:
        runs = sweep.train(trunks())
        assert outcome(runs) == outcome(store.runs()) == whole
        assert sweep.train(trunks()) == runs
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_of_a_cluster_costs_what_came_after_its_last_state(task: Sequences, tmp_path: Path) -> None:
    one = replace(trunks((400, 800))[0], recipe=replace(RECIPE, batch=8))
    steps, killed = list[int](), list[int]()

    def observe(trunk: Trunk, event: int | Run) -> None:
        if isinstance(event, int):
            steps.append(event)
        if sum(steps) > 300 and not killed:
            killed.extend(training_workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with Store(tmp_path / "runs.sqlite") as store, Sweep(task, store, RAY, tmp_path / "kept", observe) as sweep:
        runs = sweep.train([one])
    assert len(killed) == 1
    assert outcome(runs) == outcome(train(one, task))
    # A state is on its way when the next ten steps are told, and is kept before them.
    assert 0 <= sum(steps) - one.steps <= 40


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_sweep_on_a_cluster_can_be_interrupted_and_goes_on_here(
    task: Sequences, whole: list[tuple[object, ...]], tmp_path: Path
) -> None:
    def interrupt(trunk: Trunk, event: int | Run) -> None:
        if isinstance(event, Run) and event.status == "done":
            raise KeyboardInterrupt

    with (
        Store(tmp_path / "runs.sqlite") as store,
        pytest.raises(KeyboardInterrupt),
        Sweep(task, store, RAY, tmp_path / "kept", interrupt) as sweep,
    ):
        sweep.train(trunks())
    assert list(tmp_path.glob("kept/*.safetensors"))
    with Store(tmp_path / "runs.sqlite") as store, Sweep(task, store, Machine(workers=0), tmp_path / "kept") as sweep:
        assert outcome(sweep.train(trunks())) == whole


def training_workers() -> list[int]:
    """The processes of this test's own cluster that are training."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = (process / "cmdline").read_bytes().startswith(b"ray::_train")
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if mine and session.encode() in Path("/proc", parent, "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
