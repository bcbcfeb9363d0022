"""The search over the space of structures: `search`."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from einlinear.cli.comparison import kept_beside, progress_bar, write_out
from einlinear.cli.options import Report, Store, can_be_kept, known_device, numbers


def search(
    task: Annotated[
        str, typer.Argument(help="bytes, text, pixels, images, teacher, openwebtext or cifar10.")
    ] = "bytes",
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders of the task 'text' and its like.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What a structure is to save: flops, or measured seconds on this device.")
    ] = "flops",
    structure: Annotated[
        list[str] | None, typer.Option("--structure", "-s", help="One to confirm in any case; repeatable.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=4, help="Width of the models that explore.")] = None,
    horizons: Annotated[str, typer.Option(help="Rungs of the exploration in tokens, as in 40000,80000.")] = "",
    budget: Annotated[
        float | None, typer.Option(help="Of the exploration, in trainings of dense to its last horizon.")
    ] = None,
    exponents: Annotated[str, typer.Option(help="Spaces of θ: 7 (two factors), 10 (three), or both.")] = "",
    experts: Annotated[str, typer.Option(help="Also mixtures of so many experts, as in 4,8.")] = "",
    costliest: Annotated[float | None, typer.Option(help="Most FLOPs, in those of dense.")] = None,
    slowest: Annotated[float | None, typer.Option(help="Most modelled seconds, in those of dense.")] = None,
    least_rank: Annotated[float | None, typer.Option(help="Smallest exponent ψ of the rank.")] = None,
    most_sharing: Annotated[float | None, typer.Option(help="Largest exponent ω of weight sharing.")] = None,
    winners: Annotated[int | None, typer.Option(min=1, help="Candidates to confirm.")] = None,
    controls: Annotated[int | None, typer.Option(min=0, help="Candidates at random to confirm beside them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the exploration.")] = 0,
    widths: Annotated[str, typer.Option(help="Widths of the confirmation.")] = "",
    confirm: Annotated[str, typer.Option(help="Training lengths of the confirmation, in tokens.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the confirmation; not that of the exploration.")] = "",
    rates: Annotated[str, typer.Option(help="Base learning rates to tune over; a single one is taken as it is.")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the accelerator if there is one.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Training processes; by default one for each core.")
    ] = None,
    store: Store = "runs/search.sqlite",
    report: Report = Path("runs/search.html"),
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what it takes.")] = False,
    explained: Annotated[
        bool, typer.Option("--explain", help="Say why the winners won, from the runs stored; trains nothing.")
    ] = False,
) -> None:
    """Searches the space of structures for one that spends compute, or time, better than dense.

    Explores with short trainings, most of them cut off early, then confirms the winners beside dense and controls at
    random with fresh seeds, each tuned: only those runs are reported. Every finished run is stored at once, and the
    same command goes on where it was stopped.
    """
    from einlinear.lab import search as lab
    from einlinear.lab.data import load
    from einlinear.lab.machine import Machine
    from einlinear.lab.search.forecast import forecast
    from einlinear.lab.store import Store

    if device:
        known_device(device, present=True)
    can_be_kept(report, store)
    machine = Machine.here(device)
    if workers is not None:
        machine = replace(machine, workers=workers)
    data = load(task, paths=paths or ())
    plan = lab.default_search(data, machine.device)
    changed: dict[str, Any] = {
        "families": tuple(structure or ()), "widths": numbers("widths", widths, int),
        "horizons": numbers("confirm", confirm, int), "seeds": numbers("seeds", seeds, int),
        "rates": numbers("rates", rates, float),
    }  # fmt: skip
    confirmation = replace(plan.confirmation, **{name: value for name, value in changed.items() if value})
    options: dict[str, Any] = {
        "width": width, "horizons": numbers("horizons", horizons, int) or None, "budget": budget,
        "exponents": numbers("exponents", exponents, int) or None, "experts": numbers("experts", experts, int) or None,
        "costliest": costliest, "slowest": slowest, "least_rank": least_rank, "most_sharing": most_sharing,
        "winners": winners, "controls": controls,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    given["objective"] = objective
    plan = replace(plan, confirmation=confirmation, seed=seed, **given)

    if explained:
        if "://" not in store and not Path(store).exists():
            raise ValueError(f"cannot explain: there is no {store}; run 'einlinear search {task}' first")
        with Store(store) as opened:
            typer.echo(lab.explain(lab.recalled(plan, data, opened, machine=machine)))
        return
    typer.echo(f"{data.name}: {data.description}")
    left_out: Counter[str] = Counter()
    pool = plan.pool(machine.device, refused=lambda family, reason: left_out.update([reason]))
    typer.echo(f"{len(pool)} candidates; left out:")
    for reason, count in left_out.most_common():
        typer.echo(f"  {count:5} {reason}")
    if plan_only or not sys.stdout.isatty():
        typer.echo(str(forecast(plan, data, machine)))
    if plan_only:
        return
    with Store(store) as opened, progress_bar() as progress:
        searched = lab.search(plan, data, opened, machine=machine, folder=kept_beside(store), progress=progress)
    write_out([*searched.runs, *searched.explored.runs.values()], report, plan=plan)
    typer.echo(lab.told(searched))
