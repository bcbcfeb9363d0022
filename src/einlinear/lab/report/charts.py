"""The figures of the report, as Vega-Lite specifications made with Altair.

Text and the baseline take the colour of the page (`currentColor`), so that one figure serves a light page,
a dark one and paper.
"""

import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws import AXES, Axis
from einlinear.lab.summary import Summary

with extra("lab"):
    import altair as alt

Specification = dict[str, Any]
Rows = list[dict[str, Any]]
Channel = TypeVar("Channel", alt.X, alt.Y)

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # the version Altair writes

# Okabe and Ito, "Color Universal Design" (2008), less the yellow, which is lost on white; black is the page's ink.
INK = "currentColor"
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
STEPS = 48  # points of a fitted curve
WIDE = 400  # height from which a figure of losses takes the whole width of the page
LONGEST = 270  # pixels of a family's name: numbers of experts, at its end, must not be cut off


def loss_chart(summary: Summary, axis: Axis, height: int = WIDE) -> Specification:
    """Loss against one cost: the runs' means, each family's hull, and its fitted law with a 95 % band."""
    points: Rows = []
    hulls: Rows = []
    laws: Rows = []
    for family in summary.families:
        frontier = family.frontiers.get(axis)
        if frontier is None:
            continue
        fitted = {id(cell) for cell in frontier.fitted or frontier.hull}
        points += [
            {
                "family": family.family, "width": cell.width, "tokens": cell.tokens, "cost": cell.cost,
                "loss": cell.loss, "seeds": len(cell.runs), "fitted": id(cell) in fitted,
            }
            for cell in frontier.cells
        ]  # fmt: skip
        hulls += [{"family": family.family, "cost": cell.cost, "loss": cell.loss} for cell in frontier.hull]
        if not frontier.reason:
            costs = [cell.cost for cell in frontier.cells]
            grid = np.geomspace(min(costs), max(costs), STEPS)
            curves = np.stack([grid, *frontier.loss(grid)], axis=1)
            laws += [
                dict(zip(("cost", "loss", "low", "high"), map(_short, row), strict=True), family=family.family)
                for row in curves
            ]
    losses, costs = [point["loss"] for point in points], [point["cost"] for point in points]
    x = logarithmic(alt.X, "cost", AXES[axis], costs, "~s")
    y = logarithmic(alt.Y, "loss", "validation loss (nats)", losses, "~g")
    colour = coloured(summary)
    shape = shaped(summary)
    chosen = alt.selection_point(name="chosen", fields=["family"], bind="legend")
    band = (
        plotted(laws)
        .mark_area(clip=True)
        .encode(x=x, y=logarithmic(alt.Y, "low", "", losses, "~g"), y2="high:Q", color=colour)
        .encode(opacity=alt.condition(chosen, alt.value(0.1), alt.value(0.02)))
    )
    law = plotted(laws).mark_line(clip=True, strokeDash=[5, 4], strokeWidth=1.5)
    hull = plotted(hulls).mark_line(strokeWidth=2)
    dots = (
        plotted(points)
        .mark_point(size=70, filled=True)
        .encode(
            x=x, y=y, color=colour, shape=shape,
            opacity=alt.condition(chosen, alt.value(1), alt.value(0.06)),
            fillOpacity=alt.condition("datum.fitted", alt.value(1), alt.value(0.3)),
            tooltip=[
                alt.Tooltip("family:N"), alt.Tooltip("width:Q"), alt.Tooltip("tokens:Q", format="~s"),
                alt.Tooltip("cost:Q", format=".3s", title=AXES[axis]), alt.Tooltip("loss:Q", format=".4f"),
                alt.Tooltip("seeds:Q"),
            ],
        )
        .add_params(chosen)
    )  # fmt: skip
    dim = alt.condition(chosen, alt.value(1), alt.value(0.08))
    lines = [layer.encode(x=x, y=y, color=colour, opacity=dim) for layer in (law, hull)]
    columns = 2 if height >= WIDE else 1
    return finished(alt.layer(band, *lines, dots), height, f"Validation loss against {AXES[axis]}", columns)


def multiplier_chart(summary: Summary) -> Specification:
    """Each family's multipliers by FLOPs and by seconds, with their 95 % intervals, around the line at 1."""
    kinds: dict[Axis, str] = {"flops": "by training FLOPs", "seconds": "by seconds"}
    rows: Rows = [
        {"family": m.family, "kind": kind, "value": _short(m.value), "low": _short(m.low), "high": _short(m.high)}
        for axis, kind in kinds.items()
        for m in summary.multipliers(axis)
    ]
    values = [row[name] for row in rows for name in ("low", "high")] + [0.8, 1.25]
    x = logarithmic(alt.X, "low", f"cost of {summary.baseline} over its own", values, "~g")
    names = alt.Axis(title=None, labelLimit=LONGEST, labelExpr=_label_expression(summary))
    base = plotted(rows).encode(
        y=alt.Y("family:N", sort=[family.family for family in summary.families], axis=names),
        yOffset=alt.YOffset("kind:N", sort=list(kinds.values())),
        color=alt.Color("family:N", scale=_scale(summary, "colour"), legend=None),
    )
    one = plotted([{"low": 1}]).mark_rule(color=INK, strokeDash=[2, 3], opacity=0.7).encode(x=x)
    interval = base.mark_rule(strokeWidth=2, clip=True).encode(x=x, x2="high:Q")
    value = base.mark_point(size=75, filled=True, opacity=1, clip=True).encode(
        x=logarithmic(alt.X, "value", "", values, "~g"),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=list(kinds.values()), range=["circle", "diamond"]),
                        title=None),
        tooltip=["family:N", "kind:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("value", "low", "high"))],
    )  # fmt: skip
    height = 40 * max(1, len({row["family"] for row in rows}))
    return finished(alt.layer(one, interval, value), height, "Compute multipliers")


def tuning_chart(summary: Summary) -> Specification:
    """Loss against base rate for each family's tuning runs; the rate that was then used is ringed."""
    rows: Rows = [
        {
            "family": family.family, "rate": run.rate, "loss": run.loss, "used": run.rate in family.rates,
            "size": f"{family.family} {run.width} {run.tokens} {run.seed}", "width": run.width,
        }
        for family in summary.families
        for run in family.tuning
        if run.loss is not None
    ]  # fmt: skip
    x = logarithmic(alt.X, "rate", "base learning rate", [row["rate"] for row in rows], "~g")
    y = logarithmic(alt.Y, "loss", "validation loss (nats)", [row["loss"] for row in rows], "~g")
    colour = coloured(summary)
    shape = shaped(summary)
    base = plotted(rows).encode(x=x, y=y, color=colour, detail="size:N")
    dots = base.mark_point(size=55, filled=True, opacity=1).encode(
        shape=shape, tooltip=["family:N", "width:Q", alt.Tooltip("rate:Q", format=".3g"), "loss:Q"]
    )
    used = base.transform_filter("datum.used").mark_point(size=260, strokeWidth=1.5, shape="circle", opacity=1)
    return finished(alt.layer(base.mark_line(strokeWidth=1.5), dots, used), 280, "Loss against base rate")


def plotted(rows: Rows) -> alt.Chart:
    """A chart of these rows."""
    return alt.Chart({"values": rows})


def _short(value: float) -> float:
    """To the precision of a pixel: it keeps the page small."""
    return float(f"{value:.6g}")


def _scale(summary: Summary, channel: str) -> alt.Scale:
    """One colour and one shape per family, the same in every figure; 42 differ before a pair repeats."""
    names = [family.family for family in summary.families]
    others = [index - 1 if names[0] == summary.baseline else index for index in range(len(names))]
    marks = [INK if index < 0 else COLOURS[index % len(COLOURS)] for index in others]
    if channel == "shape":
        marks = [SHAPES[index % len(SHAPES)] for index in range(len(names))]
    return alt.Scale(domain=names, range=marks)


def logarithmic(channel: type[Channel], name: str, title: str, values: Sequence[float], number: str) -> Channel:
    """A position channel on a logarithmic scale that holds all values, with ticks at round numbers."""
    low, high = min(values, default=1.0), max(values, default=2.0)
    margin = (high / low) ** 0.06 if high > low else 1.1
    domain = [low / margin, high * margin]
    return channel(
        f"{name}:Q",
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(title=title, values=_ticks(*domain), format=number, labelFlush=False, labelOverlap="greedy"),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between two positive ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**k for k in decades for m in multiples if low <= m * 10.0**k <= high]
        if len(ticks) >= 4:
            return ticks
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = size * max(m for m in (1, 2, 5) if m * size <= (high - low) / 4)
    first = math.ceil(low / step)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step) + 1)]


def coloured(summary: Summary) -> alt.Color:
    """Each family in its own colour."""
    return alt.Color("family:N", scale=_scale(summary, "colour"), legend=legend(summary))


def shaped(summary: Summary) -> alt.Shape:
    """Each family with its own mark."""
    return alt.Shape("family:N", scale=_scale(summary, "shape"), legend=legend(summary))


def label(family: str) -> str:
    """A family as figures name it: the exponents of θ as fractions, θ(1/2, 0, 1/2, 1/2, 1/2, 0, 0)."""

    def exponents(found: re.Match[str]) -> str:
        values = [Fraction(value).limit_denominator(12) for value in found[1].split(",")]
        return f"θ({', '.join(map(str, values))})"

    return re.sub(r"theta\(theta=\(([\d., ]+)\)\)", exponents, family)


def _label_expression(summary: Summary) -> str:
    """Vega's expression for the label of a family."""
    return f"{json.dumps({family.family: label(family.family) for family in summary.families})}[datum.label]"


def legend(summary: Summary, **options: Any) -> alt.Legend:
    """A legend of families."""
    return alt.Legend(title=None, labelExpr=_label_expression(summary), **options)


def finished(chart: alt.LayerChart | alt.FacetChart, height: int, description: str, columns: int = 2) -> Specification:
    """A chart as the page shows it: as wide as its place, in the page's ink."""
    plain = {
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": INK, "titleColor": INK, "tickColor": INK, "domainColor": INK, "gridColor": INK,
            "gridOpacity": 0.1, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelOpacity": 0.85, "titleOpacity": 0.85,
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 10,
        },
        "legend": {
            "orient": "top", "columns": columns, "columnPadding": 44, "symbolSize": 80, "symbolOpacity": 1,
            "symbolBaseFillColor": INK, "labelColor": INK, "titleColor": INK, "labelFontSize": 12.5,
            "labelLimit": LONGEST,
        },
    }  # fmt: skip
    specification: Specification = chart.properties(width="container", height=height, description=description).to_dict()
    return specification | {
        "config": plain,
        "background": "transparent",
        "autosize": {"type": "fit-x", "contains": "padding"},
    }
