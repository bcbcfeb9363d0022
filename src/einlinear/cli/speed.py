"""Layers against the clock: `bench`."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

import einlinear as el
from einlinear.cli.options import FIGURES, can_be_written, counts, known_device, print_table, torch_type


def bench(
    structure: Annotated[
        list[str] | None, typer.Option("--structure", "-s", help="What to time; repeatable. By default, a few.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths of square layers, or of others, as 4096x11008.")] = "1024,2048",
    tokens: Annotated[str, typer.Option(help="Numbers of vectors.")] = "1024",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    file: Annotated[Path | None, typer.Option(help="Also write the rows as CSV, as they come.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw speed against FLOPs saved: .svg or .png.")] = None,
) -> None:
    """Times layers against dense ones of the same widths, in one process: ratios of medians.

    A column `floor_ms` is what FLOPs, or the bytes of inputs, outputs and weights, take at the speeds of a large
    matmul and of memory, measured first; `reach` is floor_ms / ms. What the device has no memory for is left out, and
    said.
    """
    import sys

    families = [el.structure(text) for text in structure or ["btt", "monarch(blocks=16)", "low_rank", "kronecker"]]
    sizes, lengths = _widths(widths), counts("tokens", tokens)
    can_be_written(file)
    can_be_written(figure, *FIGURES)
    kind = torch_type(dtype)

    from einlinear.lab.bench import TooLarge, bench

    if figure:
        from einlinear.lab.speed import speed_figure
    known_device(device, present=True)
    rows, refused = list[dict[str, Any]](), list[str]()
    cases = list(product(sizes, lengths))
    for place, ((d_in, d_out), count) in enumerate(cases, 1):
        typer.echo(f"{place} of {len(cases)}: {d_in} → {d_out}, {count} tokens", err=True)
        try:
            rows += bench(families, ((d_in, d_out),), (count,), device, kind)
        except TooLarge as error:
            refused.append(str(error))
        if file and rows:
            _write(rows, file)
    if not rows:
        raise ValueError(refused[0])
    shown = ("tokens", "mode", "ms", "ratio_to_dense", "flop_ratio", "floor_ms", "reach")
    cells = [
        [row["family"], f"{row['d_in']} → {row['d_out']}"]
        + [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown]
        for row in rows
    ]
    print_table(f"{rows[0]['device']}, {dtype}, one process, medians", ("family", "width", *shown), cells)
    if figure:
        figure.parent.mkdir(parents=True, exist_ok=True)
        speed_figure(rows, figure)
        typer.echo(f"figure: {figure}")
    if refused:
        sys.exit("\n".join(f"einlinear: {reason}" for reason in refused))


def _widths(text: str) -> list[tuple[int, int]]:
    """Pairs of widths: 1024 is a square layer, 4096x11008 another one."""
    pairs = [part.strip().split("x") for part in text.split(",") if part.strip()]
    if not pairs or any(len(pair) > 2 or not all(size.isdecimal() and int(size) for size in pair) for pair in pairs):
        raise ValueError(f"cannot use --widths '{text}': pass whole numbers of at least 1, as in 1024,4096x11008")
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def _write(rows: list[dict[str, Any]], file: Path) -> None:
    import csv

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
