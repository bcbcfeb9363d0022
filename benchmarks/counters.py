"""Which resource limits each kernel: hardware counters by Nsight Compute, as CSV.

    python benchmarks/counters.py profile.csv [--only TEXT ...] [--seconds N]

Runs itself under `ncu`, without its clock control: one call of each case, every kernel replayed with cold caches until
all counters are read. Percentages are of the peak that the machine sustains. Cases are in the order of the goals that
they miss; what is not reached within so many seconds stays as the table has it. `ncu` writes when its program ends, so
do not kill it: run the program by itself (`--watched`) before, and it need not compile.
"""

import argparse
import csv
import io
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.kernels import KERNELS
from einlinear.lab.provenance import checked_out

TOKENS = 16384
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "dram_read_mb": "dram__bytes_read.sum",
    "dram_written_mb": "dram__bytes_write.sum",
    "cache_mb": "lts__t_bytes.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "cache_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "between_cache_halves_percent": "lts__ltcfabric2ltc_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "matrix_unit_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "programs": "launch__grid_size",
    "registers": "launch__registers_per_thread",
}
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
    grad = torch.randn(tokens, width, **WHERE)
    leaves = [x, *module.parameters()]

    def step() -> Tensor | tuple[Tensor, ...]:
        if not training:
            with torch.no_grad():
                return module(x)
        return torch.autograd.grad(module(x), leaves, grad)

    return step


R1, R4, SIXTEEN, LOW = el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.LowRank(rank=64)
CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "layer btt 4096": lambda: layer(R1, 4096),
    "layer monarch(blocks=16) 4096": lambda: layer(SIXTEEN, 4096),
    "layer btt 1024": lambda: layer(R1, 1024),
    "layer monarch(blocks=16) 4096 training": lambda: layer(SIXTEEN, 4096, training=True),
    "layer btt 2048": lambda: layer(R1, 2048),
    "layer btt 8192": lambda: layer(R1, 8192),
    "layer btt 1024 training": lambda: layer(R1, 1024, training=True),
    "mlp 1024 relu2 training": lambda: mlp(1024, 4096, 32, "relu2", False, True),
    "layer btt 4096 training": lambda: layer(R1, 4096, training=True),
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


def run(only: list[str], seconds: float) -> None:
    """What `ncu` watches."""
    begin = time.perf_counter()
    for name, make in wanted(only).items():
        if time.perf_counter() - begin > seconds:
            print(f"{name}: not reached in {seconds:g} s", file=sys.stderr, flush=True)
            continue
        step = make()
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        del step
        torch.cuda.empty_cache()


def read(text: str, names: list[str]) -> list[dict[str, object]]:
    """Rows of what `ncu` wrote; kernels before the first mark belong to nothing."""
    start = text.find('"ID"')
    if start < 0:
        raise SystemExit(f"ncu wrote no table; the end of what it said: {text[-500:]}")
    units, *kernels = (row for row in csv.DictReader(io.StringIO(text[start:])) if row["Process ID"] is not None)
    left, rows, case = iter(names), list[dict[str, object]](), ""
    for kernel in kernels:
        if MARK in kernel["Kernel Name"]:
            case = next(left)
            continue
        row: dict[str, object] = {"case": case, "kernel": kernel["Kernel Name"][:60]}
        for name, counter in COUNTERS.items():
            value = kernel.get(counter, "").replace(",", "")
            scaled = float(value) * UNITS.get(units[counter], 1.0) if value and value[0].isdigit() else None
            row[name] = "" if scaled is None else float(f"{scaled:.4g}")
        rows.append(row)
    return rows


def main(path: Path, only: list[str], seconds: float) -> None:
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(COUNTERS.values()), sys.executable, __file__, str(path), "--watched"]
    told = path.with_suffix(".txt")
    with told.open("w") as file:
        subprocess.run([*command, "--seconds", str(seconds), "--only", *only], stdout=file)
    here = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
    rows = [{**row, **here, "commit": checked_out()} for row in read(told.read_text(), list(wanted(only)))]
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["case"] not in {row["case"] for row in rows}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows([*kept, *rows])
    for row in rows:
        print(*(row[name] for name in ("case", "kernel", *COUNTERS)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no case is begun")
    parser.add_argument("--watched", action="store_true", help="run the cases; `ncu` calls this")
    options = parser.parse_args()
    if options.watched:
        run(options.only, options.seconds)
    else:
        main(options.path, options.only, options.seconds)
