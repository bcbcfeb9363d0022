"""Anybody's runs: a CSV or Parquet file becomes a table, and what was understood is written down.

    table = read_table("runs.csv")
    table.columns   # {"parameters": "params", "tokens": "= flops / (6 params)", ...}

Nothing is guessed in silence: each column that was taken, each that could have been and was not, each row that
was left out and each number that was made from others is in `columns`, `dropped` and `notes`.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from einlinear.lab.extras import extra
from einlinear.lab.laws.frame import read_frame
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.names import BITS, PERPLEXITY, SPELLINGS, plain, read_name
from einlinear.lab.laws.numbers import Commas, Marks, commas_of, read_numbers
from einlinear.lab.laws.table import Table, TableError, size_labels
from einlinear.lab.laws.unfinished import keep_finished
from einlinear.lab.laws.untold import best_over, untold

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]

FEWEST_TOKENS, MOST_TOKENS = 1e-4, 1e7  # per parameter, beyond which one of the two is in another unit
EMPTY = 0.5  # a column with fewer numbers than this share of another one's goes behind it
NUMBERS = ("parameters", "tokens", "flops", "loss", "seconds")  # roles; the others are labels


def read_table(
    path: str | os.PathLike[str], columns: Mapping[str, str] | None = None, *, bits: bool = False,
    best: Sequence[str] = (),
) -> Table:  # fmt: skip
    """Reads finished runs from a CSV (any of , ; tab |), a JSON list or JSON lines of records, or a Parquet file.

    Args:
        path: the file.
        columns: which column to take for a role where its name does not tell: `{"loss": "val/ce"}`. Roles are
            parameters (or params), tokens, flops, loss, family, seed, trunk, seconds, device.
        bits: the losses are in bits; they are turned to nats.
        best: columns of settings that were tried: of the runs that are equal but for these, the best is kept.

    Raises:
        TableError: for a file that cannot be read, or lacks parameters, loss, or both tokens and FLOPs.
    """
    frame = read_frame(Path(path))
    return from_frame(frame, columns, bits=bits, best=best, source=Path(path).name)


def from_frame(
    frame: "pd.DataFrame", columns: Mapping[str, str] | None = None, *, bits: bool = False, best: Sequence[str] = (),
    source: str = "",
) -> Table:  # fmt: skip
    """As `read_table`, from a pandas DataFrame."""
    reader = _Reader(frame, dict(columns or {}), source)
    return reader.table(bits, best)


LIKELY = {  # parts of names that may well be it, for whoever has to choose
    "parameters": r"param|size|width", "tokens": r"token|\bstep|sample|image|batch|epoch",
    "loss": r"loss|nll|entropy|ppl|perplex|bpb|ce\\b",
}  # fmt: skip
HINTS = {"tokens": "; steps want to be multiplied by the tokens of a batch"}


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


class _Reader:
    """Takes a frame apart, and notes what it does."""

    def __init__(self, frame: "pd.DataFrame", given: dict[str, str], source: str) -> None:
        self.frame, self.source = frame.rename(columns=str), source
        self.separator = frame.attrs.get("separator", ",")
        told = {commas_of(self.frame[c]) for c in self.frame.columns if self.frame[c].dtype.kind not in "iufb"}
        proven = told - {None, "either"}
        self.commas: Commas | None = proven.pop() if len(proven) == 1 else None  # of the whole file
        self.cells: dict[str, tuple[Floats, Marks]] = {}  # numbers of the columns that were looked at
        self.taken: set[str] = set()
        self.unclear: list[str] = []  # sentences on names that say too little
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.columns: dict[str, str] = {}
        self.dropped: dict[str, int] = {}
        self.rows = len(frame)
        aliases = {"params": "parameters", "n": "parameters", "d": "tokens", "c": "flops"}
        self.given = {aliases.get(role.lower(), role.lower()): column for role, column in given.items()}
        for role, column in self.given.items():
            if role not in SPELLINGS:
                raise TableError(f"Reading runs{self._of()}: there is no role '{role}', only {', '.join(SPELLINGS)}.")
            self._present(column, f" for {role}")

    def _present(self, column: str, what: str) -> None:
        if column not in self.frame.columns:
            raise TableError(
                f"Reading runs{self._of()}: there is no column '{column}'{what}; the file has "
                f"{', '.join(map(str, self.frame.columns))}."
            )

    def table(self, bits: bool, best: Sequence[str] = ()) -> Table:
        if not self.rows:
            raise TableError(f"Reading runs{self._of()}: it has column names and no rows.")
        self.frame, self.dropped, told = keep_finished(self.frame)
        self.taken |= told
        parameters, flops = self._numbers("parameters"), self._numbers("flops")
        tokens, seconds = self._numbers("tokens"), self._numbers("seconds")
        loss, unit = self._loss(bits)
        if parameters is None or loss is None or (tokens is None and flops is None):
            found = {"parameters": parameters, "loss": loss, "tokens": tokens}
            missing = [name for name, values in found.items() if values is None]
            raise TableError(self._unrecognised(missing))
        if tokens is None and flops is not None:
            tokens = flops / (6 * parameters)
            self.columns["tokens"] = "= flops / (6 params)"
            self.notes.append("There is no column of tokens: they were taken as flops / (6 params).")
        assert tokens is not None
        if flops is None:
            flops = 6 * parameters * tokens
            self.columns["flops"] = "= 6 params tokens"
            self.notes.append(
                "There is no column of FLOPs: they were taken as 6 params tokens, which is wrong for layers that share "
                "weights or route."
            )
        family = self._labels("family")
        if family is None:
            family = np.full(len(self.frame), "all")
        table = Table(
            family=family, parameters=parameters, tokens=tokens, flops=flops, loss=loss, seconds=seconds,
            seed=self._labels("seed"), trunk=self._labels("trunk"), device=self._labels("device"),
            unit=unit, source=self.source, rows=self.rows,
        )  # fmt: skip
        for name in best:
            self._present(name, " to keep the best over")
        table = self._clean(table, list(best))
        unused = [str(name) for name in self.frame.columns if str(name) not in self.taken]
        if unused:
            self.notes.append(f"Columns not used: {', '.join(unused)}.")
            self.warnings += untold(self.frame[unused], table)
        return replace(
            table, columns=self.columns, dropped=self.dropped, notes=tuple(self.notes), warnings=tuple(self.warnings)
        )

    def _unrecognised(self, missing: list[str]) -> str:
        columns = [str(name) for name in self.frame.columns]
        if all(np.isfinite(read_numbers(pd.Series([name]))[0]).all() for name in columns):
            return (
                f"Reading runs{self._of()}: its first line holds numbers ({', '.join(columns)}) where the names of the "
                "columns are expected; put a line such as params,tokens,loss above them."
            )
        unclear = "".join(f" {sentence}." for sentence in dict.fromkeys(self.unclear))
        role = "params" if missing[0] == "parameters" else missing[0]
        likely = {name: [c for c in columns if re.search(LIKELY[name], c, re.I)] for name in missing}
        hints = "".join(
            f" For {name} it may be {' or '.join(repr(c) for c in found[:6])}{HINTS.get(name, '')}."
            for name, found in likely.items() if found
        )  # fmt: skip
        example = next((found[0] for found in [likely[missing[0]]] if found), "NAME")
        return (
            f"Reading runs{self._of()}: no column was recognised for {' and '.join(missing)}; the columns are "
            f"{', '.join(columns)}.{unclear}{hints} Rename one, or say which it is, as in --column "
            f"{_quoted(f'{role}={example}')}."
        )

    def _column(self, role: str, bases: tuple[str, ...] | None = None) -> str | None:
        """The name of the column for a role, or of one of these bare names; those passed over are noted."""
        if role in self.given:
            return self.given[role]
        taken = set(self.given.values())
        order = SPELLINGS[role] if bases is None else bases
        found = []
        for column in map(str, self.frame.columns):
            name = read_name(column)
            fits = name.base in order if bases else role in name.roles
            # A column "dataset" of names is no count of tokens.
            if column in taken or not fits or (role in NUMBERS and not np.isfinite(self._read(column)[0]).any()):
                continue
            if name.logarithm is not None and (math.isnan(name.logarithm) or role not in NUMBERS):
                self.unclear.append(f"'{column}' does not say of which base its logarithms are: name it log10_ or ln_")
                continue
            found.append(column)
        known = {c: int(np.isfinite(self._read(c)[0]).sum()) if role in NUMBERS else 1 for c in found}
        full = EMPTY * max(known.values(), default=0)
        found.sort(key=lambda column: (known[column] < full, order.index(read_name(column).base)))
        if len(found) > 1:
            others = ", ".join(f"'{c}'" for c in found[1:])
            self.notes.append(f"For {role} '{found[0]}' was taken, not {others}; --column {role}=NAME chooses another.")
        return found[0] if found else None

    def _numbers(self, role: str) -> Floats | None:
        column = self._column(role)
        return None if column is None else self._parsed(role, column)

    def _parsed(self, role: str, column: str) -> Floats:
        """A column's numbers as its name and its cells say them; notes what was done to them."""
        name = read_name(column)
        self.columns[role] = column
        self.taken.add(column)
        values, marks = self._read(column)
        if marks.commas == "either" and self.commas is None and self.separator in (";", "\t", "|"):
            raise TableError(
                f"Reading runs{self._of()}: the commas in '{column}' may part thousands or be decimal; write the "
                "numbers without the one and with a point for the other."
            )
        if marks.commas == "decimal" or (marks.commas == "either" and self.commas == "decimal"):
            self.notes.append(f"In '{column}' the comma was read as a decimal point.")
        if marks.suffixes:
            self.notes.append(f"In '{column}', suffixes were read as k = 1e3, M = 1e6, B or G = 1e9, T = 1e12.")
        if name.logarithm is not None:
            if math.isnan(name.logarithm):
                raise TableError(f"Reading runs{self._of()}: '{column}' does not say of which base its logarithms are;"
                                 " name it log10_… or ln_….")  # fmt: skip
            with np.errstate(over="ignore"):
                values = name.logarithm**values
            self.notes.append(f"'{column}' was taken for logarithms of base {name.logarithm:.4g}, going by its name.")
            self.columns[role] = f"= {name.logarithm:.4g}^{column}"
        if name.factor != 1.0:
            self.notes.append(f"'{column}' was multiplied by {name.factor:g}, going by its name.")
        return values * name.factor

    def _read(self, column: str) -> tuple[Floats, Marks]:
        if column not in self.cells:
            self.cells[column] = read_numbers(self.frame[column], self.commas or "thousands")
        return self.cells[column]

    def _loss(self, bits: bool) -> tuple[Floats | None, str]:
        column, unit = self._column("loss"), "nats"
        if column is None and (column := self._column("loss", BITS)) is not None:
            unit = "bits"
        if column is None and (column := self._column("loss", PERPLEXITY)) is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                loss = np.log(self._parsed("loss", column))
            self.columns["loss"] = f"= ln({column})"
            self.notes.append(f"The loss was taken as the logarithm of '{column}'.")
            return loss, unit
        if column is None:
            return None, unit
        loss = self._parsed("loss", column)
        if plain(column).startswith("train"):
            self.notes.append(
                f"'{column}' is a training loss: a smoothed one, or one on data seen before, biases laws."
            )
        if bits:
            self.notes.append(f"'{column}' was turned from bits to nats.")
            return loss * np.log(2), "nats"
        if unit == "bits" or "bits" in column.lower():
            unit = "bits"
            self.notes.append(
                f"'{column}' is in bits by its name and was kept so: E, A and B are in bits, exponents and multipliers "
                "do not depend on the unit (--bits turns it to nats)."
            )
        return loss, unit

    def _labels(self, role: str) -> NDArray[np.str_] | None:
        column = self._column(role)
        if column is None:
            return None
        values = self.frame[column]
        if values.isna().all():
            return None
        self.columns[role] = column
        self.taken.add(column)
        empty = values.isna().to_numpy()
        if empty.any() and role == "family":
            self.notes.append(f"{int(empty.sum())} rows without a '{column}' are a family of their own, '(none)'.")
        labels = values.astype(object).where(~empty, "(none)").map(lambda value: str(value).strip())
        if role == "trunk":  # a run that belongs to none is a trunk of its own
            labels = labels.where(~empty, [f"(row {number})" for number in range(len(labels))])
        return np.asarray(labels, dtype=np.str_)

    def _trunks_of_one_size(self, table: Table) -> Table:
        """A training run has one size of model: where a label names several, as the number of a repetition does, it is
        a trunk for each of them.
        """  # fmt: skip
        assert table.trunk is not None
        sizes = size_labels(table.parameters)
        own = np.array([f"{f}/{t}" for f, t in zip(table.family, table.trunk, strict=True)])
        one = np.array([f"{t} of size {s}" for t, s in zip(table.trunk, sizes, strict=True)])
        if len(set(zip(table.family, one, strict=True))) == len(set(own)):
            return table
        self.notes.append(
            f"Labels in '{self.columns['trunk']}' name runs of several sizes; a training run has one, so a trunk was "
            "taken to be a label and a size."
        )
        return replace(table, trunk=one)

    def _where(self, table: Table, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Table:
        """The rows that are chosen, of the table and of the frame beside it."""
        self.frame = self.frame.iloc[np.flatnonzero(chosen) if chosen.dtype == bool else chosen]
        return table.where(chosen)

    def _usable(self, table: Table) -> Table:
        """The rows with all their numbers; each other one is counted under what it lacks."""
        made = {role for role, column in self.columns.items() if column.startswith(("= flops", "= 6"))}
        fine = np.ones(len(table), dtype=bool)
        for role in ("parameters", "tokens", "flops", "loss"):
            values, column = getattr(table, role), self.columns[role].removeprefix("= ")
            if role in made:
                continue
            for bad, reason in ((~np.isfinite(values), "no finite number"), (~(values > 0), "not above zero")):
                if (bad & fine).any():
                    self.dropped[f"{reason} in '{column}'"] = int((bad & fine).sum())
                    fine &= ~bad
        if len(table) and (table.loss[np.isfinite(table.loss)] < 0).all() and np.isfinite(table.loss).any():
            raise TableError(
                f"Reading runs{self._of()}: every '{self.columns['loss']}' is negative; a loss is above zero. If these "
                "are log-likelihoods, give them without the minus."
            )
        return self._where(table, fine)

    def _clean(self, table: Table, best: list[str]) -> Table:
        with np.errstate(invalid="ignore"):
            table = self._usable(table)
        if table.seconds is not None:
            with np.errstate(invalid="ignore"):
                known = np.isfinite(table.seconds) & (table.seconds > 0)
            if not known.all():
                self.notes.append(
                    f"{int((~known).sum())} rows have no seconds; only multipliers by seconds leave them out."
                )
                table = replace(table, seconds=np.where(known, table.seconds, np.nan))
        same = [table.family, table.parameters, table.tokens, table.flops, table.loss, table.seed, table.trunk]
        rows = list(zip(*(column.tolist() for column in same if column is not None), strict=True))
        first = {row: number for number, row in reversed(list(enumerate(rows)))}
        once = np.array(sorted(first.values()), dtype=np.int64)
        if len(once) < len(rows):
            self.dropped["the same run again (every used column equal)"] = len(rows) - len(once)
            table = self._where(table, once)
        if len(table) == 0:
            why = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "it has none"
            raise TableError(f"Reading runs{self._of()}: no row can be used ({why}).")
        if best:
            chosen = best_over(self.frame[best], replace(table, columns=self.columns))
            if not chosen.all():
                tried = " and ".join(f"'{name}'" for name in best)
                self.dropped[f"not the best over {tried} at their size and tokens"] = int((~chosen).sum())
                table = self._where(table, chosen)
            self.taken |= set(best)
        if table.trunk is not None:
            table = self._trunks_of_one_size(table)
        per_parameter = float(np.median(table.tokens / table.parameters))
        if not FEWEST_TOKENS <= per_parameter <= MOST_TOKENS:
            names = " and ".join(f"'{self.columns[role].removeprefix('= ')}'" for role in ("tokens", "parameters"))
            self.warnings.append(
                f"The runs have {per_parameter:.2g} tokens per parameter (median): is one of {names} in thousands, "
                "millions or billions? Say so in its name, as in 'tokens (B)'; exponents do not depend on it, but A, "
                "B, G and FLOPs do."
            )
        elif table.parameters.max() < 1e5 and table.tokens.max() < 1e7:
            self.notes.append(
                f"Parameters reach {table.parameters.max():.4g} and tokens {table.tokens.max():.4g}: taken as they are."
                " Exponents and multipliers do not depend on their units, A, B and a given FLOPs do."
            )
        ratio = table.flops / (table.parameters * table.tokens)
        if self.columns.get("flops", "").startswith("=") is False and np.ptp(np.log(ratio)) > np.log(1.05):
            self.notes.append(
                f"FLOPs are {ratio.min():.3g} to {ratio.max():.3g} times params × tokens: not 6 N D, and used as given."
            )
        return table

    def _of(self) -> str:
        return f" from {self.source}" if self.source else ""
