"""Claims put to the test: protocols that can be run, verdicts that can say all three, pages that follow from runs."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import einlinear as el
from einlinear.lab.compare import Plan
from einlinear.lab.data import tasks
from einlinear.lab.machine import Machine
from einlinear.lab.run import Run
from einlinear.lab.store import Store
from einlinear.lab.studies import (
    Experiment,
    Part,
    Question,
    Study,
    collect,
    foretold,
    label,
    measure,
    ordering,
    page,
    priced,
    rate_transfer,
    read_runs,
    read_steps,
    timed,
    verdict,
    worth,
    write_page,
    write_runs,
    write_steps,
)
from einlinear.lab.studies.landscape import _carried as carried
from einlinear.lab.studies.landscape import best_rates
from einlinear.lab.studies.ordering import rank_correlation, regression
from einlinear.lab.studies.page import steps_of
from einlinear.lab.studies.protocol import TUNED, measured, place_of
from einlinear.lab.train import Recipe

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "studies"


def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "recipes" / "claims.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = recipe()
STUDIES: dict[str, Study] = RECIPE.STUDIES
DONE = [
    (name, scale)
    for name, study in STUDIES.items()
    for scale in study.scales
    if (PAGES / f"{name}-{scale}.csv").exists()
]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def part(low: float, high: float, claimed: str = "above", bound: float = 1.0) -> Part:
    return Part(what="it", value=(low + high) / 2, low=low, high=high, claimed=claimed, bound=bound)


# Verdicts.


@pytest.mark.parametrize(
    "claimed, holds, fails, opens",
    [
        ("above", (1.1, 2.0), (0.5, 0.9), (0.9, 1.1)),
        ("below", (0.5, 0.9), (1.1, 2.0), (0.9, 1.1)),
        ("within", (-0.9, 0.5), (1.1, 3.0), (0.5, 1.5)),
        ("within", (-0.1, 0.1), (-3.0, -1.1), (-2.0, 2.0)),
    ],
)
def test_a_part_is_decided_by_an_interval_on_one_side_alone(claimed, holds, fails, opens) -> None:
    found = [part(*interval, claimed).outcome for interval in (holds, fails, opens, (math.nan, math.nan))]
    assert found == ["holds", "fails", "open", "open"]


@pytest.mark.parametrize(
    "found, more",
    [
        (part(1.1, 2.0), 1),  # decided
        (part(1.1 - 0.4, 1.1 + 0.4), 16),  # 4 times too wide
        (part(0.9 - 0.2, 0.9 + 0.2), 4),  # towards failing
        (part(-0.4, 0.4, "within", 0.2), 4),
        (part(-0.1, 0.5, "within", 0.25), 36),  # the nearer bound counts
        (part(0.3 - 0.1, 0.3 + 0.1, "within", 0.25), 4),  # towards failing, outside
        (Part(what="it", value=2.0, low=0.5, high=8.0, claimed="above", bound=1.0, ratio=True), 4),
        (part(0.5, 1.5), math.inf),
    ],
)
def test_runs_to_decide_go_by_the_root_of_their_number(found, more) -> None:
    assert found.runs_to_decide == pytest.approx(more)


def test_a_claim_holds_where_all_of_it_does() -> None:
    holds, fails, open_ = part(1.1, 2.0), part(0.1, 0.2), part(0.5, 1.5)
    assert verdict([holds, holds]) == "holds"
    assert verdict([holds, open_]) == verdict([]) == "undecided"
    assert verdict([holds, open_, fails]) == "does not hold"


# Landscapes of rates.


def landscape(drift: float, naive: float, noise: float = 0.01, loss: float = 0.0) -> list[Run]:
    """Parabolas over log2 of the rate whose vertex moves by so many octaves for each doubling of the width."""
    random = np.random.default_rng(0)
    runs = []
    for aware, slope in ((True, drift), (False, naive)):
        setup = json.dumps({} if aware else {"structure_aware": False})
        for width in (16, 64, 256):
            for power in range(-12, -3):
                for seed in (0, 1):
                    ln = 0.05 * (power + 8 - slope * math.log2(width / 64)) ** 2 + noise * random.normal() + loss
                    runs.append(Run(
                        task="teacher", fingerprint="", family="btt", width=width, depth=1, tokens=1, rate=2.0**power,
                        seed=seed, setup=setup, loss=math.exp(ln),
                    ))  # fmt: skip
    return runs


def test_the_vertex_of_a_parabola_is_the_best_rate() -> None:
    rates = np.arange(-8.0, -2.0)
    losses = np.array([(rates + 5.3) ** 2, (rates + 8.5) ** 2, np.where(rates < -4, np.inf, rates)])
    assert best_rates(rates, losses) == pytest.approx([-5.3, -8.0, -4.0])  # outside the grid its edge


@pytest.mark.parametrize("best", [-7.5, -7.3, -7.1])
def test_the_best_rate_of_an_uneven_landscape_is_found_wherever_the_grid_lies(best) -> None:
    rates = np.arange(-11.0, -3.0)
    losses = 0.03 * (rates - best) ** 2 + 0.02 * np.maximum(rates - best, 0) ** 3
    assert best_rates(rates, losses[None]) == pytest.approx([best], abs=0.11)  # by a parabola .25 to .33 too low


def test_seeds_that_only_some_rates_have_shift_no_rate_against_another() -> None:
    """Seed 1 has higher losses throughout, and is there near the best rate alone: the best rate stays the same."""
    even = landscape(0.0, 0.4, 0.001)
    high = [replace(run, loss=run.loss * (1.05 if run.seed else 1.0)) for run in even]
    some = [run for run in high if run.seed == 0 or 2**-9 <= run.rate <= 2**-6]
    assert len(some) < len(high)
    found, wanted = (rate_transfer(runs) for runs in (some, even))
    assert [part.value for part in found.parts] == pytest.approx([part.value for part in wanted.parts], abs=0.02)


def test_the_loss_at_a_carried_rate_is_between_those_of_its_neighbours() -> None:
    rates = np.arange(-8.0, -3.0)
    small, large = (rates + 5.75) ** 2, np.array([5.0, 4.0, 2.0, math.inf, math.inf])
    drawn = {("x", 16): (rates, small[None]), ("x", 64): (rates, large[None])}
    assert carried(drawn, "x", [16, 64]) == pytest.approx([0.75 * 2 + 0.25 * math.inf])
    drawn["x", 64] = rates, np.array([[5.0, 4.0, 2.0, 1.0, math.inf]])
    assert carried(drawn, "x", [16, 64]) == pytest.approx([1.75])


@pytest.mark.parametrize(
    "drift, naive, noise, expected",
    [(0.0, 0.5, 0.002, "holds"), (0.5, 0.6, 0.002, "does not hold"), (0.0, 0.5, 0.4, "undecided")],
)
def test_a_landscape_gives_each_verdict(drift, naive, noise, expected) -> None:
    found = rate_transfer(landscape(drift, naive, noise))
    assert found.verdict == expected, found.sentence
    assert len(found.parts) == 3
    if noise < 0.1:
        assert found.parts[0].value == pytest.approx(drift, abs=0.05)
        assert found.parts[1].value == pytest.approx(naive - drift, abs=0.05)


def test_runs_that_did_not_finish_are_worse_than_any(simulate) -> None:
    runs = [replace(run, loss=None, status="diverged") if run.rate > 2**-6 else run for run in landscape(0.0, 0.3)]
    found = rate_transfer(runs)
    assert found.parts[0].value == pytest.approx(0, abs=0.05)
    assert any("did not finish" in note for note in found.notes)


# Multipliers.


@pytest.mark.parametrize(
    "truth, noise, expected", [(2.0, 0.002, "holds"), (0.5, 0.002, "does not hold"), (1.1, 0.03, "undecided")]
)
def test_worth_gives_each_verdict(simulate, truth, noise, expected) -> None:
    runs = simulate({"dense": 1.0, "btt": truth}, noise=noise)
    found = worth(runs, [Question(axis="flops", claimed="btt")])
    assert found.verdict == expected, found.sentence
    assert found.parts[0].low <= truth <= found.parts[0].high


def test_the_training_loss_is_asked_for_where_the_claim_says_so(simulate) -> None:
    runs = [
        replace(run, curve=json.dumps([[1, 9.0], [2, run.loss]]), loss=9.0)
        for run in simulate({"dense": 1.0, "btt": 2.0})
    ]
    found = worth(runs, [Question(axis="flops", claimed="btt", training=True)])
    assert found.parts[0].value == pytest.approx(2.0, rel=1e-3)


def trained(truth: float, noise: float, seed: int) -> list[Run]:
    """Three horizons of two seeds at two widths; a structure costs 1 / truth of dense at equal loss and width."""
    random = np.random.default_rng(seed)
    runs = []
    for family, width, replica in product(("dense", "btt"), (32, 64), (0, 1)):
        common = random.normal()
        for tokens in (100, 200, 400):
            seconds = tokens * width / (truth if family == "btt" else 1.0)
            ln = -0.3 * math.log(tokens * (1.3 if family == "btt" else 1.0)) - 0.2 * math.log(width)
            runs.append(Run(
                task="t", fingerprint="", family=family, width=width, depth=1, tokens=tokens, rate=0.1, seed=replica,
                seconds=seconds * (1.3 if family == "btt" else 1.0), trunk=f"{family}{width}{replica}",
                loss=math.exp(ln + noise * (0.9 * common + 0.45 * random.normal())),
            ))  # fmt: skip
    return runs


def test_at_equal_width_the_multiplier_needs_no_law() -> None:
    asked = [Question(axis="seconds", claimed="btt", by_width=True)]
    found = worth(trained(0.5, 0.0001, 0), asked)
    assert [part.value for part in found.parts] == pytest.approx([0.5, 0.5], rel=1e-2)
    assert found.verdict == "does not hold" and "btt at width 64" in found.sentence
    held = [part.low <= 1.3 <= part.high for n in range(150) for part in worth(trained(1.3, 0.02, n), asked).parts]
    assert 0.92 <= np.mean(held) <= 0.995


def test_curves_that_are_not_parallel_are_said_to_be(simulate) -> None:
    runs = simulate({"dense": 1.0, "btt": 2.0}, noise=0.0005, own_exponents={"btt": 0.2})
    (note,) = worth(runs, [Question(axis="flops", claimed="btt")]).notes
    assert "the two curves are not parallel" in note and "no one number is true" in note
    assert not worth(simulate({"dense": 1.0, "btt": 2.0}), [Question(axis="flops", claimed="btt")]).notes


def test_what_is_claimed_and_was_not_run_is_undecided(simulate) -> None:
    asked = [Question(axis="flops", claimed=name) for name in ("btt", "kronecker")]
    found = worth(simulate({"dense": 1.0, "btt": 2.0}, noise=0.002), asked)
    assert [part.outcome for part in found.parts] == ["holds", "open"] and found.verdict == "undecided"


POINTS = {
    "low_rank(rank=8)": (0, 0, 0), "theta(theta=(1.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0))": (0, 0.5, 0.5),
    "monarch(blocks=4)": (0, 1, 1), "kronecker": (0.5, 1, 0.5), "btt": (0, 1, 0.5),
    "theta(theta=(0.6667, 0.3333, 0.0, 0.3333, 0.6667, 0.0, 0.0))": (0.33, 0.67, 0.33),
    "theta(theta=(0.3333, 0.3333, 0.3333, 0.0, 1.0, 0.0, 0.0))": (0, 0.67, 0.67),
}  # fmt: skip


@pytest.mark.parametrize(
    "omega, psi, scatter, expected",
    [(-2.0, 1.5, 0.02, "holds"), (2.0, -1.5, 0.02, "does not hold"), (-0.5, 0.3, 1.0, "undecided")],
)
def test_an_ordering_gives_each_verdict(simulate, omega, psi, scatter, expected) -> None:
    random = np.random.default_rng(3)
    truth = {
        name: math.exp(omega * at[0] + psi * at[1] + scatter * random.normal() - 0.5) for name, at in POINTS.items()
    }
    found = ordering(simulate({"dense": 1.0} | truth))
    assert found.verdict == expected, found.sentence
    if scatter < 0.1:
        assert [p.value for p in found.parts] == pytest.approx([omega, psi, 0], abs=0.2)
        for note, part in zip(found.notes[-3:], found.parts, strict=True):  # no point matters much
            assert "with one point left out" in note
            assert [float(n) for n in re.findall(r"(?:from|to) ([+-].*?) without", note)] == pytest.approx(
                [part.value] * 2, abs=0.3
            )


def test_regression_is_least_squares_with_students_intervals() -> None:
    from scipy import stats

    random = np.random.default_rng(0)
    x = random.normal(size=(12, 1))
    y = 2 * x[:, 0] + random.normal(size=12)
    ((value, low, high),) = regression(x, y)
    known = stats.linregress(x[:, 0], y)
    assert value == pytest.approx(known.slope)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 10) * known.stderr)
    with pytest.raises(ValueError, match="add structures"):
        regression(x[:2], y[:2])
    with pytest.raises(ValueError, match="add structures"):
        regression(np.ones((9, 1)), y[:9])


def test_rank_correlation_has_an_interval_within_one() -> None:
    value, low, high = rank_correlation([1, 2, 3, 4, 5, 6], [1, 2, 4, 3, 5, 6])
    assert -1 < low < value < high < 1
    assert rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]) == (1.0, -1.0, 1.0)


# Protocols.


@pytest.mark.parametrize("name", STUDIES)
def test_protocols_are_well_formed(name) -> None:
    study = STUDIES[name]
    first, *_, last = study.scales
    assert (first, last, study.name) == ("small", "full", name)
    assert "arxiv.org" in study.source and "Holds if" in study.measure
    for experiments in study.scales.values():
        seen = set()
        for one in experiments:
            assert one.task in tasks()
            for family in one.plan.families:
                for width in one.plan.widths:
                    for shape in ((width, width), (width, 4 * width), (4 * width, width)):
                        el.structure(family)(*shape)
            key = (one.task, one.plan)
            assert key not in seen, "an experiment twice"
            seen.add(key)
        assert any("dense" in one.plan.families for one in experiments)
    with pytest.raises(ValueError, match="no scale 'huge'; it has small, "):
        study.experiments("huge")


def test_the_ordering_asks_for_eight_points_from_all_over_the_taxonomy() -> None:
    (experiment,) = STUDIES["order"].scales["full"]
    points = np.array([el.taxonomy(el.structure(family)) for family in experiment.plan.families[1:]])
    assert len(points) >= 8
    assert np.linalg.matrix_rank(points - points.mean(axis=0), tol=0.1) == 3


@pytest.fixture(scope="module")
def tiny() -> Study:
    plan = Plan(
        families=("dense", "monarch(blocks=4)"), widths=(16, 32), depth=1, horizons=(40, 80), rates=(2.0**-8,),
        tuning=1, recipe=Recipe(batch=4, base_width=16, base_depth=1, warmup=2), seeds=(0, 1),
    )  # fmt: skip
    finish = replace(plan, families=plan.families[1:], recipe=replace(plan.recipe, finish_dense=0.2))
    return Study(
        name="tiny", title="T", claim="C.", source="S", measure="M",
        scales={"small": tuple(Experiment(task="teacher", plan=one) for one in (plan, finish))},
        judge=lambda runs: worth(runs, [Question(axis="seconds", claimed="last 20% dense")]), priced=True,
    )  # fmt: skip


def test_a_study_from_its_protocol_to_its_page(tiny, tmp_path) -> None:
    experiments, machine = tiny.experiments("small"), Machine(workers=0)
    with Store(tmp_path / "tiny.sqlite") as store:
        runs = measure(experiments, store, machine)
        assert measure(experiments, store, machine) == runs  # nothing is trained twice
    assert len(runs) == 24
    assert {label(run) for run in runs} == {"dense", "monarch(blocks=4)", "monarch(blocks=4), last 20% dense"}
    steps = timed(experiments, machine)
    write_steps(steps, tmp_path / "tiny-small-steps.csv")
    assert read_steps(tmp_path / "tiny-small-steps.csv") == steps
    with pytest.raises(ValueError, match="no step of Timed"):
        priced(runs, steps[1:])
    runs = priced(runs, steps)
    per_step = {(label(run), run.width): run.seconds / run.tokens for run in runs}
    for width in (16, 32):
        dense, monarch = per_step["dense", width], per_step["monarch(blocks=4)", width]
        assert per_step["monarch(blocks=4), last 20% dense", width] == pytest.approx(0.8 * monarch + 0.2 * dense)
    write_runs(runs, tmp_path / "tiny-small.csv")
    written = write_page(tiny, tmp_path)
    text = written.read_text()
    assert "**Verdict at the small scale (cpu" in text and "tiny-small.svg" in text
    assert "* A step, timed in turns ([tiny-small-steps.csv]" in text and "`monarch(blocks=4)` " in text
    assert (tmp_path / "tiny-small.svg").read_text().startswith("<svg")
    assert written == write_page(tiny, tmp_path) and written.read_text() == text
    assert "in all about" in foretold(experiments, machine)


def test_a_study_cut_short_is_read_from_its_store_and_says_so(tiny, tmp_path) -> None:
    """Narrow models first, one seed after the other."""
    experiments, order = tiny.experiments("small"), []

    def stop(run: Run, done: int, wanted: int) -> None:
        order.append((run.seed, run.width))
        if done == 14:
            raise KeyboardInterrupt

    with Store(tmp_path / "tiny.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            measure(experiments, store, Machine(workers=0), tell=stop)
        runs = collect(experiments, store)
        store.add(replace(runs[0], width=48))  # of no protocol
        assert collect(experiments, store) == runs
    assert order == sorted(order) and len(runs) == 14
    text = page(tiny, {"small": runs}, {"small": tiny.judge(runs)})
    assert "**Not run** of these: 10 of 24 measurements" in text
    assert "4 of dense with seed 1" not in text and "4 of monarch(blocks=4), last 20% dense with seed 1" in text


def test_tuned_runs_have_their_places_whatever_their_rate(tmp_path) -> None:
    plan = Plan(
        families=("dense",), widths=(16,), depth=1, horizons=(40,), rates=(2.0**-9, 2.0**-8), tuning=20,
        recipe=Recipe(batch=4, base_width=16, base_depth=1, warmup=2),
    )  # fmt: skip
    (one,) = experiments = (Experiment(task="teacher", plan=plan),)
    with Store(tmp_path / "tuned.sqlite") as store:
        runs = measure(experiments, store, Machine(workers=0))
        assert collect(experiments, store) == runs
    assert [run.purpose for run in runs].count("measure") == 1 < len(runs)
    assert [place_of(run) for run in measured(one)] == [place_of(replace(runs[-1], rate=TUNED))]


@pytest.mark.parametrize("study", ["rates", "reverse"])
def test_a_study_of_a_text_without_its_files_is_one_sentence(study, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["claims.py", study, "--scale", "full", "--device", "cpu", "--store", str(tmp_path / "a.sqlite")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        RECIPE.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Loading the task 'text': no paths were given. Name the files or directories.\n"


def test_runs_survive_their_table(tmp_path) -> None:
    run = Run(
        task="t", fingerprint="f", family="btt(rank=2)", width=8, depth=1, tokens=5, rate=2**-7, seed=0,
        setup='{"a": 1}', loss=0.1, flops=10**20, curve="[[3, 2.0], [5, 1.5]]", versions='{"torch": "2"}',
    )  # fmt: skip
    lost = replace(run, seed=1, loss=None, status="diverged", curve="[]")
    write_runs([run, lost], tmp_path / "a.csv")
    assert read_runs(tmp_path / "a.csv") == [replace(run, curve="[[5, 1.5]]"), lost]
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        read_runs(tmp_path / "b.csv")


def test_a_page_without_runs_is_refused(tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match="has none of its runs"):
        write_page(tiny, tmp_path)


# Pages of this repository.


def test_there_are_studies() -> None:
    assert DONE


@pytest.mark.parametrize("name", sorted({name for name, _ in DONE}))
def test_pages_are_those_of_the_committed_runs(name) -> None:
    """Words as they stand, numbers within what another platform's rounding may move."""
    study = STUDIES[name]
    runs = {scale: read_runs(PAGES / f"{name}-{scale}.csv") for scale in study.scales if (name, scale) in DONE}
    made = page(study, runs, {scale: study.judge(found) for scale, found in runs.items()}, steps_of(study, PAGES))
    text = (PAGES / f"{name}.md").read_text()
    assert NUMBER.sub("#", made) == NUMBER.sub("#", text)
    numbers = [[float(number) for number in NUMBER.findall(one)] for one in (made, text)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.011)


@pytest.mark.parametrize("name, scale", DONE)
def test_committed_runs_are_those_that_the_protocol_asks_for(name, scale) -> None:
    """Every run has a place in it, and what has no run is named on the page."""
    found = [run for run in read_runs(PAGES / f"{name}-{scale}.csv") if run.purpose == "measure"]
    wanted = {place_of(run) for one in STUDIES[name].scales[scale] for run in measured(one)}
    places = {place if (place := place_of(run)) in wanted else place_of(replace(run, rate=TUNED)) for run in found}
    assert places <= wanted
    lacking = f"{len(wanted - places)} of {len(wanted)} measurements"
    assert (lacking in (PAGES / f"{name}.md").read_text()) == (places < wanted)
