import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import einlinear as el
from einlinear.cli import app
from einlinear.lab import bench as module
from einlinear.lab.bench import TooLarge, bench
from einlinear.lab.speed import _chart

COLUMNS = ["family", "d_in", "d_out", "tokens", "mode", "ms", "ratio_to_dense", "flop_ratio", "floor_ms", "reach"]


def test_every_layer_is_a_row_beside_the_dense_one() -> None:
    rows = bench([el.BTT(), el.LowRank(rank=8)], [(256, 512)], tokens=(64,), dtype=torch.float32)
    assert [(row["family"], row["mode"]) for row in rows] == [
        (family, mode) for mode in ("forward", "training") for family in ("dense", "btt", "low_rank(rank=8)")
    ]
    for row in rows:
        assert list(row)[: len(COLUMNS)] == COLUMNS
        assert {"device", "dtype", "torch", "triton", "commit"} <= row.keys()
        assert row["ms"] > 0
        assert row["reach"] == pytest.approx(row["floor_ms"] / row["ms"], rel=0.01, abs=1e-3)
    dense, _, low_rank = rows[:3]
    assert dense["ratio_to_dense"] == dense["flop_ratio"] == 1
    assert low_rank["flop_ratio"] == pytest.approx(8 * (256 + 512) / (256 * 512), rel=1e-3)


def test_what_finds_no_memory_is_a_sentence_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = module._milliseconds

    def short(make: Callable[[], torch.nn.Module], d_in: int, tokens: int, mode: str) -> float:
        if tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return measured(make, d_in, 1, mode)

    monkeypatch.setattr(module, "_milliseconds", short)
    with pytest.raises(TooLarge, match=r"cannot time 200 tokens of 64 features, forward: .* too little memory"):
        bench([el.BTT()], [64], tokens=(200,))
    told = CliRunner().invoke(app, ["bench", "-s", "btt", "--widths", "64", "--tokens", "1,200"])
    assert told.exit_code == 1
    assert "ratio_to_dense" in told.stdout and "cannot time 200 tokens" in str(told.exception) + told.output
    monkeypatch.setattr(module, "_milliseconds", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        bench([el.BTT()], [64], tokens=(1,))


def test_an_interrupt_leaves_what_was_measured_on_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = module._milliseconds

    def interrupted(make: Callable[[], torch.nn.Module], d_in: int, tokens: int, mode: str) -> float:
        if d_in == 64:
            raise KeyboardInterrupt
        return measured(make, d_in, 1, mode)

    monkeypatch.setattr(module, "_milliseconds", interrupted)
    file = tmp_path / "rows.csv"
    CliRunner().invoke(app, ["bench", "-s", "btt", "--widths", "16x32,64", "--tokens", "1", "--file", str(file)])
    with file.open() as opened:
        found = [(row["family"], row["d_in"], row["d_out"], row["mode"]) for row in csv.DictReader(opened)]
    assert found == [(family, "16", "32", mode) for mode in module.MODES for family in ("dense", "btt")]


@pytest.mark.parametrize("speed, saving", [(0.5, 2.0), (6.0, 16.0), (40.0, 16.0), (0.8, 0.7)])
def test_the_figure_has_room_for_its_points_and_lines(speed: float, saving: float) -> None:
    """The lines of reference begin at 1, where no layer need be."""
    point = {"family": "btt", "mode": "forward", "width": "64", "tokens": 8, "saving": saving, "speed": speed}
    layer = _chart([point | {"floor": saving}], ["forward"])["hconcat"][0]["layer"][0]["encoding"]
    for axis, value in (("x", saving), ("y", speed)):
        low, high = layer[axis]["scale"]["domain"]
        assert low <= min(1, value) <= max(1, value) <= high, axis
