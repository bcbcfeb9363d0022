"""Every way to run a layer on one CPU thread, and dense, interleaved: what `einlinear.clock` is read off and held to.

    python benchmarks/cpu_ways.py [results.csv [dtype [part/parts [rounds]]]]
    python benchmarks/cpu_ways.py --fit [results.csv [processor]]

Milliseconds: medians of the thread's own CPU time over rounds in which all ways of a case take turns. Goes on where a
file that is there already ends; parts of all cases may run on cores of their own. `held` marks widths that no constant
was read off.
"""

import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
from scipy.optimize import nnls
from torch import nn

import einlinear as el
from einlinear import clock_cpu
from einlinear.kernels import KERNELS
from einlinear.kernels.kernel import Target
from einlinear.lab.bench import provenance

FAMILIES = (
    el.BTT(rank=1),
    el.BTT(rank=2),
    el.BTT(rank=4),
    el.Monarch(blocks=16),
    el.Monarch(blocks=4),
    el.LowRank(),
    el.Kronecker(),
    el.BLAST(blocks=4, rank=64),
)
FITTED = ((384, 384), (512, 512), (1024, 1024), (2048, 2048))
HELD = ((768, 768), (1024, 4096), (4096, 1024), (1536, 1536))
TOKENS = (1, 4, 16, 64, 256, 1024)
LARGEST = 1024 * 2048 * 2048
"""Tokens times dense weights beyond which a case would take too long."""
MADE = 1024 * 1024
"""Dense weights beyond which, or for fewer than 64 tokens, the matrix is not made: that takes much too long."""
RESULTS = Path(__file__).parent / "results" / "cpu_ways.csv"
WAYS = ("dense", "rows", "columns", "blocked", "turned", "native", "chain", "materialised")
KEY = ("family", "d_in", "d_out", "tokens", "mode", "dtype")


def cases(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[el.Family, int, int, int, str, torch.dtype]]:
    for widths in (*FITTED, *HELD):
        for dtype in dtypes:
            for tokens in TOKENS:
                for mode in ("forward", "training"):
                    if tokens * widths[0] * widths[1] * (2 if mode == "training" else 1) <= LARGEST:
                        yield from ((family, *widths, tokens, mode, dtype) for family in FAMILIES)


def measure(
    family: el.Family, d_in: int, d_out: int, tokens: int, mode: str, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """Milliseconds of each way."""
    structure, target, training = family(d_in, d_out).canonical, Target.of("cpu", dtype), mode == "training"
    options = {"dtype": dtype, "requires_grad": training}
    factors = [torch.randn(shape, **options) for shape in structure.matrix_shapes]  # type: ignore[arg-type]
    plain = nn.Linear(d_in, d_out, bias=False, dtype=dtype).requires_grad_(training)
    x, grad = torch.randn(tokens, d_in, **options), torch.randn(tokens, d_out, dtype=dtype)  # type: ignore[arg-type]
    padded = nn.functional.pad(x.detach(), (0, structure.pad_in)).requires_grad_(training)
    wide = nn.functional.pad(grad, (0, structure.pad_out))

    def call(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(run(), leaves, grad)) if training else run

    calls = {"dense": call(lambda: plain(x), [x, plain.weight], grad)}
    for kernel in KERNELS:
        if kernel.name == "materialised" and (tokens < 64 or d_in * d_out > MADE):
            continue
        if kernel.name in WAYS and kernel.refuses(structure, target) is None:
            run = kernel.prepare(structure)
            calls[kernel.name] = call(lambda run=run: run(factors, padded), [padded, *factors], wide)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, timed in calls.items():
            count, begin = 0, time.thread_time()
            while (spent := time.thread_time() - begin) < 4e-3:
                timed()
                count += 1
            times[name].append(1e3 * spent / count)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main(path: str = str(RESULTS), dtype: str = "", part: str = "0/1", rounds: str = "5") -> None:
    dtypes = [getattr(torch, dtype)] if dtype else [torch.float32, torch.bfloat16]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    done = {tuple(row[name] for name in KEY) for row in read(path)} if Path(path).exists() else set()
    with Path(path).open("a", newline="") as file:
        writer = csv.DictWriter(file, ("held", *KEY, *WAYS, "device", "torch", "commit"))
        if not done:
            writer.writeheader()
        first, step = map(int, part.split("/"))
        for family, d_in, d_out, tokens, mode, kind in [*cases(dtypes)][first::step]:
            here = provenance(torch.device("cpu"), kind)
            key = {"family": str(family), "d_in": d_in, "d_out": d_out, "tokens": tokens, "mode": mode}
            key |= {name: here[name] for name in ("dtype", "device", "torch", "commit")}
            if tuple(str(key[name]) for name in KEY) not in done:
                times = measure(family, d_in, d_out, tokens, mode, kind, int(rounds))
                found = {way: float(f"{ms:.4g}") for way, ms in times.items()}
                writer.writerow({"held": int((d_in, d_out) in HELD), **key, **found})
                file.flush()


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def fit(path: str = str(RESULTS), processor: str = "") -> None:
    """Writes `einlinear.clock_cpu.COSTS`: non-negative factors, least in the sum of roots of relative errors."""
    samples: dict[str, list[tuple[clock_cpu.Cost, float]]] = {}
    for row in read(path):
        if row["held"] == "1":
            continue
        widths, tokens = (int(row["d_in"]), int(row["d_out"])), int(row["tokens"])
        for way in clock_cpu.MEASURED:
            if row[way]:
                family = el.Dense() if way == "dense" else el.structure(row["family"])
                size = getattr(torch, row["dtype"]).itemsize
                counted = clock_cpu.terms(way, family(*widths).canonical, tokens, size)
                case = f"{way} {size} {row['mode']}"
                samples.setdefault(case, []).append((counted, 1e-3 * float(row[way])))
    costs = {}
    for case, found in samples.items():
        counts = numpy.array([counted for counted, _ in found]) / numpy.array([[time] for _, time in found])
        scale = counts.max(0) + (counts.max(0) == 0)
        weights = numpy.ones(len(found))
        for _ in range(30):  # reweighted towards the sum of absolute logarithms
            each, _ = nnls(counts / scale * weights[:, None], weights)
            weights = numpy.maximum(abs(numpy.log(numpy.maximum(counts / scale @ each, 1e-9))), 0.05) ** -0.5
        costs[case] = [float(f"{cost:.3g}") for cost in each / scale]
    known = json.loads(clock_cpu.COSTS.read_text()) if clock_cpu.COSTS.exists() else {}
    known[processor or clock_cpu.kind()] = costs
    lines = ",\n".join(
        f'  "{name}": {{\n' + ",\n".join(f'    "{case}": {json.dumps(each)}' for case, each in table.items()) + "\n  }"
        for name, table in sorted(known.items())
    )
    clock_cpu.COSTS.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    fit(*sys.argv[2:]) if sys.argv[1:2] == ["--fit"] else main(*sys.argv[1:])
