"""Routed layers on one CPU thread, expert-sorted and all experts on all tokens, interleaved, over random cases.

    python benchmarks/cpu_experts.py [minutes [results.csv]]
    python benchmarks/cpu_experts.py --fit [results.csv]       # prints `einlinear.clock_experts.COSTS`
    python benchmarks/cpu_experts.py --table [results.csv]     # prints the table of docs/experts.md

Microseconds: medians of the thread's own CPU time over rounds in which both take turns, with the routing given. Goes
on where a file that is there already ends. `held` marks widths that no factor is read off.
"""

import csv
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from scipy.optimize import nnls

import einlinear as el
from einlinear import clock_experts
from einlinear.kernels.kernel import CPU
from einlinear.kernels.routed import Everyone, ExpertSorted
from einlinear.lab.bench import provenance

FITTED, HELD = (64, 128, 256, 512, 1024), (96, 384, 768)
FAMILIES = (*el.families(), el.BTT(), el.LowRank(rank=64), el.Monarch(blocks=16))
EXPERTS = ((4, 1), (8, 2), (16, 2), (16, 4), (64, 2), (64, 16), (4, 2), (2, 1), (8, 8))
TOKENS = (1, 4, 16, 64, 256, 1024)
LARGEST = 3 * 10**8
"""Bytes of weights, or of the states of all experts, beyond which a case would take too long."""
RESULTS = Path(__file__).parent / "results" / "cpu_experts_ways.csv"
WAYS = {"all experts": Everyone(), "expert-sorted": ExpertSorted()}


def cases() -> Iterator[tuple[el.Family, int, int, int, int]]:
    """In random order, so that a part of them is one of all."""
    drawn = [(f, w, *e, t) for f in FAMILIES for w in (*FITTED, *HELD) for e in EXPERTS for t in TOKENS]
    random.Random(0).shuffle(drawn)
    for family, width, experts, active, tokens in drawn:
        structure = family(width, width).mixture(experts, active=active)
        state = max(structure.expert.size(step.result) for step in structure.expert.steps)
        fits = 4 * max(el.parameters(structure), experts * tokens * state) < LARGEST
        if fits and ExpertSorted().refuses(structure.canonical, CPU) is None:
            yield family, width, experts, active, tokens


def measure(family: el.Family, width: int, experts: int, active: int, tokens: int) -> Iterator[tuple[str, str, float]]:
    """Way, mode and microseconds."""
    layer = el.Linear(width, width, family, bias=False, experts=experts, active=active)
    assert layer.router is not None
    torch.nn.init.normal_(layer.router.weight)
    x, grad = torch.randn(tokens, width), torch.randn(tokens, layer.structure.size(layer.structure.y))
    with torch.no_grad():
        routing = layer.router(x)
    x = torch.nn.functional.pad(x, (0, layer.structure.pad_in)).requires_grad_()
    factors = list(layer.factors)

    def timed(way: str, mode: str) -> float:
        run: Callable[..., torch.Tensor] = runners[way]
        start = time.thread_time()
        with torch.set_grad_enabled(mode == "training"):
            y = run(factors, x, routing, None)
            if mode == "training":
                torch.autograd.grad(y, [x, *factors], grad)
        return 1e6 * (time.thread_time() - start)

    runners = {way: kernel.prepare(layer.structure) for way, kernel in WAYS.items()}
    pairs = [(way, mode) for mode in ("forward", "training") for way in WAYS]
    once = sum(timed(*pair) for pair in pairs)
    rounds = [[timed(*pair) for pair in pairs] for _ in range(int(min(9, max(3, 1e5 / once))))]
    for pair, found in zip(pairs, zip(*rounds, strict=True), strict=True):
        yield *pair, statistics.median(found)


def main(minutes: str = "6", path: str = str(RESULTS)) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    done, end = len(read(path)) if Path(path).exists() else 0, time.monotonic() + 60 * float(minutes)
    where = provenance(torch.device("cpu"), torch.float32)
    for number, case in enumerate(cases()):
        if time.monotonic() > end:
            return
        if 2 * number < done:
            continue
        found = {(way, mode): value for way, mode, value in measure(*case)}
        about = dict(zip(("family", "width", "experts", "active", "tokens"), (str(case[0]), *case[1:]), strict=True))
        rows = [
            {**about, "mode": mode, **{way: f"{found[way, mode]:.4g}" for way in WAYS}, "held": int(case[1] in HELD)}
            for mode in ("forward", "training")
        ]
        new = not Path(path).exists()
        with Path(path).open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *where])
            if new:
                writer.writeheader()
            writer.writerows(row | where for row in rows)


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def fit(path: str = str(RESULTS)) -> None:
    """Non-negative factors, least in relative error; FLOPs are those of the sorted way's own matmuls, forward."""
    fitted = [row for row in read(path) if row["held"] == "0"]
    made = {}
    for mode in ("forward", "training"):
        for way in WAYS:
            rows = [row for row in fitted if row["mode"] == mode]
            counts = numpy.array([clock_experts.terms(way, structure(row), int(row["tokens"])) for row in rows])
            relative = counts / numpy.array([[float(row[way])] for row in rows])
            scale = relative.max(0) + (relative.max(0) == 0)
            made[mode, way] = nnls(relative / scale, numpy.ones(len(rows)))[0] / scale
    for way in WAYS:  # one choice serves both modes: the mean of both, each by its own matmuls
        modes = [made[mode, way] / made[mode, "expert-sorted"][4] for mode in ("forward", "training")]
        print(f'"{way}": ({", ".join(f"{value:.3g}" for value in numpy.mean(modes, axis=0))}),')


def table(path: str = str(RESULTS)) -> None:
    """Cases with at least four times as many experts as are active: times as fast as all experts, by tokens."""
    speeds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read(path):
        if int(row["experts"]) >= 4 * int(row["active"]):
            foretold = {way: clock_experts.cost(way, structure(row), int(row["tokens"])) for way in WAYS}
            ways = ("expert-sorted", min(foretold, key=foretold.__getitem__))
            sped = [float(row["all experts"]) / float(row[way]) for way in ways]
            speeds.setdefault((row["mode"], row["tokens"]), []).append((sped[0], sped[1]))
    kinds: dict[str, Callable[[list[tuple[float, float]]], str]] = {
        "sorted, median": lambda found: f"{statistics.median(one for one, _ in found):.2g}",
        "cases where sorted is faster": lambda found: f"{statistics.mean(one > 1 for one, _ in found):.0%}",
        "as planned, median": lambda found: f"{statistics.median(one for _, one in found):.2g}",
        "planned more than 5 % slower": lambda found: f"{sum(one < 0.95 for _, one in found)} of {len(found)}",
    }
    print(f"| tokens | {' | '.join(map(str, TOKENS))} |\n|{'---|' * (len(TOKENS) + 1)}")
    for kind, told in kinds.items():
        cells = (" / ".join(told(speeds[mode, str(n)]) for mode in ("forward", "training")) for n in TOKENS)
        print(f"| {kind} | {' | '.join(cells)} |")


def structure(row: dict[str, str]) -> el.Structure:
    """Of a row."""
    width = int(row["width"])
    made = el.structure(row["family"])(width, width).mixture(int(row["experts"]), active=int(row["active"]))
    return made.canonical


if __name__ == "__main__":
    verbs = {"--fit": fit, "--table": table}
    verbs[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in verbs else main(*sys.argv[1:])
