"""Figures, table and rows of router health: how mixtures spread their tokens, at the end of runs and over training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from einlinear.lab.extras import extra
from einlinear.lab.report.charts import INK, Rows, Specification, coloured, finished, legend, plotted
from einlinear.lab.run import Run
from einlinear.lab.summary import Summary

with extra("lab"):
    import altair as alt


@dataclass(frozen=True)
class FamilyHealth:
    """What the runs of one family say of its routers; loads are in even shares, 1 over the number of experts."""

    family: str
    run: Run  # its largest, which the figures show
    layers: int
    experts: int  # in all routed layers together
    dead: int  # of them at the end
    busiest: float
    idlest: float
    entropy: float  # mean over layers
    dropped: float  # mean over layers
    worst: int  # most dead experts in a window of training
    runs: int
    runs_with_dead: int  # of all runs, those that end with a dead expert


def router_rows(runs: Sequence[Run]) -> Rows:
    """One row for each run and routed layer, from what the run says of its routers at its end (`Run.routers`)."""
    rows: Rows = []
    for run in runs:
        for layer, found in json.loads(run.routers or "{}").items():
            load = [float(share) for share in found["load"]]
            rows.append({
                "family": run.family, "width": run.width, "tokens": run.tokens, "seed": run.seed,
                "purpose": run.purpose, "rate": run.rate, "layer": layer, "experts": len(load),
                "dead": sum(share == 0 for share in load), "busiest": max(load) * len(load),
                "idlest": min(load) * len(load), "entropy": float(found["entropy"]),
                "dropped": float(found["dropped"]),
            })  # fmt: skip
    return rows


def family_health(summary: Summary) -> list[FamilyHealth]:
    """The families with routers, in the order of the summary."""
    told = []
    for family in summary.families:
        own = [run for run in summary.runs if run.family == family.family and json.loads(run.routers or "{}")]
        measured = [run for run in own if run.purpose == "measure"] or own
        if not measured:
            continue
        largest = max(measured, key=lambda run: (run.status == "done", run.flops, -run.seed))
        rows = router_rows([largest])
        dead_at_end = [any(row["dead"] for row in router_rows([run])) for run in measured]
        told.append(
            FamilyHealth(
                family=family.family,
                run=largest,
                layers=len(rows),
                experts=sum(row["experts"] for row in rows),
                dead=sum(row["dead"] for row in rows),
                busiest=max(row["busiest"] for row in rows),
                idlest=min(row["idlest"] for row in rows),
                entropy=sum(row["entropy"] for row in rows) / len(rows),
                dropped=sum(row["dropped"] for row in rows) / len(rows),
                worst=max((row["dead"] for row in _history(largest)), default=0),
                runs=len(measured),
                runs_with_dead=sum(dead_at_end),
            )
        )
    return told


def load_chart(summary: Summary) -> Specification:
    """The load of every expert of every routed layer at the end of each family's largest run: one tick each."""
    rows: Rows = [
        {"family": health.family, "layer": layer, "expert": expert, "load": share * len(found["load"])}
        for health in family_health(summary)
        for layer, found in json.loads(health.run.routers).items()
        for expert, share in enumerate(found["load"])
    ]
    families = {row["family"]: None for row in rows}
    # In the order of the model, as a family knows it that has experts in every layer.
    layers = max(([row["layer"] for row in rows if row["family"] == name] for name in families), key=len, default=[])
    layers = list(dict.fromkeys([*layers, *(row["layer"] for row in rows)]))
    names = alt.Axis(title=None, labelLimit=230, grid=True, labelExpr="replace(datum.label, 'blocks.', '')")
    ticks = (
        plotted(rows)
        .mark_tick(thickness=2, size=9, opacity=0.75)
        .encode(
            x=alt.X("load:Q", scale=alt.Scale(domainMin=0), axis=alt.Axis(title="load, in even shares", tickCount=8)),
            y=alt.Y("layer:N", sort=layers, axis=names),
            yOffset=alt.YOffset("family:N", sort=list(families)),
            color=_families(summary, rows),
            tooltip=["family:N", "layer:N", "expert:Q", alt.Tooltip("load:Q", format=".2f")],
        )
    )
    even = plotted([{"load": 1}]).mark_rule(color=INK, strokeDash=[2, 3], opacity=0.7).encode(x="load:Q")
    return finished(alt.layer(even, ticks), max(90, len(layers) * max(18, 10 * len(families))), "Load of every expert")


def entropy_chart(summary: Summary) -> Specification:
    """Entropy over training: the mean over the layers of each family's largest run, and all of them as a band."""
    rows = _over_training(summary)
    colour, x = _families(summary, rows, columns=1), _tokens()
    band = plotted(rows).mark_area(opacity=0.13).encode(x=x, y="least:Q", y2="most:Q", color=colour)
    line = (
        plotted(rows)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
        .encode(
            x=x,
            y=alt.Y("entropy:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="entropy (1: undecided)")),
            color=colour,
            tooltip=["family:N", alt.Tooltip("tokens:Q", format="~s"), alt.Tooltip("entropy:Q", format=".3f")],
        )
    )
    return finished(alt.layer(band, line), 260, "Entropy of routers over training")


def dead_chart(summary: Summary) -> Specification:
    """Experts without a token, and dropped tokens where there are any, over training: shares over all layers."""
    rows = _over_training(summary)
    kinds = {"dead": "dead experts", "dropped": "dropped tokens"}
    if not any(row["dropped"] for row in rows):
        del kinds["dropped"]
    shares: Rows = [
        {"family": row["family"], "tokens": row["tokens"], "kind": label, "share": row[name]}
        for row in rows
        for name, label in kinds.items()
    ]
    top = max([0.04, *(1.05 * row["share"] for row in shares)])
    legend = alt.Legend() if len(kinds) > 1 else None
    axis = alt.Axis(title=" and ".join(kinds.values()), format="~%")
    lines = (
        plotted(shares)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
        .encode(
            x=_tokens(),
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, top]), axis=axis),
            color=_families(summary, rows, columns=1),
            strokeDash=alt.StrokeDash("kind:N", sort=list(kinds.values()), title=None, legend=legend),
            tooltip=["family:N", "kind:N", alt.Tooltip("tokens:Q", format="~s"), alt.Tooltip("share:Q", format=".2%")],
        )
    )  # fmt: skip
    return finished(alt.layer(lines), 260, "Dead experts over training")


def _history(run: Run) -> Rows:
    """For each window of a run: means over its layers, and dead experts of all."""
    layers = [found for found in json.loads(run.routers).values() if found.get("history")]
    rows: Rows = []
    for window, tokens in enumerate(layers[0]["history"]["tokens"] if layers else ()):
        now: dict[str, list[Any]] = {
            name: [found["history"][name][window] for found in layers] for name in ("entropy", "dead", "dropped")
        }
        rows.append({
            "tokens": tokens, "entropy": sum(now["entropy"]) / len(layers), "least": min(now["entropy"]),
            "most": max(now["entropy"]), "dead": sum(now["dead"]), "dropped": sum(now["dropped"]) / len(layers),
        })  # fmt: skip
    return rows


def _over_training(summary: Summary) -> Rows:
    """The windows of each family's largest run, dead experts as a share of all."""
    return [
        {"family": health.family} | row | {"dead": row["dead"] / health.experts}
        for health in family_health(summary)
        for row in _history(health.run)
    ]


def _tokens() -> alt.X:
    return alt.X("tokens:Q", axis=alt.Axis(title="training tokens", format="~s", tickCount=5))


def _families(summary: Summary, rows: Rows, columns: int | None = None) -> alt.Color:
    """Each family in its own colour, those without routers left out of the legend."""
    there = {row["family"] for row in rows}
    shown = [family.family for family in summary.families if family.family in there]
    return coloured(summary).legend(
        legend(summary, values=shown, labelLimit=320, **({"columns": columns} if columns else {}))
    )
