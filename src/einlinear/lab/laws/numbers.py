"""Numbers as people write them: "70M", "1.4B tokens", "1,000,000", "1_000", "2.3 x 10^20", "2,35".

numbers, marks = read_numbers(pd.Series(["70M", "1,000,000"]))
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.names import MULTIPLES

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]

Commas = Literal["thousands", "decimal", "either"]

_NUMBER = r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKmMbBgGtT]?)\s*(?:tokens?|params?|parameters|flops?)?$"
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3}){2,}(?:\.\d+)?|\d{1,3},\d{3}\.\d+")
_DECIMAL = re.compile(r"\d+,(?!\d{3}$)\d+|0,\d+|\d{4,},\d+|\d+,\d+[eE][+-]?\d+|\d{1,3}(?:\.\d{3})+,\d+")
_EITHER = re.compile(r"\d{1,3},\d{3}")
_KINDS: tuple[tuple[re.Pattern[str], Commas], ...] = (
    (_THOUSANDS, "thousands"), (_DECIMAL, "decimal"), (_EITHER, "either"),
)  # fmt: skip


@dataclass(frozen=True)
class Marks:
    """How the numbers of a column were written."""

    suffixes: bool = False  # k, M, B
    commas: Commas | None = None


def commas_of(column: "pd.Series[str]") -> Commas | None:
    """What the commas in a column's numbers are: one number tells for all; None without any."""
    texts = [text.strip().lstrip("+-") for text in column if isinstance(text, str) and "," in text]
    told = {kind for pattern, kind in _KINDS for text in texts if pattern.fullmatch(text)}
    proven = told - {"either"}
    if len(proven) == 1:
        return proven.pop()
    return "either" if told else None


def read_numbers(column: "pd.Series[object]", commas: Commas = "thousands") -> tuple[Floats, Marks]:
    """Numbers `[n]`, NaN for what is none, and how they were written.

    `commas` is what they are where the column itself does not tell.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.isna().sum() == column.isna().sum():
        return np.asarray(numbers, dtype=np.float64), Marks()
    told = commas_of(column)
    used = commas if told in (None, "either") else told
    text = column.astype(str).str.strip().str.replace(r"\s*[x×*]\s*10\^?\s*", "e", regex=True)
    text = text.str.replace(r"\s*(?:±|\+/-).*$", "", regex=True)  # the error of a number is not used
    if used == "decimal":
        grouped = text.str.contains(",") | text.str.fullmatch(r"[+-]?\d{1,3}(?:\.\d{3}){2,}")
        text = text.str.replace(r"\.(?=\d{3})", "", regex=True).where(grouped, text)
        text = text.str.replace(",", ".", regex=False)
    text = text.str.replace(r"(?<=\d)[,_ '](?=\d{3})", "", regex=True)
    parts = text.str.extract(_NUMBER)
    factor = parts[1].str.lower().map({"": 1.0, **MULTIPLES})
    read = pd.to_numeric(parts[0], errors="coerce") * factor
    suffixes = bool((read.notna() & column.notna() & (factor > 1)).any())
    return np.asarray(numbers.fillna(read), dtype=np.float64), Marks(suffixes, told)
