"""Anybody's tables: what a column is taken for is said, and what cannot be used is counted or refused in a sentence."""

import numpy as np
import pandas as pd
import pytest

from einlinear.lab.laws import TableError, from_frame, read_table

FRAME = pd.DataFrame({"params": [1e6, 2e6, 4e6], "tokens": [1e8, 2e8, 3e8], "loss": [3.0, 2.5, 2.2]})


@pytest.mark.parametrize(
    "names",
    [
        {"params": "N", "tokens": "D", "loss": "L"},
        {"params": "n_params", "tokens": "Training Tokens", "loss": "val/loss"},
        {"params": "Model Size", "tokens": "tokens_seen", "loss": "Validation Loss"},
        {"params": "parameters", "tokens": "num-tokens", "loss": "final_loss"},
        {"params": "# params", "tokens": "D", "loss": "loss (nats)"},
        {"params": "Model Size (params)", "tokens": "Dataset [tokens]", "loss": "Final loss (validation loss)"},
    ],
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_common_spellings_are_understood_and_told(tmp_path, names, separator):
    FRAME.rename(columns=names).to_csv(tmp_path / "runs.csv", index=False, sep=separator)
    table = read_table(tmp_path / "runs.csv")
    assert {"parameters": names["params"], "tokens": names["tokens"], "loss": names["loss"]}.items() <= (
        table.columns.items()
    )
    assert table.loss.tolist() == [3.0, 2.5, 2.2] and table.flops == pytest.approx(6 * table.parameters * table.tokens)


def test_parquet_is_read_as_csv_is(tmp_path):
    FRAME.to_parquet(tmp_path / "runs.parquet")
    FRAME.to_parquet(tmp_path / "runs.data")
    for name in ("runs.parquet", "runs.data"):
        assert read_table(tmp_path / name).parameters.tolist() == FRAME["params"].tolist()


def test_what_is_made_from_other_columns_is_said():
    made = from_frame(FRAME)
    assert made.columns["flops"] == "= 6 params tokens" and any("6 params tokens" in note for note in made.notes)
    counted = from_frame(FRAME.drop(columns="tokens").assign(flops=[6e14, 2.4e15, 7.2e15]))
    assert counted.tokens.tolist() == FRAME["tokens"].tolist() and counted.columns["tokens"] == "= flops / (6 params)"


def test_the_better_of_two_columns_is_taken_and_the_other_told():
    table = from_frame(FRAME.assign(train_loss=1.0, dataset="c4"))
    assert table.columns["loss"] == "loss" and any("not 'train_loss'" in note for note in table.notes)
    assert any("Columns not used: train_loss, dataset" in note for note in table.notes)
    chosen = from_frame(FRAME.assign(train_loss=1.0), {"loss": "train_loss"})
    assert chosen.loss.tolist() == [1.0] * 3 and any("training loss" in note for note in chosen.notes)


def test_units_in_names_and_suffixes_of_numbers_are_read_and_told():
    named = from_frame(FRAME.rename(columns={"params": "params (M)", "tokens": "tokens_B"}).assign(
        **{"params (M)": [1, 2, 4], "tokens_B": [0.1, 0.2, 0.3]}))  # fmt: skip
    written = from_frame(FRAME.assign(params=["1M", "2m", "4,000,000"], tokens=["0.1B", "200M", "3e8"]))
    for table in (named, written):
        assert table.parameters == pytest.approx(FRAME["params"]) and table.tokens == pytest.approx(FRAME["tokens"])
    assert sum("multiplied by" in note for note in named.notes) == 2
    assert sum("suffixes" in note for note in written.notes) == 2
    small = from_frame(FRAME.assign(params=[1, 2, 4], tokens=[100, 200, 300]))
    assert small.parameters.tolist() == [1, 2, 4] and any("taken as they are" in note for note in small.notes)


def test_a_unit_that_is_not_known_is_not_passed_over():
    with pytest.raises(TableError, match="no column was recognised for tokens"):
        from_frame(FRAME.drop(columns="tokens").assign(**{"flops (PF-days)": 1.0}))
    assert from_frame(FRAME.assign(**{"time (h)": 2.0})).seconds == pytest.approx([7200.0] * 3)


def test_bits_are_kept_and_told_or_turned_to_nats_when_asked():
    bits = FRAME.rename(columns={"loss": "bpb"})
    assert from_frame(bits).unit == "bits" and any("in bits by its name" in note for note in from_frame(bits).notes)
    nats = from_frame(bits, bits=True)
    assert nats.unit == "nats" and nats.loss == pytest.approx(FRAME["loss"] * np.log(2))
    assert from_frame(FRAME.assign(loss=np.exp(FRAME["loss"])).rename(columns={"loss": "ppl"})).loss == pytest.approx(
        FRAME["loss"]
    )


def test_seconds_may_be_hours():
    assert from_frame(FRAME.assign(hours=[1, 2, 3])).seconds.tolist() == [3600, 7200, 10800]
    assert from_frame(FRAME.assign(time_minutes=[1, 2, 3])).seconds.tolist() == [60, 120, 180]
    assert from_frame(FRAME.assign(seconds=[1, np.nan, 3])).seconds[[0, 2]].tolist() == [1, 3]


def test_rows_that_cannot_be_used_are_counted():
    frame = pd.concat(
        [FRAME, FRAME.iloc[:1], FRAME.assign(loss=np.nan), FRAME.assign(loss=-1.0), FRAME.assign(tokens="?")]
    )
    table = from_frame(frame)
    assert len(table) == 3 and table.rows == 13
    assert table.dropped == {
        "a number is missing or not finite": 6, "not positive": 3, "the same run again (every used column equal)": 1,
    }  # fmt: skip
    assert len(from_frame(pd.concat([FRAME, FRAME]).assign(seed=[0, 0, 0, 1, 1, 1]))) == 6
    assert table.without_highest(2).loss.tolist() == [2.2]
    assert table.without_highest(2).dropped["of the highest losses, as asked"] == 2


def test_a_store_of_this_library_leaves_trials_and_failures_out():
    frame = FRAME.assign(purpose=["measure", "tune", "measure"], status=["done", "done", "diverged"])
    table = from_frame(frame)
    assert len(table) == 1 and sum(table.dropped.values()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a table that can be read"),
        ("params,tokens,loss\n", "column names and no rows"),
        (
            "params,tokens,accuracy\n1,2,3\n",
            "no column was recognised for loss; the columns are params, tokens, accuracy",
        ),
        ("params,loss\n1,2\n", "no column was recognised for tokens"),
        ("params,tokens,loss\n1,2,x\n", "no column was recognised for loss"),
        ("params,tokens,loss\n1,2,-3\n", "no row can be used"),
    ],
)
def test_what_is_no_table_of_runs_is_refused_in_a_sentence(tmp_path, content, said):
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(TableError, match=said):
        read_table(tmp_path / "runs.csv")


def test_a_choice_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(TableError, match="there is no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(TableError, match="there is no column 'ce' for loss; the file has params, tokens, loss"):
        from_frame(FRAME, {"loss": "ce"})
    with pytest.raises(TableError, match="there is no role 'weight'"):
        from_frame(FRAME, {"weight": "loss"})
