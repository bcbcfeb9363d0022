"""The table and the figures of docs/guide/compress.md, from the rows that `minilm.py` wrote.

python benchmarks/minilm_figures.py
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "minilm.csv"
CURVES = ROOT / "benchmarks" / "results" / "minilm_curves.csv"
GUIDE = ROOT / "docs" / "guide" / "compress.md"
IMAGES = ROOT / "docs" / "img"
MARKS = re.compile(r"(<!-- minilm -->\n).*?(<!-- /minilm -->)", re.DOTALL)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(found: list[dict[str, str]]) -> str:
    """The rows as Markdown: plain and calibrated beside each other."""
    lines = [
        "| family | budget | share | MB on disk | cosine, plain | cosine, calibrated "
        "| Spearman, plain | Spearman, calibrated |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    known = {(row["family"], row["budget"], row["calibrated"]): row for row in found}
    for (family, budget, calibrated), row in known.items():
        plain = known.get((family, budget, "False"))
        if calibrated == "True" and plain is not None:
            continue
        aware = known.get((family, budget, "True"))
        cells = [family, budget, row["share"], row["megabytes"]]
        for measure in ("cosine", "spearman"):
            cells += [version[measure] if version else "–" for version in (plain, aware)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures() -> None:
    import altair as alt

    found = [row for row in rows(ROWS) if row["family"] != "dense"]
    values = [
        {
            "family": row["family"],
            "share": float(row["share"]),
            "spearman": float(row["spearman"]),
            "projection": "calibrated" if row["calibrated"] == "True" else "plain",
        }
        for row in found
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("share:Q", title="parameters of linear layers, share of dense"),
        y=alt.Y("spearman:Q", title="Spearman correlation with the dense model's similarities"),
        color=alt.Color("family:N", title="family"),
        strokeDash=alt.StrokeDash("projection:N", title="projection"),
    )
    chart = (base.mark_line() + base.mark_point(filled=True, size=70)).properties(width=460, height=300)
    chart.save(IMAGES / "minilm_frontier.svg")

    points = [
        {
            "layer": row["layer"].removeprefix("encoder.layer."),
            "kind": row["layer"].partition(".layer.")[2].partition(".")[2],
            "share": float(row["share"]),
            "error": float(row["error"]),
            "errors": "of outputs, calibrated" if row["calibrated"] == "True" else "of weights, plain",
        }
        for row in rows(CURVES)
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
    curves.properties(width=280, height=240).facet(column=alt.Column("errors:N", title=None)).save(
        IMAGES / "minilm_curves.svg"
    )


def main() -> None:
    text = GUIDE.read_text()
    GUIDE.write_text(MARKS.sub(lambda marks: marks[1] + table(rows(ROWS)) + marks[2], text))
    figures()


if __name__ == "__main__":
    main()
