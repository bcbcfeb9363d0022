"""What a structure is, costs and needs: `table`, `candidates`, `describe`, `check`."""

import json
from collections import Counter
from typing import Annotated, Any

import typer

import einlinear as el
from einlinear.cli.options import Json, counts, known_device, print_table, torch_type


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
        print_table(f"{d_in} → {d_out}", COLUMNS, cells)


COLUMNS = ("family", "parameters", "FLOPs", "of dense", "rank", "ψ  ν  ω", "fans in → out", "source")


def _cells(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [row["family"], *["–"] * 6, row["refused"]]
    fans = [f"{fan_in}→{fan_out}" for fan_in, fan_out in row["fans"]]
    shown = fans if len(fans) <= 4 else [*fans[:3], f"… {len(fans)} factors"]
    counts = [f"{row['parameters']:,}", f"{row['flops']:,}", f"{row['of_dense']:.3g}", f"{row['rank']:,}"]
    return [row["family"], *counts, "  ".join(f"{e:.3g}" for e in row["taxonomy"]), ", ".join(shown), row["source"]]


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


def candidates(
    width: Annotated[int, typer.Option(min=4, help="Width of the model.")] = 256,
    costliest: Annotated[float, typer.Option(help="FLOPs, in those of dense.")] = 1.0,
    least_rank: Annotated[float, typer.Option(help="Smallest exponent ψ of the rank.")] = 1.0,
    most_sharing: Annotated[float, typer.Option(help="Largest exponent ω of weight sharing.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Structures worth a try: θ, ranks and block counts, each linear map once, pruned by cost and taxonomy."""
    left: list[str] = []
    found = el.candidates(
        width,
        costliest=costliest,
        least_rank=least_rank,
        most_sharing=most_sharing,
        refused=lambda _, reason: left.append(reason),
    )
    if not found:
        often = "; ".join(f"{reason} ({count})" for reason, count in Counter(left).most_common(2))
        raise ValueError(f"no structure of width {width} is a candidate; most often it {often}; ask for less")
    if as_json:
        typer.echo(json.dumps([vars(candidate) for candidate in found], indent=2))
        return
    rows = [
        [c.family, *(f"{value:.3g}" for value in (c.flops, c.parameters, c.psi, c.nu, c.omega)), str(len(c.equivalent))]
        for c in found
    ]
    columns = ("family", "FLOPs", "parameters", "ψ", "ν", "ω", "same maps")
    print_table(f"width {width}, of dense", columns, rows)


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
    known_device(device, present=measure)
    kind = dtype or ("float32" if device == "cpu" else "bfloat16")
    own_type = torch_type(kind)
    if "->" in structure:
        spec = el.Structure.parse(structure, **_sizes(structure, sizes or []))
    else:
        if sizes:
            raise el.StructureError(
                f"cannot use '{' '.join(sizes)}' with a family: its widths are given as --in 512 --out 512"
            )
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
    typer.echo(el.explain(spec, tokens=tokens, device=device, dtype=own_type))


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _sizes(expression: str, sizes: list[str]) -> dict[str, int]:
    pairs = [size.partition("=") for size in sizes]
    for name, _, size in pairs:
        if not name.isidentifier() or not size.isdigit():
            raise el.StructureError(
                f"cannot read the sizes of '{expression}': expected axis=number, as in i=768, found '{name}={size}'"
            )
    return {name: int(size) for name, _, size in pairs}


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
    verdict = el.check(el.default_model(structure), counts("widths", widths), optimizer=optimizer)
    typer.echo(str(verdict))
    raise typer.Exit(0 if verdict.ok else 1)
