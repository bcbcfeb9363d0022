"""Forward time of structured layers against `torch.nn.Linear` on one CPU thread, written as CSV.

    python benchmarks/cpu_forward.py [results.csv]

`einlinear bench` on the grid that the project is held to: one process, medians of the thread's own
CPU time (on a machine that others use, wall time measures them too).
"""

import csv
import sys
from pathlib import Path

import torch

import einlinear as el
from einlinear.lab.bench import bench

FAMILIES = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.Monarch(blocks=4), el.LowRank(), el.Kronecker())
RESULTS = Path(__file__).parent / "results" / "cpu_forward.csv"


def main(path: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = bench(FAMILIES, (1024, 2048, 4096), (256, 1024), modes=("forward",))
    for row in rows:
        saving = 1 / row["flop_ratio"]
        print(f"{row['family']:20} {row['d_in']:5} x {row['tokens']:5}  {row['ratio_to_dense']:6.2f} of {saving:.1f}")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
