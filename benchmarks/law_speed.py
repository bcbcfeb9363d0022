"""Seconds of the law fits: `python benchmarks/law_speed.py` writes benchmarks/results/law_speed.csv.

A synthetic surface of 240 runs (15 sizes × 16 lengths, noise .005), as many as the points of the Chinchilla paper.
Thread CPU time beside the wall's, because a shared machine's wall says little.
"""

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from law_coverage import TRUTH, rectangle

import einlinear
from einlinear.lab.laws import bootstrap, fit_surface, from_frame, isoflop, law_card, variable_projection

RESULTS = Path(__file__).parent / "results" / "law_speed.csv"


def main() -> None:
    N, D = rectangle(15, 16)
    loss = TRUTH.loss(N, D) * np.exp(0.005 * np.random.default_rng(0).normal(size=len(N)))
    table = from_frame(pd.DataFrame({"params": N, "tokens": D, "loss": loss}))
    fit = fit_surface(N, D, loss)
    cases: dict[str, Callable[[], object]] = {
        "surface, 240 starts": lambda: fit_surface(N, D, loss),
        "bootstrap, 4000 draws": lambda: bootstrap(fit, 4000),
        "variable projection": lambda: variable_projection(N, D, loss),
        "IsoFLOP, Akima, 1000 draws": lambda: isoflop(N, 6 * N * D, loss, "akima"),
        "law card, 1000 draws": lambda: law_card(table),
        "law card, 4000 draws": lambda: law_card(table, draws=4000),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "seconds", "cpu_seconds", "cores", "machine", "versions", "commit"])
        for case, call in cases.items():
            call()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            versions = f"einlinear {einlinear.__version__}, numpy {np.__version__}"
            writer.writerow([case, f"{wall:.2f}", f"{cpu:.2f}", os.cpu_count(), platform.machine(), versions, commit])
            print(f"{case:30} {wall:7.2f} s, {cpu:7.2f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
