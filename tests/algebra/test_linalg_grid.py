"""The committed grid of random compositions and named matrices, as a study to be run by hand."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "linalg_grid"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_cell_is_wrong(seed, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    grid = importlib.import_module("grid")
    wrong = []
    for case in grid.cases(150, seed):
        for name in grid.QUESTIONS:
            if (error := grid.judge(case, name)) is not None:
                wrong.append(f"{name} of {case.name} {case.A.dtype} {case.D.shape}: {error}")
    assert not wrong, "\n".join(wrong)
