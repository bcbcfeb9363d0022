"""Laws of the laws: a known law is recovered, an interval covers what it says, and runs that do not compare refuse."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from einlinear.lab.laws import Multiplier, frontiers, hull, measured, multiplier, multiplier_at, times
from einlinear.lab.laws.cells import cells_of, near_hull, slope
from einlinear.lab.summary import answer, summary

BTT = "btt(rank=1)"


@pytest.mark.parametrize("truth", [0.4, 1.0, 1.5, 6.0])
def test_a_multiplier_without_noise_is_recovered(simulate, truth):
    found = multiplier(simulate({"dense": 1.0, BTT: truth}), BTT)
    assert found.value == pytest.approx(truth, rel=1e-4)
    assert found.low == pytest.approx(truth, rel=1e-3) and found.high == pytest.approx(truth, rel=1e-3)
    assert found.crosscheck == pytest.approx(truth, rel=0.02)
    assert found.cells == 16 and found.trend is None
    assert found.verdict == {0.4: "worse", 1.0: "undecided", 1.5: "better", 6.0: "better"}[truth]


@pytest.mark.parametrize(("floor", "exponent"), [(0.0, 0.1), (1.0, 0.2), (0.5, 0.4)])
def test_a_frontier_without_noise_is_recovered(simulate, floor, exponent):
    law = frontiers(simulate({"dense": 2.0}, floor=floor, exponent=exponent))["dense"]
    assert pytest.approx(floor, abs=1e-3) == law.E
    assert law.c == pytest.approx(exponent, rel=5e-3)
    assert pytest.approx(0.5e12, rel=0.02) == law.C0
    assert law.agreement > 0.5 and len(law.fitted) == 8
    loss, low, high = law.loss(np.array([1e11, 1e13]))
    assert loss == pytest.approx(floor + (np.array([1e11, 1e13]) / 0.5e12) ** -exponent, rel=1e-3)
    assert (low <= loss).all() and (loss <= high).all()


@pytest.mark.parametrize("trunk_share", [0.0, 0.8])
def test_the_reported_interval_covers_95_percent_also_when_horizons_share_a_trunk(simulate, trunk_share):
    inside = []
    for seed in range(150):
        runs = simulate({"dense": 1.0, BTT: 1.5}, noise=0.005, seed=seed, trunk_share=trunk_share)
        found = multiplier(runs, BTT)
        inside.append(found.low < 1.5 < found.high)
    assert 0.91 <= np.mean(inside) <= 0.987  # .95 within two standard errors of 150 draws


def test_dependent_horizons_widen_the_interval(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.5}, noise=0.005, trunk_share=0.9, seed=1)
    dependent, independent = multiplier(runs, BTT), multiplier([replace(run, trunk="") for run in runs], BTT)
    assert dependent.value == independent.value
    assert dependent.high / dependent.low > 1.1 * independent.high / independent.low


def test_an_interval_is_the_same_each_time_and_does_not_depend_on_a_third_family(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.2, "low_rank(rank=8)": 0.6}, noise=0.01)
    pair = [run for run in runs if run.family in ("dense", BTT)]
    assert multiplier(runs, BTT) == multiplier(runs, BTT) == multiplier(pair, BTT)


def test_curves_that_are_not_parallel_report_a_range(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.5}, own_exponents={BTT: 0.14}, noise=0.0005)
    found = multiplier(runs, BTT)
    assert found.trend is not None and found.trend[0] != pytest.approx(found.trend[1], rel=0.1)
    assert found.low <= min(found.trend) and max(found.trend) <= found.high
    assert "not parallel" in " ".join(summary(runs).notes)


def test_as_a_curve_each_loss_has_its_own_multiplier(simulate):
    def truth(loss):
        return 1.5 * (loss - 1) ** (1 / 0.14 - 1 / 0.1)

    losses = (1.9, 1.8, 1.75)
    exact = simulate({"dense": 1.0, BTT: 1.5}, own_exponents={BTT: 0.14})
    assert [one.value for one in multiplier_at(exact, losses, BTT)] == pytest.approx([*map(truth, losses)], rel=1e-3)
    inside = []
    for seed in range(60):
        runs = simulate({"dense": 1.0, BTT: 1.5}, own_exponents={BTT: 0.14}, noise=0.003, seed=seed, trunk_share=0.8)
        inside += [one.low < truth(one.loss_low) < one.high for one in multiplier_at(runs, losses, BTT)]
    assert 0.88 <= np.mean(inside) <= 0.995
    reasons = [one.reason for one in multiplier_at(exact, (9.0, 1.8, 1.01), BTT)]
    assert reasons == ["not both were measured at 9", "", "not both were measured at 1.01"]


def test_the_hull_is_convex_improves_and_uses_the_means_over_seeds(simulate):
    runs = simulate({"dense": 1.0}, noise=0.02, seeds=3)
    vertices = hull(runs)["dense"]
    assert all(left.cost < right.cost and left.loss > right.loss for left, right in pairwise(vertices))
    slopes = [slope(left, right) for left, right in pairwise(vertices)]
    assert slopes == sorted(slopes)
    lowest = min(vertices, key=lambda cell: cell.loss)
    assert len(lowest.runs) == 3 and lowest.loss > min(run.loss for run in lowest.runs)


def test_a_size_far_above_the_hull_does_not_enter_the_law(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.5})
    poor = [replace(r, loss=r.loss * 1.3) if r.family == BTT and r.width == 96 else r for r in runs]
    found = multiplier(poor, BTT)
    assert found.cells == 14 and found.value == pytest.approx(1.5, rel=1e-3)


def test_a_size_that_cost_more_for_the_same_loss_is_not_near_the_hull(simulate):
    cells = cells_of(simulate({"dense": 1.0}))["dense"]
    best = min(cells, key=lambda cell: cell.loss)
    wasted = replace(best, cost=8 * best.cost, loss=best.loss * 1.001)
    assert near_hull([*cells, wasted], 0.02) == cells
    assert near_hull([*cells, replace(wasted, cost=1.01 * best.cost)], 0.02)[-1].loss == wasted.loss


@pytest.mark.parametrize("name", ["task", "fingerprint", "setup"])
def test_runs_that_do_not_compare_are_refused_in_one_sentence(simulate, name):
    runs = simulate({"dense": 1.0, BTT: 1.5})
    mixed = [replace(runs[0], **{name: "another"}), *runs[1:]]
    with pytest.raises(ValueError, match=f"losses do not compare; select the runs of one {name}"):
        multiplier(mixed, BTT)
    assert multiplier(mixed, BTT, allow_mixed_data=True).value == pytest.approx(1.5, rel=1e-3)
    tuning = [replace(runs[0], purpose="tune", **{name: "another"}), *runs]
    assert len(measured(tuning)) == 16


def test_too_little_data_says_so_instead_of_guessing(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.5})
    few = [run for run in runs if run.width == 64]
    law, found = frontiers(few)["dense"], multiplier(few, BTT)
    assert math.isnan(law.c) and "fewer than three" in law.reason
    assert found.verdict == "undecided" and "too few sizes" in found.reason and str(found) == found.reason
    rising = [replace(run, loss=1 + run.flops / 1e15) for run in runs]
    assert "does not fall with cost" in frontiers(rising)["dense"].reason
    assert "does not fall with cost" in multiplier(rising, BTT).reason
    with pytest.raises(ValueError, match="no runs of kronecker"):
        multiplier(runs, "kronecker")


def test_seconds_of_two_devices_do_not_compare(simulate):
    runs = simulate({"dense": 1.0, BTT: 1.5})
    mixed = [replace(run, device="cuda") if run.family == BTT else run for run in runs]
    assert "different devices" in multiplier(mixed, BTT, axis="seconds").reason
    assert multiplier(mixed, BTT, axis="flops").value == pytest.approx(1.5, rel=1e-3)


def test_extrapolation_tells_how_far_beyond_the_baseline(simulate):
    runs = simulate({"dense": 1.0, BTT: 8.0})
    assert multiplier(runs, BTT).extrapolation == pytest.approx(8.0, rel=1e-3)
    assert multiplier(simulate({"dense": 1.0, BTT: 0.5}), BTT).extrapolation == 1.0


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 2, "better"), (0.9, 1.1, "undecided"), (0.5, 0.99, "worse"), (1, 2, "undecided")],
)
def test_only_an_interval_that_excludes_1_decides(low, high, verdict):
    assert Multiplier(family=BTT, baseline="dense", axis="flops", value=1.0, low=low, high=high).verdict == verdict


def test_the_answer_is_in_words_and_numbers_and_honest(simulate):
    better = answer(summary(simulate({"dense": 1.0, BTT: 1.5, "low_rank(rank=4)": 0.5}, noise=0.001)))
    assert (
        better.startswith("At equal loss, dense needs 1.5") and "worse than dense: low_rank(rank=4)" in better.lower()
    )
    undecided = answer(summary(simulate({"dense": 1.0, BTT: 1.0}, noise=0.02)))
    assert undecided.startswith("No structure tried is shown to spend training compute better than dense.")
    assert "By training compute, undecided: btt(rank=1)" in undecided
    alone = simulate({"dense": 1.0})
    assert "add another structure" in answer(summary(alone))
    assert "nothing to compare" in answer(summary([replace(r, status="diverged", loss=None) for r in alone]))
    assert "add it" in answer(summary(simulate({BTT: 1.0})))


def test_diverged_runs_and_tuning_are_counted_and_told(study):
    found = summary(study)
    monarch = next(family for family in found.families if family.family.startswith("monarch"))
    assert monarch.runs == 7 and len(monarch.failed) == 1 and len(monarch.tuning) == 5
    assert [run.status for run, _ in found.excluded] == ["diverged"]
    assert any("monarch(blocks=8): 1 run did not finish (width 512)" in note for note in found.notes)
    assert not any(family.rate_at_edge for family in found.families)
    smaller = [run for run in study if run.purpose == "measure" or run.rate >= 4e-3]
    assert all(family.rate_at_edge for family in summary(smaller).families)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.656, "1.66"), (0.4321, "0.43"), (0.0043, "0.0043"), (18.93, "18.9"), (188.73, "189"), (5e21, "5.0e21"),
        (math.inf, "∞"),
    ],
)  # fmt: skip
def test_multipliers_are_short_and_never_nothing(value, text):
    assert times(value) == text
