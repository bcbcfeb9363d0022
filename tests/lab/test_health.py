"""What runs keep of their routers: windows of training, the end of it, and the same after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from einlinear.lab import checkpoint
from einlinear.lab.data import Sequences
from einlinear.lab.health import LATEST, WINDOWS, Health
from einlinear.lab.train import Recipe, Trunk, train
from einlinear.routing import RouterStatistics


def seen(load: tuple[float, ...], entropy: float = 0.5, dropped: float = 0.0) -> dict[str, RouterStatistics]:
    return {"block.query.router": RouterStatistics(load, entropy, dropped, 10)}


def test_an_expert_is_dead_where_no_look_of_a_window_found_it() -> None:
    health = Health()
    for look in range(4 * WINDOWS):  # each expert has every other batch, the third none
        health.look(look + 1, seen((1.0, 0.0, 0.0) if look % 2 else (0.0, 1.0, 0.0), entropy=look / 100))
    layer = health.told()["block.query"]
    history = layer["history"]
    assert history["tokens"] == list(range(2, 4 * WINDOWS + 1, 2))  # each window is two looks by now
    assert set(history["dead"]) == {1} and set(history["busiest"]) == {0.5} and set(history["idlest"]) == {0.0}
    assert history["entropy"] == pytest.approx([0.005 + look / 100 for look in range(0, 4 * WINDOWS, 2)], abs=1e-3)
    assert layer["load"] == [0.5, 0.5, 0.0]
    last = range(4 * WINDOWS - LATEST, 4 * WINDOWS)
    assert layer["entropy"] == pytest.approx(sum(last) / 100 / LATEST, rel=1e-3)


def test_windows_stay_few_and_lose_nothing() -> None:
    health = Health()
    for look in range(1000):
        health.look(look, seen((look / 1000, 1 - look / 1000)))
    assert WINDOWS <= len(health.windows) <= 2 * WINDOWS
    assert sum(looks for _, looks, _ in health.windows) == 1000
    assert len({looks for _, looks, _ in health.windows[:-1]}) == 1
    assert sum(sums["block.query"][0] for *_, sums in health.windows) == pytest.approx(499.5)
    assert health.told()["block.query"]["load"][0] == pytest.approx(0.95, abs=0.02)  # the last tenth


def test_a_tiny_load_is_not_dead() -> None:
    health = Health()
    health.look(1, seen((1 - 1e-9, 1e-9)))
    assert health.told()["block.query"]["history"]["dead"] == [0]


def test_without_routers_there_is_nothing_to_tell() -> None:
    health = Health()
    health.look(10, {})
    assert health.told() == {} and health.windows == []


@pytest.fixture
def task() -> Sequences:
    tokens = torch.arange(2000) % 11
    return Sequences("s", "", "", 11, 12, tokens, tokens, limit=100)


def trunk(family: str) -> Trunk:
    recipe = Recipe(batch=4, base_width=32, base_depth=1, warmup=2)
    return Trunk(family=family, width=32, depth=1, rate=0.01, seed=0, horizons=(30, 60), recipe=recipe)


def test_runs_keep_it_interrupted_or_not(task: Sequences, tmp_path: Path) -> None:
    family = "mixture(of='btt', experts=4, active=2)"
    runs = train(trunk(family), task)
    for run in runs:
        told = json.loads(run.routers)
        assert list(told) == [f"blocks.0.{layer}" for layer in LAYERS]
        for layer in told.values():
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-3) and len(layer["load"]) == 4
            assert layer["history"]["tokens"][-1] == run.tokens and 0 < layer["entropy"] <= 1
    stops = iter([False] * 4 + [True])
    with pytest.raises(KeyboardInterrupt):
        train(trunk(family), task, file=tmp_path / "state", stop=lambda: next(stops))
    (resumed,) = train(replace(trunk(family), horizons=(60,)), task, file=tmp_path / "state")  # 30 was done
    assert resumed.routers == runs[-1].routers


LAYERS = ("attention.query", "attention.output", "feed_forward.up", "feed_forward.down")


def test_a_run_that_fails_keeps_it_too(task: Sequences) -> None:
    (run, _) = train(replace(trunk("moe(experts=4, active=2)"), rate=1e4), task)
    assert run.status == "diverged" and list(json.loads(run.routers)) == ["blocks.0.feed_forward.up"]


def test_plain_models_have_none_and_their_old_states_are_read(
    task: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of versions that did not know of routers have three numbers each."""
    (run, long) = train(trunk("dense"), task)
    assert run.routers == long.routers == "{}"
    dumps = json.dumps
    with monkeypatch.context() as older:
        older.setattr(checkpoint.json, "dumps", lambda values: dumps(values[:3]))
        stops = iter([False, False, True])
        with pytest.raises(KeyboardInterrupt):
            train(trunk("dense"), task, file=tmp_path / "state", stop=lambda: next(stops))
    assert [run.loss for run in train(trunk("dense"), task, file=tmp_path / "state")][-1] == long.loss
