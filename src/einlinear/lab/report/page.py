"""The report: one HTML page with everything in it, and its main figure as a file."""

import base64
import contextlib
import csv
import functools
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einlinear.lab.extras import extra
from einlinear.lab.laws import AXES, Multiplier, from_runs, law_card
from einlinear.lab.report.charts import (
    COLOURS,
    VEGA_LITE,
    Specification,
    loss_chart,
    multiplier_chart,
    tuning_chart,
)
from einlinear.lab.report.maps import places, taxonomy_chart
from einlinear.lab.report.routers import dead_chart, entropy_chart, family_health, load_chart, router_rows
from einlinear.lab.report.searches import search_section
from einlinear.lab.run import Run
from einlinear.lab.search.looked import exploration
from einlinear.lab.summary import Summary, answer, sentences, summary

with extra("lab"):
    import jinja2
    import vl_convert

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DRAWS = 200  # of the law card's bootstrap; `einlinear fit` takes more
LAW = ("E", "C0", "c", "c_low", "c_high", "agreement", "reason")
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
SPACE = "\u202f"  # narrow, and no line breaks at it


def write_report(
    runs: Sequence[Run],
    path: str | os.PathLike[str],
    *,
    command: str = "",
    plan: "DataclassInstance | None" = None,
    baseline: str = "dense",
    allow_mixed_data: bool = False,
    refresh: int | None = None,
) -> None:
    """Write a study as one HTML page that needs nothing else: no network, and for its text and tables no JavaScript.

    `command` is what reproduces the study and `plan` what it set out to do (any dataclass); both are only shown.
    With `refresh` the page reads itself again every so many seconds, for a study that is still running.
    The file appears complete or not at all.

    Raises ValueError where the runs do not compare, and OSError where the page cannot be written.
    """
    found = summary(runs, baseline, allow_mixed_data=allow_mixed_data)
    charts = {
        "flops": loss_chart(found, "flops"),
        "seconds": loss_chart(found, "seconds", height=280),
        "parameters": loss_chart(found, "parameters", height=280),
        "multipliers": multiplier_chart(found),
        "tuning": tuning_chart(found),
    }
    if places(found):
        charts["taxonomy"] = taxonomy_chart(found)
    routers = family_health(found)
    if routers:
        charts |= {"loads": load_chart(found), "entropy": entropy_chart(found), "dead": dead_chart(found)}
    explored = exploration(runs)
    section = search_section(found, explored) if explored else None
    if section:
        charts |= section.charts
    card = _card(runs, baseline)
    names = [field.name for field in fields(Run) if field.name not in ("curve", "routers")]  # the store keeps them
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("einlinear.lab.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"quantity": quantity, "number": number}
    page = environment.get_template("page.html").render(
        summary=found,
        answer=sentences(found),
        axes=AXES,
        charts=charts,
        pictures={name: _svg(charts[name], width=680) for name in ("flops", "multipliers")},
        colours=COLOURS,
        vega=_vega(),
        untested=_untested(found),
        provenance=_provenance(runs),
        plan=_flat(asdict(plan)) if plan is not None else {},
        command=command,
        card=card,
        routers=routers,
        search=section,
        refresh=refresh,
        downloads={
            "runs.csv": _data("text/csv", _csv([{name: getattr(run, name) for name in names} for run in runs])),
            "summary.json": _data("application/json", _json(found)),
            "law_card.json": _data("application/json", json.dumps(card, indent=1)),
        }
        | ({"routers.csv": _data("text/csv", _csv(router_rows(runs)))} if routers else {})
        | ({"candidates.csv": _data("text/csv", _csv(section.table))} if section else {}),
    )
    _replace(Path(path), page.encode(), "report")


def save_figure(
    runs: Sequence[Run], path: str | os.PathLike[str], *, baseline: str = "dense", allow_mixed_data: bool = False
) -> None:
    """Write the main figure, loss against training FLOPs, as a static .svg or .png on white.

    Raises ValueError for another kind of file or where the runs do not compare, and OSError as `write_report`.
    """
    save_picture(loss_chart(summary(runs, baseline, allow_mixed_data=allow_mixed_data), "flops"), Path(path))


def save_picture(chart: Specification, path: Path) -> None:
    """Write a figure as a static .svg or .png on white; raises as `save_figure`."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"Saving the figure as {path}: only .svg and .png can be written; name it {path.stem}.svg.")
    svg = _svg(chart | {"background": "white"}, width=760)
    _replace(path, svg.encode() if path.suffix == ".svg" else vl_convert.svg_to_png(svg, scale=2), "figure")


def quantity(value: float) -> str:
    """A count with an SI prefix, three digits: 1.23 T; – where there is none."""
    if math.isnan(value):
        return "–"
    step = min(max(0, math.floor(math.log10(value) / 3)), len(PREFIXES) - 1) if value >= 1 else 0
    return f"{value / 1000**step:.3g}{SPACE * bool(step)}{PREFIXES[step]}"


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many digits; – where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script; bundling them takes seconds."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE))


def _card(runs: Sequence[Run], baseline: str) -> dict[str, Any]:
    """The law card of the runs, or why there is none."""
    try:
        table = from_runs(runs)
        return law_card(table, baseline=baseline if baseline in table.families else None, draws=DRAWS)
    except ValueError as error:  # NoFit, or runs that do not compare
        return {"reason": str(error), "families": {}}


def _svg(chart: Specification, width: int) -> str:
    return str(vl_convert.vegalite_to_svg(chart | {"width": width}, vl_version=VEGA_LITE, allowed_base_urls=[]))


def _replace(path: Path, content: bytes, what: str) -> None:
    """Writes beside the path and renames, so that what was there before stays until the new file is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OSError(
            f"Writing the {what} to {path}: {(error.strerror or str(error)).lower()}; make room or name another "
            "place. The runs are not touched."
        ) from error


def _untested(found: Summary) -> str:
    """The limits of what was measured, in one sentence."""
    done = [family for family in found.families if family.runs]
    if not done:
        return "Nothing has been measured yet."
    runs = [run for run in found.runs if run.purpose == "measure" and run.status == "done"]
    widths = sorted({run.width for run in runs})
    tokens = sorted({run.tokens for run in runs})
    most = max(run.flops for run in runs)
    seeds = len({run.seed for run in runs})
    devices = sorted({run.device or "an unnamed device" for run in runs})
    return (
        f"Measured: {', '.join(sorted({run.task for run in runs}))}, widths {widths[0]} to {widths[-1]}, "
        f"{quantity(tokens[0])} to {quantity(tokens[-1])} tokens, up to {quantity(most)} FLOPs, "
        f"{seeds} seed{'s' * (seeds > 1)}, on {'; '.join(devices)}. "
        "Other data, larger models, longer training and other devices were not tested."
    )


def _provenance(runs: Sequence[Run]) -> dict[str, str]:
    """What the runs were made with; several values where they differ."""
    names = {"task": "Task", "fingerprint": "Data fingerprint", "device": "Device", "commit": "Commit"}
    shown = {
        label: ", ".join(dict.fromkeys(str(getattr(run, name)) for run in runs if getattr(run, name)))
        for name, label in names.items()
    }
    for name, label in (("versions", "Versions"), ("setup", "Setup")):
        texts = dict.fromkeys(getattr(run, name) for run in runs if run.purpose == "measure")
        shown[label] = "; ".join(
            ", ".join(f"{key} {value}" for key, value in _flat(json.loads(text)).items()) for text in texts
        )
    made = sorted(run.created for run in runs if run.created)
    shown["Measured"] = f"{made[0]} to {made[-1]}" if made else ""
    return {label: text for label, text in shown.items() if text}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of texts."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = str(value)
    return flat


def _data(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of the same columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(found: Summary) -> str:
    """The numbers of the summary; NaN, which JSON lacks, as null."""
    return json.dumps(
        {
            "answer": answer(found),
            "baseline": found.baseline,
            "notes": found.notes,
            "families": [
                {
                    "family": family.family, "runs": family.runs, "failed": len(family.failed), "rates": family.rates,
                    "tuned": family.tuned, "best_loss": _null(family.best_loss),
                    "frontiers": {
                        axis: {name: _null(getattr(law, name)) for name in LAW}
                        for axis, law in family.frontiers.items()
                    },
                    "multipliers": {
                        axis: {field.name: _null(getattr(m, field.name)) for field in fields(Multiplier)}
                        | {"verdict": m.verdict}
                        for axis, m in family.multipliers.items()
                    },
                }
                for family in found.families
            ],
        },
        indent=1,
    )  # fmt: skip


def _null(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
