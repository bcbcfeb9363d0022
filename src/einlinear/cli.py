"""The command line: one thin verb for each public function. torch is imported by the verbs that need it."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import einlinear as el

if TYPE_CHECKING:
    from einlinear.lab.compare import Plan, Progress
    from einlinear.lab.run import Run

Number = TypeVar("Number", int, float)

app = typer.Typer(
    name="einlinear",
    help="Structured linear layers that turn saved FLOPs into saved seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Store = Annotated[str, typer.Option(help="Where all runs are kept: a file (SQLite), or a database's URL.")]
Report = Annotated[Path, typer.Option(help="Where to write the report (one HTML page).")]


def main() -> None:
    """Runs the command line; what a user can mend ends in one sentence and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"einlinear: {error}")
    except SystemExit as end:
        if end.code == 130:  # how typer ends what was interrupted, and says nothing
            told = "einlinear: interrupted; what was done is kept, and the same command goes on from there"
            print(told, file=sys.stderr)  # noqa: T201
        raise


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        typer.echo(el.__version__)
        raise typer.Exit


@app.command()
def table(
    d_in: Annotated[int, typer.Option("--in", min=1, help="Features of the input.")] = 1024,
    d_out: Annotated[int, typer.Option("--out", min=1, help="Features of the output.")] = 1024,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Every family with what it costs and can express, at one pair of widths."""
    rows = [_row(family, d_in, d_out) for family in el.families()]
    cells = [_cells(row) for row in rows]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif markdown:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *cells):
            typer.echo(f"| {' | '.join(line)} |")
    else:
        _print_table(f"{d_in} → {d_out}", COLUMNS, cells)


COLUMNS = ("family", "parameters", "FLOPs", "of dense", "rank", "ψ  ν  ω", "fans in → out", "source")


def _cells(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [row["family"], *["–"] * 6, row["refused"]]
    fans = [f"{fan_in}→{fan_out}" for fan_in, fan_out in row["fans"]]
    shown = fans if len(fans) <= 4 else [*fans[:3], f"… {len(fans)} factors"]
    counts = [f"{row['parameters']:,}", f"{row['flops']:,}", f"{row['of_dense']:.3g}", f"{row['rank']:,}"]
    return [row["family"], *counts, "  ".join(f"{e:.3g}" for e in row["taxonomy"]), ", ".join(shown), row["source"]]


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for name, cells in zip(columns, zip(*rows, strict=True), strict=True):
        numeric = all(cell[:1].isdigit() or cell == "–" for cell in cells)
        out.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        out.add_row(*row)
    # A terminal wraps; a pipe gets whole rows.
    Console(width=None if sys.stdout.isatty() else 250).print(out)


def _row(family: el.Family, d_in: int, d_out: int) -> dict[str, Any]:
    try:
        structure = family(d_in, d_out)
    except el.StructureError as error:
        return {"family": str(family), "refused": " ".join(str(error).split())}
    return {
        "family": str(family),
        "structure": repr(structure),
        "parameters": el.parameters(structure),
        "flops": el.flops(structure),
        "of_dense": el.flops(structure) / (2 * d_in * d_out),
        "rank": el.generic_rank(structure),
        "taxonomy": el.taxonomy(family),
        "fans": [(scale.fan_in, scale.fan_out) for scale in el.spectral(structure)],
        "source": family.source,
    }


@app.command("candidates")
def candidates_table(
    width: Annotated[int, typer.Option(min=4, help="Width of the model.")] = 256,
    costliest: Annotated[float, typer.Option(help="FLOPs, in those of dense.")] = 1.0,
    least_rank: Annotated[float, typer.Option(help="Smallest exponent ψ of the rank.")] = 1.0,
    most_sharing: Annotated[float, typer.Option(help="Largest exponent ω of weight sharing.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Structures worth a try: θ, ranks and block counts, each linear map once, pruned by cost and taxonomy."""
    found = el.candidates(width, costliest=costliest, least_rank=least_rank, most_sharing=most_sharing)
    if as_json:
        typer.echo(json.dumps([vars(candidate) for candidate in found], indent=2))
        return
    rows = [
        [c.family, *(f"{value:.3g}" for value in (c.flops, c.parameters, c.psi, c.nu, c.omega)), str(len(c.equivalent))]
        for c in found
    ]
    columns = ("family", "FLOPs", "parameters", "ψ", "ν", "ω", "same maps")
    _print_table(f"width {width}, of dense", columns, rows)


@app.command()
def describe(
    structure: Annotated[str, typer.Argument(help="A family ('btt(rank=4)') or an einsum ('i, r i, o r -> o').")],
    sizes: Annotated[list[str] | None, typer.Argument(help="Sizes of the einsum's axes: i=768 r=64 o=768.")] = None,
    d_in: Annotated[int, typer.Option("--in", min=1, help="Features of the input (families).")] = 1024,
    d_out: Annotated[int, typer.Option("--out", min=1, help="Features of the output (families).")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="How many vectors at once, for the choice of the kernel.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu or cuda: where it would run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on cuda.")] = "",
    measure: Annotated[bool, typer.Option("--measure", help="Also time it, here and now, beside dense.")] = False,
) -> None:
    """One structure: its spec, cost, rank, initialisation and rates, how long it takes, and the kernel that runs it."""
    if "->" in structure:
        spec = el.Structure.parse(structure, **_sizes(structure, sizes or []))
    else:
        family = el.structure(structure)
        spec = family(d_in, d_out)
        psi, nu, omega = el.taxonomy(family)
        typer.echo(f"{family}: {(type(family).__doc__ or '').splitlines()[0]}")
        typer.echo(f"source      {family.source}")
        typer.echo(f"taxonomy    rank d^{psi:g}, FLOPs d^{1 + nu:g}, FLOPs per parameter d^{omega:g}")
    dense = 2 * spec.d_in * spec.d_out
    typer.echo(f"map         {spec.d_in} → {spec.d_out}, rank {el.generic_rank(spec):,}")
    typer.echo(f"parameters  {el.parameters(spec):,} ({2 * el.parameters(spec) / dense:.3g} of dense)")
    typer.echo(f"FLOPs       {el.flops(spec):,} per token ({el.flops(spec) / dense:.3g} of dense)")
    better = el.cheapest(spec)
    if el.flops(better) < el.flops(spec):
        typer.echo(f"            {el.flops(better):,} in another order, which is another structure: {better}")
    for axes, scale in zip(spec.factors, el.spectral(spec), strict=True):
        fans = f"{scale.slices} × ({scale.fan_in} → {scale.fan_out})"
        typer.echo(f"  factor {' '.join(axes):12} {fans:22} std {scale.std:.3g}, rate × {scale.lr:.3g} of dense")
    kind = dtype or ("float32" if device == "cpu" else "bfloat16")
    plain = el.Dense()(spec.d_in, spec.d_out)
    if not spec.routed:
        for mode in ("forward", "training"):
            mine, other = (el.seconds(s, tokens, device, kind, mode) for s in (spec, plain))
            typer.echo(
                f"{mode:11} {_time(mine)} modelled for {tokens:,} tokens, {other / mine:.2f} times as fast as dense"
            )
    if measure:
        from einlinear.lab.bench import bench_structure

        for row in bench_structure(spec, tokens, device, kind):
            told = f"{row['ratio_to_dense']:.2f} times as fast as dense"
            typer.echo(f"{row['mode']:11} {_time(row['ms'] / 1e3)} measured on {row['device']}, {told}")
    typer.echo(el.explain(spec, tokens=tokens, device=device, dtype=_torch_type(kind)))


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _torch_type(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"cannot use the type '{name}': torch has none of that name; pass float32 or bfloat16")
    return found


def _sizes(expression: str, sizes: list[str]) -> dict[str, int]:
    pairs = [size.partition("=") for size in sizes]
    for name, _, size in pairs:
        if not name.isidentifier() or not size.isdigit():
            raise el.StructureError(
                f"cannot read the sizes of '{expression}': expected axis=number, as in i=768, found '{name}={size}'"
            )
    return {name: int(size) for name, _, size in pairs}


@app.command()
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
    widths: Annotated[str, typer.Option(help="Widths of the models, as in 32,64,96,128.")] = "",
    horizons: Annotated[str, typer.Option(help="Training lengths in tokens (or examples), as in 150000,300000.")] = "",
    rates: Annotated[str, typer.Option(help="Base learning rates to tune over; a single one is taken as it is.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1,2: more of them narrow the intervals.")] = "",
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the models.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the accelerator if there is one.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Training processes; by default one for each core.")
    ] = None,
    store: Store = "runs/compare.sqlite",
    report: Report = Path("runs/compare.html"),
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Only say what it takes; exit code 1 if the answer would be too blurred."),
    ] = False,
    resolve: Annotated[
        float, typer.Option(min=1.0, help="The multiplier that a plan should tell from 1 (--plan).")
    ] = 1.25,
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
            "widths": _numbers("widths", widths, int),
            "horizons": _numbers("horizons", horizons, int),
            "rates": _numbers("rates", rates, float),
            "seeds": _numbers("seeds", seeds, int),
            "depth": depth,
        }
        given = {name: value for name, value in changed.items() if value}
        plan = replace(lab.default_plan(data, machine.device), **given)
        foretold = forecast(plan, data, machine)
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
        with Store(store) as opened, _progress() as progress:
            runs = lab.compare(plan, data, opened, machine=machine, folder=_parts(store), progress=progress)
        return _write(runs, report, plan=plan)


def _parts(store: str) -> Path:
    """Where runs in progress are kept: beside a file; beside where the command runs, for a database."""
    return Path("runs/compare.parts") if "://" in store else Path(store).with_suffix(".parts")


@app.command("report")
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
    """The report of `compare`, written again from the stored runs."""
    from einlinear.lab.report import save_figure, watch
    from einlinear.lab.store import Store

    def there() -> bool:
        return "://" in store or Path(store).exists()

    def read() -> "Sequence[Run]":
        if not there():
            return ()
        with Store(store) as opened:
            return opened.runs(task=task)

    if watching:
        typer.echo(f"watching {store} every {every} seconds; interrupt to end")
        told = f"report: {report}, "
        watch(
            read, report, every=every, allow_mixed_data=mixed, told=lambda runs: typer.echo(f"{told}{len(runs)} runs")
        )
    if not there():
        raise ValueError(f"cannot report on {store}: there is no such file; run 'einlinear compare' first")
    runs = read()
    if not runs:
        raise ValueError(
            f"cannot report on the task '{task}': {store} holds no runs of it; run 'einlinear compare {task}'"
        )
    _write(runs, report, allow_mixed_data=mixed)
    if figure:
        save_figure(runs, figure)
        typer.echo(f"figure: {figure}")


@app.command()
def fit(
    runs: Annotated[
        Path, typer.Argument(help="CSV or Parquet: params, tokens, loss; flops, family, seed, trunk, seconds.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the law card as JSON (docs/laws.md).")] = False,
    baseline: Annotated[
        str | None, typer.Option(help="The family that multipliers compare with: dense by default.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Which column is which, as in loss=val/ce; repeatable.")
    ] = None,
    drop_highest: Annotated[int, typer.Option(min=0, help="Leave out so many runs of the highest losses.")] = 0,
    delta: Annotated[float, typer.Option(min=1e-6, help="Of Huber's loss of ln L.")] = 1e-3,
    draws: Annotated[int, typer.Option(min=50, help="Of the bootstrap.")] = 1000,
    bits: Annotated[bool, typer.Option("--bits", help="The losses are in bits: turn them to nats.")] = False,
    about: Annotated[
        list[str] | None, typer.Option(help="What the runs do not tell, as in data=C4; repeatable.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Also write the card to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw loss over size: .svg or .png.")] = None,
) -> None:
    """Scaling laws of anybody's finished runs, with intervals, warnings and the compute multiplier."""
    from rich.console import Console

    from einlinear.lab.laws import law_card, print_card, read_table

    table = read_table(runs, _pairs("column", column), bits=bits).without_highest(drop_highest)
    with _bar("fitting") as tell:
        found = law_card(
            table, baseline=baseline, delta=delta, draws=draws, about=_pairs("about", about),
            progress=lambda family, share: tell(share, f"fitting {family}"),
        )  # fmt: skip
    text = json.dumps(found, indent=1, allow_nan=False)
    if card:
        card.write_text(text + "\n")
    if figure:
        from einlinear.lab.report import save_law_figure

        save_law_figure(found, table, figure)
    if as_json:
        typer.echo(text)
    else:
        print_card(found, Console(width=None if sys.stdout.isatty() else 160))


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    for name, _, value in pairs:
        if not name or not value:
            raise ValueError(f"cannot read --{option} '{name}': expected NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


@contextmanager
def _bar(doing: str) -> "Iterator[Callable[[float, str], None]]":
    """A bar on the terminal's error stream, none elsewhere."""
    from rich import progress as rich
    from rich.console import Console

    with rich.Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task(doing, total=1.0)
        yield lambda share, text: bar.update(shown, completed=share, description=text)


@app.command()
def check(
    structure: Annotated[str, typer.Argument(help="A family, such as 'btt(rank=4)'.")] = "btt(rank=4)",
    widths: Annotated[
        str, typer.Option(help="Widths of the models; powers of 4 suit most structures.")
    ] = "64,256,1024",
    optimizer: Annotated[str, typer.Option(help="adamw, sgd or muon.")] = "adamw",
) -> None:
    """Whether learning rates transfer across widths: each factor's own updates must keep their size.

    Exit code 1 if they do not.
    """
    verdict = el.check(el.default_model(structure), _numbers("widths", widths, int), optimizer=optimizer)
    typer.echo(str(verdict))
    raise typer.Exit(0 if verdict.ok else 1)


@app.command()
def bench(
    structure: Annotated[
        list[str] | None, typer.Option("--structure", "-s", help="What to time; repeatable. By default, a few.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths of square layers.")] = "1024,2048",
    tokens: Annotated[str, typer.Option(help="Numbers of vectors.")] = "1024",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    file: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw speed against FLOPs saved: .svg or .png.")] = None,
) -> None:
    """Times layers against dense ones of the same widths, in one process: ratios of medians."""
    import csv

    from einlinear.lab.bench import bench

    kind = _torch_type(dtype)
    families = [el.structure(text) for text in structure or ["btt", "monarch(blocks=16)", "low_rank", "kronecker"]]
    rows = bench(families, _numbers("widths", widths, int), _numbers("tokens", tokens, int), device, kind)
    shown = ("family", "d_in", "tokens", "mode", "ms", "ratio_to_dense", "flop_ratio", "floor_ms", "reach")
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown] for row in rows]
    _print_table(f"{rows[0]['device']}, {dtype}, one process, medians", shown, cells)
    if file:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if figure:
        from einlinear.lab.speed import speed_figure

        speed_figure(rows, figure)
        typer.echo(f"figure: {figure}")


@app.command()
def compress(
    model: Annotated[Path, typer.Argument(help="Directory with a model of transformers, as save_pretrained writes.")],
    out: Annotated[Path, typer.Option(help="Where to write the compressed model; must not exist.")],
    budget: Annotated[
        float, typer.Option(help="Share of what the linear layers cost dense, above 0, at most 1.")
    ] = 0.5,
    structure: Annotated[
        str, typer.Option("--structure", "-s", help="A family ('btt'), one with settings ('btt(rank=4)'), or auto.")
    ] = "auto",
    cost: Annotated[str, typer.Option(help="What the budget counts: parameters or flops (per token).")] = "parameters",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration", "-c", help="Text files or folders, or safetensors of inputs; errors are then the outputs'."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of text to calibrate with, about.")] = 100_000,
    plan: Annotated[
        Path | None, typer.Option(help="A plan to follow in place of a budget, as --write-plan writes.")
    ] = None,
    write_plan: Annotated[
        Path | None, typer.Option(help="Write the plan to this file, to edit and to follow, and stop.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Layers to compress: names, suffixes or patterns; all but heads if none.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave as they are.")] = None,
    finetune: Annotated[
        int, typer.Option(min=0, help="Steps of distillation from the dense model, on the calibration data.")
    ] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate of the distillation.")] = 1e-3,
    sweeps: Annotated[
        int, typer.Option(min=0, help="Rounds of alternating least squares at most, where a layer has no closed form.")
    ] = 100,
) -> None:
    """A dense model of transformers to a structured one within a budget, in a directory that loads like any other.

    Prints the plan and how near the outputs come on held-out data. What is found on the way is kept in OUT.work, and
    the same command goes on there after an interrupt; OUT appears when it is complete.
    """
    from einlinear.checkpoints import Settings, compress_checkpoint, plan_checkpoint

    if cost not in ("parameters", "flops"):
        raise ValueError(f"cannot compress to a budget of '{cost}': it counts 'parameters' or 'flops'")
    if finetune and not calibration:
        raise ValueError("cannot fine-tune without data: pass --calibration FILE")
    settings = Settings(
        structure,
        budget,
        "flops" if cost == "flops" else "parameters",
        calibration or [],
        target or None,
        exclude or [],
        tokens,
        finetune=finetune,
        rate=rate,
        sweeps=sweeps,
    )
    with _stages() as progress:
        if write_plan:
            allocation = plan_checkpoint(model, out, settings, progress)
        else:
            compress_checkpoint(model, out, settings, plan, progress, tell=typer.echo)
    if write_plan:
        typer.echo(str(allocation))
        write_plan.write_text(allocation.plan)
        typer.echo(f"plan: {write_plan}; edit it, then: einlinear compress {model} --plan {write_plan} --out {out}")
    else:
        typer.echo(f"model: {out}; load it by AutoModel.from_pretrained with einlinear imported")


@contextmanager
def _stages() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar for what is being done, with the time left, in a terminal; elsewhere a line when something begins."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
                if bar.disable:
                    typer.echo(f"{doing} ({total})", err=True)
            bar.update(tasks[doing], completed=done, total=total)

        yield tell


def _numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"cannot read --{option} '{text}': expected numbers with commas between, as in 32,64"
        ) from None


def _write(runs: "Sequence[Run]", report: Path, *, plan: "Plan | None" = None, allow_mixed_data: bool = False) -> None:
    from rich.console import Console

    from einlinear.lab.report import print_summary, write_report
    from einlinear.lab.summary import summary

    print_summary(summary(runs, allow_mixed_data=allow_mixed_data), Console())
    report.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["einlinear", *sys.argv[1:]])
    write_report(runs, report, command=command, plan=plan, allow_mixed_data=allow_mixed_data)
    typer.echo(f"report: {report}")


@contextmanager
def _progress() -> "Iterator[Callable[[Progress], None]]":
    """A bar with the time left in a terminal; elsewhere one plain line for each finished run."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[left]}"),
    )
    with rich.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        shown = bar.add_task("training", total=1.0, left="")

        def tell(progress: "Progress") -> None:
            left = "" if progress.seconds_left is None else f"{progress.seconds_left / 60:.1f} minutes left"
            counted = f"run {progress.runs} of {progress.total}"
            bar.update(shown, completed=progress.share, description=counted, left=left)
            if progress.run:
                outcome = f"loss {progress.run.loss:.4f}" if progress.run.loss is not None else progress.run.status
                line = f"{counted}: {progress.run.family}, width {progress.run.width}, {progress.run.tokens:,} tokens"
                line += f", rate {progress.run.rate:.3g} ({progress.run.purpose}): {outcome}"
                bar.console.print(line, highlight=False) if not bar.disable else typer.echo(f"{line}; {left}")

        yield tell
