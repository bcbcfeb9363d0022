"""The law card answers for anybody's runs: as JSON, in the terminal, from the command line, and not without reason."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from einlinear.cli import app
from einlinear.lab.laws import NoFit, Surface, TableError, expected_error, from_frame, law_card, print_card
from einlinear.lab.laws.card import STATED, _baseline

TRUTH = Surface(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.37)


def runs(families, noise=0.002, seed=0, budgets=6, sizes=7):
    """IsoFLOP designs; a family's runs cost 1/rho of what they would cost as dense."""
    generator = np.random.default_rng(seed)
    frames = []
    for family, rho in families.items():
        cost = np.repeat(np.geomspace(1e17, 1e19, budgets), sizes)
        N = TRUTH.optimum(cost)[0] * np.tile(np.geomspace(1 / 4, 4, sizes), budgets)
        D = cost / 6 / N
        loss = TRUTH.loss(N, D) * np.exp(noise * generator.normal(size=len(N)))
        frames.append(pd.DataFrame({
            "family": family, "params": N, "tokens": D, "flops": cost / rho, "loss": loss, "seconds": cost / 1e12,
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def card():
    return law_card(from_frame(runs({"dense": 1.0, "btt": 1.5, "kronecker": 0.7}), source="runs"), draws=100)


def test_the_card_has_the_laws_and_their_intervals(card):
    fit = card["parametric"]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = fit["intervals"][name]
        assert low <= fit[name] <= high and low < getattr(TRUTH, name) < high
    assert fit["starts_agreeing"] > 0.9 and fit["a"] == pytest.approx(TRUTH.a, abs=0.02)
    assert card["isoflop"]["akima"]["a"] == pytest.approx(TRUTH.a, abs=0.03)
    assert card["frontier"]["c"] == pytest.approx(TRUTH.gamma, abs=0.03)
    assert set(card["families"]) == {"dense", "btt", "kronecker"} and card["baseline"] == "dense"
    assert card["parametric"] == card["families"]["dense"]["parametric"]


@pytest.mark.parametrize(("family", "truth", "verdict"), [("btt", 1.5, "better"), ("kronecker", 0.7, "worse")])
def test_the_card_has_a_multiplier_per_family(card, family, truth, verdict):
    found = card["multiplier"][family]
    assert found["value"] == pytest.approx(truth, rel=0.05) and found["verdict"] == verdict
    assert found["interval"][0] < truth < found["interval"][1]
    assert found["interpolated"] == pytest.approx(truth, rel=0.06)
    assert found["surface"]["multiplier"] == pytest.approx(truth, rel=0.04)
    assert found["seconds"]["value"] == pytest.approx(1.0, rel=0.05) and found["seconds"]["verdict"] == "undecided"


def test_the_card_fills_the_checklist(card):
    stated = card["checklist"]
    assert stated["runs"] == {"dense": 42, "btt": 42, "kronecker": 42}
    assert stated["variables"]["N"] == "params" and stated["starts"] == 240
    assert "tokenizer" in stated["not_stated"] and stated["tokenizer"] is None
    about = {item: f"the {item}" for item in STATED}
    told = law_card(from_frame(runs({"dense": 1.0})), draws=50, about=about)["checklist"]
    assert {item: told[item] for item in STATED} == about and told["not_stated"] == []
    with pytest.raises(TableError, match="the checklist has no such item"):
        law_card(from_frame(runs({"dense": 1.0})), about={"colour": "red"})


def test_the_card_is_json_and_prints(card):
    json.dumps(card, allow_nan=False)
    text = io.StringIO()
    print_card(card, Console(file=text, width=160))
    said = text.getvalue()
    for part in ("column 'params'", "Huber", "2, IsoFLOP Akima", "Frontier L(C)", "better", "worse", "Not stated"):
        assert part in said


def test_a_card_with_numbers_that_are_none_prints(card):
    gone = {"multiplier": None, "multiplier_interval": None}
    odd = card | {
        "multiplier": {"btt": card["multiplier"]["btt"] | {"surface": card["multiplier"]["btt"]["surface"] | gone}}
    }
    text = io.StringIO()
    print_card(odd, Console(file=text, width=200))
    assert "– (–)" in text.getvalue()


def test_broken_grids_are_warned_of():
    frame = runs({"dense": 1.0}, sizes=9)
    frame = frame[(frame["tokens"] / frame["params"]).between(14, 60)]
    card = law_card(from_frame(frame), draws=50)
    said = " ".join(card["warnings"])
    assert "Tokens per parameter vary by" in said
    curves = pd.concat([
        pd.DataFrame({"params": N, "tokens": np.geomspace(1e8, 1e10, 12), "seed": 0}) for N in np.geomspace(1e7, 1e9, 6)
    ])  # fmt: skip
    curves["loss"] = TRUTH.loss(curves["params"].to_numpy(), curves["tokens"].to_numpy())
    assert "name them in a column 'trunk'" in " ".join(law_card(from_frame(curves), draws=50)["warnings"])
    trunks = law_card(from_frame(curves.assign(trunk=curves["params"])), draws=50)
    assert trunks["parametric"]["bootstrap"]["resampled"] == "trunks"
    assert trunks["parametric"]["bootstrap"]["units"] == 6 and "trunk" not in " ".join(trunks["warnings"])


def test_curves_that_are_not_parallel_are_not_given_one_number():
    other = runs({"btt": 1.0}, noise=0.0005)
    other["flops"] = 1e18 * (other["flops"] / 1e18) ** 0.8
    card = law_card(from_frame(pd.concat([runs({"dense": 1.0}, noise=0.0005), other])), draws=50)
    found = card["multiplier"]["btt"]
    assert found["at_the_ends"] is not None and found["same_exponent_p"] < 0.01
    assert found["interval"][0] <= min(found["at_the_ends"]) and max(found["at_the_ends"]) <= found["interval"][1]


def test_one_size_has_a_frontier_and_no_surface():
    frame = runs({"dense": 1.0})
    card = law_card(from_frame(frame.assign(params=1e8).drop(columns="flops")), draws=50)
    assert "one size of model" in card["parametric"]["reason"] and card["frontier"]["c"] > 0
    assert "A and alpha are not identified, nor is E" in card["parametric"]["reason"]
    assert "beta is the exponent of the frontier" in card["parametric"]["reason"]
    short = law_card(from_frame(frame.assign(tokens=1e9, loss=TRUTH.loss(frame["params"].to_numpy(), 1e9)).drop(
        columns="flops").iloc[:7]), draws=50)  # fmt: skip
    assert "B and beta are not identified" in short["parametric"]["reason"]
    assert short["frontier"]["c"] == pytest.approx(TRUTH.alpha, abs=1e-3)


def test_too_few_runs_are_refused_in_a_sentence():
    with pytest.raises(NoFit, match=r"^Fitting runs\.csv: no law can be had\. .*4 different pairs"):
        law_card(from_frame(runs({"dense": 1.0}).iloc[:4], source="runs.csv"))
    for frame in (runs({"dense": 1.0}).iloc[[0, 8, 16]], runs({"dense": 1.0}).assign(loss=2.0)):
        with pytest.raises(NoFit, match="no law can be had"):
            law_card(from_frame(frame))
    with pytest.raises(TableError, match="the runs are of dense, btt; name one of these"):
        law_card(from_frame(runs({"dense": 1.0, "btt": 1.2})), baseline="mlp")


def test_the_command_prints_the_card(tmp_path):
    path = tmp_path / "runs.csv"
    runs({"mlp": 1.0, "btt": 1.4}).to_csv(path, index=False)
    done = CliRunner().invoke(app, ["fit", str(path), "--json", "--draws", "50", "--card", str(tmp_path / "card.json")])
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    assert card == json.loads((tmp_path / "card.json").read_text())
    assert card["baseline"] == "mlp" and card["multiplier"]["btt"]["value"] == pytest.approx(1.4, rel=0.06)
    assert any("mlp, the first, is the baseline" in note for note in card["notes"])
    shown = CliRunner().invoke(app, ["fit", str(path), "--draws", "50", "--baseline", "btt"])
    assert shown.exit_code == 0 and "Times its own compute that btt needs" in shown.stdout


@pytest.mark.parametrize(
    ("families", "baseline"),
    [
        (["btt", "Dense"], "Dense"), (["btt", "dense_mlp", "moe"], "dense_mlp"), (["moe", "Transformer (baseline)"],
        "Transformer (baseline)"), (["moe-dense", "dense", "dense-wide"], "dense"), (["condensed", "btt"], "condensed"),
        (["a", "vanilla", "standard"], "a"),
    ],
)  # fmt: skip
def test_the_baseline_is_known_by_its_name(families, baseline):
    notes = []
    table = from_frame(pd.DataFrame({"family": families, "params": 1e6, "tokens": 1e8, "loss": 3.0}))
    assert _baseline(table, None, notes) == baseline
    assert bool(notes) == (baseline != "dense")


def test_the_planning_formula():
    assert expected_error(0.01, -0.08, 12, 12) == pytest.approx(0.051, abs=1e-3)


def test_the_guide_runs_and_says_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "laws.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", guide, re.S):
        exec(compile(block, "docs/laws.md", "exec"), {})
    value, interval = capsys.readouterr().out.splitlines()[1].split(" ", 1)
    low, high = json.loads(interval)
    assert low < 1.5 < high and float(value) == pytest.approx(1.5, rel=0.06)
    done = CliRunner().invoke(app, ["fit", "runs.csv", "--draws", "50", "--figure", "law.svg"])
    assert done.exit_code == 0 and (tmp_path / "law.svg").read_text().startswith("<svg")


def test_every_field_of_the_card_is_in_the_guide(card):
    guide = (Path(__file__).parents[2] / "docs" / "laws.md").read_text().partition("## 5. The card")[2]
    for field in {*card, *card["multiplier"]["btt"], *card["isoflop"]["akima"]} - {"frontier"}:
        assert f"`{field}`" in guide or field in guide, field
