"""Several processes, or a batch in parts: the same model comes out, to rounding."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from einlinear.lab.data import Sequences
from einlinear.lab.parallel import World
from einlinear.lab.run import Run
from einlinear.lab.step import Execution
from einlinear.lab.train import Recipe, Training, Trunk, train

RECIPE = Recipe(batch=4, base_width=16, base_depth=1, head=8, warmup=5)
TRUNK = Trunk(family="btt(rank=2)", width=16, depth=2, rate=0.02, seed=0, horizons=(15, 30), recipe=RECIPE)


@pytest.fixture(scope="module")
def alone(task: Sequences) -> list[Run]:
    torch.set_num_threads(1)
    return train(TRUNK, task)


def losses(runs: list[Run]) -> list[float]:
    return [run.loss or 0.0 for run in runs] + [json.loads(run.curve)[-1][1] for run in runs]


def test_a_batch_in_parts_is_the_batch(task: Sequences, alone: list[Run]) -> None:
    assert losses(train(TRUNK, task, execution=Execution(accumulate=4))) == pytest.approx(losses(alone), rel=1e-5)


def test_parts_add_up_in_float32_where_losses_are_of_bfloat16(task: Sequences) -> None:
    """Against the float32 gradient: parts bring no error beyond that of bfloat16 itself."""
    exact = replace(TRUNK, recipe=replace(RECIPE, clip=1e9))
    half = replace(exact, recipe=replace(exact.recipe, precision="bfloat16"))
    start = Training(exact, task)
    list(start.advance(10))
    gradients = []
    for trunk, parts in ((exact, 1), (half, 1), (half, 4)):
        training = Training(trunk, task, Execution(accumulate=parts))
        training.load(start.state())
        list(training.advance(11))
        assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.model.parameters()]))
    whole, parted = ((gradient - gradients[0]).norm() / gradients[0].norm() for gradient in gradients[1:])
    assert 0 < parted < 1.5 * whole < 0.05


def test_bfloat16_trains_as_well(task: Sequences, alone: list[Run]) -> None:
    runs = train(replace(TRUNK, recipe=replace(RECIPE, precision="bfloat16")), task)
    assert losses(runs) != losses(alone)
    assert losses(runs) == pytest.approx(losses(alone), rel=0.03)


def test_a_batch_that_cannot_be_cut_is_refused(task: Sequences) -> None:
    with pytest.raises(ValueError, match="batches of 4: they cannot be cut into 3 equal parts"):
        train(TRUNK, task, execution=Execution(accumulate=3))
    for wrong in ({"accumulate": 0}, {"graphed": True}, {"shard": True, "compiled": True}):
        with pytest.raises(ValueError, match="Training "):
            Execution(**wrong)


def test_one_process_shards_nothing(task: Sequences, alone: list[Run]) -> None:
    assert losses(train(TRUNK, task, execution=Execution(shard=True))) == losses(alone)


def test_shares_make_up_the_batch() -> None:
    batch = torch.arange(6)
    assert torch.cat([World(rank, 3).share(batch) for rank in range(3)]).sort().values.tolist() == batch.tolist()


SCRIPT = """
import json, sys, torch
from einlinear.lab.data import Sequences
from einlinear.lab.parallel import joined
from einlinear.lab.step import Execution
from einlinear.lab.train import Recipe, Training, Trunk, train

tokens = torch.arange(3000) * 5 % 13
task = Sequences("s", "", "f", 13, 8, tokens[:2000], tokens[2000:], limit=400)
trunk = Trunk(family="btt(rank=2)", width=16, depth=2, rate=0.02, seed=0, horizons=(15, 30),
              recipe=Recipe(batch=4, base_width=16, base_depth=1, head=8, warmup=5))
with joined("cpu") as device:
    found = {}
    for name in ("replicated", "sharded", "sharded in parts"):
        execution = Execution(device=device, shard="sharded" in name, accumulate=2 if "parts" in name else 1)
        runs = train(trunk, task, execution=execution)
        found[name] = [run.loss for run in runs] + [json.loads(run.curve)[-1][1] for run in runs]
    factor = Training(trunk, task, execution).model.blocks[0].feed_forward.up.factors[0]
    rank = torch.distributed.get_rank()
    (whole, slices) = (list(factor.shape), list(factor.to_local().shape))
    print(json.dumps([rank, whole, slices, runs[0].device, found]), file=open(f"{sys.argv[1]}/{rank}.json", "w"))
"""


def test_two_processes_train_the_model_of_one(task: Sequences, alone: list[Run], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, script, tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result[0] for result in results] == [0, 1]
    for _, whole, local, device, found in results:
        assert local == [whole[0] // 2, *whole[1:]]  # matrices stay whole
        assert device.startswith("2 x cpu")
        for name, values in found.items():
            assert values == pytest.approx(losses(alone), rel=1e-4), name


def test_a_compiled_model_is_compiled_once_for_all_blocks(task: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """One version of the block, one of the read-out and one of the loss; evaluation adds none, nor does a branch."""
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile  # which modules call too
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, **how, backend=counter))
    trunk = replace(TRUNK, depth=3)
    found = train(trunk, task, execution=Execution(compiled=True))
    assert counter.frame_count == 3
    assert losses(found) == pytest.approx(losses(train(trunk, task)), rel=1e-5)
