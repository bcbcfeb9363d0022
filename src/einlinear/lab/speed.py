"""The figure of `einlinear bench`: how many times as fast as dense, against how many times fewer FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from einlinear.lab.extras import extra
from einlinear.lab.report.charts import COLOURS, VEGA_LITE, plotted

with extra("lab"):
    import altair as alt
    import vl_convert


def speed_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a static figure of the rows of `einlinear.lab.bench.bench`, one panel for each mode.

    Points are measured, with the layer's widths beside them, and × the number of tokens where there are several; dashed
    lines of the same colour are what FLOPs, or the bytes of input, output and weights, would allow (`floor_ms`); on the
    grey line every FLOP saved is time saved.

    Raises:
        ValueError: for another kind of file than .svg or .png, or rows without a structured layer.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"cannot draw a figure into {path}: only .svg and .png can be written")
    several = len({row["tokens"] for row in rows}) > 1
    dense = {_case(row): float(row["ms"]) for row in rows if row["family"] == "dense"}
    points = [
        {
            "family": row["family"],
            "mode": row["mode"],
            "width": _width(row) + (f" × {row['tokens']}" if several else ""),
            "tokens": row["tokens"],
            "saving": 1 / float(row["flop_ratio"]),
            "speed": float(row["ratio_to_dense"]),
            "floor": dense[_case(row)] / float(row["floor_ms"]),
        }
        for row in rows
        if row["family"] != "dense"
    ]
    if not points:
        raise ValueError(f"cannot draw a figure into {path}: there is no structured layer among the rows")
    spec = _chart(points, [*dict.fromkeys(str(row["mode"]) for row in rows)])
    svg = str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, allowed_base_urls=[]))
    path.write_bytes(svg.encode() if path.suffix == ".svg" else vl_convert.svg_to_png(svg, scale=2))


def _chart(points: list[dict[str, Any]], modes: Sequence[str]) -> dict[str, Any]:
    families = [*dict.fromkeys(point["family"] for point in points)]
    legend = alt.Legend(orient="top", columns=len(families), symbolOpacity=1, labelLimit=240)
    scale = alt.Scale(domain=families, range=list(COLOURS))
    colour = alt.Color("family:N", scale=scale, title=None, legend=legend)
    low = 0.9 * min(1.0, *(point["speed"] for point in points))
    high = max(1.0, *(point[name] for point in points for name in ("saving", "floor", "speed")))
    least = min(1.0, *(0.9 * point["saving"] for point in points))
    across = alt.Scale(type="log", domain=[least, 1.3 * high], nice=False)
    x = alt.X("saving:Q", title="FLOPs of dense / FLOPs", scale=across)
    panels = []
    for mode in modes:
        mine = [point for point in points if point["mode"] == mode]
        y_title = f"times as fast as dense, {mode}"
        y = alt.Y("speed:Q", title=y_title, scale=alt.Scale(type="log", domain=[low, high], nice=False))
        ideal = [{"saving": one, "speed": one} for one in (1, high)]
        even = [{"saving": one, "speed": 1} for one in (1, high)]
        whole = plotted(ideal).mark_line(color="#bbbbbb").encode(x=x, y=y)
        one = plotted(even).mark_line(color="#bbbbbb", strokeDash=[1, 3]).encode(x=x, y=y)
        base = plotted(mine).encode(x=x, color=colour, detail="tokens:N")
        floor = base.mark_line(strokeDash=[4, 4], strokeWidth=1, opacity=0.6).encode(y=alt.Y("floor:Q"))
        line = base.mark_line(strokeWidth=1.5).encode(y=y)
        dots = base.mark_point(filled=True, size=50, opacity=1).encode(y=y)
        text = base.mark_text(dx=7, align="left", fontSize=9).encode(y=y, text="width:N")
        panels.append(alt.layer(whole, one, floor, line, dots, text).properties(width=380, height=380))
    text = "dashed: what FLOPs, or the bytes of input, output and weights, allow; grey: every FLOP saved is time saved"
    title = alt.Title(text, anchor="start", fontSize=11, fontWeight="normal", color="#555555")
    chart = alt.hconcat(*panels, title=title).configure(background="white").configure_view(stroke=None)
    spec: dict[str, Any] = chart.to_dict()
    return spec


def _case(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("d_in", "d_out", "tokens", "mode"))


def _width(row: Mapping[str, Any]) -> str:
    d_in, d_out = int(row["d_in"]), int(row["d_out"])
    return str(d_in) if d_in == d_out else f"{d_in} → {d_out}"
