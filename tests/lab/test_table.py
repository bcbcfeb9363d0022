"""Anybody's tables: what a column is taken for is said, and what cannot be used is counted or refused in a sentence."""

import numpy as np
import pandas as pd
import pytest

from einlinear.lab.laws import TableError, from_frame, read_table
from einlinear.lab.laws.table import size_labels

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
        from_frame(FRAME.drop(columns="tokens").assign(**{"flops (GPU-years)": 1.0}))
    assert from_frame(FRAME.assign(**{"time (h)": 2.0})).seconds == pytest.approx([7200.0] * 3)


@pytest.mark.parametrize(
    ("names", "divide"),
    [
        ({"params": "paramsM", "tokens": "tokensB", "loss": "loss"}, (1e6, 1e9)),
        ({"params": "Params (in millions)", "tokens": "Tokens [billions]", "loss": "loss (nats)"}, (1e6, 1e9)),
        ({"params": "N (x10^6)", "tokens": "D (1e9)", "loss": "L"}, (1e6, 1e9)),
        ({"params": "params_in_millions", "tokens": "tokens bn", "loss": "loss"}, (1e6, 1e9)),
    ],
)
def test_units_in_names(names, divide):
    frame = FRAME.assign(params=FRAME["params"] / divide[0], tokens=FRAME["tokens"] / divide[1]).rename(columns=names)
    table = from_frame(frame)
    assert table.parameters == pytest.approx(FRAME["params"]) and table.tokens == pytest.approx(FRAME["tokens"])


@pytest.mark.parametrize(
    ("name", "unit"),
    [("compute (PF-days)", 8.64e19), ("compute_exaflops", 1e18), ("EFLOPs", 1e18), ("training flops [1e15]", 1e15)],
)
def test_units_of_compute(name, unit):
    table = from_frame(FRAME.assign(**{name: [1.0, 2.0, 3.0]}))
    assert table.flops == pytest.approx([unit, 2 * unit, 3 * unit])


def test_a_speed_is_no_compute():
    for name in ("tflops", "flops_per_second", "MFU"):
        assert from_frame(FRAME.assign(**{name: 300.0})).columns["flops"] == "= 6 params tokens"


@pytest.mark.parametrize("name", ["log10_{}", "log10({})", "{} (log10)", "Log10 {}"])
def test_logarithms_of_a_stated_base_are_undone_and_told(name):
    frame = FRAME.assign(params=np.log10(FRAME["params"]), tokens=np.log10(FRAME["tokens"]))
    table = from_frame(frame.rename(columns={"params": name.format("params"), "tokens": name.format("N tokens")}))
    assert table.parameters == pytest.approx(FRAME["params"]) and table.tokens == pytest.approx(FRAME["tokens"])
    assert sum("logarithms of base 10" in note for note in table.notes) == 2
    natural = from_frame(FRAME.assign(ln_loss=np.log(FRAME["loss"])).drop(columns="loss"))
    assert natural.loss == pytest.approx(FRAME["loss"])


def test_logarithms_of_no_stated_base_are_refused():
    with pytest.raises(TableError, match="'log_params' does not say of which base its logarithms are: name it log10_"):
        from_frame(FRAME.rename(columns={"params": "log_params"}))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings_remarks_and_separators(tmp_path, encoding):
    for separator in (",", ";", "\t", " "):
        text = "# runs of a Tuesday\n\n" + FRAME.assign(note="é").to_csv(index=False, sep=separator)
        (tmp_path / "runs.csv").write_text(text, encoding=encoding)
        assert read_table(tmp_path / "runs.csv").loss.tolist() == [3.0, 2.5, 2.2]


def test_decimal_commas_are_told_by_one_number_and_refused_where_they_are_unclear(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("params;tokens;loss\n1.000.000;1e8;3,0\n2e6;2e8;2,512\n4e6;3e8;2,2\n")
    table = read_table(path)
    assert table.loss.tolist() == [3.0, 2.512, 2.2] and any("decimal point" in note for note in table.notes)
    path.write_text('params,tokens,loss\n"1,000","1,000,000",3.0\n"2,000","2,000,000",2.5\n')
    assert read_table(path).parameters.tolist() == [1000, 2000]
    path.write_text("params;tokens;loss\n1e6;1e8;3,125\n2e6;2e8;2,512\n")
    with pytest.raises(TableError, match="the commas in 'loss' may part thousands or be decimal"):
        read_table(path)


def test_rows_without_a_trunk_are_alone_and_a_trunk_has_one_size():
    some = from_frame(FRAME.assign(trunk=["a", None, None]))
    assert len(set(some.trunk.tolist())) == 3
    repeated = from_frame(pd.concat([FRAME.assign(run=0), FRAME.assign(run=1, loss=[3.1, 2.6, 2.3])]))
    assert len(set(repeated.trunk.tolist())) == 6 and any("a label and a size" in note for note in repeated.notes)


def test_sizes_that_lie_close_do_not_all_become_one():
    sizes = np.geomspace(1e6, 1e8, 3000)
    labels = size_labels(sizes)
    assert np.log(1e2) / 0.005 / 1.5 < labels.max() + 1 < np.log(1e2) / 0.005 * 1.5
    assert size_labels(np.array([1e6, 1.004e6, 2e6])).tolist() == [0, 0, 1]


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
        "no finite number in 'loss'": 3, "no finite number in 'tokens'": 3, "not above zero in 'loss'": 3,
        "the same run again (every used column equal)": 1,
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
        ("params,tokens,loss\n1,2,-3\n", "every 'loss' is negative"),
        ("params,tokens,loss\n1,0,3\n", "no row can be used .1 not above zero in 'tokens'"),
        ("params,steps,batch size,loss\n1,2,3,4\n", "For tokens it may be 'steps' or 'batch size'; .* tokens=steps"),
        ("params,tokens,my loss\n1,2,3\n", "For loss it may be 'my loss'.*--column \"loss=my loss\""),
        ('[{"params": 1}]', "no column was recognised for loss and tokens"),
        ("[1, 2", "not a table that can be read"),
        ("1e6,2e8,3.0\n2e6,4e8,2.5\n", "its first line holds numbers .* put a line such as params,tokens,loss"),
        ("params,tokens,loss\n1,2,3,4\n", "not a table that can be read"),
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
