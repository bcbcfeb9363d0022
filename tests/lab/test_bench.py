import pytest
import torch

import einlinear as el
from einlinear.lab.bench import bench

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
