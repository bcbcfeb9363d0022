"""Trained comparisons and their report: `compare`, `report`."""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einlinear.cli.options import FIGURES, Report, Store, can_be_kept, can_be_written, known_device, numbers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from einlinear.lab.compare import Progress
    from einlinear.lab.run import Run


def compare(
    task: Annotated[
        str, typer.Argument(help="bytes, text, pixels, images, teacher, openwebtext or cifar10.")
    ] = "bytes",
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders of the task 'text' and its like.")
    ] = None,
    structure: Annotated[
        list[str] | None, typer.Option("--structure", "-s", help="One to compare, such as 'btt(rank=2)'; repeatable.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths of the models, as in 16,32,48,64.")] = "",
    horizons: Annotated[str, typer.Option(help="Training lengths in tokens (or examples), as in 150000,300000.")] = "",
    rates: Annotated[str, typer.Option(help="Base learning rates to tune over; a single one is taken as it is.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1,2: more of them narrow the intervals.")] = "",
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the models.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the accelerator if there is one.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Training processes; by default one for each core, or one on a GPU.")
    ] = None,
    store: Store = "runs/compare.sqlite",
    report: Report = Path("runs/compare.html"),
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Only say what it takes; exit code 1 if the answer would be too blurred."),
    ] = False,
    resolve: Annotated[
        float, typer.Option(min=1.0, help="The multiplier that a plan should tell from 1 (--plan).")
    ] = 1.4,
    engine: Annotated[
        str, typer.Option(help="Whose workers train: processes (of this machine) or ray (a cluster's).")
    ] = "processes",
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a batch, one after the other: less memory.")] = 1,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile each block: pays off in long runs of wide models on a GPU.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: also share out parameters and optimizer state (FSDP2).")
    ] = False,
) -> None:
    """Which structure spends compute best: trains a grid of structures and widths, and reports with intervals.

    Every structure is first tuned; every finished run is stored at once, and the same command goes on where it
    was stopped. Started by torchrun, all processes train each model together.
    """
    from einlinear.lab import compare as lab
    from einlinear.lab.data import load
    from einlinear.lab.forecast import forecast
    from einlinear.lab.machine import Machine
    from einlinear.lab.parallel import World, joined
    from einlinear.lab.store import Store
    from einlinear.lab.sweep import follow

    if device:
        known_device(device, present=True)
    can_be_kept(report, store)
    if engine not in ("processes", "ray"):
        raise ValueError(f"cannot train by the engine '{engine}': pass processes or ray")
    settings: dict[str, Any] = {"engine": engine, "accumulate": accumulate, "compiled": compiled, "shard": shard}
    if shard:
        settings["graphed"] = False
    machine = replace(Machine.here(device), **settings)
    if workers is not None:
        machine = replace(machine, workers=workers)
    with joined(machine.device) as own_device:
        world = World.here()
        if world.size > 1:
            machine = replace(machine, device=own_device, workers=0, graphed=False)
        data = load(task, paths=paths or ())
        changed: dict[str, Any] = {
            "families": tuple(structure or ()),
            "widths": numbers("widths", widths, int),
            "horizons": numbers("horizons", horizons, int),
            "rates": numbers("rates", rates, float),
            "seeds": numbers("seeds", seeds, int),
            "depth": depth,
        }
        given = {name: value for name, value in changed.items() if value}
        plan = replace(lab.default_plan(data, machine.device), **given)
        foretold = forecast(plan, data, machine, _stored(store, data.name))
        if world.rank:
            return None if plan_only else follow(plan.cut(data), machine)
        typer.echo(f"{data.name}: {data.description}")
        typer.echo(str(foretold))
        refusal = foretold.refusal(resolve)
        if plan_only and refusal:
            raise ValueError(refusal)
        if plan_only:
            return None
        if refusal:
            typer.echo(f"warning: {refusal}", err=True)
        with Store(store) as opened, progress_bar() as progress:
            runs = lab.compare(
                plan, data, opened, machine=machine, folder=kept_beside(store), progress=partial(progress, "")
            )
        return write_out(runs, report, plan=plan)


def kept_beside(store: str) -> Path:
    """Where runs in progress are kept: beside a file; beside where the command runs, for a database."""
    return Path("runs/compare.parts") if "://" in store else Path(store).with_suffix(".parts")


def _there(store: str) -> bool:
    return "://" in store or Path(store).exists()


def _stored(store: str, task: str) -> "Sequence[Run]":
    """The task's runs in a store, which is not made where there is none, or a file of no bytes."""
    from einlinear.lab.store import Store

    if not _there(store) or ("://" not in store and Path(store).is_file() and not Path(store).stat().st_size):
        return ()
    with Store(store) as opened:
        return opened.runs(task=task)


def write_again(
    task: Annotated[str, typer.Option(help="The task whose runs are reported.")] = "bytes",
    store: Store = "runs/compare.sqlite",
    report: Report = Path("runs/compare.html"),
    figure: Annotated[Path | None, typer.Option(help="Also write the main figure alone: .svg or .png.")] = None,
    mixed: Annotated[
        bool, typer.Option("--allow-mixed-data", help="Put runs on different data or settings in one fit.")
    ] = False,
    watching: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever there are new runs, until interrupted.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Seconds between looks at the store, with --watch.")] = 10,
) -> None:
    """The report of `compare` or `search`, written again from the stored runs."""
    can_be_written(report)
    can_be_written(figure, *FIGURES)

    from rich.console import Console

    from einlinear.lab.report import print_exploration, save_figure, watch
    from einlinear.lab.search.looked import exploration

    if watching:
        typer.echo(f"watching {store} every {every} seconds; interrupt to end")
        told = f"report: {report}, "
        watch(
            lambda: _stored(store, task),
            report,
            every=every,
            allow_mixed_data=mixed,
            told=lambda runs: typer.echo(f"{told}{len(runs)} runs"),
        )
    if not _there(store):
        raise ValueError(f"cannot report on {store}: there is no such file; run 'einlinear compare' first")
    runs = _stored(store, task)
    if not runs:
        raise ValueError(
            f"cannot report on the task '{task}': {store} holds no runs of it; run 'einlinear compare {task}'"
        )
    write_out(runs, report, allow_mixed_data=mixed)
    if explored := exploration(runs):
        print_exploration(explored, Console())
    if figure:
        figure.parent.mkdir(parents=True, exist_ok=True)
        save_figure(runs, figure)
        typer.echo(f"figure: {figure}")


def write_out(
    runs: "Sequence[Run]", report: Path, *, plan: "DataclassInstance | None" = None, allow_mixed_data: bool = False
) -> None:
    from rich.console import Console

    from einlinear.lab.report import print_summary, write_report
    from einlinear.lab.summary import summary

    print_summary(summary(runs, allow_mixed_data=allow_mixed_data), Console())
    report.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["einlinear", *sys.argv[1:]])
    write_report(runs, report, command=command, plan=plan, allow_mixed_data=allow_mixed_data)
    typer.echo(f"report: {report}")


@contextmanager
def progress_bar() -> "Iterator[Callable[[str, Progress], None]]":
    """A bar with the time left in a terminal; elsewhere one plain line for each finished run. Told what part it is."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[left]}"),
    )
    with rich.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        shown = bar.add_task("training", total=1.0, left="")

        def tell(part: str, progress: "Progress") -> None:
            left = "" if progress.seconds_left is None else f"{progress.seconds_left / 60:.1f} minutes left"
            counted = f"{part}{': ' * bool(part)}run {progress.runs} of {progress.total}"
            bar.update(shown, completed=progress.share, description=counted, left=left)
            if progress.run:
                outcome = f"loss {progress.run.loss:.4f}" if progress.run.loss is not None else progress.run.status
                line = f"{counted}: {progress.run.family}, width {progress.run.width}, {progress.run.tokens:,} tokens"
                line += f", rate {progress.run.rate:.3g} ({progress.run.purpose}): {outcome}"
                bar.console.print(line, highlight=False) if not bar.disable else typer.echo(f"{line}; {left}")

        yield tell
