"""The tables and the figures of docs/guide/compress.md, from the rows that `minilm.py` wrote.

python benchmarks/minilm_figures.py
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = ROOT / "docs" / "guide" / "compress.md"
IMAGES = ROOT / "docs" / "img"

PANELS = ("plain", "calibrated", "calibrated, then trained")

Row = dict[str, str]


def rows(name: str) -> list[Row]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_family(found: Sequence[Row]) -> list[Row]:
    """Large budgets first, and within one as the rows come."""
    return sorted(found, key=lambda row: -float(row["budget"]))


def markdown(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = "|".join(["---", *["--:"] * (len(names) - 1)])
    return "\n".join([f"| {' | '.join(names)} |", f"|{ruler}|", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def families() -> str:
    """Every layer alike, not trained on: plain and calibrated beside each other."""
    lines = []
    found = [row for row in rows("minilm") if row["allocation"] in ("none", "uniform") and row["recovery_steps"] == "0"]
    known = {(row["family"], row["budget"], row["calibrated"]): row for row in found}
    for budget, family in dict.fromkeys((row["budget"], row["family"]) for row in by_family(found)):
        versions = [known.get((family, budget, calibrated)) for calibrated in ("False", "True")]
        row = versions[1] or versions[0] or {}
        cells = [family, budget, row["share"], row["megabytes"]]
        for measure in ("cosine", "spearman"):
            cells += [version[measure] if version else "–" for version in versions]
        lines.append(cells)
    names = ["family", "budget", "share", "MB on disk"]
    names += [f"{measure}, {how}" for measure in ("cosine", "Spearman") for how in ("plain", "calibrated")]
    return markdown(names, lines)


def trained() -> str:
    """Calibrated rows with the budget alike to all, allocated, and trained on."""
    found = [row for row in rows("minilm") if row["calibrated"] == "True"]
    asked = {(row["family"], row["budget"]) for row in found if row["allocation"] in ("allocated", "relative")}
    asked |= {(row["family"], row["budget"]) for row in found if row["recovery_steps"] != "0"}
    found = [row for row in found if (row["family"], row["budget"]) in asked]
    found.sort(key=lambda row: (-float(row["budget"]), row["family"], float(row["spearman"])))
    columns = ("family", "budget", "allocation", "recovery_steps", "minutes", "share", "cosine", "spearman")
    lines = [[(row | {"minutes": recovery_minutes(row)})[column] for column in columns] for row in found]
    names = ["family", "budget", "allocation", "steps of recovery", "CPU minutes", "share", "cosine", "Spearman"]
    return markdown(names, lines)


def recovery_minutes(row: Row) -> str:
    return f"{float(row['recovery_seconds']) / 60:.1f}" if row["recovery_steps"] != "0" else "–"


def times() -> str:
    """Times of the dense model relative to a compressed one's."""
    names = ["family", "budget"]
    measures = []
    for size in (1, 64):
        names += [f"ms per sentence, batch {size}", f"dense / this, batch {size}"]
        measures += [f"ms_per_sentence_batch_{size}", f"speedup_batch_{size}"]
    lines = [[row["family"], row["budget"], *(row[name] for name in measures)] for row in rows("minilm_times")]
    return markdown(names, lines)


TABLES = {"families": families, "trained": trained, "times": times}


def written(text: str) -> str:
    """The guide with its tables made anew."""
    for name, table in TABLES.items():
        marks = re.compile(rf"(<!-- minilm {name} -->\n).*?(<!-- /minilm -->)", re.DOTALL)
        text = marks.sub(lambda found, table=table: found[1] + table() + found[2], text)
    return text


def figures() -> None:
    import altair as alt

    values = [
        {
            "family": row["family"],
            "share": float(row["share"]),
            "spearman": float(row["spearman"]),
            "how": PANELS[(row["calibrated"] == "True") + (row["recovery_steps"] != "0")],
        }
        for row in rows("minilm")
        if row["allocation"] == "uniform"
    ]
    base = alt.Chart().encode(
        x=alt.X("share:Q", title="parameters, share of dense", scale=alt.Scale(domain=[0, 0.8])),
        y=alt.Y("spearman:Q", title="Spearman with dense", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("family:N", title="family"),
    )
    layers = alt.layer(
        base.mark_line(strokeWidth=1), base.mark_point(size=50, filled=True), data=alt.Data(values=values)
    )
    panels = layers.properties(width=230, height=260).facet(column=alt.Column("how:N", title=None, sort=PANELS))
    panels.save(IMAGES / "minilm_frontier.svg")

    points = [
        {
            "layer": row["layer"].removeprefix("encoder.layer."),
            "kind": row["layer"].partition(".layer.")[2].partition(".")[2],
            "share": float(row["share"]),
            "error": float(row["error"]),
            "errors": f"{row['family']}, " + ("outputs" if row["calibrated"] == "True" else "weights"),
        }
        for row in rows("minilm_curves")
    ]
    curves = (
        alt.Chart(alt.Data(values=points))
        .mark_line(strokeWidth=1)
        .encode(
            x=alt.X("share:Q", title="parameters, share of dense"),
            y=alt.Y("error:Q", title="relative error"),
            color=alt.Color("kind:N", title="layer"),
            detail="layer:N",
        )
    )
    curves.properties(width=240, height=220).facet(column=alt.Column("errors:N", title=None)).save(
        IMAGES / "minilm_curves.svg"
    )


def main() -> None:
    GUIDE.write_text(written(GUIDE.read_text()))
    figures()


if __name__ == "__main__":
    main()
