"""The committed grid of random compositions and named matrices, as a study to be run by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "linalg_grid.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_cell_is_wrong(seed):
    spec = importlib.util.spec_from_file_location("linalg_grid", PATH)
    assert spec is not None and spec.loader is not None
    grid = importlib.util.module_from_spec(spec)
    sys.modules["linalg_grid"] = grid  # for its dataclass
    spec.loader.exec_module(grid)
    wrong = []
    for case in grid.cases(150, seed):
        for name in grid.QUESTIONS:
            if (error := grid.judge(case, name)) is not None:
                wrong.append(f"{name} of {case.name} {case.A.dtype} {case.D.shape}: {error}")
    assert not wrong, "\n".join(wrong)
