"""Trains every candidate of a small search space at every horizon: the recorded runs that searches are replayed on.

    python benchmarks/search_runs.py runs/search_space.sqlite     # some 10 CPU-minutes; goes on where it was stopped

Rows go to benchmarks/results/search_runs.csv as far as they have come. `benchmarks/search.py` replays searches on them.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

from einlinear.lab.data import Sequences, load
from einlinear.lab.search.space import candidates
from einlinear.lab.store import Store
from einlinear.lab.sweep import Machine, Sweep
from einlinear.lab.train import Recipe, Trunk

RESULTS = Path(__file__).parent / "results" / "search_runs.csv"
WIDTH, DEPTH, RATE = 64, 1, 2**-6
HORIZONS = (50, 100, 200)  # steps of 256 tokens
COLUMNS = (
    "family",
    "width",
    "depth",
    "tokens",
    "rate",
    "seed",
    "status",
    "loss",
    "parameters",
    "flops",
    "seconds",
    "trunk",
)


def main() -> None:
    task = load("bytes")
    assert isinstance(task, Sequences)
    task = replace(task, context=64)
    recipe = Recipe(batch=4, base_width=WIDTH, base_depth=DEPTH, warmup=10)
    common = {"depth": DEPTH, "rate": RATE, "recipe": recipe}
    trunks = [
        Trunk(family="dense", width=width, seed=seed, horizons=(*HORIZONS, 400), **common)
        for seed in (0, 1, 2)
        for width in (32, 48, 64, 96)
    ]
    pool = candidates(WIDTH, exponents=(7,), least_rank=0.5)
    trunks += [
        Trunk(family=candidate.family, width=WIDTH, seed=seed, horizons=HORIZONS, **common)
        for seed in (0, 1)
        for candidate in pool
    ]
    store = Store(sys.argv[1])

    def write() -> None:
        runs = store.runs()
        with RESULTS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, "device", "versions", "commit"])
            writer.writerows(
                [getattr(run, name) for name in (*COLUMNS, "device", "versions", "commit")] for run in runs
            )

    with store, Sweep(task, store, replace(Machine.here("cpu"), workers=2)) as sweep:
        for first in range(0, len(trunks), 8):
            sweep.train(trunks[first : first + 8])
            write()
            print(f"{min(first + 8, len(trunks))} of {len(trunks)} trunks", flush=True)


if __name__ == "__main__":
    main()
