"""Models with experts: in every linear layer, or whole MLPs; what they cost, and that they train and resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import einlinear as el
from einlinear.lab import models
from einlinear.lab.data import Sequences
from einlinear.lab.models import build, counted
from einlinear.lab.step import Execution
from einlinear.lab.train import Recipe, Training, Trunk, train

EVERYWHERE = "mixture(of='btt', experts=4, active=2)"
FAMILIES = (EVERYWHERE, "moe(experts=4, active=2)", "moe(experts=4, active=2, of='btt')")
VOCABULARY, CONTEXT = 11, 12


@pytest.fixture
def task() -> Sequences:
    tokens = torch.arange(2000) % VOCABULARY
    return Sequences("s", "", "", VOCABULARY, CONTEXT, tokens, tokens, limit=100)


def trunk(family: str, **options: Any) -> Trunk:
    recipe = Recipe(batch=4, base_width=32, base_depth=1, warmup=2, **options)
    return Trunk(family=family, width=32, depth=1, rate=0.01, seed=0, horizons=(30,), recipe=recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_active_is_counted(family: str, task: Sequences) -> None:
    architecture = trunk(family).architecture
    model, (_, costs) = build(task, architecture), counted(task, architecture)
    of = el.BTT() if "btt" in family else el.Dense()
    square, mlp = el.flops(of(32, 32)), el.flops(of(32, 128)) + el.flops(of(128, 32))
    routers = [module for module in model.modules() if isinstance(module, el.Router)]
    active = 2 * (4 * square + mlp) if family == EVERYWHERE else 4 * square + 2 * mlp
    assert costs.linear == active + sum(2 * router.d_in * 4 for router in routers)
    assert len(routers) == (4 if family == EVERYWHERE else 1)  # queries, keys and values share one


@pytest.mark.parametrize("family", FAMILIES)
def test_they_learn_and_resume(family: str, task: Sequences, tmp_path: Path) -> None:
    (run,) = train(trunk(family), task)
    assert run.status == "done" and run.loss < 0.9 * math.log(VOCABULARY)
    told = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        train(trunk(family), task, file=tmp_path / "state", stop=lambda: next(told))
    (resumed,) = train(trunk(family), task, file=tmp_path / "state")
    assert resumed.loss == run.loss


def test_steps_move_biases_and_evaluation_nothing(task: Sequences) -> None:
    training = Training(trunk(EVERYWHERE), task)
    biases = [module.bias for module in training.model.modules() if isinstance(module, el.Router)]
    assert all((bias == 0).all() for bias in biases)  # what is done once is no step
    for _ in training.advance(10):
        pass
    before = [bias.clone() for bias in biases]
    assert any((bias != 0).any() for bias in biases)
    routers = [module for module in training.update.working.modules() if isinstance(module, el.Router)]
    latest = [router.latest for router in routers]
    training.evaluate()
    assert all(router.latest is before for router, before in zip(routers, latest, strict=True))
    assert all((a == b).all() for a, b in zip(before, biases, strict=True))


def test_a_recipe_says_how_experts_are_evened_out(task: Sequences) -> None:
    def curve(**options: float) -> list[tuple[int, float]]:
        training = Training(trunk(EVERYWHERE, **options), task)
        assert sum(training.advance(20)) == 20
        biases = [module.bias for module in training.model.modules() if isinstance(module, el.Router)]
        assert all((bias == 0).all() for bias in biases) == (options.get("rebalance") == 0)
        return training.curve

    curves = [curve(), curve(rebalance=0.0), curve(rebalance=0.0, balance=0.0)]
    assert len({losses[-1][1] for losses in curves}) == 3
    assert curve(rebalance=0.01, balance=0.1) == curves[0]
    assert "balance" not in trunk(EVERYWHERE).recipe.setup  # as of runs that were stored before it could be chosen
    assert trunk(EVERYWHERE, balance=0.01).recipe.setup["balance"] == 0.01


def test_a_copy_in_16_bits_leaves_routers_alone(task: Sequences) -> None:
    training = Training(trunk(EVERYWHERE, precision="bfloat16"), task)
    routers = [module for module in training.update.working.modules() if isinstance(module, el.Router)]
    assert {router.weight.dtype for router in routers} == {torch.float32}
    for _ in training.advance(10):
        pass
    assert all((router.weight != 0).any() for router in routers)


def test_blocks_compile(task: Sequences) -> None:
    torch._dynamo.reset()
    training = Training(trunk(EVERYWHERE), task)
    compiled = Training(trunk(EVERYWHERE), task, Execution())
    for block in compiled.model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    for each in (training, compiled):
        for _ in each.advance(10):
            pass
        losses.append(each.curve[-1][1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_family_of_the_lab_has_a_short_text() -> None:
    family = el.structure("moe(experts=8, active=2)")
    assert isinstance(family, models.Moe) and str(family) == "moe(experts=8, active=2)"
    for of in ("moe(experts=2, active=1)", "mixture(of='btt', experts=2, active=1)"):
        with pytest.raises(ValueError, match="has experts already"):
            models.Moe(4, 2, of)
    assert family not in el.families()
    assert isinstance(models.feed_forward(trunk(str(family)).architecture), el.MixtureMLP)
