"""Experts in every linear layer against the standard mixture, dense layers and BTT, for the same compute.

    python recipes/experts.py --plan                  # what it takes here, before any of it is trained
    python recipes/experts.py                         # small, on a CPU
    python recipes/experts.py --scale h200 --task text --paths corpus/ --workers 4 --minutes 9
    python recipes/experts.py --checks                # other rates, and experts evened out less
    python recipes/experts.py --health                # routers of 16 experts on `bytes`, 1000 steps
    python recipes/experts.py --clock                 # seconds of a step, once the machine does nothing else

Every call goes on where the last one stopped, killed or out of its minutes: finished runs are found in the store,
those in progress beside it. Families, rates and horizons are tuned and measured alike (docs/laws.md). Afterwards
`recipes/experts_page.py` writes figures and tables of docs/experts.md from the results. See recipes/README.md.
"""

import argparse
import csv
import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from einlinear.cli.options import can_be_kept, known_device
from einlinear.lab import compare
from einlinear.lab.crew import Event
from einlinear.lab.data import Task, load
from einlinear.lab.forecast import forecast
from einlinear.lab.machine import Machine
from einlinear.lab.report import write_report
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.studies import Experiment, timed, write_steps
from einlinear.lab.studies.pricing import Timed
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk, train

STANDARD = "moe(experts=8, active=2)"


def everywhere(experts: int, active: int) -> str:
    """BTT-MoE: experts of rank one in every linear layer."""
    return f"mixture(of='btt', experts={experts}, active={active})"


FAMILIES = (
    "dense",
    "btt",
    "btt(rank=2)",  # the FLOPs of two active experts, without a choice
    STANDARD,
    *(everywhere(experts, 2) for experts in (4, 8, 16)),
)
THOUSAND = 1_000
BATCH = 64 * 128  # tokens of a step at the larger scale
PLANS = {
    # Four budgets over 1.6 decades for every family.
    "small": compare.Plan(
        families=FAMILIES,
        widths=(32, 64, 128),
        depth=2,
        horizons=(40 * THOUSAND, 80 * THOUSAND, 160 * THOUSAND, 320 * THOUSAND),
        rates=(2**-8, 2**-7, 2**-6),
        tuning=160 * THOUSAND,
        recipe=Recipe(batch=16, base_width=64, base_depth=2, warmup=10),
        context=64,
        seeds=(0, 1),
    ),
    # Budgets over three decades and more. A window of minutes on a shared GPU: models of two blocks.
    # Blocks of a BTT at these widths are multiples of eight, as its kernels want them.
    "h200": compare.Plan(
        families=(*FAMILIES[:1], *FAMILIES[2:], *(everywhere(e, k) for e, k in ((8, 1), (8, 4), (16, 1), (4, 4)))),
        widths=(64, 128, 256, 384, 512),
        depth=2,
        horizons=tuple(BATCH * steps for steps in (200, 400, 800, 1600, 3200)),
        rates=(2**-8, 2**-7, 2**-6),
        tuning=BATCH * 800,
        recipe=Recipe(batch=64, base_width=128, base_depth=2, head=32, warmup=50, precision="bfloat16"),
        context=128,
        seeds=(0, 1),
        extensions=2,
        growth=0.75,
    ),
}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LEFT_OUT = ("curve", "routers", "spec")  # what the store keeps and a table of results does not
EVENED = {  # weights of the loss and steps of the bias, beside the plan's 0.1 and 0.01
    everywhere(16, 2): [(0.1, 0.001), (0.1, 0.0), (0.01, 0.01), (0.01, 0.001), (0.01, 0.0)],
    everywhere(8, 1): [(0.1, 0.0), (0.01, 0.0)],
}
HEALTHY = ("mixture(of='btt', experts=16, active=2)", "moe(experts=16, active=2)")


def checks(plan: compare.Plan, task: Task, rates: Mapping[str, float]) -> list[Trunk]:
    """What may cost the plan's families their loss: half and twice the tuned rate, and how experts are evened out.

    Rates at the base width over the longest horizon, and at twice that width over the one before it, where experts are
    evened out more or less too.
    """
    longest, before = (replace(plan, horizons=plan.horizons[at:][:1], seeds=plan.seeds[:1]) for at in (-1, -2))
    base = plan.recipe.base_width
    at_base = replace(longest, widths=(base,)).trunks(task, rates)
    wider = replace(before, widths=(2 * base,)).trunks(task, rates)
    found = [
        replace(trunk, rate=trunk.rate * factor)
        for trunk in [trunk for trunk in wider if trunk.family in ("dense", everywhere(16, 2))] + at_base
        for factor in (0.5, 2.0)
    ]
    for trunk in replace(before, widths=(base,)).trunks(task, rates):
        for balance, step in EVENED.get(trunk.family, ()):
            found.append(replace(trunk, recipe=replace(plan.recipe, balance=balance, rebalance=step)))
    return [replace(trunk, purpose="check") for trunk in found]


def run(plan: compare.Plan, task: Task, machine: Machine, options: argparse.Namespace) -> None:
    """Trains until all is done or the minutes are over; writes what there is either way."""
    with Store(options.store) as store:
        folder = Path(options.store).with_suffix(".parts")
        with in_time(options.minutes):
            if options.checks:
                with Sweep(task, store, machine, folder, heard) as sweep:
                    _, (rates,) = compare.tune([plan], task, sweep.train)
                    done = sweep.train(checks(plan, task, rates))
            else:
                done = compare.compare(plan, task, store, machine=machine, folder=folder, progress=told)
            print(f"all {len(done)} runs are done", flush=True)
        runs = store.runs(task=task.name, fingerprint=task.fingerprint)
    write_report(runs, options.report, command="python recipes/experts.py", plan=plan)
    write_runs(runs, options.results, options.scale)


def write_runs(runs: Sequence[Run], results: Path, scale: str) -> None:
    """The runs as a table, and two of the routers of the longest ones."""
    names = [field.name for field in fields(Run) if field.name not in LEFT_OUT]
    write(results / f"experts_{scale}.csv", ({name: getattr(run, name) for name in names} for run in runs))
    routed = [run for run in runs if run.family in HEALTHY and run.purpose == "measure" and run.status == "done"]
    longest = {run.width: max(other.tokens for other in routed if other.width == run.width) for run in routed}
    watched((run for run in routed if run.tokens == longest[run.width]), results, f"{scale}_routers")


@contextmanager
def in_time(minutes: float) -> Iterator[None]:
    """Interrupts what is within it after so many minutes, if not 0, and says so; or where the user does."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def heard(trunk: Trunk, event: Event) -> None:
    if isinstance(event, Run):
        print(described(event), flush=True)


def told(progress: compare.Progress) -> None:
    if run := progress.run:
        left = f", {progress.seconds_left / 60:.0f} minutes left" if progress.seconds_left else ""
        print(f"{progress.runs}/{progress.total} {described(run)}{left}", flush=True)


def described(run: Run) -> str:
    outcome = run.status if run.loss is None else f"{run.loss:.4f}"
    what = f"{run.family} width {run.width} {run.tokens} tokens rate {run.rate:.4g} seed {run.seed} ({run.purpose})"
    return f"{what}: {outcome}"


def health(steps: int, seeds: Iterable[int], machine: Machine, results: Path) -> None:
    """Routers of the lab's GPT with its defaults while it trains: every window of training, and loads at its end."""
    task = load("bytes", context=64)
    recipe = Recipe(batch=16, base_width=64, base_depth=1)
    runs = []
    for family in HEALTHY:
        for seed in seeds:
            trunk = Trunk(family=family, width=64, depth=1, rate=2**-7, seed=seed, horizons=(steps,), recipe=recipe)
            runs += train(trunk, task, execution=machine)
            print(f"{family} seed {seed}: loss {runs[-1].loss}", flush=True)
            watched(runs, results, "health")


def one_active(steps: int, results: Path, machine: Machine) -> None:
    """Why one active expert fails: what evens experts out, step by step less, beside two active ones."""
    task = load("bytes", context=64)
    rows: list[dict[str, object]] = []
    for active, balance, step in ((1, 0.1, 0.01), (1, 0.1, 0.0), (1, 0.0, 0.0), (2, 0.1, 0.01), (2, 0.1, 0.0)):
        recipe = Recipe(batch=16, base_width=64, base_depth=1, balance=balance, rebalance=step)
        family = everywhere(8, active)
        trunk = Trunk(family=family, width=64, depth=1, rate=2**-8, seed=0, horizons=(steps,), recipe=recipe)
        (run,) = train(trunk, task, execution=machine)
        entropies = [router["entropy"] for router in json.loads(run.routers).values()]
        rows.append(
            {"active": active, "balance": balance, "rebalance": step, "loss": run.loss, "entropy": min(entropies)}
        )
        print(rows[-1], flush=True)
        write(results / "experts_one_active.csv", rows)


def watched(runs: Iterable[Run], results: Path, name: str) -> None:
    """Two tables of what runs tell of their routers: every window of training, and loads at its end."""
    windows: list[dict[str, object]] = []
    loads: list[dict[str, object]] = []
    for run in runs:
        for layer, found in json.loads(run.routers).items():
            about = {"family": run.family, "width": run.width, "seed": run.seed, "layer": layer}
            by_window = zip(*found["history"].values(), strict=True)
            windows += [about | dict(zip(found["history"], values, strict=True)) for values in by_window]
            loads += [about | {"expert": e, "load": share} for e, share in enumerate(found["load"])]
    write(results / f"experts_{name}.csv", windows)
    write(results / f"experts_{name}_loads.csv", loads)


def clock(plan: compare.Plan, machine: Machine, options: argparse.Namespace) -> None:
    """Seconds of a step of every family, timed in turn, one width after the other; on a CPU those of its thread.

    On a machine that others use, the wall time of a run says when it ran and not what it takes.
    """
    torch.set_num_threads(machine.threads)
    steps: list[Timed] = []
    for width in plan.widths:
        one = replace(plan, widths=(width,))
        steps += timed([Experiment(task=options.task, plan=one, paths=tuple(options.paths))], machine)
        write_steps(steps, options.results / f"experts_{options.scale}_clock.csv")


def write(file: Path, rows: Iterable[dict[str, object]]) -> None:
    """A table of results; rows have the same columns."""
    found = list(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(found[0]) if found else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of things")
    return count


def _minutes(text: str) -> float:
    if not (minutes := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=PLANS, default="small")
    parser.add_argument("--seeds", type=_count, help="how many; a later call with more of them adds to it")
    parser.add_argument("--widths", type=int, nargs="+", help="only these; a later call with more of them adds to it")
    parser.add_argument("--families", nargs="+", help="only these; a later call with more of them adds to it")
    parser.add_argument("--horizons", type=int, nargs="+", help="only these, in steps of the base width; as --widths")
    parser.add_argument("--wide-first", action="store_true", help="for many processes in a short time")
    parser.add_argument("--task", default="bytes")
    parser.add_argument("--paths", nargs="*", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=_count, default=1, help="trunks trained at once, also on one GPU")
    parser.add_argument("--minutes", type=_minutes, default=0.0, help="after which it stops and keeps what it is at")
    parser.add_argument("--store", default="runs/experts.sqlite")
    parser.add_argument("--report", type=Path, default=Path("runs/experts.html"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of CSVs")
    parser.add_argument("--plan", action="store_true", help="say what it takes, instead")
    parser.add_argument("--checks", action="store_true", help="train what may explain the outcome, instead")
    parser.add_argument("--clock", action="store_true", help="time a step of each, instead")
    parser.add_argument("--health", type=int, nargs="?", const=1000, help="steps to watch routers for, instead")
    parser.add_argument("--one-active", action="store_true", help="why one active expert fails, instead (500 steps)")
    options = parser.parse_args()
    try:
        carry_out(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"experts.py: {error}") from None


def carry_out(options: argparse.Namespace) -> None:
    """What the options ask for."""
    known_device(options.device, present=True)
    can_be_kept(options.report, options.store)
    plan = PLANS[options.scale]
    if options.seeds is not None:
        plan = replace(plan, seeds=tuple(range(options.seeds)))
    if options.widths:
        plan = replace(plan, widths=tuple(options.widths))
    if options.families:
        plan = replace(plan, families=tuple(options.families))
    if options.horizons:
        step = plan.recipe.batch * (plan.context or 1)
        plan = replace(plan, horizons=tuple(step * steps for steps in options.horizons))
    plan = replace(plan, wide_first=options.wide_first)
    machine = replace(Machine.here(options.device), workers=options.workers)
    if options.health:
        torch.set_num_threads(1)
        health(options.health, plan.seeds, machine, options.results)
        return
    if options.one_active:
        torch.set_num_threads(1)
        one_active(500, options.results, machine)
        return
    if options.clock:
        clock(plan, machine, options)
        return
    task = plan.cut(load(options.task, paths=options.paths))
    if options.plan:
        foretold = forecast(plan, task, machine)
        print(foretold)
        return
    run(plan, task, machine, options)


if __name__ == "__main__":
    main()
