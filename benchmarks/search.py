"""Guided against random search at equal budget, replayed on recorded runs: rows of benchmarks/results/search.csv.

    python benchmarks/search.py [--records teacher bytes] [--repeats 200]     # some CPU-minutes

`benchmarks/search_runs.py` trained every candidate of a space to every rung with several seeds. A replay looks up what
a search asks for and pays what that training had cost. Searches see one seed; what they name best is judged by the
others, which none has seen: by its ln multiplier at the last rung, less that of the best of all candidates there.
Searches of one repeat begin with the same seed, so that their difference is paired.

`--half` keeps every other candidate, by cost: the strategy was chosen on the even half of the teacher's
(docs/search.md).
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
WIDTH = 64
BUDGETS = (0.5, 1, 2, 4, 8)  # trainings of dense to the last rung
SEARCHES = ("guided", "halving", "random")
HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass(frozen=True)
class Recorded:
    """What was recorded of candidates with every seed."""

    families: list[str]
    features: np.ndarray  # [candidates, f]
    values: np.ndarray  # [candidates, rungs, seeds] ln multiplier
    variances: np.ndarray
    costs: np.ndarray  # [candidates, rungs] FLOPs of a training from nothing
    shares: list[float]  # of it that is paid where the rung before is kept
    unit: float  # FLOPs of dense at the width of the candidates, to the last rung

    def search(self, name: str, budget: float, seed: int, sees: int) -> Found:
        """A replay that sees one of the seeds; `budget` in trainings of dense."""
        paid = self.costs if name == "random" else self.costs * np.array(self.shares)

        def measure(asked: Sequence[tuple[int, int]]) -> list[Outcome]:
            return [Outcome(self.values[n, r, sees], self.variances[n, r, sees], paid[n, r]) for n, r in asked]

        count, rungs = self.costs.shape
        if name == "random":
            return random_search(count, rungs, measure, budget * self.unit, seed=seed)
        table = self.features if name == "guided" else np.zeros((count, 1))  # nothing to tell candidates apart by
        return guided_search(table, paid, measure, budget * self.unit, seed=seed)

    def regret(self, found: Found, sees: int) -> float:
        """How much worse, in ln multiplier of the seeds not seen, the chosen one is than the best there."""
        fresh = np.delete(self.values[:, -1], sees, axis=1).mean(axis=1)
        return float(fresh.max() - fresh[found.ranking[0]])


def recorded(path: Path, half: str = "all", last: int = 9) -> Recorded:
    """The runs of a record whose candidates were trained to every rung with every seed; of them the last rungs."""
    frame = pd.read_csv(path)
    rungs = sorted(frame["tokens"].unique())
    plain, others = frame[frame["family"] == "dense"], frame[frame["family"] != "dense"]
    reference = Reference(list(_rows(plain)))
    trained = others.groupby("family")["seed"].agg(list)
    seeds = sorted({seed for own in trained for seed in own})
    whole = {family for family, own in trained.items() if len(own) == len(seeds) * len(rungs)}
    pool = [candidate for candidate in el.candidates(WIDTH)[HALVES[half]] if candidate.family in whole]
    shape = (len(pool), len(rungs), len(seeds))
    values, variances, costs = np.empty(shape), np.empty(shape), np.empty(shape[:2])
    place = {candidate.family: number for number, candidate in enumerate(pool)}
    mine = others[others["family"].isin(place)]
    for row, seed in zip(_rows(mine), mine["seed"], strict=True):
        number, rung = place[row.family], rungs.index(row.tokens)
        worth = reference.worth(row)
        values[number, rung, seeds.index(seed)] = worth.value
        variances[number, rung, seeds.index(seed)] = worth.variance
        costs[number, rung] = row.flops
    # A horizon of h steps begins to cool down at 0.8 h, and the next one goes on from there.
    values, variances, costs, rungs = values[:, -last:], variances[:, -last:], costs[:, -last:], rungs[-last:]
    shares = [1.0] + [1 - 0.8 * before / after for before, after in pairwise(rungs)]
    unit = plain[(plain["width"] == WIDTH) & (plain["tokens"] == rungs[-1])]["flops"].iloc[0]
    return Recorded([*place], features(pool), values, variances, costs, shares, float(unit))


def _rows(frame: pd.DataFrame) -> Iterator[Row]:
    for run in frame.itertuples():
        loss = float(run.loss) if run.status == "done" else None
        yield Row(
            family=run.family, parameters=run.parameters, tokens=run.tokens, flops=run.flops, loss=loss,
            seconds=run.seconds, trunk=f"{run.family} {run.width} {run.seed}", width=run.width,
        )  # fmt: skip


def replay(runs: Recorded, budget: float, repeats: int, searches: Sequence[str]) -> dict[str, np.ndarray]:
    """Regrets `[repeats]` of each search; the seed that is seen goes round."""
    seeds = runs.values.shape[2]
    return {
        name: np.array([
            runs.regret(runs.search(name, budget, repeat, repeat % seeds), repeat % seeds) for repeat in range(repeats)
        ])
        for name in searches
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", nargs="+", default=["teacher", "bytes"])
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=["guided", "random"])
    parser.add_argument("--half", choices=sorted(HALVES), default="all")
    parser.add_argument("--last", type=int, default=9, help="rungs to search along, from the end")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    parser.add_argument("--out", type=Path, default=RESULTS / "search.csv")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([
            "record", "half", "rungs", "search", "budget", "repeats", "candidates", "seeds", "regret",
            "regret_less_random", "low", "high", "commit",
        ])  # fmt: skip
        for record in options.records:
            runs = recorded(options.folder / f"search_runs_{record}.csv", options.half, options.last)
            for budget in options.budgets:
                regrets = replay(runs, budget, options.repeats, options.searches)
                for name, regret in regrets.items():
                    less = regret - regrets["random"]
                    half = 1.96 * less.std(ddof=1) / np.sqrt(len(less))
                    row = [
                        record, options.half, runs.costs.shape[1], name, f"{budget:g}", options.repeats,
                        len(runs.families), runs.values.shape[2], f"{regret.mean():.4f}", f"{less.mean():.4f}",
                        f"{less.mean() - half:.4f}", f"{less.mean() + half:.4f}", commit,
                    ]  # fmt: skip
                    writer.writerow(row)
                    file.flush()
                    print(*row, flush=True)


if __name__ == "__main__":
    main()
