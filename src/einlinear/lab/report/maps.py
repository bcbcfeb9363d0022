"""Families in the space of structures."""

import math
from collections import Counter
from typing import Any

import einlinear as el
from einlinear.lab.extras import extra
from einlinear.lab.report.charts import INK, Rows, Specification, finished, label, plotted
from einlinear.lab.summary import Summary

with extra("lab"):
    import altair as alt

APART = 0.055  # between families of equal exponents, which would hide each other


def places(summary: Summary) -> Rows:
    """The families with a place in the taxonomy: their exponents ψ, ν, ω and what they were measured to be worth."""
    rows: Rows = []
    seen: Counter[tuple[float, float]] = Counter()
    for family in summary.families:
        try:
            psi, nu, omega = (float(exponent) for exponent in el.taxonomy(el.structure(family.family)))
        except el.StructureError:
            continue
        found = family.multipliers.get("flops")
        measured = found is not None and not found.reason
        value = found.value if measured and found else 1.0 if family.family == summary.baseline else None
        rows.append({
            "family": family.family, "psi": psi, "nu": nu, "omega": omega, "multiplier": value,
            "low": found.low if measured and found else None, "high": found.high if measured and found else None,
            "height": psi - APART * seen[omega, psi],
        })  # fmt: skip
        seen[omega, psi] += 1
    return rows


def taxonomy_chart(summary: Summary) -> Specification:
    """ψ over ω, ν as size, the multiplier as colour; families of equal exponents are drawn below each other."""
    rows = places(summary)
    values = [abs(math.log2(row["multiplier"])) for row in rows if row["multiplier"]]
    reach = max([0.5, *values])
    rows = [
        row | {"label": label(row["family"]), "value": math.log2(row["multiplier"]) if row["multiplier"] else None}
        for row in rows
    ]
    axis: dict[str, Any] = {"grid": True, "tickCount": 5, "format": ".2~f"}
    base = plotted(rows).encode(
        x=alt.X("omega:Q", scale=alt.Scale(domain=[-0.08, 1.6 * max([0.3, *(row["omega"] for row in rows)]) + 0.1]),
                axis=alt.Axis(title="ω, weight sharing", **axis)),
        y=alt.Y("height:Q", scale=alt.Scale(domain=[min([0.4, *(row["height"] for row in rows)]) - 0.1, 1.1]),
                axis=alt.Axis(title="ψ, rank", **axis)),
    )  # fmt: skip
    # Blue and orange are told apart with every kind of colour blindness; blue is better than the baseline.
    dots = base.mark_circle(opacity=1, stroke=INK, strokeWidth=1).encode(
        size=alt.Size("nu:Q", scale=alt.Scale(domain=[0, 1], range=[60, 420]), title="ν, density",
                      legend=alt.Legend(values=[0, 0.5, 1], symbolFillColor="transparent", symbolStrokeColor=INK)),
        color=alt.Color("value:Q", scale=alt.Scale(range=["#d55e00", "#f4f4f4", "#0072b2"], domain=[-reach, 0, reach]),
                        legend=alt.Legend(title="multiplier", labelExpr="format(pow(2, datum.value), '.2~f') + '×'",
                                          tickCount=5, gradientLength=130)),
        tooltip=["family:N", "psi:Q", "nu:Q", "omega:Q",
                 *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("multiplier", "low", "high"))],
    )  # fmt: skip
    names = base.mark_text(align="left", dx=14, color=INK, fontSize=12).encode(text="label:N")
    return finished(alt.layer(dots, names), 320, "Families by their exponents")
