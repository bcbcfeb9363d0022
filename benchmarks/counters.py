"""Which resource limits each kernel: hardware counters by Nsight Compute, as CSV.

    python benchmarks/counters.py profile.csv [--only TEXT ...]

Runs itself under `ncu`, without its clock control: one call of each case, every kernel replayed with cold caches until
all counters are read. Percentages are of the peak that the machine sustains.
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.kernels import KERNELS

TOKENS = 16384
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "dram_read_mb": "dram__bytes_read.sum",
    "dram_write_mb": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "special_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "programs": "launch__grid_size",
    "registers": "launch__registers_per_thread",
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
UNITS = {"second": 1e6, "msecond": 1e3, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "us": 1.0, "ns": 1e-3, "s": 1e6}
UNITS |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
MARK = "spin_kernel"
"""A kernel that is launched before each case, so that the list of kernels can be cut."""

WHERE = {"device": "cuda", "dtype": torch.bfloat16}


def layer(family: el.Family, width: int, tokens: int = TOKENS, training: bool = False) -> Callable[[], object]:
    return call(el.Linear(width, width, family, bias=False, **WHERE), width, tokens, training)


def by(name: str, family: el.Family, width: int, tokens: int) -> Callable[[], object]:
    """A layer by a kernel that need not be the one it would choose."""
    structure = family(width, width).canonical
    run = next(kernel for kernel in KERNELS if kernel.name == name).prepare(structure)
    factors = [torch.randn(shape, **WHERE) for shape in structure.matrix_shapes]
    x = torch.randn(tokens, width, **WHERE)
    return lambda: run(factors, x)


def mlp(
    width: int, hidden: int, blocks: int, activation: str, bias: bool, training: bool = False
) -> Callable[[], object]:
    family = el.BTT(blocks=(blocks, blocks)) if blocks else el.BTT()
    made = el.StructuredMLP(width, hidden, family, activation, bias, **WHERE)
    return call(made, width, TOKENS, training)


def call(module: nn.Module, width: int, tokens: int, training: bool) -> Callable[[], object]:
    x = torch.randn(tokens, width, **WHERE, requires_grad=training)
    leaves = [x, *module.parameters()]

    def step() -> Tensor | tuple[Tensor, ...]:
        if not training:
            with torch.no_grad():
                return module(x)
        y = module(x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


R1, R4, SIXTEEN, LOW = el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.LowRank(rank=64)
CASES: dict[str, Callable[[], Callable[[], object]]] = {
    **{f"layer btt {width}": lambda width=width: layer(R1, width) for width in (1024, 2048, 4096, 8192)},
    "layer btt 4096 training": lambda: layer(R1, 4096, training=True),
    "layer monarch(blocks=16) 4096 training": lambda: layer(SIXTEEN, 4096, training=True),
    "mlp 4096 relu2": lambda: mlp(4096, 16384, 64, "relu2", False),
    "mlp 4096 gelu bias training": lambda: mlp(4096, 16384, 64, "gelu", True, True),
    "mlp 4096 swiglu": lambda: mlp(4096, 11008, 0, "swiglu", False),
    "few dense 1024 x 1024": lambda: call(nn.Linear(1024, 1024, False, **WHERE), 1024, 1024, False),
    "few btt(rank=4) 1024 x 1024 tiles": lambda: by("tiles", R4, 1024, 1024),
    "few btt(rank=4) 1024 x 1024 materialised": lambda: by("materialised", R4, 1024, 1024),
    "few btt(rank=4) 1024 x 16384 training": lambda: layer(R4, 1024, training=True),
    "few low_rank(rank=64) 2048 x 64 chain": lambda: by("chain", LOW, 2048, 64),
    "few low_rank(rank=64) 2048 x 64 bottleneck": lambda: by("bottleneck", LOW, 2048, 64),
    "few low_rank(rank=64) 1024 x 1024 bottleneck": lambda: by("bottleneck", LOW, 1024, 1024),
}


def wanted(only: list[str]) -> dict[str, Callable[[], Callable[[], object]]]:
    return {name: make for name, make in CASES.items() if any(text in name for text in only)}


def run(only: list[str]) -> None:
    """What `ncu` watches."""
    mark = torch.cuda._sleep
    for make in wanted(only).values():
        step = make()
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        mark(1)
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        del step
        torch.cuda.empty_cache()


def main(path: Path, only: list[str]) -> None:
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += ["--metrics", "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum"]
    told = subprocess.run(
        [*command, sys.executable, __file__, str(path), "--watched", "--only", *only], capture_output=True, text=True
    )
    table = told.stdout[told.stdout.find('"ID"') :]
    path.with_suffix(".txt").write_text(told.stdout + told.stderr)
    units, *kernels = csv.DictReader(io.StringIO(table))
    names = iter(wanted(only))
    rows: list[dict[str, object]] = []
    case = ""
    for kernel in kernels:
        if MARK in kernel["Kernel Name"]:
            case = next(names)
            continue
        row: dict[str, object] = {"case": case, "kernel": kernel["Kernel Name"][:60]}
        for name, counter in COUNTERS.items():
            value = kernel.get(counter, "").replace(",", "")
            scaled = float(value) * UNITS.get(units[counter], 1.0) if value else None
            row[name] = "" if scaled is None else float(f"{scaled:.4g}")
        told_by = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
        rows.append({**row, **told_by})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases; all by default")
    parser.add_argument("--watched", action="store_true", help="run the cases; `ncu` calls this")
    options = parser.parse_args()
    if options.watched:
        run(options.only)
    else:
        main(options.path, options.only)
