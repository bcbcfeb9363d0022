"""What a comparison promises: tuned structures, nothing trained twice, nothing finished ever lost."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear.lab import sweep as sweeping
from einlinear.lab.compare import Plan, Progress, compare, default_plan, tune
from einlinear.lab.data import Examples, Sequences, Task, load
from einlinear.lab.machine import Machine
from einlinear.lab.models import counted
from einlinear.lab.run import Run
from einlinear.lab.store import Store, StoreError
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk, train

HERE = Machine(workers=0)
PLAN = Plan(
    families=("dense", "low_rank(rank=2)"),
    widths=(24, 16),
    depth=1,
    horizons=(1600, 640),
    rates=(0.01, 0.02, 0.04),
    tuning=320,
    recipe=Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5),
)


@pytest.fixture(scope="module")
def whole(task: Sequences, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The runs of `PLAN`, uninterrupted."""
    torch.set_num_threads(1)
    return compare(PLAN, task, Store(tmp_path_factory.mktemp("whole") / "runs.sqlite"), machine=HERE)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs.sqlite")


class Trainer:
    """Instead of training: a loss that depends on family and rate, and a list of what was asked for."""

    def __init__(self, loss: Callable[[Trunk], float | None]) -> None:
        self.loss, self.trunks = loss, list[Trunk]()

    def __call__(self, trunk: Trunk, task: Task, *, tell: Callable[[int | Run], object], **_: object) -> None:
        self.trunks.append(trunk)
        tell(trunk.steps)
        for horizon in trunk.horizons:
            loss = self.loss(trunk)
            tell(replace(trunk.run(task, horizon), loss=loss, status="done" if loss else "diverged", seconds=1.0))


def valley(best: float) -> Callable[[Trunk], float]:
    return lambda trunk: 1 + math.log2(trunk.rate / best) ** 2


def test_the_grid_is_what_the_plan_says(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", trainer := Trainer(valley(0.02)))
    runs = compare(PLAN, task, store, machine=HERE)
    assert runs == store.runs()
    tuned = [run for run in runs if run.purpose == "tune"]
    assert {(run.family, run.rate, run.width, run.tokens) for run in tuned} == {
        (family, rate, 16, 320) for family in PLAN.families for rate in PLAN.rates
    }
    measured = [run for run in runs if run.purpose == "measure"]
    assert {(run.family, run.width, run.tokens, run.rate) for run in measured} == {
        (family, width, tokens, 0.02) for family in PLAN.families for width in (16, 24) for tokens in (640, 1600)
    }
    widths = [trunk.width for trunk in trainer.trunks[6:]]
    assert widths == sorted(widths)  # so that a report of the first ones means something
    assert len({run.setup for run in runs}) == 1


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.02, (0.01, 0.02, 0.04)),
        (0.04, (0.01, 0.02, 0.04, 0.08)),
        (0.01, (0.005, 0.01, 0.02, 0.04)),
        (0.32, (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)),  # three times, and no more
        (2.56, (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)),
    ],
)
def test_a_grid_grows_where_the_best_is_on_its_edge(
    task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch, best: float, tried: tuple[float, ...]
) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer(lambda t: valley(best if t.family == "dense" else 0.02)(t)))
    compare(PLAN, task, store, machine=HERE)
    rates = {family: sorted(run.rate for run in store.runs(family=family, purpose="tune")) for family in PLAN.families}
    assert rates["dense"] == pytest.approx(tried)
    assert rates["low_rank(rank=2)"] == [0.01, 0.02, 0.04]  # each family by itself
    chosen = {run.rate for run in store.runs(family="dense", purpose="measure")}
    assert chosen == {min(tried, key=lambda rate: abs(math.log(rate / best)))}


def test_a_family_that_always_diverges_is_reported_and_not_measured(
    task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer(lambda t: None if t.family == "dense" else valley(0.02)(t)))
    runs = compare(PLAN, task, store, machine=HERE)
    dense = [run for run in runs if run.family == "dense"]
    assert {(run.purpose, run.status) for run in dense} == {("tune", "diverged")}
    assert sorted(run.rate for run in dense) == [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04]  # smaller ones were tried
    assert {run.purpose for run in runs if run.family != "dense"} == {"tune", "measure"}


def test_a_rate_that_diverges_is_not_chosen(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer(lambda t: None if t.rate > 0.02 else 1 / t.rate))
    compare(PLAN, task, store, machine=HERE)
    assert {run.rate for run in store.runs(purpose="measure")} == {0.02}


def test_a_single_rate_is_taken_as_given(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "train", Trainer(valley(0.02)))
    compare(replace(PLAN, rates=(0.5,)), task, store, machine=HERE)
    assert {(run.rate, run.purpose) for run in store.runs()} == {(0.5, "measure")}


def test_rates_of_several_plans_are_tuned_together(task: Sequences) -> None:
    """Each at its own best, trials that two share once; one rate is no trial; a grid grows `extensions` times."""
    plan = Plan(
        families=("dense", "btt"), widths=(16,), depth=1, horizons=(64,), rates=(2**-9, 2**-8, 2**-7), tuning=64,
        recipe=Recipe(batch=8, base_width=16, base_depth=1), extensions=2,
    )  # fmt: skip
    naive = replace(plan, families=("btt",), recipe=replace(plan.recipe, structure_aware=False))
    single = replace(plan, families=("btt",), rates=(2**-5,))
    asked = []

    def trained(trunks: list[Trunk]) -> list[Run]:
        asked.append(len(trunks))
        best = {("dense", True): -8.0, ("btt", True): -6.0, ("btt", False): -1.0}
        return [
            replace(
                trunk.run(task, *trunk.horizons),
                loss=1 + abs(math.log2(trunk.rate) - best[trunk.family, trunk.recipe.structure_aware]),
            )
            for trunk in trunks
        ]  # fmt: skip

    runs, rates = tune([plan, naive, single, replace(plan, seeds=(0, 1))], task, trained)
    assert rates == [{"dense": 2**-8, "btt": 2**-6}, {"btt": 2**-5}, {"btt": 2**-5}, {"dense": 2**-8, "btt": 2**-6}]
    assert asked == [9, 11, 13] and len(runs) == 13


def test_the_same_command_trains_nothing_twice(task: Sequences, store: Store, tmp_path: Path) -> None:
    first, again = list[Progress](), list[Progress]()
    runs = compare(PLAN, task, store, machine=HERE, folder=tmp_path / "kept", progress=first.append)
    assert compare(PLAN, task, store, machine=HERE, folder=tmp_path / "kept", progress=again.append) == runs
    assert again == []
    assert not (tmp_path / "kept").exists()
    wider = compare(replace(PLAN, widths=(16, 24, 32)), task, store, machine=HERE, progress=again.append)
    assert {event.run.width for event in again if event.run} == {32}
    assert [run for run in wider if run.width < 32] == runs
    shares = [event.share for event in first]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert first[-1].runs == first[-1].total == len(runs)
    assert [event.run for event in first if event.run] == store.runs()[: len(runs)]
    assert first[-1].seconds_left == pytest.approx(0)


def test_progress_knows_what_is_left(task: Sequences, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With seconds in proportion to the work, the estimate is right from the first run on."""
    events: list[Progress] = []
    monkeypatch.setattr(sweeping, "train", trainer := Trainer(valley(0.02)))
    compare(PLAN, task, store, machine=HERE, progress=events.append)
    assert events[0].seconds_left is None
    assert all(event.seconds_left is not None and event.seconds_left >= 0 for event in events[1:])
    assert [event.runs for event in events if event.run] == list(range(1, 15))
    assert {event.total for event in events} == {14}
    assert len(trainer.trunks) == 10


@pytest.mark.parametrize(("purpose", "number"), [("tune", 1), ("measure", 1), ("measure", 4)])
def test_interrupted_between_runs_nothing_finished_is_lost(
    task: Sequences, store: Store, whole: list[Run], purpose: str, number: int
) -> None:
    """Between trunks, and between the horizons of one."""

    def interrupt(event: Progress) -> None:
        if event.run and len(store.runs(purpose=purpose)) == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(PLAN, task, store, machine=HERE, progress=interrupt)
    finished = store.runs()
    assert len([run for run in finished if run.purpose == purpose]) == number
    trained: list[Progress] = []
    runs = compare(PLAN, task, store, machine=HERE, progress=trained.append)
    assert store.runs()[: len(finished)] == finished
    assert [event.run for event in trained if event.run] == store.runs()[len(finished) :]
    assert (trained[-1].share, trained[-1].runs) == (1, len(runs))
    assert [(run.key, run.loss) for run in runs] == [(run.key, run.loss) for run in whole]


def test_workers_give_the_same_runs_and_keep_what_they_are_at(task: Sequences, store: Store, tmp_path: Path) -> None:
    folder, seen = tmp_path / "kept", list[Run]()
    slow = replace(PLAN.recipe, batch=8)
    trunks = [
        Trunk(family=family, width=16, depth=1, rate=0.02, seed=0, horizons=(20, 120), recipe=slow)
        for family in PLAN.families
    ]

    def interrupt(trunk: Trunk, event: int | Run) -> None:
        if isinstance(event, Run):
            seen.append(event)
            raise KeyboardInterrupt

    machine = Machine(workers=2)
    with pytest.raises(KeyboardInterrupt), Sweep(task, store, machine, folder, interrupt) as sweep:
        sweep.train(trunks)
    assert store.runs()[0] == seen[0]
    assert any(folder.glob("*.safetensors"))  # the trunks under way, whose long horizons are not done
    steps: list[int] = []
    with Sweep(task, store, machine, folder, lambda trunk, event: isinstance(event, int) and steps.append(event)) as s:
        runs = s.train(trunks)
    assert sum(steps) < sum(trunk.steps for trunk in trunks)
    alone = [run for trunk in trunks for run in train(trunk, task)]
    assert [(run.key, run.loss, run.curve) for run in runs] == [(run.key, run.loss, run.curve) for run in alone]
    assert not folder.exists()


def test_a_store_that_fails_stops_the_workers(task: Sequences, tmp_path: Path) -> None:
    class Full(Store):
        def add(self, run: Run) -> bool:
            raise StoreError("Storing a run failed: disk full.")

    plan = replace(PLAN, families=("dense",), rates=(0.02,))
    with pytest.raises(StoreError, match="disk full"):
        compare(plan, task, Full(tmp_path / "runs.sqlite"), machine=Machine(workers=1))


def test_a_mistake_in_the_plan_costs_no_training(task: Sequences, store: Store) -> None:
    machine = Machine(workers=0)
    with pytest.raises(el.StructureError, match="did you mean 'btt'"):
        replace(PLAN, families=("dense", "bt"))
    for wrong in ({"widths": ()}, {"horizons": (0,)}, {"rates": (-1.0,)}, {"families": ()}):
        with pytest.raises(ValueError, match=f"Planning a comparison: {next(iter(wrong))}="):
            replace(PLAN, **wrong)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        compare(replace(PLAN, widths=(16, 20)), task, store, machine=machine)
    with pytest.raises(el.StructureError):
        compare(replace(PLAN, families=("btt(blocks=(7, 7))",)), task, store, machine=machine)
    assert store.runs() == []


def test_wherever_it_ends_what_is_done_compares(task: Sequences) -> None:
    """Every family at a width and seed comes before any at the next one."""
    plan = replace(PLAN, families=("dense", "btt", "low_rank(rank=1)"), widths=(32, 16, 24), seeds=(0, 1))
    trunks = plan.trunks(task, dict.fromkeys(plan.families, 0.01))
    cells = [(trunk.width, trunk.seed) for trunk in trunks]
    assert cells == sorted(cells) and len(trunks) == 18
    other_way = [
        trunk.width for trunk in replace(plan, wide_first=True).trunks(task, dict.fromkeys(plan.families, 0.01))
    ]
    assert other_way == sorted(other_way, reverse=True)
    costs = [trunk.run(task, 1).flops for trunk in trunks]
    assert all(sorted(costs[first : first + 3], reverse=True) == costs[first : first + 3] for first in range(0, 18, 3))


def test_horizons_may_grow_with_the_width(task: Sequences) -> None:
    plan = replace(PLAN, widths=(8, 16, 32), growth=1.5)
    steps = {trunk.width: trunk.horizons for trunk in plan.trunks(task, {"dense": 0.01})}
    assert steps[16] == (640 // 16, 1600 // 16) == PLAN.trunks(task, {"dense": 0.01})[0].horizons
    assert steps[32] == (round(2**1.5 * 40), round(2**1.5 * 100))
    assert steps[8] == (round(0.5**1.5 * 40), round(0.5**1.5 * 100))


def test_families_are_named_as_they_are_stored() -> None:
    assert replace(PLAN, families=("BTT(rank=2)", "btt( rank = 2 )", "dense()")).families == ("btt(rank=2)", "dense")


@pytest.mark.parametrize("name", ["pixels", "images", "teacher"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_plans_are_legal(name: str, device: str) -> None:
    task = load(name)
    plan = default_plan(task, device)
    assert len(plan.families) >= 3 and len(plan.widths) >= 4 and len(plan.horizons) >= 2
    for trunk in [*plan.trials(task), *plan.trunks(task, dict.fromkeys(plan.families, 1.0))]:
        counted(task, trunk.architecture)
        assert trunk.recipe.warmup < trunk.branch(trunk.horizons[0])


def test_a_plan_may_cut_sequences_shorter(task: Sequences, store: Store) -> None:
    plan = replace(PLAN, rates=(0.02,), widths=(16,), families=("dense",))
    runs = [compare(replace(plan, context=context), task, store, machine=HERE)[0] for context in (None, 4)]
    whole, cut = runs
    assert whole.fingerprint == cut.fingerprint and whole.setup != cut.setup
    assert whole.tokens == cut.tokens
    # Half the context, half the attention: 2 · T · 2 · width multiply-adds, three passes, all tokens.
    assert whole.flops - cut.flops == 3 * (8 - 4) * 4 * 16 * whole.tokens
    with pytest.raises(ValueError, match="too small"):
        compare(replace(plan, context=10**6), task, store, machine=HERE)


def test_examples_can_be_compared(store: Store) -> None:
    task = load("images")
    assert isinstance(task, Examples)
    recipe = replace(PLAN.recipe, batch=32)
    runs = compare(replace(PLAN, rates=(0.01,), horizons=(2000,), recipe=recipe), task, store, machine=HERE)
    assert all(run.loss < math.log(10) for run in runs if run.purpose == "measure")


KILLED = """
import sys, torch
from pathlib import Path
from einlinear.lab.data import Sequences
from einlinear.lab.store import Store
from einlinear.lab.machine import Machine
from einlinear.lab.sweep import Sweep
from einlinear.lab.train import Recipe, Trunk

if __name__ == "__main__":
    tokens = torch.arange(3000) * 5 % 13
    task = Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=400)
    recipe = Recipe(batch=2, base_width=16, base_depth=1, head=8)
    trunk = Trunk(family="dense", width=16, depth=1, rate=0.02, seed=0, horizons=(10**6,), recipe=recipe)
    place = Path(sys.argv[1])
    tell = lambda trunk, event: print("trained", event, flush=True)
    with Sweep(task, Store(place / "runs.sqlite"), Machine(workers=1), place / "kept", tell) as sweep:
        sweep.train([trunk])
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_the_state_of_what_was_under_way(tmp_path: Path, sign: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as caller:
        assert caller.stdout and caller.stderr
        assert caller.stdout.readline().startswith(b"trained")
        caller.send_signal(sign)
        caller.wait(60)
        if sign == signal.SIGINT:
            assert caller.stderr.read().strip().endswith(b"KeyboardInterrupt")
        deadline = time.monotonic() + 10  # less than the time between two saves that nobody asked for
        while not list(tmp_path.glob("kept/*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
