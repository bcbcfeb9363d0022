"""Scaling laws of anybody's runs: `fit`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from einlinear.cli.options import FIGURES, can_be_written


def fit(
    runs: Annotated[
        Path, typer.Argument(help="CSV, JSON or Parquet: params, tokens, loss; flops, family, seed, trunk, seconds.")
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
    best_over: Annotated[
        list[str] | None, typer.Option(help="A column of a setting that was tried, as lr: keep the best; repeatable.")
    ] = None,
    about: Annotated[
        list[str] | None, typer.Option(help="What the runs do not tell, as in data=C4; repeatable.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Also write the card to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw loss over size: .svg or .png.")] = None,
) -> None:
    """Scaling laws of anybody's finished runs, with intervals, warnings and the compute multiplier."""
    from rich.console import Console

    can_be_written(card)
    can_be_written(figure, *FIGURES)

    from einlinear.lab.laws import law_card, print_card, read_table

    if figure:
        from einlinear.lab.report import save_law_figure

    table = read_table(runs, _pairs("column", column), bits=bits, best=best_over or ()).without_highest(drop_highest)
    with _bar("fitting") as tell:
        found = law_card(
            table, baseline=baseline, delta=delta, draws=draws, about=_pairs("about", about),
            progress=lambda family, share: tell(share, f"fitting {family}"),
        )  # fmt: skip
    text = json.dumps(found, indent=1, allow_nan=False)
    if card:
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(text + "\n")
    if as_json:
        typer.echo(text)
    else:
        print_card(found, Console(width=None if sys.stdout.isatty() else 160))
    if figure:
        figure.parent.mkdir(parents=True, exist_ok=True)
        save_law_figure(found, table, figure)


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
