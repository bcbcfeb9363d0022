"""Forward time of two-factor layers against `torch.nn.Linear` on one CPU thread, written as CSV.

    python benchmarks/cpu_forward.py [results.csv]

Every layer and the dense one run in the same process, one after the other in each of several
rounds; a ratio is that of the two medians over rounds. Time is the thread's own CPU time: on a
machine that others use, wall time measures them too.
"""

import csv
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import einlinear as el

WIDTHS = (1024, 2048, 4096)
TOKENS = (256, 1024)
FAMILIES = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.Monarch(blocks=4), el.LowRank(), el.Kronecker())
ROUNDS = 9
RESULTS = Path(__file__).parent / "results" / "cpu_forward.csv"


def main(path: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = {
        "device": _processor(),
        "torch": torch.__version__,
        "einlinear": el.__version__,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
    }
    rows = [{**row, **where} for width in WIDTHS for tokens in TOKENS for row in measure(width, tokens)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@torch.inference_mode()
def measure(width: int, tokens: int) -> list[dict[str, object]]:
    """One row for each family at one width: median milliseconds, and ratios to dense."""
    x = torch.randn(tokens, width)
    layers: dict[object, torch.nn.Module] = {family: el.Linear(width, width, family, bias=False) for family in FAMILIES}
    layers["dense"] = torch.nn.Linear(width, width, bias=False)
    times: dict[object, list[float]] = {name: [] for name in layers}
    for _ in range(ROUNDS + 1):
        for name, layer in layers.items():
            times[name].append(_seconds(layer, x))
    medians = {name: statistics.median(runs[1:]) for name, runs in times.items()}  # the first round warms up
    rows: list[dict[str, object]] = []
    for family in FAMILIES:
        flop_ratio = 2 * width**2 / el.flops(family(width, width))
        speedup = medians["dense"] / medians[family]
        print(f"d {width} tokens {tokens:5} {family!s:22} {speedup:6.2f} x dense, of {flop_ratio:.1f}", flush=True)
        rows.append(
            {
                "family": str(family),
                "d_in": width,
                "d_out": width,
                "tokens": tokens,
                "dtype": "float32",
                "threads": 1,
                "ms": round(medians[family] * 1e3, 4),
                "dense_ms": round(medians["dense"] * 1e3, 4),
                "speedup": round(speedup, 3),
                "flop_saving": round(flop_ratio, 3),
            }
        )
    return rows


def _seconds(layer: torch.nn.Module, x: torch.Tensor, least: float = 0.05) -> float:
    """Seconds of one call, over as many calls as take `least` seconds together."""
    calls, begin = 0, time.thread_time()
    while (spent := time.thread_time() - begin) < least:
        layer(x)
        calls += 1
    return spent / calls


def _processor() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
