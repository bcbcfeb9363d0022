"""What training promises: exact resumption, independent horizons, per-group rates, failures as results."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from einlinear.lab import checkpoint
from einlinear.lab.data import Sequences
from einlinear.lab.models import counted
from einlinear.lab.run import Run
from einlinear.lab.step import Execution, Step
from einlinear.lab.train import CHUNK, Recipe, Training, Trunk, schedule, train

RECIPE = Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5)
TRUNK = Trunk(family="low_rank(rank=4)", width=16, depth=1, rate=0.02, seed=0, horizons=(25, 60), recipe=RECIPE)

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def whole(task: Sequences) -> list[Run]:
    """The runs of `TRUNK`, uninterrupted."""
    torch.set_num_threads(1)
    return train(TRUNK, task)


def outcome(runs: list[Run]) -> list[tuple[object, ...]]:
    return [(run.key, run.status, run.loss, run.curve) for run in runs]


def stopper(chunks: int) -> Callable[[], bool]:
    asked = iter(range(1000))
    return lambda: next(asked) >= chunks


def test_training_learns(task: Sequences, whole: list[Run]) -> None:
    short, long = whole
    assert (short.tokens, long.tokens) == (25 * 16, 60 * 16)
    assert short.status == long.status == "done"
    assert long.loss < short.loss < math.log(13) - 0.2
    assert long.seconds > short.seconds > 0
    assert short.trunk == long.trunk != train(replace(TRUNK, seed=1, horizons=(2,)), task)[0].trunk
    curve = json.loads(long.curve)
    assert curve[-1][0] == long.tokens and curve[0][1] > curve[-1][1]


def test_costs_are_exact(task: Sequences) -> None:
    parameters, forward = counted(task, TRUNK.architecture)
    run = train(replace(TRUNK, horizons=(3,)), task)[0]
    assert (run.parameters, run.flops, run.linear_flops) == (parameters, 144 * forward.total, 144 * forward.linear)


@pytest.mark.parametrize("chunks", range(8))
def test_a_resumed_run_is_the_uninterrupted_one(task: Sequences, whole: list[Run], tmp_path: Path, chunks: int) -> None:
    """Stopped in the trunk and in cooldowns: everything after is bitwise the same."""
    file, first = tmp_path / "folder" / "trunk.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        train(TRUNK, task, file=file, stop=stopper(chunks), tell=first.append)
    done = [event for event in first if isinstance(event, Run)]
    rest = replace(TRUNK, horizons=TRUNK.horizons[len(done) :])
    retrained: list[int | Run] = []
    resumed = train(rest, task, file=file, tell=retrained.append)
    assert outcome(done + resumed) == outcome(whole)
    steps = sum(event for event in first + retrained if isinstance(event, int))
    assert steps == TRUNK.steps  # nothing was trained twice, nothing left out
    assert resumed[-1].seconds > 0


def test_a_killed_run_loses_only_what_came_after_the_last_save(
    task: Sequences, whole: list[Run], tmp_path: Path
) -> None:
    eager = Execution(patience=0.0)
    file, told = tmp_path / "trunk.safetensors", []

    def killed(event: int | Run) -> None:
        told.append(event)
        if len(told) == 4:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(TRUNK, task, execution=eager, file=file, tell=killed)
    rest: list[int | Run] = []
    resumed = train(replace(TRUNK, horizons=(60,)), task, file=file, tell=rest.append)
    assert outcome(resumed) == outcome(whole[1:])
    assert sum(event for event in rest if isinstance(event, int)) < 60


def test_a_state_past_the_branch_of_a_new_horizon_is_not_used(
    task: Sequences, whole: list[Run], tmp_path: Path
) -> None:
    file = tmp_path / "trunk.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(replace(TRUNK, horizons=(60,)), task, file=file, stop=stopper(3))
    assert outcome(train(TRUNK, task, file=file)) == outcome(whole)


def test_horizons_do_not_see_each_other(task: Sequences, whole: list[Run]) -> None:
    alone = train(replace(TRUNK, horizons=(60,)), task)[0]
    assert alone.loss == whole[1].loss
    assert replace(TRUNK, horizons=(60,)).steps == 60
    assert TRUNK.steps == 48 + 5 + 12


def test_training_is_a_function_of_the_trunk_alone(task: Sequences) -> None:
    one = replace(TRUNK, horizons=(10,))
    first = train(one, task)[0].loss
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert train(one, task)[0].loss == first
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are its own
    assert train(replace(one, seed=1), task)[0].loss != first


def test_the_schedule_warms_up_stays_and_cools_down() -> None:
    rates = [schedule(step, 4, 80, 100) for step in range(100)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(rates[4:81]) == {1.0}
    assert rates[85] == pytest.approx(0.5) and rates[95] == pytest.approx(1 - math.sqrt(0.75))
    assert 0 < rates[-1] < 0.03
    assert [schedule(step, 4, None, 100) for step in (4, 99)] == [1.0, 1.0]
    assert schedule(0, 0, None, 100) == 1.0


def test_the_schedule_keeps_the_ratios_of_the_groups(task: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(replace(TRUNK, width=32), task)
    multiples = [group["lr_mult"] for group in run.update.optimizer.param_groups]
    assert len(set(multiples)) > 1  # else this test would show nothing
    seen = []
    optimizer = run.update.optimizer
    step = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (seen.append([group["lr"].item() for group in optimizer.param_groups]), step())
    )
    list(run.advance(40, branch=20))
    for at, rates in enumerate(seen):
        factor = schedule(at, RECIPE.warmup, 20, 40)
        assert rates == pytest.approx([TRUNK.rate * factor * multiple for multiple in multiples])


def test_divergence_is_a_result(task: Sequences) -> None:
    told: list[int | Run] = []
    runs = train(replace(TRUNK, rate=1e9, recipe=replace(RECIPE, clip=1e9)), task, tell=told.append)
    assert [event for event in told if isinstance(event, Run)] == runs
    assert [run.tokens for run in runs] == [25 * 16, 60 * 16]
    for run in runs:
        assert run.status == "diverged" and run.loss is None
        assert run.reason.startswith("training loss ") and " at step 10 " in run.reason
        json.loads(run.curve)


def test_a_branch_that_fails_leaves_the_others(
    task: Sequences, whole: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Training.evaluate

    def poisoned(self: Training) -> float:
        if self.step == 25:
            next(self.model.parameters()).data.fill_(math.nan)
        return evaluate(self)

    monkeypatch.setattr(Training, "evaluate", poisoned)
    runs = train(TRUNK, task)
    assert (runs[0].status, runs[0].reason) == ("diverged", "validation loss nan at step 25")
    assert outcome(runs[1:]) == outcome(whole[1:])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] can't allocate memory: 8 GB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_lack_of_memory_is_a_result(task: Sequences, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def fails(self: Step, *batch: object) -> None:
        raise error

    monkeypatch.setattr(Step, "__call__", fails)
    assert [(run.status, run.reason) for run in train(TRUNK, task)] == [("out of memory", str(error))] * 2


def test_lack_of_memory_behind_another_error_is_a_result(task: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a CUDA graph is being recorded: what is raised last is that the recording could not be ended."""

    def fails(self: Step, *batch: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(Step, "prepare", fails)
    runs = train(TRUNK, task)
    assert [(run.status, run.reason) for run in runs] == [("out of memory", "CUDA out of memory.")] * 2


def test_other_errors_are_errors(task: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Step, *batch: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Step, "__call__", fails)
    with pytest.raises(RuntimeError, match="a mistake"):
        train(TRUNK, task)


def test_evaluation_is_no_training(task: Sequences) -> None:
    run = Training(TRUNK, task)
    list(run.advance(CHUNK))
    before = run.state()
    loss = run.evaluate()
    assert loss == run.evaluate() and math.isfinite(loss)
    after = run.state()
    assert (before.step, before.seconds, before.curve) == (after.step, after.seconds, after.curve)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_going_back_leaves_the_state_as_it_is(task: Sequences) -> None:
    run = Training(TRUNK, task)
    list(run.advance(CHUNK))
    state = run.state()
    copy = {name: tensor.clone() for name, tensor in state.tensors.items()}
    for _ in range(2):
        list(run.advance(2 * CHUNK))
        run.load(state)
        list(run.advance(2 * CHUNK))
        assert all(torch.equal(copy[name], state.tensors[name]) for name in copy)
        run.load(state)


def test_states_survive_a_file(task: Sequences, tmp_path: Path) -> None:
    run = Training(TRUNK, task)
    list(run.advance(CHUNK))
    file = tmp_path / "a.safetensors"
    state = run.state()
    checkpoint.save(file, {"trunk": state, "horizon 5": replace(run.state(), step=5)})
    found = checkpoint.load(file)
    assert set(found) == {"trunk", "horizon 5"}
    assert (found["trunk"].step, found["horizon 5"].step) == (CHUNK, 5)
    assert (found["trunk"].seconds, found["trunk"].curve) == (state.seconds, state.curve)
    assert {n: t.tolist() for n, t in found["trunk"].tensors.items()} == {
        n: t.tolist() for n, t in state.tensors.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]  # nothing half-written is left
    checkpoint.remove(file)
    assert checkpoint.load(file) == {}


def test_a_failed_save_leaves_the_old_file(task: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = Training(TRUNK, task).state()
    file = tmp_path / "a.safetensors"
    checkpoint.save(file, {"trunk": state})
    monkeypatch.setattr(checkpoint.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"Saving the checkpoint .* failed: No space left\. Make room"):
        checkpoint.save(file, {"trunk": replace(state, step=7)})
    assert checkpoint.load(file)["trunk"].step == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_file_is_named(task: Sequences, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match=r"Resuming from .*a\.safetensors: the file is damaged .* Remove it"):
        train(TRUNK, task, file=file)


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(compile(snippet, GUIDE.name, "exec"), {})
    assert re.fullmatch(r"(\d+ tokens: loss \d\.\d{3}\n){2}", capsys.readouterr().out)


@pytest.mark.parametrize("family", ["btt(rank=2)", "monarch(blocks=4)"])
def test_an_update_takes_as_many_launches_for_three_blocks_as_for_one(family: str, task: Sequences) -> None:
    """One fused AdamW for each group, and the gradients' norm and the copies by lists: nothing factor by factor."""
    launches = []
    for depth in (1, 3):
        trunk = replace(TRUNK, family=family, depth=depth, recipe=replace(RECIPE, precision="bfloat16"))
        training = Training(trunk, task)
        list(training.advance(CHUNK))
        step = training.update
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            step.optimizer.step()
            step.renew()
        counts = {event.key: event.count for event in profiled.key_averages() if event.key.startswith("aten::")}
        assert counts["aten::_fused_adamw_"] == len(step.optimizer.param_groups)
        assert counts["aten::_foreach_copy_"] == 1
        assert len(step._parameters) > 4 * len(step.optimizer.param_groups) or depth == 1
        launches.append({name: count for name, count in counts.items() if "foreach" in name or "fused" in name})
    assert launches[0] == launches[1]
