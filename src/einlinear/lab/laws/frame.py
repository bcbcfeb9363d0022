"""A file of runs as a data frame: CSV of any separator and encoding, JSON, or Parquet; gzipped or not."""

import csv
import gzip
import io
import json
import re
import warnings
from pathlib import Path

from einlinear.lab.extras import extra
from einlinear.lab.laws.table import TableError

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]

SEPARATORS = ",;\t|"


def read_frame(path: Path) -> "pd.DataFrame":
    """The table in a file; `attrs["separator"]` is a CSV's.

    Raises:
        TableError: for a file that is none.
    """
    if not path.is_file():
        raise TableError(f"Reading runs from {path}: there is no such file.")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(path)
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:4] == b"PAR1":
            return pd.read_parquet(io.BytesIO(content))
        text = _decoded(content)
        return _frame_of_json(text) if text.lstrip()[:1] in ("[", "{") else _frame_of_text(text)
    except (ValueError, OSError, EOFError, csv.Error, ImportError, pd.errors.ParserWarning) as error:
        # pandas' own errors are ValueErrors
        cause = " ".join(str(error).split())
        raise TableError(
            f"Reading runs from {path}: it is not a table that can be read ({cause}); give a CSV with a line of "
            "column names, JSON records, or Parquet."
        ) from error


def _decoded(content: bytes) -> str:
    """The text of a file: UTF-8, UTF-16 where its first bytes say so, or else what Windows writes in the west."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _frame_of_json(text: str) -> "pd.DataFrame":
    """A list of records, or one record a line; what is nested in a record gets a name with dots."""
    try:
        records = json.loads(text)
    except ValueError:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(records, dict):
        return pd.DataFrame(records)  # a list for each column
    return pd.json_normalize(records)


def _frame_of_text(text: str) -> "pd.DataFrame":
    """A CSV: its separator is the one that its line of names has most of; remarks above that line are passed over."""
    lines = text.splitlines()
    skipped = 0
    while skipped + 1 < len(lines) and (
        not lines[skipped].strip() or (lines[skipped].startswith("#") and _separators(lines[skipped]) == 0)
    ):
        skipped += 1
    names = re.sub(r'"[^"]*"', "", lines[skipped]) if lines else ""
    separator = max(SEPARATORS, key=names.count)
    blanks = not names.count(separator) and len(names.split()) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more fields than there are names
        frame = pd.read_csv(
            io.StringIO(text), sep=r"\s+" if blanks else separator, skiprows=skipped, skipinitialspace=True,
            index_col=False, low_memory=False,
        )  # fmt: skip
    frame.attrs["separator"] = separator
    return frame


def _separators(line: str) -> int:
    return max(map(line.count, SEPARATORS))
