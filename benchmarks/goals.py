"""The goals of the clock beside what was measured, as the tables of docs/kernels.md.

    python benchmarks/goals.py

Reads the committed results (`results/nvidia_h200/*.csv`), and writes the tables between their marks in the page; a
test holds the page to it.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import einlinear as el

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "nvidia_h200", HERE.parent / "docs" / "kernels.md"
MARKS = "<!-- goals: benchmarks/goals.py writes these tables -->\n", "<!-- end of goals -->\n"
BUSY = {
    "dram_percent": "memory",
    "between_cache_halves_percent": "the link between the cache's halves",
    "matrix_unit_percent": "matrix units",
}
"""What limits kernels that read and write once, by the profiler (`counters.py`)."""

MANY, SLOWER = 10**5, 0.95
"""A layer with so many weights should be this many times as fast as dense at least."""


@dataclass(frozen=True)
class Goal:
    """How many times as fast as dense some work should be, by mode; the rows of it, and what the profiler calls it."""

    work: str
    table: str
    row: Mapping[str, str]
    goals: Mapping[str, float]
    case: str = ""
    modes: Mapping[str, str] = field(default_factory=lambda: {"forward": "forward", "training": "training"})


def layer(work: str, width: int, family: str, forward: float, training: float) -> Goal:
    row = {"d_in": str(width), "d_out": str(width), "family": family, "tokens": "16384"}
    return Goal(work, "layers", row, {"forward": forward, "training": training}, f"layer {family} {width}")


def mlp(work: str, width: int, hidden: int, family: str, activation: str, forward: float, training: float) -> Goal:
    row = {"d_model": str(width), "hidden": str(hidden), "family": family, "activation": activation}
    return Goal(work, "mlps", row, {"forward": forward, "training": training})


def decode(tokens: int, forward: float) -> Goal:
    row = {"d_in": "4096", "tokens": str(tokens), "family": "btt"}
    return Goal(f"decode, d 4096, {tokens} token{'s' * (tokens > 1)}", "decode", row, {"forward": forward})


def step(work: str, width: int, family: str, training: float) -> Goal:
    row = {"width": str(width), "family": family, "mode": "compiled+graph"}
    return Goal(work, "gpt_steps", row, {"training": training}, modes={"training": "compiled+graph"})


GOALS = (
    layer("layer d 8192, BTT of rank 1", 8192, "btt", 13, 12),
    layer("layer d 4096, BTT of rank 1", 4096, "btt", 7, 6),
    layer("layer d 4096, Monarch of 16 blocks", 4096, "monarch(blocks=16)", 5.8, 5.5),
    layer("layer d 2048, BTT of rank 1", 2048, "btt", 3, 2.7),
    layer("layer d 1024, BTT of rank 1", 1024, "btt", 1.7, 1.5),
    mlp("layers 4096 → 11008 → 4096, BTT at 1/43 of the FLOPs", 4096, 11008, "btt", "relu2", 5, 4.5),
    mlp("MLP 1024 → 4096 → 1024, 32 blocks", 1024, 4096, "btt(blocks=(32, 32))", "relu2", 7, 5),
    mlp("MLP 2048 → 8192 → 2048, 32 blocks, rank 2", 2048, 8192, "btt(rank=2, blocks=(32, 32))", "relu2", 12, 9),
    mlp("MLP 4096 → 16384 → 4096, 64 blocks", 4096, 16384, "btt(blocks=(64, 64))", "relu2", 24, 16),
    mlp("SwiGLU MLP 4096 → 11008 → 4096, BTT at 1/45 of the FLOPs", 4096, 11008, "btt", "swiglu", 6, 5),
    decode(1, 4),
    decode(8, 3.5),
    decode(32, 3),
    step("GPT d 2048 × 6, BTT, step", 2048, "btt", 3),
    step("GPT d 1024 × 6, BTT, step", 1024, "btt", 1.6),
    step("GPT d 512 × 4, Monarch of 16 blocks, step", 512, "monarch(blocks=16)", 1.15),
)


@cache
def rows(table: str) -> list[dict[str, str]]:
    with (RESULTS / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def found(goal: Goal, mode: str) -> dict[str, str]:
    wanted = {**goal.row, "mode": goal.modes[mode]}
    (row,) = [row for row in rows(goal.table) if all(row[name] == value for name, value in wanted.items())]
    return row


def busy(case: str) -> str:
    """How busy kernels kept each resource, in the mean over their time; empty where the profiler has not seen them."""
    kernels = [row for row in rows("counters") if row["case"] == case]
    if not kernels:
        return ""
    total = sum(float(row["us"]) for row in kernels)
    shares = {name: sum(float(row["us"]) * float(row[name]) for row in kernels) / total for name in BUSY}
    return " keeps " + ", ".join(f"{told} {shares[name]:.0f} %" for name, told in BUSY.items()) + " busy"


def table() -> str:
    """Markdown; a number that reaches its goal is bold."""
    lines = ["| work | forward: goal, found | training: goal, found | |", "| --- | --- | --- | --- |"]
    for goal in GOALS:
        cells, missed = [], list[str]()
        for mode in ("forward", "training"):
            if mode not in goal.goals:
                cells.append("–")
                continue
            wanted, row = goal.goals[mode], found(goal, mode)
            speed = float(row["ratio_to_dense"])
            if speed < wanted:
                missed.append(mode + busy(goal.case + " training" * (mode == "training")))
            cells.append(f"{wanted:g} ×, " + (f"**{speed:.3g} ×**" if speed >= wanted else f"{speed:.3g} ×"))
        verdict = "missed: " + "; ".join(missed) if missed else "met"
        lines.append(f"| {goal.work} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines) + "\n"


def slower() -> str:
    """Where layers of `MANY` weights or more are slower than they should be; whole layers, as the planner runs them."""
    cases = {
        (row["family"], int(row["d_in"]), int(row["d_out"]), int(row["tokens"]), row["mode"]): float(
            row["ratio_to_dense"]
        )
        for name in ("layers", "decode", "few")
        if (RESULTS / f"{name}.csv").exists()
        for row in rows(name)
        if row["family"] != "dense"
    }
    large = {
        case: ratio for case, ratio in cases.items() if el.parameters(el.structure(case[0])(case[1], case[2])) >= MANY
    }
    below: dict[tuple[str, int, str], dict[int, float]] = {}
    for (family, width, _, tokens, mode), ratio in sorted(large.items()):
        if ratio < SLOWER:
            below.setdefault((family, width, mode), {})[tokens] = ratio
    lines = [
        f"Of {len(large)} cases of layers with 10⁵ weights or more, {sum(map(len, below.values()))} are slower "
        "than dense by more than 5 %:",
        "",
        "| layer | width | mode | tokens: times as fast as dense |",
        "| --- | --- | --- | --- |",
    ]
    for (family, width, mode), ratios in below.items():
        told = ", ".join(f"{tokens}: {ratio:.2f}" for tokens, ratio in ratios.items())
        lines.append(f"| `{family}` | {width} | {mode} | {told} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the tables in their place."""
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + "\n" + table() + "\n" + slower() + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page())
