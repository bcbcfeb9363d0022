"""Trains every candidate of a small search to every horizon: the recorded runs that searches are replayed on.

    python benchmarks/search_runs.py runs/search_space.sqlite     # some 25 CPU-minutes; goes on where it was stopped

Rows go to benchmarks/results/search_runs.csv as far as they have come. `benchmarks/search.py` replays searches on them.
"""

import csv
import random
import sys
from dataclasses import replace
from pathlib import Path

import einlinear as el
from einlinear.lab.data import Sequences, load
from einlinear.lab.machine import Machine
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

RESULTS = Path(__file__).parent / "results" / "search_runs.csv"
WIDTH, DEPTH, RATE = 64, 1, 2**-7  # the best of three rates of dense at this width
HORIZONS = (75, 150, 300)  # steps of 512 tokens
SEEDS = (0, 1)
COLUMNS = (
    "family", "width", "depth", "tokens", "rate", "seed", "status", "loss", "parameters", "flops", "linear_flops",
    "seconds", "trunk", "device", "versions", "commit",
)  # fmt: skip


def main() -> None:
    task = load("bytes")
    assert isinstance(task, Sequences)
    task = replace(task, context=32)
    recipe = Recipe(batch=16, base_width=WIDTH, base_depth=DEPTH)
    common = {"depth": DEPTH, "rate": RATE, "recipe": recipe, "horizons": HORIZONS, "purpose": "search"}
    pool = [candidate.family for candidate in el.candidates(WIDTH)]
    random.Random(0).shuffle(pool)
    trunks = [Trunk(family="dense", width=w, seed=s, **common) for s in SEEDS for w in (32, 48, 64, 96)]
    trunks += [Trunk(family=family, width=WIDTH, seed=s, **common) for family in pool for s in SEEDS]
    with Store(sys.argv[1]) as store, Sweep(task, store, replace(Machine.here("cpu"), workers=2)) as sweep:
        for first in range(0, len(trunks), 8):
            sweep.train(trunks[first : first + 8])
            with RESULTS.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows([getattr(run, name) for name in COLUMNS] for run in store.runs())
            print(f"{min(first + 8, len(trunks))} of {len(trunks)} trunks", flush=True)


if __name__ == "__main__":
    main()
