"""Which rows of a table are finished measurements: not trials of a rate, not failures, not checkpoints on the way."""

import re

from einlinear.lab.extras import extra
from einlinear.lab.laws.names import plain
from einlinear.lab.laws.numbers import read_numbers

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]

FINISHED = frozenset({"done", "finished", "completed", "complete", "ok", "success", "succeeded"})
LABELS = {  # names of columns, the labels of the rows to keep, and what the others are
    ("purpose",): (frozenset({"measure"}), "not measurements but trials of a rate"),
    ("status", "state", "runstate", "runstatus"): (FINISHED, "not finished"),
}
NOW = ("currentstep", "currentsteps", "step", "steps", "globalstep", "iteration", "currentepoch")
GOAL = (
    "totalsteps",
    "totalstep",
    "maxsteps",
    "maxstep",
    "targetsteps",
    "plannedsteps",
    "totaliterations",
    "totalepochs",
)
SHARE = re.compile(r"progress|(portion|fraction|share|percent|pct).*(step|train|elapsed|done|complete|run|budget)\w*")
ENOUGH = 0.995  # of its goal: the last logged step is often one short


def keep_finished(frame: "pd.DataFrame") -> "tuple[pd.DataFrame, dict[str, int], set[str]]":
    """The rows of finished runs, reason → count of the others, and the columns that told.

    A column tells only where some of its rows are finished; otherwise nothing is known of it, and all rows stay.
    """
    dropped: dict[str, int] = {}
    told: set[str] = set()

    def keep(chosen: "pd.Series[bool]", reason: str, *columns: str) -> None:
        nonlocal frame
        told.update(columns)
        if chosen.any() and not chosen.all():
            dropped[reason] = int((~chosen).sum())
            frame = frame[chosen]

    for names, (labels, reason) in LABELS.items():
        for column in _called(frame, names)[:1]:
            keep(frame[column].astype(str).str.strip().str.lower().isin(labels), f"{reason} ('{column}')", column)
    for now in _called(frame, NOW):
        for goal in _called(frame, GOAL):
            if ("epoch" in plain(now)) == ("epoch" in plain(goal)):
                done, whole = _numbers(frame, now), _numbers(frame, goal)
                keep(done.isna() | whole.isna() | (done >= ENOUGH * whole),
                     f"checkpoints on the way ('{now}' below '{goal}')", now, goal)  # fmt: skip
    for column in map(str, frame.columns):
        if SHARE.fullmatch(plain(column)):
            done = _numbers(frame, column)
            if done.max() in (1.0, 100.0) and done.min() >= 0:
                keep(done.isna() | (done >= ENOUGH * done.max()), f"checkpoints on the way ('{column}')", column)
    return frame, dropped, told


def _called(frame: "pd.DataFrame", names: tuple[str, ...]) -> list[str]:
    return [column for column in map(str, frame.columns) if plain(column) in names]


def _numbers(frame: "pd.DataFrame", column: str) -> "pd.Series[float]":
    return pd.Series(read_numbers(frame[column])[0], index=frame.index)
