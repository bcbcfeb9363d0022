"""Trains every candidate of a space to every rung, with several seeds: the record that searches are replayed on.

    python benchmarks/search_runs.py teacher runs/record     # some 35 CPU-minutes; goes on where it was stopped
    python benchmarks/search_runs.py bytes runs/record       # some 85

The folder gets a store and, written from it, a CSV like benchmarks/results/search_runs_teacher.csv. Candidates are all
of `el.candidates(64)`, shuffled; a seed is begun when the seeds before it are done, so that what there was time for is
a sample of them. `benchmarks/search.py` replays searches on the record.
"""

import argparse
import csv
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import einlinear as el
from einlinear.lab.data import Sequences, Task, load
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

WIDTH = 64
DENSE = (32, 48, 64, 96)  # widths that give dense's law
COLUMNS = (
    "task", "family", "width", "depth", "steps", "tokens", "rate", "seed", "status", "loss", "parameters", "flops",
    "seconds", "device", "torch", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What is trained on one task. The rate is dense's best of five, at this width and some 800 steps."""

    task: Callable[[], Task]
    rungs: tuple[int, ...]  # steps
    batch: int
    depth: int
    rate: float

    def trunk(self, family: str, width: int, seed: int) -> Trunk:
        recipe = Recipe(batch=self.batch, base_width=WIDTH, base_depth=self.depth)
        return Trunk(
            family=family, width=width, depth=self.depth, rate=self.rate, seed=seed, horizons=self.rungs, recipe=recipe,
            purpose="search",
        )  # fmt: skip


def short_text() -> Task:
    """Source text in sequences of 32 bytes, and less of it to validate on, which took a third of the time."""
    task = load("bytes")
    assert isinstance(task, Sequences)
    return replace(task, context=32, limit=2**14)


RECORDS = {
    "teacher": Record(lambda: load("teacher"), (100, 200, 400, 800, 1600), batch=128, depth=2, rate=2**-10),
    "bytes": Record(short_text, (50, 100, 200, 400, 800), batch=16, depth=1, rate=2**-8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", choices=sorted(RECORDS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=None, help="only the first so many")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so many; 0 for when all is done")
    options = parser.parse_args()
    record = RECORDS[options.record]
    task = record.task()
    pool = [candidate.family for candidate in el.candidates(WIDTH)]
    random.Random(0).shuffle(pool)
    pool = pool[: options.candidates]
    trunks = [
        trunk
        for seed in range(options.seeds)
        for trunk in (
            *(record.trunk("dense", width, seed) for width in DENSE),
            *(record.trunk(family, WIDTH, seed) for family in pool),
        )
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    machine = replace(Machine.here("cpu"), workers=options.workers)
    done = 0

    def observe(trunk: Trunk, event: int | Run) -> None:
        nonlocal done
        if isinstance(event, Run) and event.tokens == record.rungs[-1] * trunk.recipe.tokens(task):
            done += 1
            print(f"{done}: {event.family} seed {event.seed} {event.loss} in {event.seconds:.1f} s", flush=True)

    signal.signal(signal.SIGALRM, signal.default_int_handler)  # it stops as an interrupt would
    with Store(str(options.folder / f"{options.record}.sqlite")) as store:
        try:
            with Sweep(task, store, machine, observe=observe) as sweep:
                signal.alarm(options.seconds)
                sweep.train(trunks)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", flush=True)
        signal.alarm(0)
        of_step = record.trunk("dense", WIDTH, 0).recipe.tokens(task)
        write(store.runs(), of_step, options.folder / f"search_runs_{options.record}.csv")


def write(runs: list[Run], of_step: int, path: Path) -> None:
    """The runs as CSV; a step takes `of_step` tokens."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for run in sorted(runs, key=lambda run: (run.seed, run.width, run.family, run.tokens)):
            row = {column: getattr(run, column, "") for column in COLUMNS} | {
                "steps": run.tokens // of_step,
                "loss": "" if run.loss is None else f"{run.loss:.6g}",
                "seconds": f"{run.seconds:.3f}",
                "torch": json.loads(run.versions)["torch"],
                "commit": (run.commit or os.environ.get("COMMIT", ""))[:12],
            }
            writer.writerow(row)
    print(f"{len(runs)} runs in {path}", flush=True)


if __name__ == "__main__":
    main()
