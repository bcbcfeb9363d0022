"""Layers against the clock: `bench`."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

import einlinear as el
from einlinear.cli.options import FIGURES, can_be_written, counts, known_device, print_table, torch_type


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
    """Times layers against dense ones of the same widths, in one process: ratios of medians.

    What the device has no memory for is left out, and said.
    """
    import csv
    import sys

    families = [el.structure(text) for text in structure or ["btt", "monarch(blocks=16)", "low_rank", "kronecker"]]
    sizes, lengths = counts("widths", widths), counts("tokens", tokens)
    can_be_written(file)
    can_be_written(figure, *FIGURES)
    kind = torch_type(dtype)

    from einlinear.lab.bench import TooLarge, bench

    if figure:
        from einlinear.lab.speed import speed_figure
    known_device(device, present=True)
    rows, refused = [], list[str]()
    for width, count in product(sizes, lengths):
        try:
            rows += bench(families, (width,), (count,), device, kind)
        except TooLarge as error:
            refused.append(str(error))
    if not rows:
        raise ValueError(refused[0])
    shown = ("family", "d_in", "tokens", "mode", "ms", "ratio_to_dense", "flop_ratio", "floor_ms", "reach")
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown] for row in rows]
    print_table(f"{rows[0]['device']}, {dtype}, one process, medians", shown, cells)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if figure:
        figure.parent.mkdir(parents=True, exist_ok=True)
        speed_figure(rows, figure)
        typer.echo(f"figure: {figure}")
    if refused:
        sys.exit("\n".join(f"einlinear: {reason}" for reason in refused))
