"""The summary as a table for the terminal."""

import math

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from einlinear.lab.laws import Axis
from einlinear.lab.summary import FamilySummary, Summary, answer

STYLES = {"better": "green", "worse": "red", "undecided": ""}


def print_summary(summary: Summary, console: Console) -> None:
    """Families × multipliers with their 95 % intervals, best loss, base rate and runs; then notes and the answer."""
    table = Table(
        title=f"Times its own cost that {escape(summary.baseline)} costs at equal loss (95 % interval)",
        title_justify="left",
        title_style="",
        box=HORIZONTALS,
        show_lines=True,
        pad_edge=False,
    )
    # Numbers are whole in 80 columns too; what is folded there is the text of a structure.
    table.add_column("family", overflow="fold")
    for name in ("training FLOPs", "seconds", "parameters"):
        table.add_column(name, justify="right", min_width=11)
    table.add_column("best loss, base rate", justify="right", min_width=10)
    table.add_column("runs", justify="right", min_width=4)
    for family in summary.families:
        done = f"{family.runs}" + (f" ({len(family.failed)} failed)" if family.failed else "")
        loss = "–" if math.isnan(family.best_loss) else f"{family.best_loss:.4f}"
        rates = ", ".join(f"{rate:.3g}" for rate in family.rates) + (" at edge" if family.rate_at_edge else "")
        table.add_row(
            Text(family.family),
            _multiplier(family, "flops", summary.baseline),
            _multiplier(family, "seconds", summary.baseline),
            _multiplier(family, "parameters", summary.baseline),
            f"{loss}\n{rates}",
            done,
        )
    console.print(table)
    for note in summary.notes:
        console.print(Text(f"· {note}"), style="dim")
    console.print(Text(answer(summary)), style="bold")


def _multiplier(family: FamilySummary, axis: Axis, baseline: str) -> Text:
    if family.family == baseline:
        return Text("1 (baseline)", style="dim")
    found = family.multipliers.get(axis)
    if found is None or found.reason:
        return Text("–", style="dim")
    return Text(f"{found} {found.verdict}", style=STYLES[found.verdict])
