"""The results of recipes/experts.py, read back from its tables."""

import csv
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from experts import RESULTS, STANDARD, everywhere

from einlinear.lab.run import Run
from einlinear.lab.studies import read_steps

NAMES = {STANDARD: "standard mixture, E = 8"} | {everywhere(e, 2): f"BTT-MoE, E = {e}" for e in (4, 8, 16)}
OTHERS = {everywhere(e, k): f"BTT-MoE, E = {e}, k = {k}" for e, k in ((8, 1), (16, 1), (4, 4), (8, 4))}


def named(family: str) -> str:
    """A family as the page calls it."""
    return (NAMES | OTHERS).get(family, family)


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def results(scale: str) -> list[Run]:
    """The runs of a scale; their seconds are steps times what a step takes alone (`experts.clock`).

    Steps that were timed at another depth count by their blocks. A family that was not timed at every width of its runs
    has no seconds.
    """
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Run)}
    runs = []
    for row in read(RESULTS / f"experts_{scale}.csv"):
        loss = float(row.pop("loss")) if row["loss"] else None
        runs.append(Run(loss=loss, **{name: kinds[name](value) for name, value in row.items()}))
    file = RESULTS / f"experts_{scale}_clock.csv"
    if not file.exists():
        return runs
    of_block = {(one.family, one.width): one.seconds / one.depth for one in read_steps(file)}
    untimed = {run.family for run in runs if (run.family, run.width) not in of_block}
    return [
        replace(
            run,
            seconds=0.0 if run.family in untimed
            else of_block[run.family, run.width] * run.depth * run.tokens / batch_of(run),
        )
        for run in runs
    ]  # fmt: skip


def batch_of(run: Run) -> int:
    setup = json.loads(run.setup)
    return int(setup["batch"] * setup["context"])


def ranked(runs: Sequence[Run]) -> list[str]:
    """The families of runs, as the page orders them."""
    return sorted({run.family for run in runs}, key=rank)


def rank(family: str) -> int:
    """The place of a family on the page."""
    return ["dense", "btt", "btt(rank=2)", *NAMES, *OTHERS].index(family)
