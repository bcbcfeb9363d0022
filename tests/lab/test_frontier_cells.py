"""Laws of what a law of cost is fitted to: the best size for each cost, whatever else was tried beside it."""

import numpy as np
import pytest

from einlinear.lab.laws import Surface, compare_cells, fit_frontier
from einlinear.lab.laws.cells import cells_of, frontier_cells
from einlinear.lab.laws.rows import Row

TRUTH = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.37)


def grid(sizes, lengths, *, noise=0.005, seed=0, saving=1.0, family="dense"):
    """Every size at every length: most of them far from the best one for their compute."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(2e8, 2e10, lengths)))
    loss = TRUTH.loss(N * saving**0.5, D * saving**0.5)
    loss *= np.exp(noise * np.random.default_rng(seed).normal(size=len(N)))
    rows = [
        Row(family=family, parameters=n, tokens=d, flops=6 * n * d, loss=value)
        for n, d, value in zip(*(column.tolist() for column in (N, D, loss)), strict=True)
    ]
    return cells_of(rows)[family]


@pytest.mark.parametrize(("sizes", "lengths"), [(7, 5), (8, 8)])
def test_a_full_grids_frontier_has_the_exponent_of_its_surface(sizes, lengths):
    found = [fit_frontier(grid(sizes, lengths, seed=seed)) for seed in range(20)]
    assert np.mean([law.c for law in found]) == pytest.approx(TRUTH.gamma, rel=0.04)
    assert np.mean([law.c_low <= TRUTH.gamma <= law.c_high for law in found]) >= 0.85
    assert all(len(law.fitted) < 0.7 * sizes * lengths for law in found)


def test_sizes_far_from_the_best_do_not_blur_a_multiplier():
    found = [
        compare_cells(grid(8, 8, seed=seed, saving=1.5), grid(8, 8, seed=100 + seed), names=("other", "dense"))
        for seed in range(20)
    ]
    assert np.mean([f.low <= 1.5 <= f.high for f in found]) >= 0.85
    assert np.median([f.high / f.low for f in found]) < 1.12


def test_diverged_runs_do_not_choose_the_frontier():
    """Three losses near a uniform guess's would make the noise of all look so large that everything is frontier."""
    cells = grid(7, 5)
    lost = {1: 10.8, 6: 7.3, 28: 11.0}
    broken = [
        Row(
            family="dense", parameters=c.runs[0].parameters, tokens=c.tokens, flops=c.cost,
            loss=lost.get(number, c.loss),
        )
        for number, c in enumerate(cells)
    ]  # fmt: skip
    kept = {(cell.cost, cell.tokens) for cell in frontier_cells(cells)}
    with_broken = {(cell.cost, cell.tokens) for cell in frontier_cells(cells_of(broken)["dense"])}
    assert len(kept ^ with_broken) <= 3


def test_all_cells_are_frontier_where_each_is_the_best_of_its_cost(simulate):
    cells = cells_of(simulate({"dense": 1.0}, noise=0.005))["dense"]
    assert len(frontier_cells(cells)) >= len(cells) - 1
