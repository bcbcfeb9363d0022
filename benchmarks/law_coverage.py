"""How often 95 % intervals of laws hold the truth, on synthetic surfaces: rows of benchmarks/results/law_coverage.csv.

    python benchmarks/law_coverage.py --workers 2          # 1000 draws of each case, some 15 CPU-minutes
    python benchmarks/law_coverage.py --draws 60 --case surface

Each draw adds fresh noise to a known law, fits it as `einlinear fit` does, and asks whether the interval holds the
truth. With 1000 draws the share is known to about ±1.4 points, with 300 to ±2.5. `--seed` takes other draws: an
interval that was mended by looking at some is judged on others.
"""

import argparse
import csv
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import einlinear
from einlinear.lab.laws import (
    NoFit,
    Surface,
    bootstrap,
    compare_cells,
    fit_frontier,
    fit_surface,
    from_frame,
    hull,
    interpolated_multiplier,
    isoflop,
    scaled_surface,
    variable_projection,
)
from einlinear.lab.laws.cells import cells_of
from einlinear.lab.laws.parametric import NAMES
from einlinear.lab.laws.rows import optima, rows_of
from einlinear.lab.run import Run

TRUTH = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.37)
RHO = 1.5
PART = 25  # draws that a process does at a time
RESULTS = Path(__file__).parent / "results" / "law_coverage.csv"

Hits = dict[str, bool]


def rectangle(sizes: int, lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Every size at every length."""
    N, D = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(2e8, 2e10, lengths))
    return N.ravel(), D.ravel()


def equal_compute(budgets: int, sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes within 4 times of N* at each budget."""
    cost = np.repeat(np.geomspace(1e17, 1e19, budgets), sizes)
    N = TRUTH.optimum(cost)[0] * np.tile(np.geomspace(1 / 4, 4, sizes), budgets)
    return N, cost / 6 / N


def within(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def surface_case(points: tuple[np.ndarray, np.ndarray], noise: float, delta: float) -> Callable[[int], Hits]:
    truth = {name: getattr(TRUTH, name) for name in NAMES}

    def draw(seed: int) -> Hits:
        N, D = points
        loss = TRUTH.loss(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))
        draws = bootstrap(fit_surface(N, D, loss, delta=delta, starts=40), 300, seed=10_000 + seed)
        return {name: within(draws.interval(name), truth[name]) for name in NAMES}

    return draw


def least_squares_case(points: tuple[np.ndarray, np.ndarray], noise: float) -> Callable[[int], Hits]:
    def draw(seed: int) -> Hits:
        N, D = points
        loss = TRUTH.loss(N, D) + noise * np.random.default_rng(seed).normal(size=len(N))
        found = variable_projection(N, D, loss)
        return {name: within(found.intervals[name], getattr(TRUTH, name)) for name in NAMES}

    return draw


def allocation_case(points: tuple[np.ndarray, np.ndarray], noise: float) -> Callable[[int], Hits]:
    def draw(seed: int) -> Hits:
        N, D = points
        loss = TRUTH.loss(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))
        hits = {}
        for method in ("parabola", "akima"):
            found = isoflop(N, 6 * N * D, loss, method)
            hits[f"a, {method}"] = within((found.a_low, found.a_high), TRUTH.a)
        return hits

    return draw


def multiplier_case(points: tuple[np.ndarray, np.ndarray], noise: float) -> Callable[[int], Hits]:
    import pandas as pd

    def draw(seed: int) -> Hits:
        generator = np.random.default_rng(seed)
        N, D = points
        frames = []
        for family, ratio in (("dense", 1.0), ("other", RHO)):
            loss = TRUTH.loss(N * ratio**0.5, D * ratio**0.5) * np.exp(noise * generator.normal(size=len(N)))
            frames.append(pd.DataFrame({"family": family, "params": N, "tokens": D, "loss": loss}))
        table = from_frame(pd.concat(frames))
        parts = {name: table.of(name) for name in table.families}
        chosen = {name: optima(name, isoflop(p.parameters, p.flops, p.loss, "parabola")) for name, p in parts.items()}
        found = compare_cells(
            cells_of(rows_of(parts["other"]))["other"], cells_of(rows_of(parts["dense"]))["dense"],
            names=("other", "dense"), chosen=(chosen["other"], chosen["dense"]),
        )  # fmt: skip
        return {
            "multiplier, shared law": within((found.low, found.high), RHO),
            "multiplier, one surface": within(scaled_surface(parts["other"], parts["dense"]).multiplier_interval, RHO),
        }

    return draw


def grid_case(points: tuple[np.ndarray, np.ndarray], noise: float) -> Callable[[int], Hits]:
    """Two families on a full grid, most of whose sizes are far from the best for their compute."""
    import pandas as pd

    def draw(seed: int) -> Hits:
        generator = np.random.default_rng(seed)
        N, D = points
        frames = []
        for family, ratio in (("dense", 1.0), ("other", RHO)):
            loss = TRUTH.loss(N * ratio**0.5, D * ratio**0.5) * np.exp(noise * generator.normal(size=len(N)))
            frames.append(pd.DataFrame({"family": family, "params": N, "tokens": D, "loss": loss}))
        cells = cells_of(rows_of(from_frame(pd.concat(frames))))
        found = compare_cells(cells["other"], cells["dense"], names=("other", "dense"))
        law = fit_frontier(cells["dense"])
        return {
            "multiplier, shared law": within((found.low, found.high), RHO),
            "c of the frontier": within((law.c_low, law.c_high), TRUTH.gamma),
        }

    return draw


def trunk_case(noise: float, shared: float, widths: int = 4, horizons: int = 2) -> Callable[[int], Hits]:
    """Two families on their frontiers; `shared` is the share of the noise's variance that a trunk's horizons share."""
    import pandas as pd

    def draw(seed: int) -> Hits:
        generator = np.random.default_rng(seed)
        rows = []
        for family, ratio in (("dense", 1.0), ("other", RHO)):
            for width in range(widths):
                common = generator.normal() * shared**0.5
                for horizon in range(horizons):
                    cost = 1e12 * 2.25 ** (2 * width) * 2**horizon
                    own = generator.normal() * (1 - shared) ** 0.5
                    loss = (1.0 + (cost * ratio / 1e12) ** -0.1) * np.exp(noise * (common + own))
                    rows.append({
                        "family": family, "params": 1e6 * 2.25**width, "tokens": 1e6 * 2**horizon, "flops": cost,
                        "loss": loss, "trunk": str(width) if shared else f"{width}/{horizon}",
                    })  # fmt: skip
        table = from_frame(pd.DataFrame(rows))
        cells = cells_of(rows_of(table))
        found = compare_cells(cells["other"], cells["dense"], names=("other", "dense"))
        return {"multiplier, shared law": within((found.low, found.high), RHO)}

    return draw


def hulls_case(noise: float, seeds: int, widths: int = 4, horizons: int = 4) -> Callable[[int], Hits]:
    """Two families whose curves are not parallel, off their hulls; the truth is what the hulls say without noise.

    Four fifths of a run's noise are its trunk's, and it is twice as large at half of the longest horizon and before.
    """

    def runs(seed: int, noise: float) -> list[Run]:
        generator = np.random.default_rng(seed)
        found = []
        for family, late in (("dense", 0.0), ("other", 0.2)):
            for width in range(widths):
                for replica in range(seeds):
                    common = generator.normal()
                    for horizon in range(horizons):
                        N, D = 1e5 * 4**width, 4e6 * 2 ** (horizon + 0.75 * width)
                        own = noise * (1 if horizon == horizons - 1 else 2)
                        error = own * (0.8**0.5 * common + 0.2**0.5 * generator.normal())
                        loss = TRUTH.loss(100 * N * (D / 4e6) ** late, 100 * D)
                        found.append(
                            Run(
                                task="t", fingerprint="f", family=family, width=2**width, depth=1, tokens=int(D),
                                rate=1.0, seed=replica, parameters=int(N), flops=int(6 * N * D),
                                loss=float(loss * np.exp(error)), trunk=f"{family}/{width}/{replica}",
                            )
                        )  # fmt: skip
        return found

    exact = hull(runs(0, 0.0))
    low = max(cells[-1].loss for cells in exact.values())
    high = min(cells[0].loss for cells in exact.values())
    losses = [high * (low / high) ** share for share in (0.3, 0.5, 0.7)]
    truth = [one.value for one in interpolated_multiplier(runs(0, 0.0), losses, "other")]

    def draw(seed: int) -> Hits:
        found = interpolated_multiplier(runs(seed, noise), losses, "other")
        return {
            f"multiplier, no law, at {share}": within((one.low, one.high), value)
            for share, one, value in zip((0.3, 0.5, 0.7), found, truth, strict=True)
        }

    return draw


CASES: dict[str, Callable[[int], Hits]] = {
    "surface, 5 × 4 grid, noise .005": surface_case(rectangle(5, 4), 0.005, 1e-3),
    "surface, 6 × 6 grid, noise .005": surface_case(rectangle(6, 6), 0.005, 1e-3),
    "surface, 8 × 8 grid, noise .005": surface_case(rectangle(8, 8), 0.005, 1e-3),
    "surface, 15 × 16 grid, noise .005": surface_case(rectangle(15, 16), 0.005, 1e-3),
    "surface, 6 budgets × 7 sizes, noise .003": surface_case(equal_compute(6, 7), 0.003, 1e-3),
    "surface, 8 × 8 grid, noise .005, delta .1": surface_case(rectangle(8, 8), 0.005, 0.1),
    "least squares, 8 × 8 grid, noise .01 nats": least_squares_case(rectangle(8, 8), 0.01),
    "allocation, 6 budgets × 7 sizes, noise .003": allocation_case(equal_compute(6, 7), 0.003),
    "optima, 6 budgets × 7 sizes, noise .003": multiplier_case(equal_compute(6, 7), 0.003),
    "frontier, 7 × 5 grid, noise .005": grid_case(rectangle(7, 5), 0.005),
    "frontier, 15 × 16 grid, noise .005": grid_case(rectangle(15, 16), 0.005),
    "frontier, 4 widths × 2 horizons, noise .005": trunk_case(0.005, 0.0),
    "frontier, 4 widths × 2 horizons, noise .005, trunks share .8": trunk_case(0.005, 0.8),
    "frontier, 6 widths × 3 horizons, noise .01, trunks share .5": trunk_case(0.01, 0.5, 6, 3),
    "hulls, 4 widths × 4 horizons × 2 seeds, noise .01": hulls_case(0.01, 2),
    "hulls, 5 widths × 5 horizons × 2 seeds, noise .01": hulls_case(0.01, 2, 5, 5),
}


def hits_of(case: str, seeds: range) -> list[Hits | None]:
    """Of each seed; None where the fit was refused."""

    def one(seed: int) -> Hits | None:
        try:
            return CASES[case](seed)
        except NoFit:
            return None

    return [one(seed) for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first draw")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="for trees without .git")
    options = parser.parse_args()
    commit = (
        options.commit
        or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    versions = f"einlinear {einlinear.__version__}, numpy {np.__version__}"
    last = options.seed + options.draws
    parts = [range(first, min(last, first + PART)) for first in range(options.seed, last, PART)]
    with options.out.open("w", newline="") as file, ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "quantity", "coverage", "draws", "refused", "first_seed", "versions", "commit"])
        pending = {case: [pool.submit(hits_of, case, part) for part in parts]
                   for case in CASES if options.case in case}  # fmt: skip
        for case, futures in pending.items():
            found = [hits for future in futures for hits in future.result()]
            fitted = [hits for hits in found if hits is not None]
            for quantity in fitted[0] if fitted else ():
                share, refused = float(np.mean([hits[quantity] for hits in fitted])), len(found) - len(fitted)
                writer.writerow([case, quantity, f"{share:.3f}", len(found), refused, options.seed, versions, commit])
                print(f"{case:62} {quantity:26} {share:.3f} of {len(found)}", flush=True)
            file.flush()


if __name__ == "__main__":
    main()
