"""Reverse sparsification: at the switch nothing changes but the parameters, and the switch is part of the run."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear.lab.data import Sequences
from einlinear.lab.models import counted
from einlinear.lab.run import Run
from einlinear.lab.train import CHUNK, Recipe, Training, Trunk, train

RECIPE = Recipe(batch=2, base_width=16, base_depth=1, head=8, warmup=5, finish_dense=0.4)
TRUNK = Trunk(family="monarch(blocks=4)", width=16, depth=1, rate=0.02, seed=0, horizons=(25, 60), recipe=RECIPE)
FAMILIES = ("monarch(blocks=4)", "btt(rank=2)", "low_rank(rank=4)", "kronecker", "dense")


@pytest.fixture(scope="module")
def whole(task: Sequences) -> list[Run]:
    torch.set_num_threads(1)
    return train(TRUNK, task)


def outcome(runs: list[Run]) -> list[tuple[object, ...]]:
    return [(run.key, run.status, run.loss, run.curve) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_kept_at_the_switch(task: Sequences, family: str) -> None:
    training = Training(replace(TRUNK, family=family), task)
    list(training.advance(3 * CHUNK))
    finish = training.finish()
    inputs, _ = task.batch(0, 4, 1)
    with torch.no_grad():
        torch.testing.assert_close(finish.model(inputs), training.model(inputs), rtol=1e-4, atol=1e-5)
    assert (finish.step, finish.seconds, finish.curve) == (training.step, training.seconds, training.curve)
    layers = [layer for layer in finish.model.modules() if isinstance(layer, el.Linear)]
    assert layers and all(str(layer.structure) == "dense" or len(layer.factors) == 1 for layer in layers)


def test_weights_are_those_that_convert_reverses_to(task: Sequences) -> None:
    training = Training(TRUNK, task)
    list(training.advance(CHUNK))
    finish = training.finish()
    el.convert(training.model, "dense", weights="reverse")
    for name, layer in finish.model.named_modules():
        if isinstance(layer, el.Linear):
            assert torch.equal(layer.factors[0][0], training.model.get_submodule(name).weight), name


def test_the_optimizer_forgets_products_alone(task: Sequences) -> None:
    training = Training(TRUNK, task)
    list(training.advance(CHUNK))
    before, after = training.state().tensors, training.finish().state().tensors
    kept = [key for key in after if key in before and "factors" not in key]
    assert any(key.startswith("optimizer.token.") for key in kept)
    assert all(torch.equal(before[key], after[key]) for key in kept)
    fresh = [key for key in after if key.startswith("optimizer.") and "factors" in key]
    assert fresh and all(not after[key].any() for key in fresh)


@pytest.mark.parametrize("chunks", range(1, 8))
def test_a_resumed_run_is_the_uninterrupted_one(task: Sequences, whole: list[Run], tmp_path: Path, chunks: int) -> None:
    """Stopped in the trunk, and in branches, whose model is another one."""
    asked, told = iter(range(1000)), []
    file = tmp_path / "trunk.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(TRUNK, task, file=file, stop=lambda: next(asked) >= chunks, tell=told.append)
    done = [event for event in told if isinstance(event, Run)]
    rest = train(replace(TRUNK, horizons=TRUNK.horizons[len(done) :]), task, file=file, tell=told.append)
    assert outcome(done + rest) == outcome(whole)
    assert sum(event for event in told if isinstance(event, int)) == TRUNK.steps  # nothing twice


def test_it_learns_and_costs_what_its_two_phases_cost(task: Sequences, whole: list[Run]) -> None:
    run = whole[-1]
    assert run.status == "done" and run.loss < math.log(13) - 0.2
    (_, structured), (parameters, dense) = (counted(task, part.architecture) for part in (TRUNK, TRUNK.finish))
    assert run.parameters == parameters
    assert run.flops == 3 * 16 * (36 * structured.total + 24 * dense.total)
    assert run.linear_flops == 3 * 16 * (36 * structured.linear + 24 * dense.linear)
    assert (TRUNK.branch(60), TRUNK.cooldown(60)) == (36, 48)
    assert TRUNK.steps == 36 + 24 + 10


def test_it_cools_down_in_the_usual_share(task: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Training, "advance", lambda self, until, branch=None: seen.append((until, branch)) or ())
    monkeypatch.setattr(Training, "evaluate", lambda self: 1.0)
    train(replace(TRUNK, horizons=(60,)), task)
    assert seen == [(36, None), (60, 48)]


def test_the_finish_is_part_of_what_a_run_is_and_earlier_keys_stay(task: Sequences) -> None:
    plain = replace(TRUNK, recipe=replace(RECIPE, finish_dense=0.0))
    setups = [one.run(task, 60).setup for one in (TRUNK, plain)]
    assert '"finish_dense": 0.4' in setups[0]
    assert "finish_dense" not in setups[1] and "structure_aware" not in setups[1]
    assert TRUNK.run(task, 60).trunk != plain.run(task, 60).trunk


def test_a_finish_shorter_than_the_cooldown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finish_dense=0\.1: a dense finish takes the cooldown"):
        replace(RECIPE, finish_dense=0.1)


def test_experts_cannot_be_multiplied_out(task: Sequences) -> None:
    family = "mixture(of='btt', experts=4, active=2)"
    with pytest.raises(ValueError, match="with experts it is another map for each token"):
        train(replace(TRUNK, family=family, horizons=(5,)), task)
