"""The command line: one thin verb for each public function. torch is imported by the verbs that need it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import einlinear as el

app = typer.Typer(
    name="einlinear",
    help="Structured linear layers that turn saved FLOPs into saved seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Store = Annotated[Path, typer.Option(help="The file that holds all runs (SQLite).")]
Report = Annotated[Path, typer.Option(help="Where to write the report (one HTML page).")]


def main() -> None:
    """Runs the command line; what a user can mend ends in one sentence and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"einlinear: {error}")
    except KeyboardInterrupt:
        sys.exit("einlinear: interrupted; nothing finished is lost, and the same command goes on from there")


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


@app.command()
def describe(
    structure: Annotated[str, typer.Argument(help="A family ('btt(rank=4)') or an einsum ('i, r i, o r -> o').")],
    sizes: Annotated[list[str] | None, typer.Argument(help="Sizes of the einsum's axes: i=768 r=64 o=768.")] = None,
    d_in: Annotated[int, typer.Option("--in", min=1, help="Features of the input (families).")] = 1024,
    d_out: Annotated[int, typer.Option("--out", min=1, help="Features of the output (families).")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="How many vectors at once, for the choice of the kernel.")] = 1024,
) -> None:
    """One structure: its spec, cost, rank, initialisation and rates, and the kernel that runs it."""
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
    typer.echo(el.explain(spec, tokens=tokens))


def _sizes(expression: str, sizes: list[str]) -> dict[str, int]:
    pairs = [size.partition("=") for size in sizes]
    for name, _, size in pairs:
        if not name.isidentifier() or not size.isdigit():
            raise el.StructureError(
                f"cannot read the sizes of '{expression}': expected axis=number, as in i=768, found '{name}={size}'"
            )
    return {name: int(size) for name, _, size in pairs}
