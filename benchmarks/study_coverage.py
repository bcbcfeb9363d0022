"""How often the 95 % intervals of studies hold the truth: rows of benchmarks/results/study_coverage.csv.

    python benchmarks/study_coverage.py --draws 150        # some 15 CPU-minutes
    python benchmarks/study_coverage.py --draws 40 --case rates

Each draw makes the runs of a whole study whose truth is known, as the store has them, and judges them as a page does.
Landscapes: a structure's best rate does not drift by the structure-aware rule and by .4 octaves a doubling by the naive
one; ln loss rises evenly, faster above the best rate than below, or hardly. Orders: ln multipliers of the protocol's
points are linear in ω, ψ and ν with a scatter of their own, and every run has noise. With 150 draws a share is known to
about ± 3.5 points.
"""

import argparse
import csv
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import einlinear as el
from einlinear.lab.run import Run
from einlinear.lab.studies import Finding, ordering, rate_transfer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study_coverage.csv"

WIDTHS = (64, 256, 1024)
NAIVE_DRIFT, BETWEEN = 0.4, 2.0  # octaves: of the naive rule for each doubling, and between the rules at width 256

SHAPES: Mapping[str, tuple[float, float]] = {"even": (0.03, 0.0), "uneven": (0.03, 0.02), "flat": (0.008, 0.004)}
"""ln loss above the best, by octaves squared, and above the best rate by octaves cubed besides."""


def rise(octaves: float, shape: str) -> float:
    """ln loss above its least, at a rate so many octaves above the best."""
    square, cube = SHAPES[shape]
    return square * octaves**2 + cube * max(octaves, 0.0) ** 3


def landscape(shape: str, noise: float, seeds: int, phase: float, random: np.random.Generator) -> list[Run]:
    """The runs of a landscape; `phase` is where between two rates of the grid the best one lies."""
    runs = []
    for aware, powers in ((True, range(-10, -3)), (False, range(-8, 0))):
        setup = json.dumps({} if aware else {"structure_aware": False})
        for width in WIDTHS:
            best = -7 + phase + (0 if aware else BETWEEN + NAIVE_DRIFT * math.log2(width / 256))
            for power in powers:
                for seed in range(seeds):
                    ln = rise(power - best, shape) + noise * random.normal()
                    runs.append(Run(
                        task="t", fingerprint="", family="btt", width=width, depth=1, tokens=1, rate=2.0**power,
                        seed=seed, setup=setup, loss=math.exp(ln),
                    ))  # fmt: skip
    return runs


def order(
    points: Sequence[str], slopes: Sequence[float], scatter: float, noise: float, random: np.random.Generator
) -> list[Run]:
    """The runs of a study of points: 4 widths, 3 horizons of a trunk each, whose noise is half in common."""
    runs = []
    for name in ("dense", *points):
        ln = 0.0
        if name != "dense":
            psi, nu, omega = el.taxonomy(el.structure(name))
            ln = float(np.dot(slopes, (omega, psi, nu))) + scatter * random.normal()
        for width in (64, 128, 256, 512):
            common = random.normal()
            for tokens in (10**6, 2 * 10**6, 4 * 10**6):
                flops = el.flops(el.structure(name)(width, 4 * width)) * 24 * tokens + 6 * 512 * width * tokens
                loss = 1.0 + (flops * math.exp(ln) / 1e12) ** -0.12
                error = noise * (common + random.normal()) / math.sqrt(2)
                runs.append(Run(
                    task="t", fingerprint="", family=name, width=width, depth=1, tokens=tokens, rate=0.01, seed=0,
                    loss=loss * math.exp(error), flops=round(flops), parameters=width**2, trunk=f"{name}/{width}",
                ))  # fmt: skip
    return runs


def shares(findings: Iterator[Finding], truths: Sequence[float]) -> list[tuple[str, float, float, float]]:
    """Of each part of a claim: its truth, how often the interval held it, and half the mean interval."""
    held = [
        [
            (part.low <= truth <= part.high, (part.high - part.low) / 2)
            for part, truth in zip(one.parts, truths, strict=True)
        ]
        for one in findings
    ]
    means = np.mean(np.array(held, dtype=float), axis=0)
    return [(truth, float(share), float(half)) for truth, (share, half) in zip(truths, means, strict=True)]


def rates_rows(draws: int) -> Iterator[tuple[object, ...]]:
    """Coverage over landscapes."""
    for shape, noise, seeds, phase in (
        ("even", 0.01, 2, 0.3), ("even", 0.03, 2, 0.3), ("uneven", 0.01, 2, 0.3), ("uneven", 0.01, 3, 0.0),
        ("uneven", 0.01, 3, 0.5), ("uneven", 0.03, 2, 0.3), ("flat", 0.01, 3, 0.3), ("flat", 0.03, 2, 0.3),
    ):  # fmt: skip
        span = math.log2(WIDTHS[-1] / WIDTHS[0])
        truths = (0.0, NAIVE_DRIFT, rise(-NAIVE_DRIFT * span, shape))
        found = (rate_transfer(landscape(shape, noise, seeds, phase, np.random.default_rng(n))) for n in range(draws))
        what = ("drift", "drift, naive less aware", "loss at the carried rate, naive less aware")
        for part, (truth, share, half) in zip(what, shares(found, truths), strict=True):
            yield "rates", f"{shape}, phase {phase}, {seeds} seeds", part, noise, truth, draws, share, half


def order_rows(draws: int) -> Iterator[tuple[object, ...]]:
    """Coverage over the points of the protocol."""
    spec = importlib.util.spec_from_file_location("claims", ROOT / "recipes" / "claims.py")
    assert spec and spec.loader
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    slopes = (-1.0, 0.5, 0.1)
    for scale, scatter, noise in (("small", 0.3, 0.01), ("full", 0.3, 0.01), ("full", 0.1, 0.01), ("full", 0.1, 0.03)):
        points = claims.STUDIES["order"].scales[scale][0].plan.families[1:]
        found = (ordering(order(points, slopes, scatter, noise, np.random.default_rng(n))) for n in range(draws))
        for part, (truth, share, half) in zip(("omega", "psi", "nu"), shares(found, slopes), strict=True):
            yield "order", f"{len(points)} points, scatter {scatter}", part, noise, truth, draws, share, half


CASES: Mapping[str, Callable[[int], Iterator[tuple[object, ...]]]] = {"rates": rates_rows, "order": order_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--case", choices=CASES, help="one of them; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    columns = ("study", "case", "part", "noise", "truth", "draws", "coverage", "half_width")
    kept = []
    if options.case and options.out.exists():
        with options.out.open(newline="") as file:
            kept = [tuple(row.values()) for row in csv.DictReader(file) if row["study"] != options.case]
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *kept])
        for name in [options.case] if options.case else CASES:
            for row in CASES[name](options.draws):
                shown = [f"{value:.3g}" if isinstance(value, float) else value for value in row]
                writer.writerow(shown)
                file.flush()
                print(*shown, sep=", ", flush=True)


if __name__ == "__main__":
    main()
