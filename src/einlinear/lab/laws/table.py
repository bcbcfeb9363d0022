"""Anybody's runs: a CSV or Parquet file becomes columns of numbers, and what was understood is written down.

    table = read_table("runs.csv")
    table.columns   # {"parameters": "params", "tokens": "= flops / (6 params)", ...}

Nothing is guessed in silence: each column that was taken, each that could have been and was not, each row that
was left out and each number that was made from others is in `columns`, `dropped` and `notes`.
"""

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from einlinear.lab.extras import extra

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# What a column may be called, best first; compared without case, blanks and punctuation. A unit behind the
# name, as in "params (M)" or "hours", is not a spelling: it changes the numbers, and has its own table below.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "parameters": (
        "params", "parameters", "nparams", "nparameters", "numparams", "numparameters", "parametercount", "paramcount",
        "totalparams", "totalparameters", "ntotal", "modelsize", "modelparams", "modelparameters", "n",
        "trainableparams", "activeparams", "activeparameters", "nactive", "nonembeddingparams",
        "nonembeddingparameters", "paramsnonembedding", "nonembedparams", "size",
    ),
    "tokens": (
        "tokens", "ntokens", "numtokens", "trainingtokens", "traintokens", "tokensseen", "tokencount", "totaltokens",
        "d", "data", "datasize", "datasetsize", "dataset", "examples", "samples", "nsamples", "numsamples",
    ),
    "flops": (
        "flops", "flop", "trainingflops", "trainflops", "totalflops", "nflops", "trainingflop", "compute",
        "trainingcompute", "traincompute", "totalcompute", "c", "budget", "computebudget", "flopsbudget",
        "flopbudget", "isoflop",
    ),
    "loss": (
        "loss", "valloss", "validationloss", "evalloss", "testloss", "finalloss", "finalvalloss", "finalevalloss",
        "heldoutloss", "l", "nll", "crossentropy", "ce", "celoss", "lmloss", "losses", "trainloss", "trainingloss",
    ),
    "family": (
        "family", "structure", "architecture", "arch", "modelfamily", "variant", "group", "method", "layer",
        "modeltype", "type",
    ),
    "seed": ("seed", "randomseed", "rngseed", "replicate", "replica", "repeat"),
    "trunk": ("trunk", "trunkid", "run", "runid", "runname", "parentrun", "trajectory"),
    "seconds": (
        "seconds", "secs", "wallseconds", "trainingseconds", "trainseconds", "traintime", "trainingtime", "walltime",
        "wallclock", "wallclocktime", "time", "duration", "elapsed", "runtime",
    ),
    "device": ("device", "gpu", "hardware", "accelerator"),
}  # fmt: skip
NEEDED = ("parameters", "loss")
MULTIPLES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
WORDS = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12, "million": 1e6, "billion": 1e9}
HOURS = {
    "hours": 3600.0, "hour": 3600.0, "hrs": 3600.0, "h": 3600.0, "minutes": 60.0, "mins": 60.0, "min": 60.0,
    "days": 86400.0,
}  # fmt: skip
BITS = ("bits", "bpb", "bpc", "bitsperbyte", "bitsperchar", "bitspertoken", "valbpb", "bpbval", "evalbpb", "lossbits")
PERPLEXITY = ("ppl", "perplexity", "valppl", "valperplexity", "testppl", "evalppl")


SAME = 0.005  # sizes whose logarithms are nearer are one: they were read off a plot, or padded


class TableError(ValueError):
    """A file of runs that cannot be used, in one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Finished runs as columns `[n]`, with the story of how the file was read."""

    family: NDArray[np.str_]
    parameters: Floats
    tokens: Floats
    flops: Floats
    loss: Floats
    seconds: Floats | None = None
    seed: NDArray[np.str_] | None = None
    trunk: NDArray[np.str_] | None = None  # runs of one family and trunk are dependent
    device: NDArray[np.str_] | None = None
    unit: str = "nats"  # of the loss
    source: str = ""
    rows: int = 0  # of the file
    columns: Mapping[str, str] = field(default_factory=dict)  # role: column of the file, or "= formula"
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason: rows left out
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def families(self) -> list[str]:
        """Names, in the order of first appearance."""
        return list(dict.fromkeys(self.family.tolist()))

    def where(self, chosen: NDArray[np.bool_] | Integers) -> "Table":
        """The rows that are chosen, by a mask or by their numbers."""
        names = ("family", "parameters", "tokens", "flops", "loss", "seconds", "seed", "trunk", "device")
        return replace(self, **{n: v[chosen] for n in names if (v := getattr(self, n)) is not None})

    def of(self, family: str) -> "Table":
        """The runs of one family."""
        return self.where(self.family == family)

    def without_highest(self, count: int) -> "Table":
        """Without the runs of the `count` highest losses, which counts them among the dropped."""
        if not count:
            return self
        kept = self.where(np.sort(np.argsort(self.loss, kind="stable")[: max(0, len(self) - count)]))
        return replace(kept, dropped={**self.dropped, "of the highest losses, as asked": len(self) - len(kept)})


def size_labels(parameters: Floats) -> Integers:
    """A label `[n]` for each size of model; sizes within half a per cent of the next are one."""
    order = np.argsort(parameters, kind="stable")
    labels = np.empty(len(parameters), dtype=np.int64)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(parameters[order])) > SAME)])
    return labels


def read_table(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None, *, bits: bool = False) -> Table:
    """Reads finished runs from a CSV (any of , ; tab |) or a Parquet file.

    Args:
        path: the file.
        columns: which column to take for a role where its name does not tell: `{"loss": "val/ce"}`. Roles are
            parameters (or params), tokens, flops, loss, family, seed, trunk, seconds, device.
        bits: the losses are in bits; they are turned to nats.

    Raises:
        TableError: for a file that cannot be read, or lacks parameters, loss, or both tokens and FLOPs.
    """
    frame = _frame(Path(path))
    return from_frame(frame, columns, bits=bits, source=Path(path).name)


def from_frame(
    frame: "pd.DataFrame", columns: Mapping[str, str] | None = None, *, bits: bool = False, source: str = ""
) -> Table:
    """As `read_table`, from a pandas DataFrame."""
    reader = _Reader(frame, dict(columns or {}), source)
    return reader.table(bits)


def _frame(path: Path) -> "pd.DataFrame":
    if not path.is_file():
        raise TableError(f"Reading runs from {path}: there is no such file.")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if path.read_bytes()[:4] == b"PAR1":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep=None, engine="python", skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, OSError, csv.Error, ImportError) as error:  # pandas' own errors are ValueErrors
        cause = " ".join(str(error).split())
        raise TableError(
            f"Reading runs from {path}: it is not a table that can be read ({cause}); give a CSV with a line of "
            "column names, or Parquet."
        ) from error


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class _Reader:
    """Takes a frame apart, and notes what it does."""

    def __init__(self, frame: "pd.DataFrame", given: dict[str, str], source: str) -> None:
        self.frame, self.source = frame.rename(columns=str), source
        self.notes: list[str] = []
        self.columns: dict[str, str] = {}
        self.dropped: dict[str, int] = {}
        self.rows = len(frame)
        aliases = {"params": "parameters", "n": "parameters", "d": "tokens", "c": "flops"}
        self.given = {aliases.get(role.lower(), role.lower()): column for role, column in given.items()}
        for role, column in self.given.items():
            if role not in SPELLINGS:
                raise TableError(f"Reading runs{self._of()}: there is no role '{role}', only {', '.join(SPELLINGS)}.")
            if column not in self.frame.columns:
                raise TableError(
                    f"Reading runs{self._of()}: there is no column '{column}' for {role}; the file has "
                    f"{', '.join(map(str, frame.columns))}."
                )

    def table(self, bits: bool) -> Table:
        if not self.rows:
            raise TableError(f"Reading runs{self._of()}: it has column names and no rows.")
        self._keep_finished()
        parameters, flops = self._numbers("parameters"), self._numbers("flops")
        tokens, seconds = self._numbers("tokens"), self._numbers("seconds")
        loss, unit = self._loss(bits)
        if parameters is None or loss is None or (tokens is None and flops is None):
            found = {"parameters": parameters, "loss": loss, "tokens": tokens}
            missing = [name for name, values in found.items() if values is None]
            raise TableError(
                f"Reading runs{self._of()}: no column was recognised for {' and '.join(missing)}; the columns are "
                f"{', '.join(map(str, self.frame.columns))}. Rename one, or say which it is, as in "
                f"--column {'params' if missing[0] == 'parameters' else missing[0]}=NAME."
            )
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
        table = self._clean(table)
        used = {name.removeprefix("= ln(").removesuffix(")") for name in self.columns.values()} | {
            *self.columns.values()
        }
        unused = [str(name) for name in self.frame.columns if str(name) not in used]
        if unused:
            self.notes.append(f"Columns not used: {', '.join(unused)}.")
        return replace(table, columns=self.columns, dropped=self.dropped, notes=tuple(self.notes))

    def _keep_finished(self) -> None:
        """Tables of this library say which runs are trials of a rate, and which did not finish."""
        for name, keep, reason in (
            ("purpose", {"measure"}, "not measurements but trials of a rate"),
            ("status", {"done", "finished", "completed", "ok"}, "not finished"),
        ):
            found = next((c for c in self.frame.columns if _plain(str(c)) == name), None)
            if found is not None:
                values = self.frame[found].astype(str).str.lower()
                chosen = values.isin(keep)
                if chosen.any() and not chosen.all():
                    self.dropped[f"{reason} ('{found}')"] = int((~chosen).sum())
                    self.frame = self.frame[chosen]

    def _column(self, role: str, spellings: tuple[str, ...] | None = None) -> str | None:
        """The name of the column for a role; those passed over are noted."""
        if role in self.given:
            return self.given[role]
        names = SPELLINGS[role] if spellings is None else spellings
        taken = set(self.given.values())
        found = [c for c in self.frame.columns if c not in taken and self._base(str(c)) in names]
        if role not in ("family", "seed", "trunk", "device"):  # a column "dataset" of names is no count of tokens
            found = [c for c in found if np.isfinite(self._parsed(c, quiet=True)).any()]
        found.sort(key=lambda c: names.index(self._base(str(c))))
        if len(found) > 1:
            others = ", ".join(f"'{c}'" for c in found[1:])
            self.notes.append(f"For {role} '{found[0]}' was taken, not {others}; --column {role}=NAME chooses another.")
        return found[0] if found else None

    def _base(self, name: str) -> str:
        """A column's name without what is behind it: "params (M)", "time_hours", "Model Size (params)".

        Only a unit that is known, or a spelling of some column, is taken off: "flops (PF-days)" stays unknown.
        """
        remark = re.fullmatch(r"(.*\w)\s*[(\[]([^)\]]*)[)\]]\s*", name)
        if remark and len(remark[2]) > 1 and any(_plain(remark[2]) in names for names in SPELLINGS.values()):
            name = remark[1]
        words = re.split(r"[^A-Za-z0-9]+", name.strip().strip(")]"))
        words = [word for word in words if word]
        if len(words) > 1:
            last = words[-1].lower()
            if last in MULTIPLES or last in WORDS or last in HOURS or last in ("nats", "s", "sec"):
                words = words[:-1]
        return _plain("".join(words))

    def _numbers(self, role: str) -> Floats | None:
        column = self._column(role)
        if column is None:
            if role != "seconds":
                return None
            column = next(
                (c for c in self.frame.columns if _plain(str(c)) in ("gpuhours", "hours", "walltimehours")), None
            )
            if column is None:
                return None
        self.columns[role] = str(column)
        values = self._parsed(column)
        words = [w.lower() for w in re.split(r"[^A-Za-z0-9]+", str(column)) if w]
        last = words[-1] if words else ""
        factor = {**MULTIPLES, **WORDS}.get(last, 1.0) if len(words) > 1 and role != "seconds" else 1.0
        if role == "seconds":
            factor = HOURS.get(last, 3600.0 if _plain(str(column)) == "gpuhours" else 1.0)
        if factor != 1.0:
            self.notes.append(f"'{column}' was multiplied by {factor:g}, going by its name.")
            self.columns[role] = f"{column}"
        return values * factor

    def _parsed(self, column: str, *, quiet: bool = False) -> Floats:
        """Numbers, also as text: "1,000,000", "70M", "1.4B"; what is none becomes NaN."""
        series = self.frame[column]
        numbers = pd.to_numeric(series, errors="coerce")
        if numbers.isna().sum() > series.isna().sum():
            text = series.astype(str).str.strip().str.replace(r"[,_ ](?=\d{3})", "", regex=True)
            parts = text.str.extract(r"^([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?)\s*([kKmMbBgGtT]?)$")
            factor = parts[1].str.lower().map({"": 1.0, **MULTIPLES})
            read = pd.to_numeric(parts[0], errors="coerce") * factor
            numbers = numbers.fillna(read)
            if not quiet and (read.notna() & series.notna() & (factor > 1)).any():
                self.notes.append(f"In '{column}', suffixes were read as k = 1e3, M = 1e6, B or G = 1e9, T = 1e12.")
        return np.asarray(numbers, dtype=np.float64)

    def _loss(self, bits: bool) -> tuple[Floats | None, str]:
        column, unit = self._column("loss"), "nats"
        if column is None and (column := self._column("loss", BITS)) is not None:
            unit = "bits"
        if column is None and (column := self._column("loss", PERPLEXITY)) is not None:
            self.columns["loss"] = f"= ln({column})"
            self.notes.append(f"The loss was taken as the logarithm of '{column}'.")
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.log(self._parsed(column)), unit
        if column is None:
            return None, unit
        self.columns["loss"] = str(column)
        if _plain(str(column)).startswith("train"):
            self.notes.append(
                f"'{column}' is a training loss: a smoothed one, or one on data seen before, biases laws."
            )
        loss = self._parsed(column)
        if bits:
            self.notes.append(f"'{column}' was turned from bits to nats.")
            return loss * np.log(2), "nats"
        if unit == "bits" or "bits" in str(column).lower():
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
        self.columns[role] = str(column)
        empty = values.isna()
        if empty.any() and role == "family":
            self.notes.append(f"{int(empty.sum())} rows without a '{column}' are a family of their own, '(none)'.")
        return np.asarray(values.astype(object).where(~empty, "(none)").map(str), dtype=np.str_)

    def _clean(self, table: Table) -> Table:
        numbers = {"params": table.parameters, "tokens": table.tokens, "flops": table.flops, "loss": table.loss}
        finite = np.all([np.isfinite(v) for v in numbers.values()], axis=0)
        with np.errstate(invalid="ignore"):
            positive = np.all([v > 0 for v in numbers.values()], axis=0)
        for mask, reason in ((~finite, "a number is missing or not finite"), (finite & ~positive, "not positive")):
            if mask.any():
                self.dropped[reason] = int(mask.sum())
        table = table.where(finite & positive)
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
            table = table.where(once)
        if len(table) == 0:
            why = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "it has none"
            raise TableError(f"Reading runs{self._of()}: no row can be used ({why}).")
        if table.parameters.max() < 1e5 and table.tokens.max() < 1e7:
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
