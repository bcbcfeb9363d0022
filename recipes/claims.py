"""Claims of the papers this library grew from, put to the test; a page of the docs for each.

    python recipes/claims.py rates --plan                        # what it takes on this machine
    python recipes/claims.py rates --scale full --device cuda    # as often as it takes
    python recipes/claims.py rates --page                        # only the page, from the runs in docs/studies

Every call goes on where the last one stopped: finished runs are found in the store, one in progress beside it; at its
end it writes the raw runs and the page. What a study trains is data, at two scales: `small` for one core of a CPU,
`full` for one large GPU, in windows of ten minutes.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from einlinear.lab.compare import Plan
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.studies import (
    Experiment,
    Question,
    Study,
    collect,
    foretold,
    label,
    measure,
    ordering,
    priced,
    rate_transfer,
    read_steps,
    timed,
    worth,
    write_page,
    write_runs,
    write_steps,
)
from einlinear.lab.train import Recipe

PAGES = Path(__file__).parents[1] / "docs" / "studies"

MLP = Recipe(batch=256, base_width=64, base_depth=2)
GPT = Recipe(batch=8, base_width=64, base_depth=2)
WIDE_MLP = Recipe(batch=1024, base_width=128, base_depth=2, warmup=50, precision="bfloat16")
WIDE_GPT = Recipe(batch=32, base_width=128, base_depth=2, warmup=50, precision="bfloat16")


def powers(first: int, last: int) -> tuple[float, ...]:
    """Powers of two, the last one included."""
    return tuple(2.0**power for power in range(first, last + 1))


Grid = tuple[Sequence[float], Sequence[float]]
"""Base rates: all of them, which the first seed has, and those near the best, which every seed has."""


def everywhere(first: int, last: int) -> Grid:
    """Powers of two that every seed has."""
    return powers(first, last), powers(first, last)


def landscape(task: str, plan: Plan, grid: Grid) -> tuple[Experiment, ...]:
    """A plan at each rate, without any tuning."""
    rates, near = grid
    plans = [replace(plan, rates=(rate,), seeds=plan.seeds if rate in near else plan.seeds[:1]) for rate in rates]
    return tuple(Experiment(task=task, plan=one) for one in plans)


def both_rules(task: str, plan: Plan, grids: Mapping[str, tuple[Grid, Grid | None]]) -> tuple[Experiment, ...]:
    """Each family over its rates for the structure-aware rule, then over those for the naive one, if any."""
    found: list[Experiment] = []
    for aware in (True, False):
        for family, of_rules in grids.items():
            if grid := of_rules[0 if aware else 1]:
                recipe = replace(plan.recipe, structure_aware=aware)
                found += landscape(task, replace(plan, families=(family,), recipe=recipe), grid)
    return tuple(found)


def reversing(task: str, plan: Plan, *shares: float) -> tuple[Experiment, ...]:
    """A plan, and its structures again with a dense finish of each share."""
    structured = replace(plan, families=plan.families[1:])
    finished = [replace(structured, recipe=replace(plan.recipe, finish_dense=share)) for share in shares]
    return tuple(Experiment(task=task, plan=one) for one in (plan, *finished))


RATES = Study(
    name="rates",
    title="Learning rates that know the structure",
    claim=(
        "With learning rates that follow from the fans of each factor, the best base rate stays the same as the width "
        "grows; with those of the dense layer it drifts, and a rate tuned small is a bad one when wide."
    ),
    source="Qiu et al. 2024, \"Compute Better Spent\", section 3 and figure 2 (https://arxiv.org/abs/2406.06248)",
    measure=(
        "Every family is trained at every width and base rate by both rules; initialisation is the structured one in "
        "both. Holds if, for each structure, the best rate by the structure-aware rule drifts by less than a quarter "
        "of an octave for each doubling of the width (a factor of 2 over 16 times the width), by the naive rule it "
        "drifts upwards from there, and the rate that is best at the smallest width gives a higher loss at the largest "
        "one by the naive rule."
    ),
    scales={
        "small": both_rules(
            "teacher",
            Plan(
                families=("dense",), widths=(16, 64, 256), depth=2, horizons=(200 * 256,), rates=(1.0,), tuning=1,
                recipe=MLP, seeds=(0, 1),
            ),
            {
                "dense": (everywhere(-12, -7), None),
                "btt": (everywhere(-12, -7), everywhere(-9, -5)),
                "kronecker": (everywhere(-11, -5), everywhere(-9, -3)),
            },
        ),
        "full": both_rules(
            "text",
            Plan(
                families=("dense",), widths=(64, 256, 1024), depth=2, horizons=(400 * 32 * 128,), rates=(1.0,),
                tuning=1, recipe=replace(WIDE_GPT, base_width=64), context=128, seeds=(0, 1, 2),
            ),
            {
                "dense": ((powers(-10, -4), powers(-9, -5)), None),
                "btt": ((powers(-10, -4), powers(-9, -5)), (powers(-7, -1), powers(-7, -3))),
                "kronecker": ((powers(-10, -4), powers(-8, -4)), (powers(-8, -2), powers(-7, -3))),
            },
        ),
    },
    judge=rate_transfer,
)  # fmt: skip

IMAGES = Study(
    name="images",
    title="Images and a teacher by MLPs: BTT against dense",
    claim=(
        "For the same training compute, MLPs of Block Tensor-Train layers reach a lower training loss than dense ones "
        "on images with augmentation."
    ),
    source="Qiu et al. 2024, \"Compute Better Spent\", section 4 (https://arxiv.org/abs/2406.06248), on CIFAR",
    measure=(
        "Compute multipliers over dense (how many times its FLOPs dense needs for the same loss), each family at its "
        "own best rate. Holds if that of BTT is above 1, by the training loss on augmented 8 × 8 digits (moved by a "
        "pixel, with noise) and by the loss on fresh examples of a random teacher. Rates are those of the least "
        "validation loss, also where training losses are compared. The rows on the longest trainings are the "
        "paper's own comparison, in which only the width is traded for compute."
    ),
    scales={
        "small": tuple(
            Experiment(task=task, plan=Plan(
                families=("dense", "btt"), widths=(32, 64, 128, 256), depth=2,
                horizons=(75 * 256, 150 * 256, 300 * 256), rates=powers(-10, -8), tuning=300 * 256, recipe=MLP,
                seeds=(0, 1),
            ))
            for task in ("images", "teacher")
        ),
        "long": (  # the first thing that ran on a GPU: digits learnt by heart
            Experiment(task="images", plan=Plan(
                families=("dense", "btt"), widths=(64, 128, 256, 512, 1024), depth=2, growth=0.5,
                horizons=tuple(steps * 1024 for steps in (150, 300, 600, 1200)), rates=powers(-10, -8),
                tuning=600 * 1024, recipe=WIDE_MLP, seeds=(0, 1),
            )),
        ),
        "full": tuple(
            Experiment(task=task, plan=Plan(
                families=("dense", "btt"), widths=widths, depth=2, growth=0.5,
                horizons=tuple(steps * 1024 for steps in horizons), rates=powers(-10, -8), tuning=horizons[-2] * 1024,
                recipe=replace(WIDE_MLP, warmup=warmup), seeds=seeds,
            ))
            for task, widths, horizons, warmup, seeds in (
                ("images", (16, 32, 64, 128, 256, 512), (35, 70, 140, 280), 10, (0, 1, 2)),
                ("teacher", (32, 64, 128, 256, 512), (200, 400, 800, 1600), 50, (0, 1, 2)),
            )
        ),
    },
    judge=partial(worth, questions=(
        Question(task="images", axis="flops", claimed="btt", training=True),
        Question(task="images", axis="flops", claimed=None),
        Question(task="teacher", axis="flops", claimed="btt"),
        Question(task="images", axis="flops", claimed=None, training=True, longest=True),
        Question(task="teacher", axis="flops", claimed=None, longest=True),
    )),
)  # fmt: skip

MONARCH = ("dense", "monarch(blocks=4)")
REVERSE = Study(
    name="reverse",
    title="Reverse sparsification: structured first, dense to finish",
    claim=(
        "Training with Monarch layers first and multiplied out to dense at the end reaches the quality of dense "
        "training in less time (2 × for GPT-2)."
    ),
    source="Dao et al. 2022, \"Monarch\", section 4 (https://arxiv.org/abs/2204.00595)",
    measure=(
        "Multipliers over dense, in seconds and in FLOPs, of Monarch, and of Monarch whose last 20 % or 50 % of steps "
        "are dense; each is tuned. The switch is where a horizon leaves the constant rate; the optimizer's moments "
        "start anew for the products, and all else goes on. Seconds are steps times the median time of a step, "
        "measured in turns apart from the runs. Holds if the multiplier of the 20 % finish is above 1: over dense of "
        "its own width, as in the paper, at every width; and over dense of any width, by a law, in seconds and in "
        "FLOPs. (The comparison at equal width was added after the first runs were seen.)"
    ),
    scales={
        "small": reversing(
            "bytes",
            Plan(
                families=MONARCH, widths=(32, 64, 96), depth=2, horizons=(100 * 512, 200 * 512, 400 * 512),
                rates=powers(-8, -6), tuning=400 * 512, recipe=GPT, context=64, seeds=(0, 1),
            ),
            0.2,
        ),
        "full": reversing(
            "text",
            Plan(
                families=("dense", "monarch(blocks=16)"), widths=(256, 512, 1024), depth=4,
                horizons=tuple(steps * 64 * 256 for steps in (200, 400, 800)), rates=powers(-9, -7),
                tuning=400 * 64 * 256, recipe=replace(WIDE_GPT, batch=64, base_width=256, base_depth=4, head=64),
                context=256,
                seeds=(0, 1),
            ),
            0.2,
        ),
    },
    judge=partial(worth, questions=(
        Question(axis="seconds", claimed="last 20% dense", by_width=True),
        Question(axis="seconds", claimed="last 20% dense"), Question(axis="flops", claimed="last 20% dense"),
    )),
    priced=True,
)  # fmt: skip

POINTS = (
    "dense",
    "low_rank(rank=8)",
    "theta(theta=(1.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0))",
    "theta(theta=(0.6667, 0.0, 0.3333, 0.0, 0.6667, 0.3333, 0.0))",
    "theta(theta=(0.3333, 0.3333, 0.3333, 0.0, 1.0, 0.0, 0.0))",
    "btt",
    "monarch(blocks=4)",
    "theta(theta=(0.6667, 0.3333, 0.0, 0.3333, 0.6667, 0.0, 0.0))",
    "theta(theta=(0.3333, 0.3333, 0.3333, 0.3333, 0.3333, 0.3333, 0.0))",
    "kronecker",
)
"""Nine points beside dense: ω of 0, 1/3 and 1/2, ψ and ν from 0 to 1, the last three numbers not in step."""

MORE_POINTS = (
    "theta(theta=(1.0, 0.0, 0.0, 0.0, 0.75, 0.25, 0.0))",
    "theta(theta=(0.25, 0.0, 0.75, 0.0, 0.5, 0.5, 0.0))",
    "theta(theta=(0.75, 0.25, 0.0, 0.25, 0.75, 0.0, 0.0))",
    "theta(theta=(0.25, 0.75, 0.0, 0.5, 0.5, 0.0, 0.0))",
    "theta(theta=(0.3333, 0.6667, 0.0, 0.6667, 0.3333, 0.0, 0.0))",
    "theta(theta=(0.25, 0.75, 0.0, 0.75, 0.25, 0.0, 0.0))",
    "theta(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.0))",
    "theta(theta=(1.0, 0.0, 0.0, 0.25, 0.25, 0.5, 0.0))",
    "theta(theta=(0.3333, 0.0, 0.6667, 0.0, 0.6667, 0.3333, 0.0))",
    "theta(theta=(1.0, 0.0, 0.0, 0.0, 0.6667, 0.3333, 0.0))",
    "theta(theta=(0.75, 0.0, 0.25, 0.25, 0.75, 0.0, 0.0))",
    "theta(theta=(0.5, 0.5, 0.0, 0.25, 0.25, 0.5, 0.0))",
    "theta(theta=(0.75, 0.0, 0.25, 0.0, 0.5, 0.5, 0.0))",
)
"""Thirteen more, chosen so that the slopes are told apart as well as so many can: points, not seeds, decide them."""

ORDER = Study(
    name="order",
    title="What makes a structure scale: sharing, rank, compute",
    claim="Small ω (no sharing) and large ψ (full rank) scale best; ν (compute) can vary with little harm.",
    source="Potapczynski et al. 2024, \"Searching for Efficient Linear Layers\" (https://arxiv.org/abs/2410.02117)",
    measure=(
        "Compute multipliers over dense of points of θ from all over the taxonomy, each at its own best rate: on the "
        "paper's own regression onto a random teacher (small), and on text (full); ln multiplier regressed on ω, ψ and "
        "ν. Holds if the slope over ω is negative, that over ψ positive, and that over ν less than ln 2 either way (a "
        "factor of 2 from 0 to 1)."
    ),
    scales={
        "small": (
            Experiment(task="teacher", plan=Plan(
                families=POINTS, widths=(32, 64, 128), depth=2, horizons=(75 * 256, 150 * 256, 300 * 256),
                rates=powers(-10, -8), tuning=300 * 256, recipe=MLP,
            )),
        ),
        "full": (
            Experiment(task="text", plan=Plan(
                families=(*POINTS, *MORE_POINTS), widths=(64, 128, 256), depth=2,
                horizons=tuple(steps * 32 * 128 for steps in (200, 400, 800)), rates=powers(-8, -6),
                tuning=400 * 32 * 128, recipe=WIDE_GPT, context=128,
            )),
        ),
    },
    judge=ordering,
)  # fmt: skip

STUDIES = {study.name: study for study in (RATES, IMAGES, REVERSE, ORDER)}


def told(run: Run, done: int, wanted: int) -> None:
    print(f"{done}/{wanted} {label(run)} width {run.width} {run.status} {run.loss}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--scale", default="small", help="small, full, or another that the study has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that train; 0: this one alone")
    parser.add_argument("--paths", nargs="*", default=[], help="files and folders of the text that `full` trains on")
    parser.add_argument("--store", default="runs/claims.sqlite", help="where runs are kept, those of all studies")
    parser.add_argument("--plan", action="store_true", help="only say what the study takes on this machine")
    parser.add_argument("--steps", action="store_true", help="only time the steps of its models, on a quiet machine")
    parser.add_argument("--stored", action="store_true", help="only write the table and the page from stored runs")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    try:
        print(answered(STUDIES[options.study], options))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped; the same command goes on from here.\n")


def answered(study: Study, options: argparse.Namespace) -> object:
    """Does what the options ask for; returns what to print at the end."""
    scale, runs_at, steps_at = (
        options.scale,
        *(PAGES / f"{study.name}-{options.scale}{end}.csv" for end in ("", "-steps")),
    )
    experiments = study.experiments(scale, options.paths)
    machine = replace(Machine.here(options.device), workers=options.workers)
    torch.set_num_threads(machine.threads)
    if options.page:
        return write_page(study, PAGES)
    if options.plan:
        return foretold(experiments, machine)
    if options.steps or (study.priced and not steps_at.exists() and not options.stored):
        write_steps(timed(experiments, machine), steps_at)
    if options.steps:
        return steps_at
    with Store(options.store) as store:
        if options.stored:
            runs = collect(experiments, store)
        else:
            runs = measure(experiments, store, machine, Path("runs/claims.parts"), told)
    if study.priced:
        runs = priced(runs, read_steps(steps_at))
    write_runs(runs, runs_at)
    return write_page(study, PAGES)


if __name__ == "__main__":
    main()
