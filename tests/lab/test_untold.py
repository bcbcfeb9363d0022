"""Laws of tables that hold more than they say: unfinished runs, trials, data sets, units."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from einlinear.lab.laws import Surface, TableError, from_frame, law_card, read_table

TRUTH = Surface(E=1.7, A=400.0, B=410.0, alpha=0.34, beta=0.28)


def frame(**more):
    """Five sizes at four lengths, with noise."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 2e9, 5), np.geomspace(5e8, 5e10, 4)))
    loss = TRUTH.loss(N, D) * np.exp(0.004 * np.random.default_rng(0).normal(size=len(N)))
    return pd.DataFrame({"params": N, "tokens": D, "loss": loss, **more})


@pytest.mark.parametrize("column", ["State", "status", "run_status"])
@pytest.mark.parametrize("word", ["finished", "Completed", "success"])
def test_failed_runs_are_left_out_and_counted(column, word):
    table = from_frame(frame(**{column: ["crashed", "running", *[word] * 18]}))
    assert len(table) == 18 and table.dropped == {f"not finished ('{column}')": 2}


def test_a_state_of_which_no_word_is_known_leaves_nothing_out():
    assert len(from_frame(frame(state=["Ohio"] * 20))) == 20


@pytest.mark.parametrize(
    "columns",
    [
        {"current_steps": [500] * 5 + [1000] * 15, "total_steps": 1000},
        {"step": [10] * 5 + [999] * 15, "max steps": 1000},
        {"portion_steps_elapsed": [0.5] * 5 + [1.0] * 15},
        {"progress": [50] * 5 + [100] * 15},
    ],
)
def test_checkpoints_on_the_way_are_left_out_and_counted(columns):
    table = from_frame(frame(**columns))
    assert len(table) == 15 and sum(table.dropped.values()) == 5
    assert all(reason.startswith("checkpoints on the way") for reason in table.dropped)


def test_counters_of_different_things_and_runs_of_which_none_is_finished_are_left_alone():
    assert len(from_frame(frame(step=10, total_epochs=20))) == 20
    assert len(from_frame(frame(step=10, total_steps=20))) == 20


def test_data_sets_fitted_as_one_are_warned_of_and_can_be_fitted_apart():
    parts = [frame(corpus=name) for name in ("c4", "pile", "web")]
    for part, offset in zip(parts, (0.0, -0.4, 0.3), strict=True):
        part["loss"] += offset
    together = pd.concat(parts)
    (warning,) = from_frame(together).warnings
    assert "'corpus' (3 values" in warning and "--column family=corpus" in warning
    assert law_card(from_frame(together), draws=50)["warnings"][0] == warning
    apart = from_frame(together, {"family": "corpus"})
    assert apart.families == ["c4", "pile", "web"] and apart.warnings == ()


def test_trials_of_a_setting_are_warned_of_and_the_best_can_be_kept():
    parts = []
    for rate, loss in ((1e-3, 0.02), (2e-3, 0.0), (4e-3, 0.03)):
        for seed in (0, 1):
            part = frame(lr=rate, seed=seed)
            part["loss"] *= np.exp(loss + 0.001 * seed)
            parts.append(part)
    tried = pd.concat(parts)
    (warning,) = from_frame(tried).warnings
    assert "'lr' (3 values" in warning and "--best-over lr" in warning
    best = from_frame(tried, best=["lr"])
    assert best.warnings == () and len(best) == 40  # of each size, length and seed
    assert best.loss[best.seed == "0"] == pytest.approx(frame()["loss"].to_numpy())
    assert best.dropped == {"not the best over 'lr' at their size and tokens": 80}
    with pytest.raises(TableError, match="there is no column 'rate' to keep the best over; the file has params"):
        from_frame(tried, best=["rate"])


def test_columns_that_follow_from_the_size_or_say_nothing_are_no_warning():
    chance = np.random.default_rng(1).integers(0, 3, size=20)
    assert from_frame(frame(width=frame()["params"].rank(method="dense"), colour=chance)).warnings == ()
    assert from_frame(frame(note="x")).warnings == ()


@pytest.mark.parametrize(("column", "by"), [("tokens", 1e9), ("params", 1e9), ("tokens", 1e12)])
def test_a_unit_that_was_left_out_is_asked_for(column, by):
    made = frame()
    made[column] /= by
    (warning,) = from_frame(made).warnings
    assert "tokens per parameter (median): is one of" in warning


def test_a_fuller_column_goes_before_one_that_names_blocks_of_rows():
    made = frame().rename(columns={"params": "N"})
    made["Params"] = ["20M", *[None] * 19]
    assert from_frame(made).columns["parameters"] == "N"


def test_losses_far_above_the_surface_are_warned_of():
    made = frame()
    made.loc[3, "loss"] = 10.8
    said = [w for w in law_card(from_frame(made), draws=50)["warnings"] if "far above the surface" in w]
    assert len(said) == 1 and said[0].startswith("1 of 20 losses") and "10.8" in said[0]
    assert not [w for w in law_card(from_frame(frame()), draws=50)["warnings"] if "far above" in w]


def test_json_and_gzip_are_read_as_csv_is(tmp_path):
    made = frame()
    records = made.to_dict(orient="records")
    files = {
        "runs.csv": made.to_csv(index=False), "runs.json": json.dumps(records),
        "lines.jsonl": "\n".join(json.dumps({"config": {}, **record}) for record in records),
        "columns.json": json.dumps(made.to_dict(orient="list")),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for name in files:
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert read_table(path).loss == pytest.approx(made["loss"].to_numpy())
