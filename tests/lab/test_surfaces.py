"""Fitters of N and D: known laws are recovered, real data give the published optimum, bad grids are refused."""

from pathlib import Path

import numpy as np
import pytest

from einlinear.lab.laws import (
    NoFit,
    Surface,
    bootstrap,
    envelope,
    fit_surface,
    isoflop,
    read_table,
    scaled_surface,
    variable_projection,
)
from einlinear.lab.laws.isoflop import budgets_of
from einlinear.lab.laws.parametric import NAMES
from einlinear.lab.laws.sensitivity import by_delta, by_outliers, by_window, held_out
from einlinear.lab.laws.solvable import solvable_loss

TRUTH = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.37)
EPOCH = "shared/data/chinchilla_epoch_extracted.csv"  # beside the repository, or above it


def grid(sizes: int = 7, lengths: int = 7) -> tuple[np.ndarray, np.ndarray]:
    N, D = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(2e8, 2e10, lengths))
    return N.ravel(), D.ravel()


def noisy(N, D, noise=0.003, seed=0):
    return TRUTH.loss(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))


@pytest.fixture(scope="module")
def epoch():
    for folder in Path(__file__).resolve().parents[3:]:
        if (folder / EPOCH).exists():
            return read_table(folder / EPOCH)
    pytest.skip(f"Epoch AI's points are not at ../{EPOCH}: the published optimum was not checked")


@pytest.mark.parametrize("surface", [TRUTH, Surface(E=0.05, A=3.0, B=5.0, alpha=0.5, beta=0.2)])
def test_a_surface_without_noise_is_recovered(surface):
    N, D = grid()
    found = fit_surface(N, D, surface.loss(N, D))
    least = variable_projection(N, D, surface.loss(N, D))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.surface, name) == pytest.approx(getattr(surface, name), rel=1e-4)
        assert getattr(least.surface, name) == pytest.approx(getattr(surface, name), rel=1e-3)
    assert found.agreement > 0.5


def test_units_of_params_tokens_and_loss_change_nothing_but_the_scales():
    N, D = grid()
    loss = noisy(N, D)
    one, other = fit_surface(N, D, loss).surface, fit_surface(N / 1e6, D / 1e9, loss / np.log(2)).surface
    assert (other.alpha, other.beta) == pytest.approx((one.alpha, one.beta), rel=1e-4)
    assert pytest.approx(one.E / np.log(2), rel=1e-4) == other.E
    assert pytest.approx(one.A * 1e6**-one.alpha / np.log(2), rel=1e-3) == other.A


def test_a_law_without_a_floor_has_none_and_an_interval_from_nothing():
    N, D = grid()
    truth = Surface(E=0.0, A=40.0, B=60.0, alpha=0.2, beta=0.22)
    loss = truth.loss(N, D) * np.exp(0.003 * np.random.default_rng(1).normal(size=len(N)))
    found = fit_surface(N, D, loss)
    low, high = bootstrap(found, 200).interval("E")
    assert low == 0.0 and 0.001 < high < 0.2 * loss.min()  # draws may leave the bound again
    assert high >= found.surface.E and found.surface.alpha == pytest.approx(0.2, abs=0.02)


def test_many_runs_are_fitted_from_starts_that_some_of_them_judged():
    generator = np.random.default_rng(0)
    N, D = np.exp(generator.uniform(np.log(1e7), np.log(1e9), 6000)), np.exp(generator.uniform(18, 24, 6000))
    found = fit_surface(N, D, noisy(N, D))
    assert len(found) == 6000 and found.surface.alpha == pytest.approx(TRUTH.alpha, abs=0.005)
    assert found.surface.beta == pytest.approx(TRUTH.beta, abs=0.005) and found.agreement > 0.9


def test_runs_scattered_over_compute_are_no_isoflop_curves():
    generator = np.random.default_rng(0)
    N, D = np.exp(generator.uniform(np.log(1e7), np.log(1e9), 400)), np.exp(generator.uniform(18, 24, 400))
    assert all(np.ptp(np.log(N * D)[group]) <= 0.3 for group in budgets_of(6 * N * D, N))


def test_the_optimum_of_a_surface_is_one():
    N, D, loss = TRUTH.optimum(np.array([1e19, 1e21]), k=5.0)
    assert pytest.approx([1e19, 1e21]) == 5 * N * D
    for factor in (0.9, 1.1):
        assert (TRUTH.loss(N * factor, D / factor) > loss).all()
    assert TRUTH.compute(loss, k=5.0) == pytest.approx([1e19, 1e21], rel=1e-9)
    assert np.isnan(TRUTH.compute(np.array([1.7]))).all()
    assert np.log(N[1] / N[0]) / np.log(100) == pytest.approx(TRUTH.a)
    assert np.log((loss[1] - TRUTH.E) / (loss[0] - TRUTH.E)) / np.log(100) == pytest.approx(-TRUTH.gamma)


def test_epochs_240_points_give_the_converged_huber_optimum(epoch):
    table = epoch.without_highest(5)
    assert len(epoch) == 245 and len(table) == 240
    found = fit_surface(table.parameters, table.tokens, table.loss)
    assert found.objective == pytest.approx(1.01827402e-3, rel=1e-6)
    expected = {"E": 1.81722, "A": 477.83, "B": 2143.4, "alpha": 0.34731, "beta": 0.36717, "a": 0.5139, "gamma": 0.1785}
    for name, value in expected.items():
        assert getattr(found.surface, name) == pytest.approx(value, rel=2e-4)
    assert found.agreement > 0.9 and found.inside == pytest.approx(0.16, abs=0.01)
    draws = bootstrap(found, 1000)
    for name, ends in {"alpha": (0.317, 0.373), "beta": (0.331, 0.415), "a": (0.481, 0.556)}.items():
        assert draws.interval(name) == pytest.approx(ends, abs=0.006)
    assert draws.deviation("a") == pytest.approx(0.020, abs=0.003)


def test_epochs_sensitivity_is_the_known_one(epoch):
    outliers = by_outliers(epoch)
    assert [v.choice for v in outliers] == [0, 1, 2, 3, 4, 5, 10, 20]
    known = [0.565, 0.544, 0.538, 0.524, 0.516, 0.514, 0.509, 0.484]
    assert [v.surface.a for v in outliers] == pytest.approx(known, abs=6e-4)
    least, middle, _ = by_delta(epoch.without_highest(5))
    assert (least.surface.E, least.surface.beta) == pytest.approx((1.865, 0.406), abs=1e-3)
    assert (middle.surface.E, middle.surface.beta) == pytest.approx((1.838, 0.382), abs=1e-3)


def test_epochs_points_by_variable_projection(epoch):
    table = epoch.without_highest(5)
    found = variable_projection(table.parameters, table.tokens, table.loss)
    assert found.squares == pytest.approx(0.0832, abs=1e-4)
    surface = (found.surface.E, found.surface.A, found.surface.alpha, found.surface.beta)
    assert surface == pytest.approx((1.8828, 567.8, 0.3576, 0.4276), rel=1e-3)


def test_epochs_isoflop_curves(epoch):
    table = epoch.without_highest(5)
    found = isoflop(table.parameters, table.flops, table.loss, "parabola")
    assert found.a_low < 0.5139 < found.a_high and found.a == pytest.approx(0.51, abs=0.03)


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_the_solvable_law_has_its_exponents(method):
    cost = np.repeat(np.geomspace(1e7, 1e10, 7), 15)
    features = np.round(1.5 * cost**0.4 * np.tile(np.geomspace(1 / 4, 4, 15), 7))
    found = isoflop(features, cost, solvable_loss(features, cost / features), method)
    assert len(found.used) == 7
    assert found.a == pytest.approx(0.4, abs=1e-3)
    exponent = np.polyfit(np.log([b.flops for b in found.used]), np.log([b.loss for b in found.used]), 1)[0]
    assert exponent == pytest.approx(-0.6, abs=1e-3)


def test_a_solvable_law_is_its_sum():
    j = np.arange(1, 200_001)
    expected = (j[10:] ** -2.5).sum() + (j[:10] ** -2.5 * np.exp(-2 * 7 * j[:10] ** -1.5)).sum()
    assert solvable_loss(np.array([10]), np.array([7.0]))[0] == pytest.approx(expected, rel=1e-6)


def test_the_envelope_of_finished_runs_has_the_exponent():
    N, D = grid(12, 12)
    found = envelope(N, 6 * N * D, TRUTH.loss(N, D))
    assert found.a == pytest.approx(TRUTH.a, abs=0.005)
    assert found.a_low < TRUTH.a < found.a_high


def test_runs_read_off_a_plot_share_budgets_and_sizes():
    generator = np.random.default_rng(0)
    cost = np.repeat(np.geomspace(1e17, 1e19, 6), 7)
    N = TRUTH.optimum(cost)[0] * np.tile(np.geomspace(1 / 4, 4, 7), 6)
    shaken = cost * np.exp(0.01 * generator.normal(size=len(cost)))
    found = isoflop(N, shaken, TRUTH.loss(N, shaken / 6 / N), "parabola")
    assert len(found.budgets) == 6 and found.a == pytest.approx(TRUTH.a, abs=0.003)


def test_a_minimum_at_an_edge_is_not_used():
    cost = np.repeat(np.geomspace(1e17, 1e19, 5), 7)
    N = TRUTH.optimum(cost)[0] * np.tile(np.geomspace(1 / 4, 4, 7), 5)
    N[:7] = TRUTH.optimum(cost[:7])[0] * np.geomspace(2, 16, 7)
    found = isoflop(N, cost, TRUTH.loss(N, cost / 6 / N), "akima")
    assert found.budgets[0].reason == "the least loss is at the smallest size" and len(found.used) == 4
    with pytest.raises(NoFit, match="not an IsoFLOP design"):
        isoflop(*(lambda N, D: (N, 6.1 * N * D, TRUTH.loss(N, D)))(*grid(3, 3)))


def test_a_bootstrap_is_the_same_each_time_and_clusters_widen_it():
    N, D = grid()
    size = 0.01 * np.random.default_rng(1).normal(size=7)
    fit = fit_surface(N, D, noisy(N, D, 0.001) * np.exp(np.tile(size, 7)))
    one, again = bootstrap(fit, 200), bootstrap(fit, 200)
    assert np.array_equal(one.values, again.values)
    by_size = bootstrap(fit, 200, clusters=N)
    assert by_size.clusters == 7 and one.clusters == 49
    assert by_size.deviation("alpha") > 1.2 * one.deviation("alpha")


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The short form of benchmarks/law_coverage.py: 40 draws know the share to ± 7 points."""
    N, D = grid(8, 8)
    hits = []
    for seed in range(40):
        draws = bootstrap(fit_surface(N, D, noisy(N, D, 0.005, seed), starts=20), 150, seed=1000 + seed)
        hits.append([draws.interval(n)[0] <= getattr(TRUTH, n) <= draws.interval(n)[1] for n in NAMES])
    assert 0.86 <= np.mean(hits) <= 0.999


@pytest.mark.parametrize(
    ("N", "D", "said"),
    [
        (np.full(9, 1e8), np.geomspace(1e8, 1e10, 9), "one size of model"),
        (np.geomspace(1e7, 1e9, 9), np.full(9, 1e9), "one number of tokens"),
        (np.geomspace(1e7, 1e9, 9), 20 * np.geomspace(1e7, 1e9, 9), "tokens follow from params"),
        (np.array([1e7, 2e7, 4e7, 1e7]), np.array([1e8, 2e8, 9e8, 4e8]), "4 different pairs"),
    ],
)
def test_a_grid_that_does_not_hold_the_law_is_refused_in_a_sentence(N, D, said):
    with pytest.raises(NoFit, match=said):
        fit_surface(N, D, TRUTH.loss(N, D))


def test_losses_that_do_not_fall_are_refused():
    N, D = grid()
    with pytest.raises(NoFit, match="all losses are the same"):
        fit_surface(N, D, np.full(49, 3.0))
    with pytest.raises(NoFit, match="does not fall with"):
        fit_surface(N, D, 1 + N * D / 1e20)


def table_of(families, noise=0.002, seed=0):
    import pandas as pd

    from einlinear.lab.laws import from_frame

    generator = np.random.default_rng(seed)
    N, D = grid(6, 6)
    frames = [
        pd.DataFrame({
            "family": name, "params": N, "tokens": D, "flops": k * N * D,
            "loss": TRUTH.loss(N * r_N, D * r_D) * np.exp(noise * generator.normal(size=len(N))),
        })
        for name, (r_N, r_D, k) in families.items()
    ]  # fmt: skip
    return from_frame(pd.concat(frames))


def test_one_surface_tells_parameters_from_data_and_counts_flops():
    table = table_of({"dense": (1, 1, 6), "btt": (2.0, 1.2, 4)}, seed=1)
    found = scaled_surface(table.of("btt"), table.of("dense"))
    assert found.parameters == pytest.approx(2.0, rel=0.06) and found.tokens == pytest.approx(1.2, rel=0.06)
    assert found.multiplier == pytest.approx(2.0 * 1.2 * 6 / 4, rel=0.03)
    assert found.multiplier_interval[0] < 3.6 < found.multiplier_interval[1]


def test_what_is_held_out_and_what_a_window_keeps():
    table = table_of({"dense": (1, 1, 6)}, noise=0.0)
    out = held_out(table)
    assert out.runs == 7 and out.reach > 1 and abs(out.bias) < 1e-4 and out.rms < 1e-4
    fit = fit_surface(table.parameters, table.tokens, table.loss)
    windows = by_window(table, fit)
    assert windows[0].runs == 36 > windows[1].runs > windows[3].runs
    away = np.abs(np.log(table.parameters / TRUTH.optimum(table.flops)[0]))
    assert windows[2].runs == (away <= np.log(4)).sum()
