"""A study as a page of the docs: claim, verdict, protocol, figure, numbers, and where the raw runs are."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from einlinear.lab.compare import Plan
from einlinear.lab.extras import extra
from einlinear.lab.report.charts import VEGA_LITE
from einlinear.lab.report.page import quantity
from einlinear.lab.run import Run
from einlinear.lab.studies.evidence import Finding, Table
from einlinear.lab.studies.pricing import Timed, expected, read_steps
from einlinear.lab.studies.protocol import TUNED, Experiment, Study, label, measured, place_of, read_runs

with extra("lab"):
    import vl_convert

EXAMPLES = {"images", "teacher", "cifar10"}
"""Tasks of examples; the others are of sequences of tokens."""

MANY = 100

SIGNS = {"holds": "✓", "fails": "✗", "open": "?"}


def write_page(study: Study, folder: Path) -> Path:
    """Writes a study's page and figures into a folder, from the raw runs that lie there (`NAME-SCALE.csv`).

    Raises ValueError where there are none of any scale.
    """
    found = {
        scale: read_runs(path) for scale in study.scales if (path := folder / f"{study.name}-{scale}.csv").exists()
    }
    if not found:
        raise ValueError(f"Writing the page of {study.name!r}: {folder} has none of its runs; run the study first.")
    findings = {scale: study.judge(runs) for scale, runs in found.items()}
    for scale, finding in findings.items():
        svg = vl_convert.vegalite_to_svg(finding.figure, vl_version=VEGA_LITE, allowed_base_urls=[])
        (folder / f"{study.name}-{scale}.svg").write_text(str(svg))
    path = folder / f"{study.name}.md"
    path.write_text(page(study, found, findings, steps_of(study, folder)), encoding="utf-8")
    return path


def steps_of(study: Study, folder: Path) -> dict[str, list[Timed]]:
    """Times of steps that lie beside a study's runs (`NAME-SCALE-steps.csv`), by scale."""
    paths = {scale: folder / f"{study.name}-{scale}-steps.csv" for scale in study.scales}
    return {scale: read_steps(path) for scale, path in paths.items() if path.exists()}


def page(
    study: Study,
    runs: Mapping[str, Sequence[Run]],
    findings: Mapping[str, Finding],
    steps: Mapping[str, Sequence[Timed]] = MappingProxyType({}),
) -> str:
    """The page's text: the verdicts on top, then what was run at each scale, and what was not."""
    lines = [f"# {study.title}", "", f"> {study.claim}", "", f"Source: {study.source}.", ""]
    for scale, finding in findings.items():
        lines += [f"**Verdict at the {scale} scale ({_devices(runs[scale])}).** {finding.sentence}", ""]
    lines += [f"**How it is judged.** {study.measure}", ""]
    for scale, experiments in study.scales.items():
        command = f"python recipes/claims.py {study.name}" + (f" --scale {scale}" if scale != "small" else "")
        if scale in findings:
            lines += _run(study, scale, command, runs[scale], findings[scale], steps.get(scale, ()))
        else:
            lines += [
                f"## {scale.capitalize()} scale: not run yet",
                "",
                *_protocol(experiments),
                f"* {expected(experiments)}",
            ]
            lines += [
                "",
                f"`{command} --device cuda`, as often as it takes; with `--plan` it only says what it takes.",
                "",
            ]
    return "\n".join(lines)


def _run(
    study: Study, scale: str, command: str, runs: Sequence[Run], finding: Finding, steps: Sequence[Timed]
) -> list[str]:
    """A scale that was run."""
    lines = [f"## {scale.capitalize()} scale: {_devices(runs)}", ""]
    lines += [*_protocol(study.scales[scale]), f"* {_taken(runs)}", *_missing(study.scales[scale], runs)]
    lines += [*_steps(f"{study.name}-{scale}-steps.csv", steps), ""]
    lines += [f"![{study.title}, {scale} scale]({study.name}-{scale}.svg)", ""]
    for table in (_parts(finding), *finding.tables):
        lines += [*_table(table), ""]
    lines += [*(f"* {note}" for note in finding.notes), *([""] if finding.notes else [])]
    return [*lines, f"Raw runs: [{study.name}-{scale}.csv]({study.name}-{scale}.csv); `{command}` repeats them.", ""]


def _devices(runs: Sequence[Run]) -> str:
    return " and ".join(sorted({run.device for run in runs if run.device}))


def _protocol(experiments: Sequence[Experiment]) -> list[str]:
    """What is trained, in a line for each group of experiments that differ in their one rate alone."""
    groups: dict[tuple[str, Plan], list[float]] = {}
    for one in experiments:
        rates = one.plan.rates
        same = one.plan if len(rates) > 1 else replace(one.plan, rates=(1.0,))
        groups.setdefault((one.task, same), []).extend(rates)
    return [_line(task, plan, rates) for (task, plan), rates in groups.items()]


def _line(task: str, plan: Plan, rates: Sequence[float]) -> str:
    recipe = plan.recipe
    token, sequence = ("examples", "examples") if task in EXAMPLES else ("tokens", "sequences")
    how = "" if recipe.structure_aware else "naive rates: "
    how += f"last {recipe.finish_dense:.0%} of the steps dense: " if recipe.finish_dense else ""
    grid = f"2^{math.log2(min(rates)):g} to 2^{math.log2(max(rates)):g}"
    if len(plan.rates) > 1:
        grid = (
            f"tuned at width {recipe.base_width} over {quantity(plan.tuning)} {token}, in a grid of {grid} that grows "
            "where the best is at its edge"
        )
    else:
        grid = f"{grid}, all of them"
    families, horizons = _listed([f"`{family}`" for family in plan.families]), _listed([*map(quantity, plan.horizons)])
    grown = f" at width {recipe.base_width}, growing as width^{plan.growth:g}" if plan.growth else ""
    return (
        f"* `{task}`: {how}{families}; widths {_listed(plan.widths)}, depth {plan.depth}; {horizons} {token}{grown}, "
        f"{recipe.batch} {sequence} a step; base rates {grid}; seeds {_listed(plan.seeds)}; {recipe.precision}."
    )


def _taken(runs: Sequence[Run]) -> str:
    tuning = sum(run.purpose == "tune" for run in runs)
    flops, seconds = sum(run.flops for run in runs), sum(run.seconds for run in runs)
    took = f"{seconds / 60:.0f} minutes of training" if seconds else "seconds not kept"
    commits = sorted({run.commit[:7] + "-dirty" * run.commit.endswith("-dirty") for run in runs if run.commit})
    torch = sorted({json.loads(run.versions)["torch"] for run in runs if run.versions != "{}"})
    return (
        f"{len(runs)} runs, {tuning} of them to tune; {flops:.2g} training FLOPs, {took}; "
        f"torch {', '.join(torch)}; commit {', '.join(commits)}."
    )


def _missing(experiments: Sequence[Experiment], runs: Sequence[Run]) -> list[str]:
    """What the protocol asks for and was not run, by structure and seed; nothing where all was."""
    wanted = [one for experiment in experiments for one in measured(experiment)]
    have = {place for run in runs for place in (place_of(run), place_of(replace(run, rate=TUNED)))}
    lacking = [run for run in wanted if place_of(run) not in have]
    if not lacking:
        return []
    counts = Counter((label(run), run.seed) for run in lacking)
    words = ", ".join(f"{count} of {name} with seed {seed}" for (name, seed), count in sorted(counts.items()))
    return [f"* **Not run** of these: {len(lacking)} of {len(wanted)} measurements ({words})."]


def _steps(name: str, steps: Sequence[Timed]) -> list[str]:
    """What a step took, by structure, from narrow to wide."""
    if not steps:
        return []
    widths = sorted({one.width for one in steps})
    times = {(one.family, one.width): f"{1000 * one.seconds:.3g}" for one in steps}
    families = dict.fromkeys(one.family for one in steps)
    each = [f"`{name}` {_listed([times.get((name, width), '–') for width in widths])}" for name in families]
    where = _listed(sorted({one.device for one in steps}))
    return [f"* A step, timed in turns ([{name}]({name}), {where}), at widths {_listed(widths)}: {'; '.join(each)} ms."]


def _parts(finding: Finding) -> Table:
    rows = []
    for part in finding.parts:
        numbers = [f"{part.value:.3g}", f"{part.low:.3g} to {part.high:.3g}"]
        numbers = ["not measured", "–"] if math.isnan(part.value) else numbers
        more = "" if part.outcome != "open" else "–" if math.isnan(part.value) else _times(part.runs_to_decide)
        rows.append((f"{SIGNS[part.outcome]} {part.what}", *numbers, part.asked, more))
    columns = ("", "measured", "95 % interval", "claimed", "runs to decide, if it stays")
    return Table(title="What the claim says", columns=columns, rows=tuple(rows))


def _times(factor: float) -> str:
    """How many times as many runs, to two digits; beyond a hundred it is no plan."""
    return f"{factor:.2g} ×" if factor < MANY else f"> {MANY} ×"


def _table(table: Table) -> list[str]:
    ruler = "|".join(["---", *["--:"] * (len(table.columns) - 1)])
    cells = [f"| {' | '.join(row)} |" for row in (table.columns, *table.rows)]
    return [f"**{table.title}**", "", cells[0], f"|{ruler}|", *cells[1:]]


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
