"""A whole training step of the lab's GPT, structured against dense of equal width and of equal FLOPs, as CSV.

    python benchmarks/gpt_step.py [folder] [--device cuda] [--rows 2048 1024 512 128] [--families dense btt]

Trains on `bytes` as `einlinear compare` does, data, clipping and update included. Each row is a model timed by the wall
clock over whole chunks of steps; then one step is profiled, and its kernels' times added up by what they are for.
`gpt_steps.csv` has a row for each model, `gpt_kernels.csv` the longest kernels of each. Rows of models that are not
measured now are kept.
"""

import argparse
import csv
import gc
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from einlinear.lab.bench import provenance
from einlinear.lab.data import load
from einlinear.lab.models import counted
from einlinear.lab.step import Execution
from einlinear.lab.train import CHUNK, Recipe, Training, Trunk

KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "linear": ("gemm", "nvjet", "stage", "junction", "cutlass", "add_partials", "splitk", "sm90_xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
}
"""Parts of kernels' names, by what the kernels are for; all others are elementwise, and copies."""

HERE = ("device", "dtype", "torch", "triton", "commit")


@dataclass(frozen=True)
class Row:
    """Models of one width, dense first, and how they are executed; `equal` is the width of a dense model more.

    That one has about the FLOPs of the second family: what the structure's width costs at equal FLOPs.
    """

    width: int
    depth: int
    batch: int
    context: int
    families: tuple[str, ...]
    modes: tuple[str, ...] = ("compiled+graph",)
    head: int = 64
    equal: int = 0


ROWS = {
    "2048": Row(2048, 6, 512, 128, ("dense", "btt", "monarch(blocks=32)"), head=128, equal=384),
    "1024": Row(1024, 6, 512, 128, ("dense", "btt", "monarch(blocks=16)"), equal=256),
    "512": Row(512, 4, 64, 256, ("dense", "monarch(blocks=16)"), ("compiled+graph",), equal=192),
    "128": Row(128, 4, 32, 128, ("dense", "monarch(blocks=8)"), ("eager", "graph", "compiled+graph"), head=32),
}


def models(row: Row, device: str, only: list[str]) -> Iterator[tuple[str, str, Training]]:
    """The models of a row; `only` names families, by default all, and then also the dense one of equal FLOPs."""
    task = replace(load("bytes"), context=row.context)
    recipe = Recipe(
        batch=row.batch, base_width=row.width, base_depth=row.depth, head=row.head, precision="bfloat16", warmup=5
    )
    for mode in row.modes:
        shapes = [(family, row.width) for family in row.families if not only or family in only]
        if row.equal and not only and mode == row.modes[0]:
            shapes.append(("dense", row.equal))
        for family, width in shapes:
            trunk = Trunk(
                family=family, width=width, depth=row.depth, rate=2**-9, seed=0, horizons=(1000,), recipe=recipe
            )
            execution = Execution(device=device, compiled="compiled" in mode, graphed="graph" in mode)
            torch.cuda.reset_peak_memory_stats() if device != "cpu" else None
            try:
                yield mode, family, Training(trunk, task, execution)
            except Exception:
                traceback.print_exc()
            gc.collect()
            torch.cuda.empty_cache()


def measure(row: Row, mode: str, family: str, training: Training, chunks: int) -> tuple[dict[str, Any], Counter[str]]:
    """A row of `steps.csv`, and milliseconds by kernel."""
    cuda = training.device.type == "cuda"
    list(training.advance(CHUNK))
    times = []
    for _ in range(chunks):
        before = training.seconds
        list(training.advance(training.step + CHUNK))
        times.append((training.seconds - before) / CHUNK)
    seconds = sorted(times)[len(times) // 2]
    batch = training._batch(training.step)
    if cuda:  # a step that waits for the device raises
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        training.update(*training._batch(training.step), 0.5)
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        training.update(*batch, 0.5)
        torch.cuda.synchronize() if cuda else None
    spent: Counter[str] = Counter()
    launches = 0
    for event in profiled.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time:
            spent[event.key] += time / 1e3
            launches += event.count
    by_kind: Counter[str] = Counter()
    for name, ms in spent.items():
        found = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
        by_kind[next(found, "elementwise")] += ms
    trunk = training.trunk
    parameters, flops = counted(training.task, trunk.architecture)
    tokens = trunk.recipe.tokens(training.task)
    return {
        "family": family,
        "width": trunk.width,
        "depth": row.depth,
        "tokens": tokens,
        "mode": mode,
        "ms": round(1e3 * seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        **{f"{kind}_ms": round(by_kind[kind], 3) for kind in (*KINDS, "elementwise")},
        "kernels": launches,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0,
        "parameters": parameters,
        "flops_per_token": 3 * flops.total,
        "attention_share_of_flops": round(flops.attention / flops.total, 3),
        "loss": round(training.curve[-1][1], 4),
        **provenance(training.device, torch.bfloat16),
    }, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--families", nargs="*", default=[], help="only these, as written in ROWS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args()
    named = torch.cuda.get_device_name().lower().replace(" ", "_") if options.device == "cuda" else "cpu"
    folder = options.folder or Path(__file__).parent / "results" / named
    folder.mkdir(parents=True, exist_ok=True)
    steps, kernels = folder / "gpt_steps.csv", folder / "gpt_kernels.csv"
    for name in options.rows:
        row, dense = ROWS[name], dict[str, float]()
        for mode, family, training in models(row, options.device, options.families):
            try:
                found, spent = measure(row, mode, family, training, options.chunks)
            except Exception:
                traceback.print_exc()
                continue
            finally:
                del training
            dense.setdefault(mode, found["ms"])
            found = {**found, "ratio_to_dense": round(dense[mode] / found["ms"], 3)}
            model, total = {"family": family, "width": found["width"], "mode": mode}, sum(spent.values())
            longest = [
                {**model, "ms": round(ms, 3), "share": round(ms / total, 3), "kernel": kernel[:120]}
                for kernel, ms in spent.most_common(12)
            ]
            for path, rows in ((steps, [found]), (kernels, longest)):
                renew(path, model, rows)
            print({key: value for key, value in found.items() if key not in HERE}, flush=True)


def renew(path: Path, model: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Puts the rows of a model in the place of those that the table has of it."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    old = [all(str(value) == row[name] for name, value in model.items()) for row in kept]
    at = old.index(True) if True in old else len(kept)
    others = [row for row, its in zip(kept, old, strict=True) if not its]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows([*others[:at], *rows, *others[at:]])


if __name__ == "__main__":
    main()
