"""Guided against random search at equal budget, replayed on recorded runs: rows of benchmarks/results/search.csv.

    python benchmarks/search.py [--repeats 100]     # some 5 CPU-minutes

`benchmarks/search_runs.py` trained every candidate of a space to every horizon with two seeds. A replay looks up what
a search asks for and pays what that training had cost. Searches see one seed; what they name best is judged by the
other, which none has seen: by its ln multiplier at the last horizon, less that of the best of all candidates.
Searches of one repeat begin with the same seed, so that their difference is paired.
"""

import argparse
import csv
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

import einlinear as el
from einlinear.lab.laws.rows import Row
from einlinear.lab.search.strategy import Found, Outcome, guided_search, random_search
from einlinear.lab.search.surrogate import features
from einlinear.lab.search.worth import Reference

RESULTS = Path(__file__).parent / "results"
BUDGETS = (2, 4, 8)  # trainings of dense to the last horizon
SEARCHES = ("guided", "halving", "random")


@dataclass(frozen=True)
class Recorded:
    """What was recorded of candidates with both seeds."""

    families: list[str]
    features: np.ndarray  # [candidates, f]
    values: np.ndarray  # [candidates, rungs, seeds] ln multiplier
    variances: np.ndarray
    costs: np.ndarray  # [candidates, rungs] FLOPs of a training from nothing
    shares: list[float]  # of it that is paid where the rung before is kept
    unit: float  # FLOPs of dense at the width of the candidates, to the last horizon

    def search(self, name: str, budget: float, seed: int, sees: int) -> Found:
        """A replay that sees one of the two seeds; `budget` in trainings of dense."""

        def measure(asked: Sequence[tuple[int, int]]) -> list[Outcome]:
            return [
                Outcome(self.values[n, r, sees], self.variances[n, r, sees], self.costs[n, r] * paid)
                for n, r in asked
                for paid in [1.0 if name == "random" else self.shares[r]]
            ]

        count, rungs = self.costs.shape
        if name == "random":
            return random_search(count, rungs, measure, budget * self.unit, seed=seed)
        table = self.features if name == "guided" else np.zeros((count, 1))  # nothing to tell candidates apart by
        return guided_search(table, rungs, measure, budget * self.unit, seed=seed)

    def regret(self, found: Found, sees: int) -> float:
        """How much worse, in ln multiplier of the seed not seen, the chosen one is than the best there."""
        fresh = self.values[:, -1, 1 - sees]
        return float(fresh.max() - fresh[found.ranking[0]])


def recorded() -> Recorded:
    """The runs of `search_runs.csv`."""
    frame = pd.read_csv(RESULTS / "search_runs.csv")
    frame = frame[frame["seed"] < 2]
    rungs = sorted(frame["tokens"].unique())
    plain, others = frame[frame["family"] == "dense"], frame[frame["family"] != "dense"]
    reference = Reference(list(_rows(plain)))
    counts = others.groupby("family").size()
    whole = set(counts[counts == 2 * len(rungs)].index)
    pool = [candidate for candidate in el.candidates(64) if candidate.family in whole]
    shape = (len(pool), len(rungs), 2)
    values, variances, costs = np.empty(shape), np.empty(shape), np.empty(shape[:2])
    place = {candidate.family: number for number, candidate in enumerate(pool)}
    mine = others[others["family"].isin(place)]
    for row, seed in zip(_rows(mine), mine["seed"], strict=True):
        number, rung = place[row.family], rungs.index(row.tokens)
        worth = reference.worth(row)
        values[number, rung, seed], variances[number, rung, seed] = worth.value, worth.variance
        costs[number, rung] = row.flops
    # A horizon of h steps begins to cool down at 0.8 h, and the next one goes on from there.
    shares = [1.0] + [1 - 0.8 * before / after for before, after in pairwise(rungs)]
    unit = plain[(plain["width"] == 64) & (plain["tokens"] == rungs[-1])]["flops"].iloc[0]
    return Recorded([*place], features(pool), values, variances, costs, shares, float(unit))


def _rows(frame: pd.DataFrame) -> Iterator[Row]:
    for run in frame.itertuples():
        loss = float(run.loss) if run.status == "done" else None
        yield Row(
            family=run.family, parameters=run.parameters, tokens=run.tokens, flops=run.flops, loss=loss,
            seconds=run.seconds, trunk=run.trunk, width=run.width,
        )  # fmt: skip


def replay(runs: Recorded, budget: float, repeats: int, searches: Sequence[str] = SEARCHES) -> dict[str, np.ndarray]:
    """Regrets `[repeats]` of each search; every other repeat sees the other seed."""
    return {
        name: np.array([
            runs.regret(runs.search(name, budget, seed, sees=seed % 2), sees=seed % 2) for seed in range(repeats)
        ])
        for name in searches
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    runs = recorded()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with (RESULTS / "search.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([
            "search", "budget", "repeats", "candidates", "regret", "regret_less_random", "low", "high", "commit",
        ])  # fmt: skip
        for budget in BUDGETS:
            regrets = replay(runs, budget, options.repeats)
            for name, regret in regrets.items():
                less = regret - regrets["random"]
                half = 1.96 * less.std(ddof=1) / np.sqrt(len(less))
                row = [
                    name, budget, options.repeats, len(runs.families), f"{regret.mean():.4f}", f"{less.mean():.4f}",
                    f"{less.mean() - half:.4f}", f"{less.mean() + half:.4f}", commit,
                ]  # fmt: skip
                writer.writerow(row)
                file.flush()
                print(*row, flush=True)


if __name__ == "__main__":
    main()
