"""What several verbs have in common: options, how they are read, and tables."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Number = TypeVar("Number", int, float)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Store = Annotated[str, typer.Option(help="Where all runs are kept: a file (SQLite), or a database's URL.")]
Report = Annotated[Path, typer.Option(help="Where to write the report (one HTML page).")]


def numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"cannot read --{option} '{text}': expected numbers with commas between, as in 32,64"
        ) from None


def torch_type(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"cannot use the type '{name}': torch has none of that name; pass float32 or bfloat16")
    return found


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
