"""The figure of a law card: loss over size, with the fitted surface at equal compute and its optimum."""

import os
from pathlib import Path

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws import Surface, Table
from einlinear.lab.laws.card import Card
from einlinear.lab.report.charts import INK, Rows, Specification, finished, logarithmic, plotted
from einlinear.lab.report.page import save_picture

with extra("lab"):
    import altair as alt

CURVES = 7  # of equal compute
STEPS = 60


def law_chart(card: Card, table: Table) -> Specification:
    """The baseline's runs coloured by compute, its surface at seven equal computes (lines), and N* (dashed)."""
    own = table.of(card["baseline"])
    points: Rows = [
        {"parameters": n, "tokens": d, "flops": c, "loss": loss}
        for n, d, c, loss in zip(
            own.parameters.tolist(), own.tokens.tolist(), own.flops.tolist(), own.loss.tolist(), strict=True
        )
    ]
    curves: Rows = []
    optimum: Rows = []
    fit = card["parametric"]
    if "reason" not in fit:
        surface = Surface(**{name: fit[name] for name in ("E", "A", "B", "alpha", "beta")})
        k = fit["flops_per_parameter_and_token"]
        budgets = [budget["flops"] for budget in card["isoflop"]["parabola"].get("budgets", [])]
        cost = np.geomspace(min(budgets or own.flops), max(budgets or own.flops), CURVES)
        sizes = np.geomspace(own.parameters.min(), own.parameters.max(), STEPS)
        top = 1.02 * own.loss.max()
        for number, flops in enumerate(cost):
            losses = surface.loss(sizes, flops / k / sizes)
            curves += [
                {"parameters": float(n), "loss": float(loss), "flops": float(flops), "curve": number}
                for n, loss in zip(sizes, losses, strict=True)
                if loss <= top
            ]
        best, _, losses = surface.optimum(np.geomspace(cost[0], cost[-1], STEPS), k)
        optimum = [{"parameters": float(n), "loss": float(loss)} for n, loss in zip(best, losses, strict=True)]
    x = logarithmic(alt.X, "parameters", "parameters", own.parameters.tolist(), "~s")
    y = logarithmic(alt.Y, "loss", f"loss ({table.unit})", own.loss.tolist(), "~g")
    ends = [float(own.flops.min()), float(own.flops.max())]
    decades = [10.0**k for k in range(int(np.ceil(np.log10(ends[0]))), int(np.log10(ends[1])) + 1)]
    legend = alt.Legend(title="training FLOPs", values=decades if len(decades) > 1 else ends, format="~e")
    colour = alt.Color("flops:Q", scale=alt.Scale(type="log", scheme="viridis"), legend=legend)
    layers = [
        plotted(curves).mark_line(strokeWidth=1.3).encode(x=x, y=y, color=colour, detail="curve:N"),
        plotted(points).mark_point(size=38, filled=True, opacity=0.9).encode(x=x, y=y, color=colour),
        plotted(optimum).mark_line(strokeDash=[5, 4], color=INK, clip=True).encode(x=x, y=y),
    ]
    return finished(alt.layer(*layers), 400, "Loss over size at equal compute")


def save_law_figure(card: Card, table: Table, path: str | os.PathLike[str]) -> None:
    """Write the figure as a static .svg or .png on white; raises as `save_figure`."""
    save_picture(law_chart(card, table), Path(path))
