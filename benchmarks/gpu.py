"""Layers, MLPs, decoding and kernels in bfloat16 on one GPU against dense, as CSV.

    python benchmarks/gpu.py [folder] [--only TEXT ...] [--again] [--seconds N] [--compile WORKERS]

Writes into the folder, by default `results/<device>`: `layers.csv`, `mlps.csv`, `decode.csv`, `few.csv`, `tokens.csv`,
`shared.csv`, `compiled.csv` (beside torch.compile of the reference) and `kernels.csv` (each kernel that fits beside its
modelled time). Rows are written as they come, and those that are there are kept: `--only` names what to measure (every
text, or one of its alternatives between bars, must be part of a row's name, as printed), `--again` measures it anew.
`--compile` measures nothing: so many processes run each case once, for what Triton and torch.compile keep on disk.
"""

import argparse
import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import einlinear as el
from einlinear.kernels import KERNELS, Kernel
from einlinear.kernels.kernel import Target
from einlinear.kernels.reference import Reference
from einlinear.lab import bench as timing
from einlinear.lab.bench import MODES, bench, milliseconds, provenance

Row = dict[str, Any]
Case = tuple[str, Callable[[], list[Row]]]
"""The name of some rows, and what measures them."""

TOKENS = 16384
TWO_FACTORS = (el.BTT(), el.BTT(rank=4), el.BTT(rank=4, blocks="fast"), el.Monarch(blocks=16))
FAMILIES = (*TWO_FACTORS, el.LowRank(), el.Kronecker())
WIDTHS = (512, 768, 1024, 2048, 4096, 8192, (4096, 11008))
MLPS = (
    (512, 2048, el.BTT(blocks=(16, 16), rank=2), "relu2"),
    (1024, 4096, el.BTT(blocks=(32, 32)), "relu2"),
    (1024, 4096, el.BTT(), "relu2"),
    (1024, 4096, el.BTT(blocks=(32, 32)), "gelu"),
    (2048, 8192, el.BTT(blocks=(32, 32), rank=2), "relu2"),
    (2048, 8192, el.BTT(), "relu2"),
    (4096, 16384, el.BTT(blocks=(64, 64)), "relu2"),
    (4096, 16384, el.BTT(), "relu2"),
    (4096, 16384, el.BTT(blocks=(64, 64)), "gelu"),
    (4096, 11008, el.BTT(), "relu2"),
    (4096, 11008, el.BTT(), "swiglu"),
    (1024, 4096, el.BTT(blocks=(32, 32)), "swiglu"),
)
COMPILED = ((1024, 4096, "relu2"), (4096, 11008, "swiglu"))
SHARED = ((1024, TOKENS), (2048, TOKENS), (4096, TOKENS), (1024, 1), (4096, 1), (4096, 8))
WHERE: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


class DenseMLP(nn.Module):
    """What `einlinear.StructuredMLP` replaces."""

    def __init__(self, d_model: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias, **WHERE)
        self.gate = nn.Linear(d_model, hidden, bias, **WHERE) if activation == "swiglu" else None
        self.down = nn.Linear(hidden, d_model, bias, **WHERE)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            hidden = functional.silu(self.gate(x)) * self.up(x)
        elif self.activation == "relu2":
            hidden = functional.relu(self.up(x)).square()
        else:
            hidden = functional.gelu(self.up(x))
        out: Tensor = self.down(hidden)
        return out


class Several(nn.Module):
    """Query, key and value: three layers of one input; `share` says whether they read it together."""

    def __init__(self, width: int, family: el.Family | None, share: bool = False) -> None:
        super().__init__()
        make = nn.Linear if family is None else partial(el.Linear, family=family)
        self.layers = nn.ModuleList(make(width, width, bias=False, **WHERE) for _ in range(3))
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        parts = el.shared_input(x, *self.layers) if self.share else [layer(x) for layer in self.layers]
        return _Joined.apply(*parts)


class _Joined(torch.autograd.Function):
    """The first of three tensors, with a gradient for each, at no cost."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        return parts[0].view_as(parts[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad


class _Run(nn.Module):
    """A layer that one kernel runs."""

    def __init__(self, structure: el.Structure, kernel: Kernel) -> None:
        super().__init__()
        self.run = kernel.prepare(structure)
        self.factors = nn.ParameterList(
            torch.randn(shape, **WHERE) / shape[-1] ** 0.5 for shape in structure.matrix_shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run(list(self.factors), x)


class _Compiled(nn.Module):
    """A layer by torch.compile of the reference contraction, compiled once for all layers of a structure."""

    def __init__(self, structure: el.Structure) -> None:
        super().__init__()
        self.structure = structure
        self.factors = nn.ParameterList(
            torch.randn(shape, **WHERE) / shape[-1] ** 0.5 for shape in structure.matrix_shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _compiled(self.structure)(list(self.factors), x)
        return y


@cache
def _compiled(structure: el.Structure) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(Reference().prepare(structure).__call__)
    return compiled


@cache
def dense(d_in: int, d_out: int, tokens: int, mode: str) -> float:
    return milliseconds(partial(nn.Linear, d_in, d_out, False, **WHERE), d_in, tokens, mode)


@cache
def dense_mlp(d_model: int, hidden: int, activation: str, bias: bool, mode: str) -> tuple[float, float | None]:
    """As it stands, and, for one MLP of each kind, compiled, which fuses its activation."""

    def compiled() -> nn.Module:
        model = DenseMLP(d_model, hidden, activation, bias)
        model.compile()
        return model

    plain = milliseconds(partial(DenseMLP, d_model, hidden, activation, bias), d_model, TOKENS, mode)
    kept = (d_model, hidden, activation) in COMPILED
    return plain, milliseconds(compiled, d_model, TOKENS, mode) if kept else None


def layers() -> Iterator[Case]:
    for width, mode in product(WIDTHS, MODES):
        yield f"layers {width} {mode}", partial(bench, FAMILIES, (width,), (TOKENS,), modes=(mode,), **WHERE)


def decode() -> Iterator[Case]:
    families = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.LowRank())
    for width, tokens in product((1024, 2048, 4096, 8192), (1, 8, 16, 32, 64)):
        yield f"decode {width} {tokens}", partial(bench, families, (width,), (tokens,), modes=("forward",), **WHERE)


def few() -> Iterator[Case]:
    """Layers of 10⁵ weights or more where dense itself takes a few microseconds: is one slower than that?"""
    families = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=4), el.Monarch(blocks=16), el.LowRank(rank=64))
    for width, count, mode in product((512, 1024, 2048), (64, 1024, 4096), MODES):
        large = [family for family in families if el.parameters(family(width, width)) >= 10**5]
        yield f"few {width} {count} {mode}", partial(bench, large, (width,), (count,), modes=(mode,), **WHERE)


def tokens() -> Iterator[Case]:
    """Numbers of tokens that are no multiple of anything."""
    cases = ((1024, el.BTT()), (4096, el.BTT()), (4096, el.Monarch(blocks=16)), (4096, el.LowRank()))
    for (width, family), mode in product(cases, MODES):

        def measure(width: int, family: el.Family, mode: str) -> list[Row]:
            make = partial(el.Linear, width, width, family, bias=False, **WHERE)
            times = {count: milliseconds(make, width, count, mode) for count in (16384, 16383, 16377)}
            return [
                {
                    "family": str(family), "d_in": width, "d_out": width, "tokens": count, "mode": mode,
                    "ms": round(ms, 4), "ratio_to_even": round(ms / times[16384], 3),
                    "ratio_to_dense": round(dense(width, width, count, mode) / ms, 3), **provenance(**WHERE),
                }
                for count, ms in times.items()
            ]  # fmt: skip

        yield f"tokens {width} {family} {mode}", partial(measure, width, family, mode)


def mlps() -> Iterator[Case]:
    for (d_model, hidden, family, activation), mode in product(MLPS, MODES):

        def measure(d_model: int, hidden: int, family: el.Family, activation: str, mode: str) -> list[Row]:
            bias = activation == "gelu"
            ms = milliseconds(
                partial(el.StructuredMLP, d_model, hidden, family, activation, bias, **WHERE), d_model, TOKENS, mode
            )
            plain, compiled = dense_mlp(d_model, hidden, activation, bias, mode)
            ups = 2 if activation == "swiglu" else 1
            work = ups * el.flops(family(d_model, hidden)) + el.flops(family(hidden, d_model))
            return [
                {
                    "family": str(family), "d_model": d_model, "hidden": hidden, "activation": activation, "bias": bias,
                    "tokens": TOKENS, "mode": mode, "ms": round(ms, 4), "dense_ms": round(plain, 4),
                    "dense_compiled_ms": compiled and round(compiled, 4), "ratio_to_dense": round(plain / ms, 2),
                    "ratio_to_compiled": compiled and round(compiled / ms, 2),
                    "flop_ratio": round(work / (2 * (ups + 1) * d_model * hidden), 6), **provenance(**WHERE),
                }
            ]  # fmt: skip

        name = f"mlps {d_model} {hidden} {family} {activation} {mode}"
        yield name, partial(measure, d_model, hidden, family, activation, mode)


def shared() -> Iterator[Case]:
    for (width, count), mode in product(SHARED, MODES):
        if count < 64 and mode == "training":
            continue

        def measure(width: int, count: int, mode: str) -> list[Row]:
            made = {
                "dense": milliseconds(partial(Several, width, None), width, count, mode),
                "apart": milliseconds(partial(Several, width, el.BTT()), width, count, mode),
                "shared": milliseconds(partial(Several, width, el.BTT(), True), width, count, mode),
            }
            return [
                {
                    "way": way, "layers": 3, "d_in": width, "tokens": count, "mode": mode, "ms": round(ms, 5),
                    "ratio_to_dense": round(made["dense"] / ms, 2), **provenance(**WHERE),
                }
                for way, ms in made.items()
            ]  # fmt: skip

        yield f"shared {width} {count} {mode}", partial(measure, width, count, mode)


def compiled() -> Iterator[Case]:
    """Layers as they run beside torch.compile of the reference."""
    for family, mode in product((el.BTT(), el.Monarch(blocks=16), el.Kronecker(), el.BLAST(blocks=8, rank=64)), MODES):

        def measure(family: el.Family, mode: str, width: int = 2048) -> list[Row]:
            structure = family(width, width).canonical
            made = {
                "compiled reference": milliseconds(partial(_Compiled, structure), width, TOKENS, mode),
                "layer": milliseconds(
                    partial(el.Linear, width, width, family, bias=False, **WHERE), width, TOKENS, mode
                ),
            }
            return [
                {
                    "way": way, "family": str(family), "d_in": width, "d_out": width, "tokens": TOKENS, "mode": mode,
                    "ms": round(ms, 5), "ratio_to_compiled": round(made["compiled reference"] / ms, 2),
                    **provenance(**WHERE),
                }
                for way, ms in made.items()
            ]  # fmt: skip

        yield f"compiled {family} {mode}", partial(measure, family, mode)


def kernels() -> Iterator[Case]:
    """Every kernel that fits a layer beside its modelled time, and dense; the planner takes the least of these."""
    target = Target.of("cuda", torch.bfloat16)
    families = (el.Dense(), el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.LowRank(rank=64), el.Kronecker())
    for width, family, count, mode in product((512, 1024, 2048, 4096), families, (64, 1024, TOKENS), MODES):
        structure = family(width, width).canonical
        if isinstance(family, el.Dense):
            fitting = [kernel for kernel in KERNELS if kernel.name == "chain"]
        else:
            fitting = [k for k in KERNELS if k.refuses(structure, target) is None and k.name != "reference"]
        for kernel in fitting:

            def measure(structure: el.Structure, kernel: Kernel, family: str, count: int, mode: str) -> list[Row]:
                ms = milliseconds(partial(_Run, structure, kernel), structure.d_in, count, mode)
                return [
                    {
                        "family": family, "d_in": structure.d_in, "d_out": structure.d_out, "tokens": count,
                        "mode": mode, "kernel": kernel.name, "ms": float(f"{ms:.5g}"), **provenance(**WHERE),
                    }
                ]  # fmt: skip

            name = f"kernels {width} {family} {count} {mode} {kernel.name}"
            yield name, partial(measure, structure, kernel, str(family), count, mode)


TABLES: dict[str, Callable[[], Iterator[Case]]] = {
    "layers": layers, "mlps": mlps, "decode": decode, "few": few, "tokens": tokens, "shared": shared,
    "compiled": compiled, "kernels": kernels,
}  # fmt: skip


def wanted(only: list[str]) -> Iterator[tuple[str, str, Callable[[], list[Row]]]]:
    """Table, name and measurement of each case."""
    for table, make in TABLES.items():
        for name, measure in make():
            if all(any(part in name for part in text.split("|")) for text in only):
                yield table, name, measure


def tried(name: str, measure: Callable[[], list[Row]]) -> list[Row]:
    try:
        return measure()
    except Exception as error:  # the other cases go on, and this one is missing from the table
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return []


def compile_some(part: tuple[int, int, list[str]]) -> None:
    """Every so many of the cases, called and not timed."""

    def once(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
        calls[0]()
        torch.cuda.synchronize()
        return 1.0

    timing._graph_milliseconds, timing.CACHE = once, 0
    start, step, only = part
    for _, name, measure in list(wanted(only))[start::step]:
        tried(name, measure)


def compile_all(only: list[str], workers: int) -> None:
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_some, [(start, workers, only) for start in range(workers)], chunksize=1)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main(folder: Path, only: list[str], again: bool, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    begin = time.perf_counter()
    tables: dict[str, dict[str, list[Row]]] = {}
    for table, name, measure in wanted(only):
        path = folder / f"{table}.csv"
        if table not in tables:
            tables[table] = {}
            if path.exists():
                for row in csv.DictReader(path.open()):
                    tables[table].setdefault(row.pop("case"), []).append(row)
        done = tables[table]
        if (name in done and not again) or time.perf_counter() - begin > seconds:
            continue
        made = tried(name, measure)
        if not made:
            continue
        done[name] = made
        for row in made:
            what = row.get("kernel") or row.get("way") or row["family"]
            print(f"{name:48} {what:24} {row['ms']:9.4f} ms {row.get('ratio_to_dense', '')}", flush=True)
        rows = [{"case": case, **row} for case, found in done.items() for row in found]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    named = torch.cuda.get_device_name().lower().replace(" ", "_")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results" / named)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--compile", type=int, default=0, metavar="WORKERS")
    options = vars(parser.parse_args())
    workers = options.pop("compile")
    if workers:
        compile_all(options["only"], workers)
    else:
        main(**options)
