"""What a search promises: equal maps once, a budget kept, winners confirmed by runs that did not choose them."""

import html
import json
import math
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import einlinear as el
from einlinear.lab import sweep as sweeping
from einlinear.lab.compare import Plan, Progress
from einlinear.lab.data import Sequences, Task, load
from einlinear.lab.machine import Machine
from einlinear.lab.report import write_report
from einlinear.lab.run import Run
from einlinear.lab.search import SearchPlan, default_search, explain, recalled, search, told
from einlinear.lab.search.forecast import forecast
from einlinear.lab.search.looked import exploration
from einlinear.lab.search.strategy import HALVING, Outcome, guided_search, random_search
from einlinear.lab.search.surrogate import Surrogate, features
from einlinear.lab.search.worth import Reference
from einlinear.lab.store import Store
from einlinear.lab.summary import summary
from einlinear.lab.train import Recipe, Trunk, train

ROOT = Path(__file__).parents[2]
HERE = Machine(workers=0)
PLAN = SearchPlan(
    confirmation=Plan(
        families=("dense",), widths=(16, 32), depth=1, horizons=(320, 640, 1280), rates=(0.01, 0.02), tuning=320,
        recipe=Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=2), seeds=(1, 2), extensions=0,
    ),
    width=16, horizons=(160, 320, 640), budget=2, winners=2, controls=1, exponents=(7,),
)  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Sequences:
    tokens = torch.arange(3000) * 5 % 13
    return Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=200)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs.sqlite")


def power_law(trunk: Trunk, task: Task, horizon: int) -> float:
    """Dense loses as C^-0.1; a family does as if it had exp(its FLOPs per parameter, less one) times its compute."""
    run = trunk.run(task, horizon)
    if trunk.family == "dense":
        return 3 * float(run.flops) ** -0.1
    structure = el.structure(trunk.family)(64, 64)
    return 3 * (run.flops * math.exp(1 - el.flops(structure) / el.parameters(structure) / 2)) ** -0.1


class Trainer:
    """Instead of training: a loss by the law above, and a list of what was asked for."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.trunks = noise, list[Trunk]()

    def __call__(self, trunk: Trunk, task: Task, *, tell: Callable[[int | Run], object], **_: object) -> None:
        self.trunks.append(trunk)
        tell(trunk.steps)
        for horizon in trunk.horizons:
            run = trunk.run(task, horizon)
            shift = 1 + self.noise * np.random.default_rng(abs(hash(run.key)) % 2**32).normal()
            tell(replace(run, loss=power_law(trunk, task, horizon) * shift, seconds=run.flops / 1e9, device="x"))


# The strategy, by itself.


class Oracle:
    """Candidates whose worth features tell in part, and early rungs nearly: as in the record of the teacher."""

    noise = (0.4, 0.25, 0.15)

    def __init__(self, seed: int, count: int = 60) -> None:
        generator = np.random.default_rng(seed)
        self.features = generator.normal(size=(count, 3))
        self.truth = 0.6 * self.features[:, 0] + 0.8 * generator.normal(size=count)
        self.seen = self.truth[:, None] + np.array(self.noise) * generator.normal(size=(count, 3))
        self.costs = generator.uniform(0.5, 1.5, size=(count, 1)) * [0.06, 0.16, 0.8]
        self.asked: list[tuple[int, int]] = []

    def measure(self, asked: Sequence[tuple[int, int]]) -> list[Outcome]:
        self.asked += asked
        return [Outcome(self.seen[n, r], self.noise[r] ** 2, self.costs[n, r]) for n, r in asked]

    def whole(self, asked: Sequence[tuple[int, int]]) -> list[Outcome]:
        return [
            replace(outcome, cost=self.costs[n, 2] / 0.8)
            for (n, _), outcome in zip(asked, self.measure(asked), strict=True)
        ]


def test_guided_search_beats_random_search_where_early_results_tell() -> None:
    gains = []
    for seed in range(12):
        oracle = Oracle(seed)
        guided = guided_search(oracle.features, oracle.costs, oracle.measure, 2, seed=seed)
        control = random_search(60, 3, oracle.whole, 2, seed=seed)
        gains.append(oracle.truth[guided.ranking[0]] - oracle.truth[control.ranking[0]])
    assert np.mean(gains) > 2.5 * np.std(gains, ddof=1) / math.sqrt(len(gains))


@pytest.mark.parametrize("budget", [1, 6, 20, 40])
def test_a_search_spends_its_budget_and_keeps_the_order_of_horizons(budget: float) -> None:
    oracle = Oracle(0)
    found = guided_search(oracle.features, oracle.costs, oracle.measure, budget)
    again = guided_search(oracle.features, oracle.costs, Oracle(0).measure, budget)
    assert [(t.candidate, t.rung) for t in found.trials] == [(t.candidate, t.rung) for t in again.trials]
    # Of each horizon one training more than its share may be begun, and what is left over is spent.
    assert budget <= found.cost < budget + oracle.costs.max(axis=0).sum()
    assert max(Counter(oracle.asked).values()) == 1
    for candidate, rung in oracle.asked:
        assert rung == 0 or oracle.asked.index((candidate, rung - 1)) < oracle.asked.index((candidate, rung))
    counts = Counter(rung for _, rung in oracle.asked)
    assert counts[0] >= counts[1] >= counts[2] >= 1
    if budget == 6:  # too little for all of them: a third goes on
        assert counts[0] < 60 and counts[1] == pytest.approx(counts[0] / HALVING, abs=3)
    if budget == 40:  # more than a third is to go on where all have been begun
        assert counts[0] > 55 and counts[1] > 1.2 * counts[0] / HALVING
    assert {n for n in found.ranking} == {n for n, rung in oracle.asked if rung == 2}


def test_a_space_that_is_used_up_ends_the_search() -> None:
    oracle = Oracle(0, count=9)
    found = guided_search(oracle.features, oracle.costs, oracle.measure, 1e9)
    assert len({trial.candidate for trial in found.trials}) == 9 and len(found.trials) == 27


def test_the_surrogate_believes_results_by_their_variance() -> None:
    table = np.linspace(-2, 2, 9)[:, None]
    sure, unsure = Surrogate(table, 1), Surrogate(table, 1)
    values = [0.0, 0.1, 0.2, 0.3, 2.0, 0.5, 0.6, 0.7, 0.8]
    sure.fit(range(9), [0] * 9, values, [1e-4] * 9)
    unsure.fit(range(9), [0] * 9, values, [1e-4] * 4 + [4.0] + [1e-4] * 4)
    assert sure.predict(np.array([4]))[0] > 1.8
    assert unsure.predict(np.array([4]))[0] < 0.8


def test_the_surrogate_knows_that_later_horizons_saw_the_promising_alone() -> None:
    """Worth falls by 1 with each horizon for all; what did not get there is not thought better for it."""
    generator = np.random.default_rng(0)
    worth = generator.normal(size=30) * 0.3
    table = np.zeros((30, 1))
    order = np.argsort(-worth)
    which, rung = [*range(30), *order[:10]], [0] * 30 + [1] * 10
    value = [*worth, *(worth[order[:10]] - 1)]
    surrogate = Surrogate(table, 2)
    surrogate.fit(which, rung, value, [1e-3] * 40)
    mean, _ = surrogate.predict(np.arange(30))
    assert np.abs(mean - (worth - 1)).max() < 0.35
    assert mean[order[:10]].min() > mean[order[20:]].max()


def test_features_are_of_one_scale_and_experts_have_no_seconds() -> None:
    pool = el.candidates(16, experts=(4,))
    table = features(pool)
    assert np.isfinite(table).all()
    assert np.abs(table.mean(axis=0)).max() < 1e-9
    assert {candidate.seconds is None for candidate in pool} == {True, False}


def test_a_run_is_worth_what_dense_would_take(task: Sequences, store: Store) -> None:
    runs = []
    for width in (16, 32, 64):
        trunk = Trunk(
            family="dense", width=width, depth=1, rate=0.01, seed=1, horizons=(20, 80), recipe=PLAN.confirmation.recipe
        )
        runs += [replace(trunk.run(task, h), loss=power_law(trunk, task, h), seconds=1.0) for h in trunk.horizons]
    reference = Reference(runs)
    half = replace(runs[0], family="x", flops=runs[0].flops // 2)
    assert reference.worth(half).value == pytest.approx(math.log(2), abs=1e-3)
    assert reference.worth(replace(half, loss=None)).value < -1
    with pytest.raises(ValueError, match="finished runs of one family"):
        Reference([*runs, half])
    with pytest.raises(ValueError, match="finished runs of one family"):
        Reference([])


# The whole of it, with a known law instead of training.


def test_a_search_finds_confirms_and_reports(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", trainer := Trainer())
    events: list[tuple[str, Progress]] = []
    searched = search(PLAN, task, store, machine=HERE, progress=lambda *event: events.append(event))
    explored = searched.explored
    sharing = {c.family: c.flops / c.parameters for c in explored.pool}
    # The law says: least sharing wins; what reached the last horizon is ranked by it.
    last = [explored.pool[n].family for n in explored.found.ranking]
    assert sharing[explored.winners[0]] <= min(sharing[family] for family in last) + 0.1
    assert np.mean([sharing[f] for f in explored.winners]) < np.mean([*sharing.values()])
    # Reported is what confirms: fresh seeds, and no run of the exploration.
    assert {run.purpose for run in searched.runs} == {"tune", "measure"}
    assert {run.seed for run in searched.runs if run.purpose == "measure"} == {1, 2}
    assert {run.family for run in searched.runs} == {"dense", *explored.winners, *explored.controls}
    assert not {*explored.winners} & {*explored.controls}
    exploring = store.runs(purpose="search")
    assert {run.seed for run in exploring} == {0} and {run.width for run in exploring} == {16}
    assert len(exploring) == len(explored.runs) == sum(explored.counts)
    assert [part for part, _ in events if part] == sorted(
        [p for p, _ in events], key=["dense", "exploring", "confirming"].index
    )
    shares = [event.share for part, event in events if part == "exploring"]
    assert shares == sorted(shares) and shares[-1] == 1
    # Each structure, dense too, has been tuned alike.
    tuned = Counter(run.family for run in searched.runs if run.purpose == "tune")
    assert len({*tuned.values()}) == 1
    text, why = told(searched), explain(searched)
    for family in explored.winners:
        assert family in text and family in why
    assert "ω" in why and "ψ" in why and "ν" in why and "seconds" in why
    assert len(trainer.trunks) == len(
        {(t.family, t.width, t.seed, t.rate, t.purpose, t.horizons) for t in trainer.trunks}
    )


def test_the_explanation_adds_up(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved at equal size times what the loss is worth is the multiplier of the law."""
    monkeypatch.setattr(sweeping, "train", Trainer())
    searched = search(PLAN, task, store, machine=HERE)
    structure = el.structure(searched.explored.winners[0])(64, 64)
    truth = math.exp(1 - el.flops(structure) / el.parameters(structure) / 2)
    line = next(line for line in explain(searched).splitlines() if "training FLOPs; its loss" in line)
    assert float(line.rsplit(" = ", 1)[1].split(",")[0]) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("after", [1, 20])
def test_interrupted_anywhere_a_search_makes_the_same_choices(
    task: Sequences, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer(noise=0.01))
    whole = search(PLAN, task, Store(tmp_path / "whole.sqlite"), machine=HERE)

    def interrupt(part: str, progress: Progress) -> None:
        if progress.run and len(store.runs()) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(PLAN, task, store, machine=HERE, progress=interrupt)
    first = store.runs()
    assert len(first) == after
    monkeypatch.setattr(sweeping, "train", trainer := Trainer(noise=0.01))
    again = search(PLAN, task, store, machine=HERE)
    assert store.runs()[:after] == first
    assert [run.key for run in again.runs] == [run.key for run in whole.runs]
    assert again.explored.runs.keys() == whole.explored.runs.keys()
    assert len(store.runs()) == after + sum(len(trunk.horizons) for trunk in trainer.trunks)


def test_a_search_is_recalled_from_its_store_alone(
    task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer())
    with pytest.raises(ValueError, match="does not hold all of it"):
        recalled(PLAN, task, store, machine=HERE)
    searched = search(PLAN, task, store, machine=HERE)
    monkeypatch.setattr(sweeping, "train", None)
    found = recalled(PLAN, task, store, machine=HERE)
    assert explain(found) == explain(searched) and told(found) == told(searched)
    with pytest.raises(ValueError, match="does not hold all of it"):
        recalled(replace(PLAN, budget=4), task, store, machine=HERE)


def test_seconds_are_an_objective_too(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer())
    searched = search(replace(PLAN, objective="seconds"), task, store, machine=HERE)
    assert searched.explored.reference.axis == "seconds"
    assert "training seconds" in told(searched)


# Training itself.


def test_a_trunk_goes_on_from_its_last_horizon(task: Sequences, store: Store, tmp_path: Path) -> None:
    """Bit by bit the uninterrupted one, in fewer steps."""
    trunks = [PLAN.trunk(task, "low_rank(rank=2)", 0.02, rung) for rung in range(3)]
    assert [trunk.continued for trunk in trunks] == [True, True, False]
    steps: list[list[int]] = []
    with sweeping.Sweep(
        task, store, HERE, tmp_path / "kept", lambda t, e: isinstance(e, int) and steps[-1].append(e)
    ) as sweep:
        for trunk in trunks:
            steps.append([])
            sweep.train([trunk])
            assert any((tmp_path / "kept").glob("*.safetensors")) == trunk.continued
        sweep.forget(trunks[0])
    horizons = [trunk.horizons[0] for trunk in trunks]
    whole = train(replace(trunks[0], horizons=tuple(horizons), continued=False), task)
    assert [run.loss for run in store.runs()] == [run.loss for run in whole]
    assert len({run.trunk for run in store.runs()}) == 1
    before = [0, *(trunk.branch(horizon) for trunk, horizon in zip(trunks, horizons, strict=True))]
    assert [sum(part) for part in steps] == [h - b for h, b in zip(horizons, before, strict=False)]


KILLED = """
import sys, torch
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_search import HERE, PLAN, Sequences, Store, search

if __name__ == "__main__":
    tokens = torch.arange(3000) * 5 % 13
    task = Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=200)
    place = Path(sys.argv[1])
    tell = lambda part, progress: progress.run and print(part, flush=True)
    search(PLAN, task, Store(place / "runs.sqlite"), machine=HERE, folder=place / "kept", progress=tell)
"""


def test_killed_while_exploring_nothing_is_lost_or_trained_twice(task: Sequences, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script, tmp_path, Path(__file__).parent], stdout=subprocess.PIPE) as caller:
        assert caller.stdout
        while caller.stdout.readline().strip() != b"exploring":
            assert caller.poll() is None
        caller.send_signal(signal.SIGKILL)
    store = Store(tmp_path / "runs.sqlite")
    before = store.runs()
    assert before and before[-1].purpose == "search"
    trained: list[Run] = []
    tell = lambda part, progress: progress.run and trained.append(progress.run)  # noqa: E731
    search(PLAN, task, store, machine=HERE, folder=tmp_path / "kept", progress=tell)
    assert store.runs()[: len(before)] == before
    assert [run.key for run in trained] == [run.key for run in store.runs()[len(before) :]]
    assert not (tmp_path / "kept").exists()


# Plans.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": 1}, "would both choose and confirm; .* such as 3"),
        ({"width": 24}, "explore at one of them"),
        ({"objective": "parameters"}, "pass flops or seconds"),
        ({"budget": 0}, "give positive numbers"),
        ({"winners": 0}, "confirm one winner or more"),
        ({"exponents": (8,)}, "7 exponents or 10"),
        ({"experts": (1,)}, "ask for two or more"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PLAN, **wrong)  # type: ignore[arg-type]


def test_an_empty_space_costs_no_training(task: Sequences, store: Store) -> None:
    with pytest.raises(ValueError, match="too few to choose 2 winners and 1 controls"):
        search(replace(PLAN, costliest=0.01), task, store, machine=HERE)
    assert store.runs() == []


def test_what_is_left_out_has_a_reason() -> None:
    reasons: Counter[str] = Counter()
    pool = PLAN.pool(refused=lambda family, reason: reasons.update([reason]))
    assert all(c.flops <= 0.75 and c.psi >= 0.5 and c.omega <= 0.5 for c in pool)
    whole = len(el.candidates(16, costliest=math.inf)) + 1
    assert any("FLOPs" in reason for reason in reasons) and any("other words" in reason for reason in reasons)
    assert len(pool) < whole
    slow = el.candidates(64, slowest=0.9)
    assert slow and all(candidate.seconds is not None and candidate.seconds <= 0.9 for candidate in slow)


def test_mixtures_are_candidates_where_asked_for() -> None:
    found = {c.family: c for c in el.candidates(16, exponents=(), experts=(4,), costliest=2.5)}
    mixture = found["mixture(of='block_diagonal(blocks=4)', experts=4, active=2)"]
    assert mixture.flops == pytest.approx(2 * found["block_diagonal(blocks=4)"].flops)
    assert mixture.parameters == pytest.approx(4 * found["block_diagonal(blocks=4)"].parameters)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["images", "teacher"])
def test_default_searches_are_legal(name: str, device: str) -> None:
    task = load(name)
    plan = default_search(task, device)
    assert len(plan.pool(device)) > 20
    assert plan.rungs(task)[0] * (1 - plan.confirmation.recipe.cooldown) > plan.confirmation.recipe.warmup


def test_a_search_says_first_what_it_takes(task: Sequences) -> None:
    told = forecast(PLAN, task, HERE)
    assert told.candidates == len(PLAN.pool())
    dense = PLAN.trunk(task, "dense", 0.01, 2).run(task, PLAN.rungs(task)[-1])
    assert told.flops == pytest.approx(PLAN.budget * dense.flops)
    assert told.minutes > 0 and told.begun[0] > told.begun[2] > 0
    assert "2 winners" in str(told) and "minutes" in str(told)


# The recorded benchmark.


def test_recorded_searches_are_replayed_at_equal_cost_and_judged_by_the_seed_not_seen() -> None:
    """Which of them is better is for benchmarks/results/search.csv to say, from many more repeats."""
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "search.py"))
    runs = benchmark["recorded"]()
    budget = 2 * runs.unit
    for name in benchmark["SEARCHES"]:
        found = runs.search(name, 2, seed=0, sees=0)
        assert budget <= found.cost < budget + runs.costs[:, -1].max()
        assert all(t.outcome.value == runs.values[t.candidate, t.rung, 0] for t in found.trials)
        best = runs.values[:, -1, 1].max()
        assert runs.regret(found, sees=0) == pytest.approx(best - runs.values[found.ranking[0], -1, 1])
    assert runs.values.shape[0] > 40 and np.isfinite(runs.values).all()


# What is told of it afterwards.


def test_the_report_reads_what_was_looked_at_from_the_store_alone(
    task: Sequences, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exploration(store.runs()) is None
    monkeypatch.setattr(sweeping, "train", Trainer())
    explored = search(PLAN, task, store, machine=HERE).explored
    found = exploration(store.runs())
    assert found and (found.width, found.seed, found.others) == (16, 0, 0)
    assert found.counts == explored.counts and sum(found.counts) == len(found.runs) == len(explored.runs)
    assert found.spent["flops"] == pytest.approx(explored.found.cost)
    assert {one.family for one in found.looked if one.confirmed} == {*explored.winners, *explored.controls} & {
        one.family for one in found.looked
    }
    worths = {
        (explored.pool[trial.candidate].family, trial.rung): trial.outcome.value for trial in explored.found.trials
    }
    for one in found.looked:
        for rung, worth in enumerate(one.worths):
            assert worth == pytest.approx(worths[one.family, rung])
    assert [len(one.runs) for one in found.looked] == sorted((len(one.runs) for one in found.looked), reverse=True)


def test_the_page_of_a_search(task: Sequences, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer())
    searched = search(PLAN, task, store, machine=HERE)
    runs = store.runs()
    # Explored families are no part of the comparison.
    assert {family.family for family in summary(runs).families} == {run.family for run in searched.runs}
    write_report(runs, path := tmp_path / "r.html")
    page = path.read_text()
    charts = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)[1])
    drawn = [row for rows in charts["halving"]["datasets"].values() for row in rows if "tokens" in row]
    assert len(drawn) == sum(searched.explored.counts)
    dots = {row["family"] for rows in charts["space"]["datasets"].values() for row in rows}
    assert dots == {searched.explored.pool[number].family for number, _ in searched.explored.runs}
    assert all(f'id="{name}"' in page for name in charts)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for line in explain(searched).splitlines():
        if "at equal width and tokens" in line:
            assert line.strip() in text
    assert all(f">{family}</span>" in page.replace("&#39;", "'") for family in searched.explored.winners)
    write_report(searched.runs, path)
    assert "What the search looked at" not in path.read_text()


def test_an_exploration_under_way_is_shown_too(
    task: Sequences, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where dense holds no law yet there are losses to come, and a reason instead of figures."""
    monkeypatch.setattr(sweeping, "train", Trainer())
    search(PLAN, task, store, machine=HERE)
    runs = [run for run in store.runs() if run.purpose == "search"]
    found = exploration(runs)
    assert found and "finished runs of one family" in found.reason
    assert all(worth is None for one in found.looked for worth in one.worths)
    write_report(runs, tmp_path / "r.html", refresh=5)
    assert "finished runs of one family" in (tmp_path / "r.html").read_text()
