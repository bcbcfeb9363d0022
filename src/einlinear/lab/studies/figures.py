"""The figures of studies, as Vega-Lite specifications made with Altair, on white: pages show them as files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from einlinear.lab.extras import extra
from einlinear.lab.report.charts import COLOURS, SHAPES, logarithmic

with extra("lab"):
    import altair as alt

DARK = "#333333"  # of the baseline


def landscape_figure(means: Mapping[tuple[str, int], Mapping[float, float]]) -> dict[str, Any]:
    """ln loss over base rate, a line for each width and a panel for each family; the best cell of each is filled."""
    rows: list[dict[str, Any]] = []
    for (name, width), cells in means.items():
        best = min(cells, key=lambda rate: cells[rate])
        for rate, loss in cells.items():
            if math.isfinite(loss):
                place = {"power": math.log2(rate), "loss": math.exp(loss), "best": rate == best}
                rows.append({"family": name, "width": width} | place)
    names = list(dict.fromkeys(row["family"] for row in rows))
    powers = sorted({row["power"] for row in rows})
    x = alt.X(
        "power:Q",
        title="base rate",
        scale=alt.Scale(domain=[min(powers) - 0.3, max(powers) + 0.3], nice=False),
        axis=alt.Axis(values=powers[:: 2 if len(powers) > 6 else 1], labelExpr="'2^' + datum.value"),
    )
    y = logarithmic(alt.Y, "loss", "validation loss", [row["loss"] for row in rows], "~g")
    colour = alt.Color("width:O", title="width", scale=alt.Scale(scheme="viridis"))
    panels = []
    for name in names:
        base = alt.Chart({"values": [row for row in rows if row["family"] == name]}).encode(x=x, y=y, color=colour)
        dots = base.mark_point(size=45, filled=True).encode(
            opacity=alt.value(1), size=alt.condition("datum.best", alt.value(130), alt.value(28))
        )
        panels.append(alt.layer(base.mark_line(strokeWidth=1.5), dots).properties(title=name, width=210, height=200))
    return _finished(alt.concat(*panels, columns=3))


def cost_figure(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Loss over cost, a panel for each comparison; rows have `family`, `cost`, `loss`, and `hull` where on its line."""
    names = list(dict.fromkeys(row["family"] for rows in panels.values() for row in rows))
    scale = alt.Scale(domain=names, range=[DARK, *COLOURS][: len(names)])
    colour = alt.Color("family:N", title=None, scale=scale)
    shape = alt.Shape("family:N", title=None, scale=alt.Scale(domain=names, range=list(SHAPES)[: len(names)]))
    charts = []
    for title, rows in panels.items():
        x = logarithmic(
            alt.X, "cost", title.partition(" over ")[2].partition(",")[0], [row["cost"] for row in rows], "~s"
        )
        y = logarithmic(alt.Y, "loss", "loss", [row["loss"] for row in rows], "~g")
        dots = alt.Chart({"values": list(rows)}).mark_point(filled=True, size=45, opacity=0.45)
        hull = alt.Chart({"values": [row for row in rows if row["hull"]]}).mark_line(strokeWidth=2)
        layers = alt.layer(hull.encode(x=x, y=y, color=colour), dots.encode(x=x, y=y, color=colour, shape=shape))
        charts.append(layers.properties(title=title, width=300, height=260))
    return _finished(alt.concat(*charts, columns=2))


def ordering_figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Multipliers with their intervals over ω, ψ and ν; rows have these, `family`, `value`, `low`, `high`."""
    values = [bound for row in rows for bound in (row["low"], row["high"])]
    limits = [max(0.02, min(values)), min(50.0, max(values))]
    y = logarithmic(alt.Y, "value", "compute multiplier over dense", limits, "~g")
    charts = []
    for axis, name in (("omega", "ω (sharing)"), ("psi", "ψ (rank)"), ("nu", "ν (compute)")):
        moved = [dict(row) | {axis: row[axis] + 0.006 * (number - len(rows) / 2)} for number, row in enumerate(rows)]
        x = alt.X(
            f"{axis}:Q",
            title=name,
            scale=alt.Scale(domain=[-0.08, 1.08], nice=False),
            axis=alt.Axis(values=[0, 0.33, 0.5, 0.67, 1]),
        )
        base = alt.Chart({"values": moved})
        one = alt.Chart({"values": [{"value": 1}]}).mark_rule(strokeDash=[4, 4], color="#999999").encode(y=y)
        bars = base.mark_rule(clip=True, color=COLOURS[1], opacity=0.6).encode(
            x=x, y=logarithmic(alt.Y, "low", "", limits, "~g"), y2="high:Q"
        )
        dots = base.mark_point(filled=True, size=50, color=COLOURS[1], opacity=1).encode(x=x, y=y)
        charts.append(alt.layer(one, bars, dots).properties(width=210, height=240))
    return _finished(alt.hconcat(*charts))


def _finished(chart: alt.TopLevelMixin) -> dict[str, Any]:
    specification: dict[str, Any] = (
        chart.configure(background="white", font="sans-serif")
        .configure_view(stroke=None)
        .configure_axis(gridOpacity=0.35, titleFontWeight="normal")
        .configure_legend(orient="top", labelLimit=320)
        .configure_title(fontSize=12, fontWeight="normal")
        .to_dict()
    )
    return specification
