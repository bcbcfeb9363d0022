"""What the routers of the experiment did while they were trained: tables and a figure."""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import altair as alt
from experts import everywhere
from experts_results import RESULTS, batch_of, read, results

from einlinear.lab.report.charts import INK, Specification, finished, plotted


def health_chart() -> Specification:
    """The loads of the busiest and the idlest expert of each router over training, in even shares."""
    rows = [
        {"layer": row["layer"].removeprefix("blocks.0."), "tokens": int(row["tokens"]), "expert": which,
         "load": max(16 * float(row[which]), 0.01)}
        for row in read(RESULTS / "experts_health.csv") if row["family"] == everywhere(16, 2) and row["seed"] == "0"
        for which in ("busiest", "idlest")
    ]  # fmt: skip
    lines = (
        plotted(rows)
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("tokens:Q", axis=alt.Axis(title="training tokens", format="~s")),
            y=alt.Y("load:Q", scale=alt.Scale(type="log", domain=[0.05, 8], clamp=True),
                    axis=alt.Axis(title="load, in even shares", values=[0.05, 0.1, 0.25, 0.5, 1, 2, 4])),
            color=alt.Color("layer:N", title=None, scale=alt.Scale(range=["#d55e00", "#0072b2", "#009e73", "#cc79a7"])),
            strokeDash=alt.StrokeDash("expert:N", title=None),
        )
    )  # fmt: skip
    even = plotted([{"load": 1}]).mark_rule(color=INK, strokeDash=[2, 3], opacity=0.7).encode(y="load:Q")
    return finished(alt.layer(even, lines), 300, "Loads of the busiest and the idlest expert over training")


def health_table() -> str:
    """Each router at the end of 1000 steps, and the windows of training in which it left an expert idle."""
    lines = [
        "| | router | experts | least and most loaded | dead | entropy | windows with an idle expert |",
        "|---|---|---|---|---|---|---|",
    ]
    for (family, _, _, layer), shares, seen in routers("health"):
        idle = sum(row["dead"] != "0" for row in seen)
        lines.append(
            f"| {family.partition('(')[0]} | {layer.removeprefix('blocks.0.')} | {len(shares)} | {min(shares):.1%} to "
            f"{max(shares):.1%} | {shares.count(0.0)} | {float(seen[-1]['entropy']):.2f} | {idle} of {len(seen)} |"
        )
    return "\n".join(lines)


def routers(name: str) -> Iterator[tuple[tuple[str, str, str, str], list[float], list[dict[str, str]]]]:
    """Of each router (family, width, seed, layer): the loads of its experts at the end, and its windows of training."""
    about = ("family", "width", "seed", "layer")
    windows, loads = (
        {key: list(rows) for key, rows in groupby(read(RESULTS / f"experts_{name}{part}.csv"), itemgetter(*about))}
        for part in ("", "_loads")
    )
    for key, rows in loads.items():
        yield key, [float(row["load"]) for row in rows], windows[key]


def health_by_width(scale: str) -> str:
    """All routers of each model of 16 experts, at the end of its longest run and in the windows before."""
    lines = [
        "| | width | steps | routers | least and most loaded expert | dead | windows with an idle expert |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = results(scale)
    for (family, width), own in groupby(routers(f"{scale}_routers"), lambda one: one[0][:2]):
        found = list(own)
        shares = [share * len(loads) for _, loads, _ in found for share in loads]
        seen = [row for _, _, windows in found for row in windows]
        idle = sum(row["dead"] != "0" for row in seen)
        steps, name = int(found[0][2][-1]["tokens"]) // batch_of(runs[0]), family.partition("(")[0]
        lines.append(
            f"| {name} | {width} | {steps} | {len(found)} | {min(shares):.2f} to {max(shares):.2f} of an even share | "
            f"{shares.count(0.0)} | {idle} of {len(seen)} |"
        )
    return "\n".join(lines)
