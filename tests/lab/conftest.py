"""What tests of the laboratory share: a tiny task, and synthetic runs whose law is known."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from einlinear.lab.data import Sequences
from einlinear.lab.run import Run

Simulate = Callable[..., list[Run]]

WIDTHS = (64, 96, 144, 216)
HORIZONS = (1_000_000, 2_000_000)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


@pytest.fixture(scope="module")
def task() -> Sequences:
    """Text of a period that a model of width 16 learns in seconds."""
    tokens = torch.arange(3000) * 5 % 13
    return Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=400)


def simulate_law(
    families: dict[str, float],
    *,
    noise: float = 0.0,
    seed: int = 0,
    seeds: int = 1,
    trunk_share: float = 0.0,
    floor: float = 1.0,
    exponent: float = 0.1,
    own_exponents: dict[str, float] | None = None,
) -> list[Run]:
    """Runs of 4 widths x 2 horizons that obey L = floor + (multiplier C / C0)^-exponent for each family's multiplier.

    `noise` is the standard deviation of ln L; `trunk_share` the share of its variance that the two horizons
    of one trunk have in common (0: each run is a trunk of its own).
    """
    generator = np.random.default_rng(seed)
    runs = []
    for family, multiplier in families.items():
        power = (own_exponents or {}).get(family, exponent)
        for replica in range(seeds):
            for width in WIDTHS:
                shared = generator.normal() * trunk_share**0.5
                for tokens in HORIZONS:
                    cost = 6.0 * 48 * width**2 * tokens
                    loss = floor + (cost * multiplier / 1e12) ** -power
                    own = generator.normal() * (1 - trunk_share) ** 0.5
                    runs.append(
                        Run(
                            task="bytes",
                            fingerprint="f00d",
                            family=family,
                            width=width,
                            depth=4,
                            tokens=tokens,
                            rate=4e-3,
                            seed=replica,
                            loss=float(loss * np.exp(noise * (shared + own))),
                            parameters=48 * width**2,
                            flops=round(cost),
                            linear_flops=round(0.7 * cost),
                            seconds=cost / 1e10,
                            device="cpu",
                            trunk=f"{family}/{width}/{replica}" if trunk_share else "",
                        )
                    )
    return runs


def simulate_study(extra_family: str = "low_rank(rank=16)") -> list[Run]:
    """A whole comparison as a sweep leaves it: tuning runs, 4 families, two horizons of each trunk, one divergence."""
    generator = np.random.default_rng(0)
    # Parameters and speed of each family against dense, and its effective share of dense's parameters.
    families = {
        "dense": (1.0, 1.0, 1.0),
        "btt(rank=1)": (0.16, 0.45, 0.30),
        "monarch(blocks=8)": (0.22, 0.6, 0.27),
        extra_family: (0.35, 0.9, 0.23),
    }
    common = {
        "task": "bytes",
        "fingerprint": "3f9a1c02be774d10",
        "depth": 4,
        "seed": 0,
        "device": "cpu, 2 threads",
        "versions": json.dumps({"einlinear": "0.1.0", "torch": "2.13.0", "python": "3.11.9"}),
        "commit": "1a2b3c4",
        "setup": json.dumps({"batch": 32, "context": 128, "schedule": "wsd"}),
    }
    runs = []
    for family, (size, speed, effective) in families.items():
        for rate in RATES:
            diverged = rate == RATES[-1] and family != "dense"
            loss = 2.6 * (1 + 0.03 * np.log2(rate / 4e-3) ** 2 + 0.004 * generator.normal()) / (1 + effective) ** 0.03
            runs.append(
                Run(
                    **common,
                    family=family,
                    width=128,
                    tokens=500_000,
                    rate=rate,
                    purpose="tune",
                    status="diverged" if diverged else "done",
                    reason="loss is not a number at step 212" * diverged,
                    loss=None if diverged else float(loss),
                    parameters=400_000,
                    flops=10**12,
                    linear_flops=6 * 10**11,
                    seconds=4.0,
                )
            )
        for width in (64, 128, 256, 512):
            for tokens in (2_000_000, 4_000_000):
                parameters = 48 * width**2
                linear, head = 6.0 * size * parameters * tokens, 6.0 * 300 * width * tokens
                loss = 0.9 + 26.0 * (effective * parameters) ** -0.34 + 60 * tokens**-0.33
                diverged = family == "monarch(blocks=8)" and width == 512 and tokens == 4_000_000
                runs.append(
                    Run(
                        **common,
                        family=family,
                        width=width,
                        tokens=tokens,
                        rate=4e-3,
                        status="diverged" if diverged else "done",
                        reason="loss is not a number at step 1,904" * diverged,
                        loss=None if diverged else float(loss * np.exp(0.004 * generator.normal())),
                        parameters=round(size * parameters + 300 * width),
                        flops=round(linear + head),
                        linear_flops=round(linear),
                        seconds=float((speed * linear / size + head) / 2e10),
                        trunk=f"{family}/{width}",
                    )
                )
    return runs


@pytest.fixture
def simulate() -> Simulate:
    return simulate_law


@pytest.fixture(scope="session")
def study() -> list[Run]:
    return simulate_study()


@pytest.fixture
def make_study() -> Callable[[str], list[Run]]:
    return simulate_study
