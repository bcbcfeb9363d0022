"""Time of structured layers against `torch.nn.Linear` on a CPU, written as CSV.

    python benchmarks/cpu_forward.py [forward | few] [results.csv] [threads, by default 1]

`einlinear bench` on the grid that the project is held to, and on few tokens, in float32 and in bfloat16: one process,
medians of the first thread's own CPU time (on a machine that others use, wall time measures them too).
"""

import csv
import sys
from pathlib import Path

import torch

import einlinear as el
from einlinear.lab.bench import Row, bench

FAMILIES = (
    *(el.BTT(rank=rank) for rank in (1, 2, 4)),
    *(el.Monarch(blocks=blocks) for blocks in (16, 8, 4)),
    el.LowRank(),
    el.Kronecker(),
)
RESULTS = Path(__file__).parent / "results"
GRIDS = {
    "few": ((512, 1024, 2048), (1, 4, 16, 64), ("forward", "training")),
    "forward": ((1024, 2048, 4096), (256, 1024), ("forward",)),
}


def main(grid: str = "forward", path: str = "", threads: str = "1") -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    widths, counts, modes = GRIDS[grid]
    file_path = Path(path) if path else RESULTS / f"cpu_{grid}.csv"
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for width in widths:
            for tokens in counts:
                rows += bench(FAMILIES, (width,), (tokens,), dtype=dtype, modes=modes)
                with file_path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys())
                    writer.writeheader()
                    writer.writerows(rows)
    for row in rows:
        case = f"{row['dtype']:9} {row['mode']:8} {row['family']:20} {row['d_in']:5} x {row['tokens']:5}"
        print(f"{case}  {row['ratio_to_dense']:6.2f} of {1 / row['flop_ratio']:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
