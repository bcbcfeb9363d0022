"""What several verbs have in common: options, how they are read, and tables."""

import os
import re
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
        whole = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"cannot read --{option} '{text}': expected {whole} with commas between, as in 32,64"
        ) from None


def counts(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers, at least one of them, and each at least 1."""
    found = numbers(option, text, int)
    if not found or min(found) < 1:
        raise ValueError(f"cannot use --{option} '{text}': pass whole numbers of at least 1, as in 32,64")
    return found


def torch_type(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"cannot use the type '{name}' for layers: pass float32, bfloat16, float16 or float64")
    return found


def known_device(name: str, *, present: bool = False) -> str:
    """The name of a device that layers run on; with `present`, one that this machine has."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"cannot use the device '{name}': pass cpu, cuda or, of several, one such as cuda:1")
    if present and name != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"cannot use the device '{name}': this torch sees no CUDA device; pass cpu")
        if torch.device(name).index not in (None, *range(torch.cuda.device_count())):
            raise ValueError(
                f"cannot use the device '{name}': torch sees {torch.cuda.device_count()} of them, from cuda:0"
            )
    return name


def can_be_kept(report: Path, store: str) -> None:
    """Refuses a report, or a store in a file, that could not be written."""
    can_be_written(report)
    if "://" not in store:
        can_be_written(Path(store))


def can_be_written(path: Path | None, *suffixes: str) -> None:
    """Refuses a file that could not be written, before any work is done for it; folders that lack will be made."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"cannot write {path}: only {' and '.join(suffixes)} can be written; name it {path.stem}.svg")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: {folder} is no folder that may be written to")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: it is there already, and may not be written to")


FIGURES = (".svg", ".png")


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
