"""The experiment on experts: stopped and gone on with, its table read back, and its page that of the results."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from einlinear.lab.compare import Plan
from einlinear.lab.store import Store
from einlinear.lab.train import Recipe

ROOT = Path(__file__).parents[2]
TINY = Plan(
    families=("dense", "mixture(of='btt', experts=4, active=2)", "moe(experts=8, active=2)"),
    widths=(16, 32),
    depth=1,
    horizons=(2_000, 4_000, 8_000),
    rates=(2**-7,),
    tuning=2_000,
    recipe=Recipe(batch=4, base_width=32, base_depth=1, warmup=2),
    context=32,
)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """recipes/experts_page.py, which imports recipes/experts.py."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import experts_page

    yield experts_page
    for name in ("experts", "experts_page", "experts_results", "experts_routers"):
        del sys.modules[name]


def test_it_stops_goes_on_and_is_read_back(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = sys.modules["experts"]
    monkeypatch.setitem(recipe.PLANS, "small", TINY)
    monkeypatch.setattr(sys.modules["experts_results"], "RESULTS", tmp_path)
    places = ["--store", tmp_path / "runs.sqlite", "--report", tmp_path / "r.html", "--results", tmp_path]

    def call(*options: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["experts.py", "--device", "cpu", "--workers", "0", *map(str, places), *options]
        )
        recipe.main()
        return capsys.readouterr().out

    assert "18 runs" in call("--plan") and not (tmp_path / "runs.sqlite").exists()
    assert "goes on from here" in call("--minutes", "0.002")
    with Store(tmp_path / "runs.sqlite") as store:
        before = len(store.runs())
    assert before < 18 and "goes on" not in call()
    with Store(tmp_path / "runs.sqlite") as store:
        runs = store.runs()
    assert len(runs) == 18 and all(run.status == "done" for run in runs)
    assert page.results("small") == [replace(run, curve="[]", routers="{}", spec="") for run in runs]
    call("--clock")
    timed = page.results("small")
    assert all(run.seconds > 0 for run in timed) and timed[0].seconds != runs[0].seconds
    assert page.table("small").count("\n") == 4 and "2.05 k" not in page.protocol("small")
    assert "Router health" in (tmp_path / "r.html").read_text()


def test_the_page_is_that_of_the_results(page: ModuleType) -> None:
    """`python recipes/experts_page.py` writes it."""
    text = page.PAGE.read_text()
    for name, part in page.PARTS.items():
        assert f"<!-- {name} -->\n{part()}\n<!-- end -->" in text


@pytest.mark.parametrize(("name", "rows"), [("health", 64), ("h200_routers", 3 * 8 * 16)])
def test_no_expert_is_dead_at_the_end(page: ModuleType, name: str, rows: int) -> None:
    """The committed results: of `python recipes/experts.py --health`, and of the longest runs on an H200."""
    loads = sys.modules["experts_results"].read(page.RESULTS / f"experts_{name}_loads.csv")
    assert len(loads) >= rows and min(float(row["load"]) for row in loads) > 0
