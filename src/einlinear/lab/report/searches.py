"""What a search looked at: halving along its horizons, its candidates in the space of structures, why the best won."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from einlinear.lab.extras import extra
from einlinear.lab.laws import Axis
from einlinear.lab.report.charts import INK, Rows, Specification, coloured, finished, legend, logarithmic, plotted
from einlinear.lab.search.explain import in_words, parts, verdict
from einlinear.lab.search.looked import Exploration, Looked
from einlinear.lab.summary import Summary

with extra("lab"):
    import altair as alt

STEP = 0.017  # between candidates of equal exponents, which would hide each other
TURN = math.pi * (3 - math.sqrt(5))  # so that they fill a disc (Vogel 1979)
SHARING = {"0": "circle", "0.33": "square", "0.5": "triangle-up", "0.67": "triangle-down", "1": "diamond"}
REACH = 3.0  # doublings from the median at which colour saturates
DECADES = 3  # below its best that the figure of halving shows
AXES_SHOWN: tuple[Axis, Axis] = ("flops", "seconds")


@dataclass(frozen=True, kw_only=True)
class SearchSection:
    """What the page shows of a search."""

    told: str
    reason: str  # why there are no figures; empty where there are
    horizons: tuple[int, ...]
    charts: dict[str, Specification]
    why: list["Why"]
    table: Rows


@dataclass(frozen=True)
class Why:
    """Why a confirmed structure won, or did not: sentences of the runs that confirmed it."""

    family: str
    verdicts: tuple[str, ...]
    parts: tuple[str, ...]
    words: str
    thought: str


def search_section(summary: Summary, found: Exploration) -> SearchSection:
    """The section of the page, with its figures where dense holds a law."""
    charts = {} if found.reason else {"halving": halving_chart(summary, found), "space": space_chart(found)}
    return SearchSection(
        told=told(found), reason=found.reason, horizons=found.horizons, charts=charts,
        why=[] if found.reason else reasons(summary, found), table=table(found),
    )  # fmt: skip


def reasons(summary: Summary, found: Exploration) -> list[Why]:
    """For every confirmed structure, the best by training FLOPs first."""
    order = {m.family: number for number, m in enumerate(summary.multipliers("flops"))}
    confirmed = sorted(
        (one for one in found.looked if one.confirmed), key=lambda one: order.get(one.family, len(order))
    )
    return [
        Why(
            family=one.family,
            verdicts=tuple(verdict(summary.runs, one.family, axis) for axis in AXES_SHOWN),
            parts=tuple(said for axis in AXES_SHOWN if (said := parts(summary.runs, one.family, axis))),
            words=in_words(*one.exponents) if one.exponents else "it has no place in the taxonomy",
            thought=_thought(one, found),
        )
        for one in confirmed
    ]


def told(found: Exploration) -> str:
    """What was looked at, in a few sentences."""
    flops, seconds = found.spent["flops"], found.spent["seconds"]
    counts = [
        f"{count} to {tokens:,} tokens" for count, tokens in zip(found.counts, found.horizons, strict=True) if count
    ]
    failed = sum(any(run.status != "done" for run in one.runs) for one in found.looked)
    said = (
        f"Exploration trained {len(found.looked)} candidates at width {found.width} with seed {found.seed}: "
        f"{', '.join(counts)} ({flops:.3g} FLOPs, {seconds:.0f} seconds of a process"
        + (f"; {failed} diverged" if failed else "")
        + ")."
    )
    if found.others:
        said += f" The store holds {found.others} more exploration{'s' * (found.others > 1)}, which are not shown."
    return said


def print_exploration(found: Exploration, console: Console, shown: int = 8) -> None:
    """The same for the terminal, with the candidates that looked best."""
    console.print(Text(told(found)))
    if found.reason:
        console.print(Text(f"· {found.reason}"), style="dim")
        return
    for one in found.looked[:shown]:
        worth = "diverged" if one.last is None else f"{math.exp(one.last):.2f} ×"
        mark = "confirmed" if one.confirmed else ""
        console.print(Text(f"  {worth:>8} at {one.runs[-1].tokens:,} tokens  {mark:9}  {one.family}"))
    console.print(Text("· by these numbers it chose: the best of them are too good; only confirmed ones are reported"))


def table(found: Exploration) -> Rows:
    """One row for each candidate: the table of the page and its CSV."""
    rows: Rows = []
    for one in found.looked:
        psi, nu, omega = one.exponents or (None, None, None)
        row: dict[str, Any] = {
            "family": one.family, "psi": psi, "nu": nu, "omega": omega, "confirmed": one.confirmed,
            "flops": one.runs[-1].flops, "seconds": one.runs[-1].seconds, "tokens": one.runs[-1].tokens,
        }  # fmt: skip
        for tokens in found.horizons:
            at = [worth for run, worth in zip(one.runs, one.worths, strict=True) if run.tokens == tokens]
            row[f"multiplier at {tokens}"] = None if not at or at[0] is None else math.exp(at[0])
        rows.append(row)
    return rows


def halving_chart(summary: Summary, found: Exploration) -> Specification:
    """Each candidate's multiplier at every horizon that it was trained to; those that were confirmed in colour."""
    rows: Rows = [
        {"family": one.family, "tokens": run.tokens, "multiplier": math.exp(worth), "confirmed": one.confirmed}
        for one in found.looked
        for run, worth in zip(one.runs, one.worths, strict=True)
        if worth is not None
    ]
    x = alt.X(
        "tokens:Q", scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(title="training tokens", values=list(found.horizons), format=".3~s"),
    )  # fmt: skip
    best = max((row["multiplier"] for row in rows), default=1.0)
    heights = [max(row["multiplier"], best / 10**DECADES) for row in rows]
    y = logarithmic(alt.Y, "multiplier", "multiplier as explored", [*heights, 1.0], "~g")
    tip = ["family:N", alt.Tooltip("tokens:Q", format=","), alt.Tooltip("multiplier:Q", format=".3f")]
    others = plotted([row for row in rows if not row["confirmed"]]).encode(x=x, y=y, detail="family:N")
    chosen = plotted([row for row in rows if row["confirmed"]]).encode(x=x, y=y, color=_confirmed(summary, found))
    one = plotted([{"multiplier": 1}]).mark_rule(color=INK, strokeDash=[2, 3], opacity=0.7).encode(y=y)
    layers = [
        one,
        others.mark_line(color=INK, strokeWidth=1, opacity=0.25, clip=True),
        others.mark_point(color=INK, size=22, filled=True, opacity=0.35, clip=True).encode(tooltip=tip),
        chosen.mark_line(strokeWidth=2.2, clip=True),
        chosen.mark_point(size=60, filled=True, opacity=1, clip=True).encode(tooltip=tip),
    ]
    return finished(alt.layer(*layers), 340, "What candidates were worth along the horizons")


def space_chart(found: Exploration) -> Specification:
    """ψ over ν, ω as shape, size by how far it was trained; confirmed ones are ringed.

    Colour is the multiplier against the median candidate's at the same horizon.
    """
    medians = _medians(found)
    cells: dict[object, list[Looked]] = defaultdict(list)
    for one in sorted(found.looked, key=lambda one: -(one.last or -math.inf)):
        if one.exponents and one.last is not None:
            cells[one.exponents[:2]].append(one)
    rows: Rows = []
    for own in cells.values():
        for number, one in enumerate(own):
            psi, nu, omega = one.exponents or (0.0, 0.0, 0.0)
            far, angle = STEP * math.sqrt(number), TURN * number
            rows.append({
                "family": one.family, "psi": psi, "nu": nu, "omega": f"{omega:.2g}",
                "x": nu + far * math.cos(angle), "y": psi + 1.6 * far * math.sin(angle),
                "multiplier": math.exp(one.last or 0.0),
                "value": ((one.last or 0.0) - medians[one.runs[-1].tokens]) / math.log(2),
                "horizon": len(one.runs), "tokens": one.runs[-1].tokens, "confirmed": one.confirmed,
            })  # fmt: skip
    rows.sort(key=lambda row: row["horizon"])
    axis: dict[str, Any] = {"grid": True, "tickCount": 5, "format": ".2~f"}
    domain = sorted({row["omega"] for row in rows}, key=float)
    shapes = [SHARING.get(value, "cross") for value in domain]
    base = plotted(rows).encode(
        x=alt.X("x:Q", scale=alt.Scale(domain=_around([row["x"] for row in rows])),
                axis=alt.Axis(title="ν: FLOPs grow as width^(1+ν)", **axis)),
        y=alt.Y("y:Q", scale=alt.Scale(domain=_around([row["y"] for row in rows])),
                axis=alt.Axis(title="ψ: rank grows as width^ψ", **axis)),
        shape=alt.Shape("omega:N", scale=alt.Scale(domain=domain, range=shapes),
                        legend=alt.Legend(title="ω (sharing: width^ω)", columns=5)),
        size=alt.Size("horizon:O", scale=alt.Scale(range=[45, 190]), legend=None),
    )  # fmt: skip
    dots = base.mark_point(filled=True, opacity=1, stroke=INK, strokeWidth=0.6).encode(
        color=alt.Color("value:Q", scale=alt.Scale(range=["#d55e00", "#f4f4f4", "#0072b2"], domain=[-REACH, 0, REACH],
                                                        clamp=True),
                        legend=alt.Legend(title="against the median", gradientLength=130, values=[-REACH, 0, REACH],
                                          labelExpr="format(pow(2, datum.value), '.2~g') + '×'")),
        tooltip=["family:N", "psi:Q", "nu:Q", "omega:N", alt.Tooltip("tokens:Q", format=","),
                 alt.Tooltip("multiplier:Q", format=".3f")],
    )  # fmt: skip
    rings = base.transform_filter("datum.confirmed").mark_point(
        shape="circle", size=420, strokeWidth=1.8, color=INK, opacity=1
    )
    rings = rings.encode(shape=alt.ShapeValue("circle"), size=alt.SizeValue(420))
    return finished(alt.layer(dots, rings), 360, "What was looked at in the space of structures")


def _medians(found: Exploration) -> dict[int, float]:
    """ln multiplier of the median candidate at each horizon: that of the first, moved as those moved that went on."""
    level, before, medians = 0.0, dict[str, float](), dict[int, float]()
    for tokens in found.horizons:
        here = {
            one.family: worth
            for one in found.looked
            for run, worth in zip(one.runs, one.worths, strict=True)
            if run.tokens == tokens and worth is not None
        }
        moved = [worth - before[family] for family, worth in here.items() if family in before]
        level += statistics.median(moved or here.values() or [0.0])
        before, medians[tokens] = here, level
    return medians


def _thought(one: Looked, found: Exploration) -> str:
    tokens = f"{one.runs[-1].tokens:,} tokens"
    if one.last is None:
        return f"in the exploration it diverged by {tokens}" if not found.reason else ""
    return f"exploration took it to {tokens}, and saw {math.exp(one.last):.2f} × there"


def _confirmed(summary: Summary, found: Exploration) -> alt.Color:
    """The colours that confirmed families have in every figure."""
    there = {one.family for one in found.looked if one.confirmed}
    shown = [family.family for family in summary.families if family.family in there]
    return coloured(summary).legend(legend(summary, values=shown, labelLimit=420, columns=1))


def _around(values: Sequence[float]) -> list[float]:
    return [min(values, default=0.0) - 0.08, max(values, default=1.0) + 0.08]
