"""Experts in every layer against the standard mixture, dense layers and BTT, for the same compute.

    python recipes/experts.py --task text --paths corpus/ --device cuda   # as often as it takes
    python recipes/experts.py --health                                    # routers on `bytes`

Every call goes on where the last one stopped: finished runs are found in the store, one in progress beside it. The
report is written again after each call. Families, rates and horizons are tuned and measured alike (docs/laws.md).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import einlinear as el
from einlinear.lab import compare
from einlinear.lab.data import Task, load
from einlinear.lab.machine import Machine
from einlinear.lab.report import write_report
from einlinear.lab.store import Store
from einlinear.lab.train import Recipe, Training, Trunk

FAMILIES = (
    "dense",
    "btt",
    "btt(rank=2)",  # the FLOPs of two active experts, without a choice
    "moe(experts=8, active=2)",
    *(f"mixture(of='btt', experts={experts}, active=2)" for experts in (4, 8, 16)),
)
MILLION = 1_000_000


def plan(task: Task, device: str) -> compare.Plan:
    """Four budgets over more than 1.5 decades on a GPU; a small one elsewhere."""
    if not device.startswith("cuda"):
        return replace(compare.default_plan(task, device), families=FAMILIES)
    return compare.Plan(
        families=FAMILIES,
        widths=(128, 256, 384, 512, 768, 1024),
        depth=4,
        horizons=(20 * MILLION, 60 * MILLION, 200 * MILLION, 600 * MILLION),
        rates=(2**-9, 2**-8, 2**-7),
        tuning=200 * MILLION,
        recipe=Recipe(batch=128, base_width=256, base_depth=4, head=64, warmup=200, precision="bfloat16"),
        context=256,
        seeds=(0, 1),
    )


def health(steps: int, width: int) -> None:
    """Loads of all routers of a small model while it trains: on each 100 steps, from every tenth batch."""
    recipe = Recipe(batch=16, base_width=width, base_depth=1)
    trunk = Trunk(family=FAMILIES[-1], width=width, depth=1, rate=2**-7, seed=0, horizons=(steps,), recipe=recipe)
    training = Training(trunk, load("bytes", context=64))
    loads: dict[str, list[torch.Tensor]] = {}
    for _ in training.advance(steps):
        for name, found in el.router_statistics(training.model).items():
            loads.setdefault(name, []).append(torch.tensor(found.load))
        if training.step % 100 == 0:
            for name, seen in loads.items():
                mean = torch.stack(seen).mean(0)
                told = f"load {mean.min():.3f} to {mean.max():.3f}, {int((mean == 0).sum())} of {len(mean)} dead"
                print(f"step {training.step:5}  loss {training.curve[-1][1]:.3f}  {name:40} {told}", flush=True)
            loads = {}


def told(progress: compare.Progress) -> None:
    if run := progress.run:
        print(f"{progress.runs}/{progress.total} {run.family} width {run.width} {run.status} {run.loss}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="bytes")
    parser.add_argument("--paths", nargs="*", type=Path, default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--store", default="runs/experts.sqlite")
    parser.add_argument("--report", type=Path, default=Path("runs/experts.html"))
    parser.add_argument("--health", type=int, nargs="?", const=1000, help="steps to watch routers for, instead")
    options = parser.parse_args()
    if options.health:
        health(options.health, 64)
        return
    task = load(options.task, paths=options.paths)
    wanted = plan(task, options.device)
    folder = Path(options.store).with_suffix(".parts")
    with Store(options.store) as store:
        runs = compare.compare(wanted, task, store, machine=Machine.here(options.device), folder=folder, progress=told)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    write_report(runs, options.report, command="python recipes/experts.py", plan=wanted)


if __name__ == "__main__":
    main()
