"""Which factor of a branch's last layer should start at zero: the first or the last? Losses of small GPTs, as CSV.

    python benchmarks/zero_init.py [--seeds 3] [--steps 160]

Both start the branch at zero. With the last factor at zero only it has a gradient at first, with the first at
zero only that one. Every draw, batch and rate is the same otherwise, so rows compare in pairs.
"""

import argparse
import csv
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

from einlinear.lab.data import load
from einlinear.lab.train import Recipe, Trunk, train
from einlinear.layer import Linear

FAMILIES = ("low_rank(rank=16)", "monarch(blocks=4)", "btt(rank=2)")
WIDTHS = (64, 128)
RATES = (2**-8, 2**-7, 2**-6)
COLUMNS = ("family", "width", "rate", "seed", "tokens", "zero", "status", "loss", "device", "versions", "commit")


def zeroing(first: bool) -> None:
    """Makes every layer that starts at zero do so by its first factor, or by its last."""

    def reset(self: Linear) -> None:
        for factor, std in zip(self.factors, self._ceilings, strict=True):
            nn.init.normal_(factor, std=std)
        if self.zero:
            nn.init.zeros_(self.factors[0 if first else -1])

    Linear.reset_parameters = reset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--file", type=Path, default=Path(__file__).parent / "results" / "zero_init.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = replace(load("bytes"), context=64)
    recipe = Recipe(batch=16, base_width=64, base_depth=2)
    with arguments.file.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for seed, family, width, rate in product(range(arguments.seeds), FAMILIES, WIDTHS, RATES):
            trunk = Trunk(
                family=family, width=width, depth=2, rate=rate, seed=seed, horizons=(arguments.steps,), recipe=recipe
            )
            losses = []
            for zero in ("first", "last"):
                zeroing(zero == "first")
                (run,) = train(trunk, task)
                losses.append(run.loss)
                row = {name: getattr(run, name) for name in COLUMNS if name != "zero"}
                writer.writerow(row | {"zero": zero})
                file.flush()
            print(f"{family:18} width {width:4} rate {rate:.4f} seed {seed}: first {losses[0]}, last {losses[1]}")


if __name__ == "__main__":
    main()
