"""Figures and tables of docs/experts.md, and the report on the runs of an H200, from the results of recipes/experts.py.

python recipes/experts_page.py    # writes runs/experts_h200.html beside the page
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import altair as alt
from experts import PLANS, RESULTS, STANDARD, everywhere
from experts_results import NAMES, OTHERS, batch_of, named, rank, ranked, read, results
from experts_routers import health_by_width, health_chart, health_table

from einlinear.lab.laws import Axis, Cell, Multiplier, interpolated_multiplier, measured, multiplier, multiplier_at
from einlinear.lab.laws.cells import cells_of
from einlinear.lab.report import save_figure, write_report
from einlinear.lab.report.charts import INK, Specification, finished, plotted
from einlinear.lab.report.page import quantity, save_picture
from einlinear.lab.run import Run
from einlinear.lab.studies import read_steps
from einlinear.lab.train import Recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "experts.md"
REPORT = Path("runs/experts_h200.html")  # not in the docs: most of it is the code that draws its figures
BASELINES = ("dense", STANDARD, "btt(rank=2)")
EVENED = {"balance": Recipe.balance, "rebalance": Recipe.rebalance}  # where a setup does not say
AXES: tuple[Axis, ...] = ("flops", "seconds")


def table(scale: str) -> str:
    """Every family's multipliers over each baseline, with intervals, and its best loss."""
    runs = results(scale)
    heads = [f"over {named(base)}" for base in BASELINES]
    lines = [
        "| | runs | best loss | base rate | " + " | ".join(f"{head}: FLOPs | seconds" for head in heads) + " |",
        "|---|---|---|---|" + "---|---|" * len(BASELINES),
    ]
    for family in ranked(runs):
        own = [run for run in runs if run.family == family and run.purpose == "measure" and run.loss is not None]
        if not own:
            continue
        best = min(run.loss for run in own if run.loss is not None)
        cells = [named(family), f"{len(own)}", f"{best:.3f}", f"{own[0].rate:.4g}"]
        for base in BASELINES:
            for axis in AXES:
                cells.append("1" if family == base else over(runs, family, base, axis))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over(runs: list[Run], family: str, base: str, axis: Axis) -> str:
    """A multiplier with its interval and, in bold, where it decides."""
    if not any(run.family == base and run.purpose == "measure" for run in runs):
        return "–"
    return _told(fitted(tuple(runs), family, base, axis))


@cache
def fitted(runs: tuple[Run, ...], family: str, base: str, axis: Axis) -> Multiplier:
    """One fit for all the tables that show it."""
    return multiplier(runs, family, base, axis)


@cache
def off_hulls(runs: tuple[Run, ...], family: str, base: str, axis: Axis) -> list[Multiplier]:
    """One reading of two hulls for all the tables that show it."""
    return interpolated_multiplier(runs, LOSSES, family, base, axis)


def verdict(scale: str) -> str:
    """The claim for each baseline and cost, by BTT-MoE of two active experts: as one number, and loss by loss."""
    runs, lines = results(scale), []
    for base in BASELINES[:2]:
        for axis in AXES:
            found = {family: fitted(tuple(runs), family, base, axis) for family in NAMES if family != STANDARD}
            words = {one.verdict for one in found.values() if not one.reason}
            said = {("better",): "holds", ("worse",): "does not hold", (): "not timed"}.get(tuple(words), "undecided")
            each = ", ".join(
                f"{_experts(family)}: {'not timed' if one.reason else one}" for family, one in found.items()
            )
            by = "training FLOPs" if axis == "flops" else "seconds"
            told = f"At equal loss, {named(base)} takes so many times what BTT-MoE takes: {each}."
            by_loss = {family: off_hulls(tuple(runs), family, base, axis) for family in found}
            if any(not one.reason for curve in by_loss.values() for one in curve):
                told += " Off the hulls: " + "; ".join(
                    f"{_experts(family)} {_decided(curve)}" for family, curve in by_loss.items()
                )
                told += "."
            lines.append(f"* Over {named(base)}, by {by}: one number for all losses **{said} at this scale**. {told}")
    return "\n".join(lines)


def _experts(family: str) -> str:
    return named(family).partition(", ")[2]


def _decided(found: Sequence[Multiplier]) -> str:
    """At which losses a family is better or worse, in words."""
    told = []
    for word in ("better", "worse"):
        at = [one.loss_low for one in found if not one.reason and one.verdict == word]
        if at:
            told.append(f"**{word}** at {max(at):g}" + (f" to {min(at):g} nats" if len(at) > 1 else " nats"))
    return " and ".join(told) or "undecided at every loss"


def protocol(scale: str) -> str:
    """What was trained, in numbers."""
    plan, runs = PLANS[scale], results(scale)
    measured = [run for run in runs if run.purpose == "measure" and run.status == "done"]
    seeds = sorted({run.seed for run in measured})
    flops = [run.flops for run in measured]
    widths, horizons = ({getattr(run, name) for run in measured} for name in ("width", "tokens"))
    return (
        f"{len(runs)} runs, of them {len(runs) - len(measured)} to tune, to check or failed: `{runs[0].task}`, GPTs of "
        f"depth {plan.depth} and widths {', '.join(map(str, sorted(widths)))}, batches of "
        f"{batch_of(runs[0])} tokens, {_lengths(sorted(horizons), len(plan.horizons))} tokens "
        f"(each a cooled-down branch), seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
        f"{quantity(min(flops))} to {quantity(max(flops))} training FLOPs, on {runs[0].device}; "
        f"commit {' and '.join(dict.fromkeys(run.commit[:7] for run in runs))}."
    )


def _lengths(horizons: Sequence[int], count: int) -> str:
    if len(horizons) <= count:
        return f"horizons of {', '.join(map(quantity, horizons))}"
    return f"{count} horizons at each width, from {quantity(horizons[0])} to {quantity(horizons[-1])}"


def losses(scale: str) -> str:
    """The loss of every family at each width's longest horizon that BTT-MoE has, means over seeds, and its FLOPs in
    those of dense."""
    runs = [run for run in results(scale) if run.purpose == "measure" and run.loss is not None]
    widths = sorted({run.width for run in runs})
    everyone = {width: [run for run in runs if run.width == width and run.family in NAMES] for width in widths}
    longest = {width: _common(own) for width, own in everyone.items()}
    heads = (f"width {width}, {quantity(longest[width])} tokens: loss | FLOPs" for width in widths)
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|---|" * len(widths)]
    for family in ranked(runs):
        cells = []
        for width in widths:
            at = [run for run in runs if (run.width, run.tokens) == (width, longest[width])]
            own, dense = ([run for run in at if run.family == name] for name in (family, "dense"))
            if own and dense:
                mean = statistics.fmean(run.loss for run in own if run.loss is not None)
                cells += [f"{mean:.4f}", f"{own[0].flops / dense[0].flops:.2f}"]
            else:
                cells += ["–", "–"]
        lines.append(f"| {named(family)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def noise(scale: str) -> str:
    """By how much seeds differ at the longest horizon of each size that has two, and what laws leave unexplained."""
    runs = results(scale)
    ends: dict[tuple[str, int], Cell] = {}
    for family, cells in cells_of(measured(runs)).items():
        for cell in cells:
            if len(cell.runs) > 1 and cell.tokens > getattr(ends.get((family, cell.width)), "tokens", 0):
                ends[family, cell.width] = cell
    apart = []
    for cell in ends.values():
        found = [run.loss for run in cell.runs if run.loss is not None]
        apart.append(max(found) / min(found) - 1)
    scatter = [fitted(tuple(runs), family, "dense", "flops").scatter for family in NAMES]
    return (
        f"Two seeds of {len(ends)} sizes differ by {min(apart):.2%} to {max(apart):.1%} at their longest horizon "
        f"(median {statistics.median(apart):.1%}); one law for all losses leaves {min(scatter):.1%} to "
        f"{max(scatter):.1%}."
    )


LOSSES = (1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1)
STEPS = 450  # below which a run is left out of the curves


def curve(scale: str) -> str:
    """Multipliers by training FLOPs loss by loss, each with its own interval, without runs of few steps.

    Chosen before the runs at width 384 and of the longest horizons were trained, by simulating both from laws of the
    others: with all runs, and one number for all losses, no number of runs would have decided.
    """
    lines = ["| | " + " | ".join(f"{loss:g} nats" for loss in LOSSES) + " |", "|---|" + "---|" * len(LOSSES)]
    runs = [run for run in results(scale) if run.tokens // batch_of(run) >= STEPS]
    for base in BASELINES[:2]:
        for family in ranked([run for run in runs if run.purpose == "measure" and run.seed == 0]):
            if family in ("dense", base):
                continue
            found = multiplier_at(runs, LOSSES, family, base)
            if any(not one.reason for one in found):
                lines.append(f"| {named(family)}, over {named(base)} | " + " | ".join(map(_told, found)) + " |")
    return "\n".join(lines)


def _told(found: Multiplier) -> str:
    """A multiplier with its interval, in bold where it decides; a dash where there is none."""
    if found.reason:
        return "–"
    return f"**{found}**" if found.verdict != "undecided" else f"{found}"


def by_loss(scale: str, axis: Axis = "flops") -> str:
    """Multipliers read off the hulls, loss by loss: no law, and intervals from seeds.

    Chosen after the third of the windows of training, and before the fourth.
    """
    lines = ["| | " + " | ".join(f"{loss:g} nats" for loss in LOSSES) + " |", "|---|" + "---|" * len(LOSSES)]
    runs = results(scale)
    for base in BASELINES[:2]:
        for family in ranked([run for run in runs if run.purpose == "measure"]):
            if family not in ("dense", base):
                found = off_hulls(tuple(runs), family, base, axis)
                if sum(not one.reason for one in found) > 1:
                    lines.append(f"| {named(family)}, over {named(base)} | " + " | ".join(map(_told, found)) + " |")
    return "\n".join(lines)


def by_loss_seconds(scale: str) -> str:
    """The same by seconds."""
    return by_loss(scale, "seconds")


def by_loss_chart(scale: str) -> Specification:
    """Multipliers over dense layers off the hulls, with their intervals, against the loss."""
    runs, rows = results(scale), []
    for family in NAMES:
        found = interpolated_multiplier(runs, [loss / 100 for loss in range(100, 205, 5)], family)
        rows += [
            {"family": named(family), "loss": one.loss_low, "value": one.value, "low": one.low, "high": one.high}
            for one in found
            if not one.reason
        ]
    y = alt.Y(
        "value:Q", scale=alt.Scale(type="log", domain=[0.35, 3.5], clamp=True),
        axis=alt.Axis(title="cost of dense layers over its own", values=[0.4, 0.5, 0.7, 1, 1.4, 2, 2.8]),
    )  # fmt: skip
    base = plotted(rows).encode(
        x=alt.X("loss:Q", scale=alt.Scale(reverse=True, zero=False), axis=alt.Axis(title="validation loss (nats)")),
        color=alt.Color("family:N", title=None, scale=alt.Scale(range=["#009e73", "#cc79a7", "#d55e00", "#0072b2"],
                        domain=[named(everywhere(e, 2)) for e in (4, 8, 16)] + [named(STANDARD)])),
    )  # fmt: skip
    bands = base.mark_area(opacity=0.13).encode(y=alt.Y("low:Q"), y2="high:Q")
    even = plotted([{"value": 1}]).mark_rule(color=INK, strokeDash=[2, 3], opacity=0.7).encode(y="value:Q")
    chart = alt.layer(even, bands, base.mark_line(strokeWidth=1.8, point=True).encode(y=y))
    return finished(chart, 300, "Multipliers over dense layers against the loss")


def steps(scale: str) -> str:
    """Milliseconds of a step of every family and width, timed in turns."""
    file = RESULTS / f"experts_{scale}_clock.csv"
    timed = {(one.family, one.width): one.seconds for one in read_steps(file)}
    widths = sorted({width for _, width in timed})
    lines = ["| | " + " | ".join(f"width {width}" for width in widths) + " |", "|---|" + "---|" * len(widths)]
    for family in sorted({family for family, _ in timed}, key=rank):
        found = (timed.get((family, width)) for width in widths)
        lines.append(f"| {named(family)} | " + " | ".join(f"{1e3 * s:.2f} ms" if s else "–" for s in found) + " |")
    return "\n".join(lines)


def _common(runs: Sequence[Run]) -> int:
    """The longest horizon that all families have."""
    horizons = [{run.tokens for run in runs if run.family == family} for family in {run.family for run in runs}]
    return max(set.intersection(*horizons))


def moves(scale: str) -> str:
    """BTT-MoE over dense with every number of experts and active ones, on every axis, and without a law."""
    runs = results(scale)
    axes: tuple[Axis, ...] = ("flops", "linear_flops", "parameters", "seconds")
    lines = [
        "| | FLOPs | without a law | FLOPs of linear layers | parameters | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for family in ranked(runs):
        if family in NAMES | OTHERS and family != STANDARD:
            first, *rest = (over(runs, family, "dense", axis) for axis in axes)
            check = fitted(tuple(runs), family, "dense", "flops").crosscheck
            met = "–" if math.isnan(check) else f"{check:.2f}×"
            lines.append(f"| {named(family)} | {first} | {met} | " + " | ".join(rest) + " |")
    return "\n".join(lines)


def checks(scale: str) -> str:
    """The runs that no law uses: what they changed, and what came out, beside the run that they check."""
    runs = results(scale)
    lines = ["| | width | base rate | weight of the loss | step of the bias | loss |", "|---|---|---|---|---|---|"]
    found = [run for run in runs if run.purpose == "check"]
    cells = {(run.family, run.width, run.tokens) for run in found}
    for run in sorted(runs, key=lambda run: (run.family, run.width, run.rate, run.setup)):
        if (run.family, run.width, run.tokens) not in cells or run.purpose == "tune" or run.seed:
            continue
        setup, name = json.loads(run.setup), named(run.family)
        mark = "**" if run.purpose == "measure" else ""
        evened = [setup.get(key, value) if run.family != "dense" else "–" for key, value in EVENED.items()]
        loss = run.status if run.loss is None else f"{run.loss:.4f}"
        cells_of_run = (name, run.width, f"2^{math.log2(run.rate):.0f}", *evened, loss)
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells_of_run) + " |")
    return "\n".join(lines)


def one_active() -> str:
    """One active expert of eight, evened out less and less, beside two."""
    lines = ["| active | weight of the loss | step of the bias | loss | least entropy |", "|---|---|---|---|---|"]
    for row in read(RESULTS / "experts_one_active.csv"):
        lines.append(
            f"| {row['active']} of 8 | {row['balance']} | {row['rebalance']} | {float(row['loss']):.3f} | "
            f"{float(row['entropy']):.2f} |"
        )
    return "\n".join(lines)


def tuned(scale: str) -> str:
    """The loss of every trial; in bold the best rate of a family."""
    trials = [run for run in results(scale) if run.purpose == "tune"]
    rates = sorted({run.rate for run in trials})
    lines = ["| | " + " | ".join(f"2^{math.log2(rate):.0f}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for family in ranked(trials):
        found = {run.rate: run.loss for run in trials if run.family == family}
        best = min(loss for loss in found.values() if loss is not None)
        cells = []
        for rate in rates:
            text = "–" if rate not in found else "diverged" if found[rate] is None else f"{found[rate]:.4f}"
            cells.append(f"**{text}**" if found.get(rate) == best else text)
        lines.append(f"| {named(family)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def done(scale: str) -> bool:
    return (RESULTS / f"experts_{scale}.csv").exists()


PARTS = {"health": health_table, "one_active": one_active} | {
    f"{part.__name__} {scale}": partial(part, scale)
    for scale, parts in {
        "small": (protocol, table, verdict),
        "h200": (
            *(protocol, table, verdict, noise, curve, by_loss, steps, by_loss_seconds),
            *(moves, losses, tuned, checks, health_by_width),
        ),
    }.items()
    for part in parts
    if done(scale)
}


def main() -> None:
    text = PAGE.read_text()
    for name, part in PARTS.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, part=part: m[1] + part() + "\n" + m[2], text, flags=re.S
        )
    PAGE.write_text(text)
    save_picture(health_chart(), DOCS / "img" / "experts_health.svg")
    for scale in PLANS:
        if done(scale):
            shown = [run for run in results(scale) if run.family not in OTHERS]
            save_figure(shown, DOCS / "img" / f"experts_{scale}.svg")
    if done("h200"):
        save_picture(by_loss_chart("h200"), DOCS / "img" / "experts_h200_by_loss.svg")
        write_report(results("h200"), REPORT, command="python recipes/experts_page.py")


if __name__ == "__main__":
    main()
