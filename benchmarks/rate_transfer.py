"""Where the best base learning rate lies, structure by structure and width by width, on real text.

    python benchmarks/rate_transfer.py [--device cuda] [--workers 6] [results.csv]

Trains the lab's GPT on `bytes` for a grid of structures, widths and base rates; the rates of all
widths follow from the base rate by `einlinear.parameter_groups`. Prints, for every structure, the
best base rate of each width and how far apart these lie, and writes the whole landscape as CSV.
Runs are kept beside the CSV until all are done: the same command goes on where it was stopped.
"""

import argparse
import csv
import json
from itertools import product
from pathlib import Path

from einlinear.lab.data import load
from einlinear.lab.machine import Machine
from einlinear.lab.store import Store
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

FAMILIES = ("dense", "btt(rank=2)", "monarch(blocks=4)")
WIDTHS = (32, 64, 128, 256, 512)
RATES = tuple(2.0**-power for power in range(9, 2, -1))
STEPS = 300
RESULTS = Path(__file__).parent / "results" / "rate_transfer.csv"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("results", type=Path, nargs="?", default=RESULTS)
    options = arguments.parse_args()
    task = load("bytes")
    recipe = Recipe(batch=16, base_width=64, base_depth=2)
    trunks = [
        Trunk(family=family, width=width, depth=2, rate=rate, seed=seed, horizons=(STEPS,), recipe=recipe)
        for width, family, rate, seed in product(WIDTHS, FAMILIES, RATES, (0, 1))
    ]
    machine = Machine(device=options.device, workers=options.workers)
    parts = options.results.with_suffix(".sqlite")
    with Store(parts) as store, Sweep(task, store, machine, options.results.with_suffix(".parts")) as sweep:
        runs = sweep.train(trunks)
    columns = ("family", "width", "rate", "seed", "tokens", "loss", "status", "fingerprint", "device", "commit")
    with options.results.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "torch"])
        writer.writerows([*(getattr(run, name) for name in columns), json.loads(run.versions)["torch"]] for run in runs)
    parts.unlink()
    for family in FAMILIES:
        best = {}
        for width in WIDTHS:
            cells = [run for run in runs if (run.family, run.width) == (family, width)]
            means = {
                rate: sum(run.loss for run in cells if run.rate == rate) / 2  # type: ignore[misc]
                for rate in RATES
                if all(run.loss is not None for run in cells if run.rate == rate)
            }
            best[width] = min(means, key=lambda rate: means[rate])
            print(f"{family:20} {width:5}  " + "  ".join(f"{rate:.4g}: {loss:.4f}" for rate, loss in means.items()))
        print(f"{family:20} best base rates {best}: within a factor of {max(best.values()) / min(best.values()):g}")


if __name__ == "__main__":
    main()
