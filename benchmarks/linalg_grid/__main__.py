"""Every question of linear algebra about many operators, judged against the written-out matrix: the wrong cells.

    python benchmarks/linalg_grid [--draws 400] [--seed 0] [--results linalg_grid.csv] [--only kron --ask solve]

Matrices are random, singular, indefinite, defective, nearly singular, graded, with repeated eigenvalues, 1 × 1,
empty, rectangular, not contiguous or with gradients, in float32, float64 and complex128, alone or in a batch; one or
two levels of compositions are drawn over them. Beside them stand named matrices whose spectra are known in closed
form. The reference is composed in NumPy in this folder and never asks the library. What may deviate is what rounding
may: unit roundoff times a modest number times the condition of the question. A refusal (`OperatorError`) and a
warning are right only where the reference has no answer, or none to working precision.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import torch
from grid import QUESTIONS, cases, judge

from einlinear.lab.bench import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--ask", default="", help="questions whose name has this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done: Counter[tuple[str, str]] = Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for case in cases(given.draws, given.seed):
        if given.only not in case.name:
            continue
        dtype = str(case.A.dtype).removeprefix("torch.")
        for name in QUESTIONS:
            if given.ask in name:
                done[name, dtype] += 1
                if (error := judge(case, name)) is not None:
                    wrong[name, dtype] += 1
                    print(f"{name} of {case.name} {dtype} {case.D.shape}: {error}", flush=True)
    print(f"{sum(done.values())} cells, {sum(wrong.values())} wrong")
    if given.results is not None:
        here = provenance(torch.device("cpu"), torch.float64)
        with given.results.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "precision", "cells", "wrong", *here])
            writer.writerows([*key, count, wrong[key], *here.values()] for key, count in sorted(done.items()))


if __name__ == "__main__":
    main()
