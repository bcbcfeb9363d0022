"""Multipliers without a law: exact on straight lines, covered by what seeds differ by, and refused without seeds."""

import math

import numpy as np
import pytest

from einlinear.lab.laws import interpolated, interpolated_multiplier

BTT = "btt(rank=1)"
STRAIGHT = {"floor": 0.0, "exponent": 0.1}


def test_along_straight_lines_it_is_exact(simulate):
    found = interpolated_multiplier(simulate({"dense": 1.0, BTT: 1.5}, seeds=2, **STRAIGHT), (0.9, 0.8, 0.1), BTT)
    assert [one.value for one in found[:2]] == pytest.approx([1.5, 1.5], rel=1e-6)
    assert found[0].low == pytest.approx(1.5, rel=1e-6) and found[2].reason == "not both were measured at 0.1"


def test_without_a_second_seed_the_noise_is_not_known(simulate):
    (found,) = interpolated_multiplier(simulate({"dense": 1.0, BTT: 1.5}, noise=0.01, **STRAIGHT), (0.9,), BTT)
    assert "second seed" in found.reason and math.isnan(found.value)


def test_the_interval_covers_and_grows_with_the_noise(simulate, monkeypatch):
    monkeypatch.setattr(interpolated, "DRAWS", 60)
    inside, widths = [], {0.005: [], 0.01: []}
    for seed in range(60):
        for noise, found in widths.items():
            runs = simulate({"dense": 1.0, BTT: 1.5}, noise=noise, seeds=2, seed=seed, trunk_share=0.8, **STRAIGHT)
            (one,) = interpolated_multiplier(runs, (0.85,), BTT)
            inside.append(one.low < 1.5 < one.high)
            found.append(math.log(one.high / one.low))
    assert 0.9 <= np.mean(inside) <= 1.0
    small, large = (np.median(found) for found in widths.values())
    assert 1.6 < large / small < 2.4
