"""Forward time of structured layers against `torch.nn.Linear` on one CPU thread, written as CSV.

    python benchmarks/cpu_forward.py [results.csv]

`einlinear bench` on the grid that the project is held to, in float32 and in bfloat16: one process, medians of the
thread's own CPU time (on a machine that others use, wall time measures them too).
"""

import csv
import sys
from pathlib import Path

import torch

import einlinear as el
from einlinear.lab.bench import bench

FAMILIES = (
    *(el.BTT(rank=rank) for rank in (1, 2, 4)),
    *(el.Monarch(blocks=blocks) for blocks in (16, 8, 4)),
    el.LowRank(),
    el.Kronecker(),
)
RESULTS = Path(__file__).parent / "results" / "cpu_forward.csv"


def main(path: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for row in bench(FAMILIES, (1024, 2048, 4096), (256, 1024), dtype=dtype, modes=("forward",))
    ]
    for row in rows:
        saving = 1 / row["flop_ratio"]
        case = f"{row['dtype']:9} {row['family']:20} {row['d_in']:5} x {row['tokens']:5}"
        print(f"{case}  {row['ratio_to_dense']:6.2f} of {saving:.1f}")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
