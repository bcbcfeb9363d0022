"""Figures and tables of docs/experts.md, and the report on the runs of an H200, from the results of recipes/experts.py.

python recipes/experts_page.py    # writes runs/experts_h200.html beside the page
"""

import csv
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import altair as alt
from experts import PLANS, RESULTS, STANDARD, everywhere

from einlinear.lab.laws import Axis, Multiplier, interpolated_multiplier, multiplier, multiplier_at
from einlinear.lab.report import save_figure, write_report
from einlinear.lab.report.charts import INK, Specification, finished, plotted
from einlinear.lab.report.page import quantity, save_picture
from einlinear.lab.run import Run
from einlinear.lab.studies import read_steps
from einlinear.lab.train import Recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "experts.md"
REPORT = Path("runs/experts_h200.html")  # not in the docs: most of it is the code that draws its figures
NAMES = {STANDARD: "standard mixture, E = 8"} | {everywhere(e, 2): f"BTT-MoE, E = {e}" for e in (4, 8, 16)}
OTHERS = {everywhere(e, k): f"BTT-MoE, E = {e}, k = {k}" for e, k in ((8, 1), (16, 1), (4, 4), (8, 4))}
BASELINES = ("dense", STANDARD, "btt(rank=2)")
EVENED = {"balance": Recipe.balance, "rebalance": Recipe.rebalance}  # where a setup does not say
AXES: tuple[Axis, ...] = ("flops", "seconds")


def named(family: str) -> str:
    """A family as the page calls it."""
    return (NAMES | OTHERS).get(family, family)


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


def results(scale: str) -> list[Run]:
    """The runs of a scale; their seconds are steps times what a step takes alone (`experts.clock`).

    Steps that were timed at another depth count by their blocks. A family that was not timed at every width of its runs
    has no seconds.
    """
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Run)}
    runs = []
    for row in read(RESULTS / f"experts_{scale}.csv"):
        loss = float(row.pop("loss")) if row["loss"] else None
        runs.append(Run(loss=loss, **{name: kinds[name](value) for name, value in row.items()}))
    file = RESULTS / f"experts_{scale}_clock.csv"
    if not file.exists():
        return runs
    of_block = {(one.family, one.width): one.seconds / one.depth for one in read_steps(file)}
    untimed = {run.family for run in runs if (run.family, run.width) not in of_block}
    return [
        replace(
            run,
            seconds=0.0 if run.family in untimed
            else of_block[run.family, run.width] * run.depth * run.tokens / _batch(run),
        )
        for run in runs
    ]  # fmt: skip


def _batch(run: Run) -> int:
    setup = json.loads(run.setup)
    return int(setup["batch"] * setup["context"])


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


def verdict(scale: str) -> str:
    """The claim in a sentence for each baseline and cost, by BTT-MoE of two active experts."""
    runs, lines = results(scale), []
    for base in BASELINES[:2]:
        for axis in AXES:
            found = {family: fitted(tuple(runs), family, base, axis) for family in NAMES if family != STANDARD}
            words = {one.verdict for one in found.values() if not one.reason}
            said = {("better",): "holds", ("worse",): "does not hold"}.get(tuple(words), "undecided")
            each = ", ".join(
                f"{named(family).partition(', ')[2]}: {'not timed' if one.reason else one}"
                for family, one in found.items()
            )
            by = "training FLOPs" if axis == "flops" else "seconds"
            told = f"At equal loss, {named(base)} takes so many times what BTT-MoE takes: {each}."
            lines.append(f"* Over {named(base)}, by {by}: **{said} at this scale**. {told}")
    return "\n".join(lines)


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
        f"{_batch(runs[0])} tokens, {_lengths(sorted(horizons), len(plan.horizons))} tokens "
        f"(each a cooled-down branch), seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
        f"{quantity(min(flops))} to {quantity(max(flops))} training FLOPs, on {runs[0].device}; "
        f"commit {' and '.join(dict.fromkeys(run.commit[:7] for run in runs))}."
    )


def _lengths(horizons: Sequence[int], count: int) -> str:
    if len(horizons) <= count:
        return f"horizons of {', '.join(map(quantity, horizons))}"
    return f"{count} horizons at each width, from {quantity(horizons[0])} to {quantity(horizons[-1])}"


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
        steps, name = int(found[0][2][-1]["tokens"]) // _batch(runs[0]), family.partition("(")[0]
        lines.append(
            f"| {name} | {width} | {steps} | {len(found)} | {min(shares):.2f} to {max(shares):.2f} of an even share | "
            f"{shares.count(0.0)} | {idle} of {len(seen)} |"
        )
    return "\n".join(lines)


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


LOSSES = (1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1)
STEPS = 450  # below which a run is left out of the curves


def curve(scale: str) -> str:
    """Multipliers by training FLOPs loss by loss, each with its own interval, without runs of few steps.

    Chosen before the runs at width 384 and of the longest horizons were trained, by simulating both from laws of the
    others: with all runs, and one number for all losses, no number of runs would have decided.
    """
    lines = ["| | " + " | ".join(f"{loss:g} nats" for loss in LOSSES) + " |", "|---|" + "---|" * len(LOSSES)]
    runs = [run for run in results(scale) if run.tokens // _batch(run) >= STEPS]
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


def by_loss(scale: str) -> str:
    """Multipliers by training FLOPs read off the hulls, loss by loss: no law, and intervals from seeds.

    Chosen after the second of the windows of training, and before the third.
    """
    lines = ["| | " + " | ".join(f"{loss:g} nats" for loss in LOSSES) + " |", "|---|" + "---|" * len(LOSSES)]
    runs = results(scale)
    for base in BASELINES[:2]:
        for family in ranked([run for run in runs if run.purpose == "measure"]):
            if family not in ("dense", base):
                found = interpolated_multiplier(runs, LOSSES, family, base)
                if sum(not one.reason for one in found) > 1:
                    lines.append(f"| {named(family)}, over {named(base)} | " + " | ".join(map(_told, found)) + " |")
    return "\n".join(lines)


def _common(runs: Sequence[Run]) -> int:
    """The longest horizon that all families have."""
    horizons = [{run.tokens for run in runs if run.family == family} for family in {run.family for run in runs}]
    return max(set.intersection(*horizons))


def ranked(runs: Sequence[Run]) -> list[str]:
    """The families of runs, as the page orders them."""
    return sorted({run.family for run in runs}, key=ranked_key)


def ranked_key(family: str) -> int:
    return ["dense", "btt", "btt(rank=2)", *NAMES, *OTHERS].index(family)


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


PARTS = {"health": health_table} | {
    f"{part.__name__} {scale}": partial(part, scale)
    for scale, parts in {
        "small": (protocol, table, verdict),
        "h200": (protocol, table, verdict, curve, by_loss, moves, losses, tuned, checks, health_by_width),
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
            save_figure(results(scale), DOCS / "img" / f"experts_{scale}.svg")
    if done("h200"):
        write_report(results("h200"), REPORT, command="python recipes/experts_page.py")


if __name__ == "__main__":
    main()
