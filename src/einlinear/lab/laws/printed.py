"""The law card for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from einlinear.lab.laws.card import Card

NAMES = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β", "a": "a = β/(α+β)", "gamma": "γ = αβ/(α+β)"}
STYLES = {"better": "green", "worse": "red", "undecided": ""}


def print_card(card: Card, console: Console) -> None:
    """What was read, each family's laws, multipliers, and what to know before relying on them."""
    console.print(Text(f"{card['source'] or 'runs'}: {card['used']} of {card['rows']} rows used"), style="bold")
    for role, column in card["columns"].items():
        console.print(Text(f"  {role:<11} {column if column.startswith('=') else f'column {column!r}'}"))
    for reason, count in card["dropped"].items():
        console.print(Text(f"  {count} rows left out: {reason}"))
    for note in card["notes"]:
        console.print(Text(f"· {note}"), style="dim")
    families = card["families"]
    for family, block in families.items():
        title = f" {family}" if len(families) > 1 else ""
        ranges = block["ranges"]
        console.print()
        console.print(
            Text(
                f"{block['runs']} runs{title and ' of'}{title}: {block['sizes']} sizes, "
                f"params {_range(ranges['parameters'])}, tokens {_range(ranges['tokens'])}, "
                f"tokens per param {_range(ranges['tokens_per_parameter'])}, FLOPs "
                f"{_range(ranges['flops'])}"
            ),
            style="bold",
        )
        _surface(block, card["loss_unit"], console)
        _allocation(block, console)
        _frontier(block, console)
        _sensitivity(block, console)
        for warning in block["warnings"]:
            console.print(Text(f"! {warning}"), style="yellow")
    if card["multiplier"]:
        console.print()
        _multipliers(card, console)
    missing = card["checklist"]["not_stated"]
    if missing:
        console.print(Text(f"Not stated, and worth stating with --about NAME=TEXT: {', '.join(missing)}."), style="dim")


def _surface(block: Card, unit: str, console: Console) -> None:
    fit, least = block["parametric"], block["variable_projection"]
    if "reason" in fit:
        console.print(Text(f"No surface. {fit['reason']}"))
        return
    resampled = fit["bootstrap"]
    rows = [
        [label, _number(fit[name]), _interval(fit["intervals"][name]), _interval(fit["intervals_by_size"][name]),
         _number(least.get(name)), _interval(least["intervals"].get(name))]
        for name, label in NAMES.items()
    ]  # fmt: skip
    _table(
        f"L(N, D) = E + A/N^α + B/D^β   ({unit}; Huber δ = {fit['objective']['delta']:g}, "
        f"{fit['starts_agreeing']:.0%} of {fit['starts']} starts agree, median |residual| "
        f"{fit['residuals']['median_absolute']:.2g})",
        ["", "Huber", f"95 % over {resampled['units']} {resampled['resampled']}",
         f"95 % over {resampled['sizes']} sizes", "least squares", "95 %"],
        rows, console,
    )  # fmt: skip


def _allocation(block: Card, console: Console) -> None:
    rows, reasons = [], {}
    if "reason" not in block["parametric"]:
        fit = block["parametric"]
        rows.append(["3, surface", _number(fit["a"]), _interval(fit["intervals"]["a"]), f"{block['runs']} runs"])
    found = {"2, IsoFLOP parabola": block["isoflop"]["parabola"], "2, IsoFLOP Akima": block["isoflop"]["akima"],
             "1, envelope": block["envelope"]}  # fmt: skip
    for name, part in found.items():
        if "reason" in part:
            reasons[part["reason"]] = name
            continue
        used = sum(budget["used"] for budget in part["budgets"])
        rows.append(
            [name, _number(part["a"]), _interval(part["interval"]), f"{used} of {len(part['budgets'])} budgets"]
        )
    if rows:
        _table("N* ∝ C^a at equal compute", ["approach", "a", "95 %", "from"], rows, console)
    for reason, name in reasons.items():
        console.print(Text(f"· {name.split(',')[0]}: {reason}"), style="dim")


def _frontier(block: Card, console: Console) -> None:
    law = block["frontier"]
    if "reason" in law:
        console.print(Text(f"· Frontier: {law['reason']}"), style="dim")
        return
    said = f"Frontier L(C) = {_number(law['E'])} + (C/{_number(law['C0'])})^-{_number(law['c'])}, exponent "
    said += f"{_interval(law['intervals']['c'])}, {len(law['points'])} points"
    if law["intervals"]["E"][0] is not None:
        said += f"; floor E {_interval(law['intervals']['E'])} by profile"
    if law.get("held_out_error"):
        error = law["held_out_error"]
        said += (
            f"; the largest budgets, held out, are predicted {error['with_E']:+.2%} off with E and "
            f"{error['without_E']:+.2%} without"
        )
    console.print(Text(said + "."))
    out = block["held_out"]
    if "reason" not in out:
        console.print(
            Text(
                f"Surface, held out: the {out['runs']} most expensive runs ({out['reach']:.3g} times the compute of "
                f"the rest) are predicted {out['bias']:+.2%} off on average, {out['rms']:.2%} rms."
            )
        )


def _sensitivity(block: Card, console: Console) -> None:
    if "reason" in block["parametric"]:
        return
    rows = []
    for name, key, label in (
        ("outliers", "dropped", "{} highest losses dropped"), ("delta", "delta", "δ = {}"),
        ("window", "times_optimum", "within {} × N*"),
    ):  # fmt: skip
        for part in block["sensitivity"][name]:
            choice = "∞" if part[key] is None else f"{part[key]:g}"
            if "reason" in part:
                rows.append([label.format(choice), str(part["runs"]), "–", "–", "–", "–", "–"])
            else:
                values = [_number(part[n]) for n in ("E", "alpha", "beta", "a")]
                rows.append([label.format(choice), str(part["runs"]), *values, f"{part['median_residual']:.2g}"])
    _table("How far choices move it", ["choice", "runs", "E", "α", "β", "a", "median |residual|"], rows, console)


def _multipliers(card: Card, console: Console) -> None:
    baseline = card["baseline"]
    rows = []
    for family, found in card["multiplier"].items():
        seconds, surface = found.get("seconds"), found["surface"]
        rows.append(
            [
                family, _multiplier(found), _number(found.get("interpolated")),
                "–" if seconds is None else _multiplier(seconds),
                *(
                    ["–"] * 3 if "reason" in surface
                                        else [
                        f"{_number(surface[n])} ({_interval(surface[f'{n}_interval'])})"
                        for n in ("multiplier", "parameters", "tokens")
                    ]
),
            ]
        )  # fmt: skip
    _table(
        f"Times its own compute that {baseline} needs at equal loss (95 %)",
        ["family", "by FLOPs", "no law", "by seconds", "one surface", "params count as", "tokens count as"],
        rows, console,
    )  # fmt: skip
    for family, found in card["multiplier"].items():
        if found.get("reason"):
            console.print(Text(f"· {family}: {found['reason']}."))
        elif found["at_the_ends"]:
            high, low = found["at_the_ends"]
            console.print(
                Text(
                    f"! {family}: its curve is not parallel to {baseline}'s (p = {found['same_exponent_p']:.1g}); the "
                    f"multiplier goes from {high:.3g} to {low:.3g} as the loss falls. No one number is true."
                ),
                style="yellow",
            )
        if (found.get("extrapolation") or 1.0) > 1.5:
            console.print(
                Text(
                    f"! {family}: its best loss would take {baseline} {found['extrapolation']:.2g} times the compute "
                    "that was measured: extrapolated."
                ),
                style="yellow",
            )


def _multiplier(found: Card) -> str:
    if found["value"] is None:
        return "–"
    return f"{found['value']:.3g}× ({_interval(found['interval'])}) {found['verdict']}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(title=escape(title), title_justify="left", title_style="")
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(ends: Sequence[float | None] | None) -> str:
    return "–" if ends is None or None in ends else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3g} to {ends[1]:.3g}"
