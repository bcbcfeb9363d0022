"""A layer, or a whole step of the lab's GPT, in a CUDA graph: replays are what runs without one.

TRITON_INTERPRET=0 python -m pytest tests/test_cuda_graphs.py
"""

import os

import pytest
import torch
from torch.testing import assert_close

import einlinear as el
from einlinear.lab.data import Sequences
from einlinear.lab.step import Execution
from einlinear.lab.train import CHUNK, Recipe, Training, Trunk

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU"),
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] == "1", reason="kernels are interpreted here: set TRITON_INTERPRET=0"
    ),
]

FAMILIES = [
    el.BTT(rank=1),
    el.BTT(rank=4),
    el.Monarch(blocks=4),
    el.LowRank(rank=8),
    el.Kronecker(),
    el.BLAST(blocks=4, rank=8),
]


def recorded(step):
    """A graph of `step`, which has run before on a stream of its own, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 1024])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_replay_is_the_layer_and_its_gradients_on_what_the_input_then_holds(family, tokens, dtype):
    replays_as_it_runs(el.Linear(256, 256, family, device="cuda", dtype=dtype), tokens)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_replay_is_an_mlp_by_its_junction(activation):
    mlp = el.StructuredMLP(256, 1024, el.BTT(), activation, device="cuda", dtype=torch.bfloat16)
    assert mlp.unfused is None
    replays_as_it_runs(mlp, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "active"), [(33, 4, 1), (1024, 8, 2), (4096, 16, 2)])
@pytest.mark.parametrize("family", [el.BTT(), el.LowRank(rank=16)], ids=str)
def test_a_replay_routes_what_the_input_then_holds(family, tokens, experts, active, dtype):
    layer = el.Linear(256, 256, family, experts=experts, active=active, device="cuda", dtype=dtype)
    torch.nn.init.normal_(layer.router.weight)
    replays_as_it_runs(layer, tokens)


def replays_as_it_runs(layer, tokens):
    dtype = next(layer.parameters()).dtype
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, 256, device="cuda", dtype=dtype)

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y, [x, *layer.parameters()], grad)

    graph, (y, grads) = recorded(step)
    with torch.no_grad():
        x.normal_()
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    graph.replay()
    wanted, wanted_grads = step()
    assert_close(y, wanted, rtol=0, atol=0)
    for found, want in zip(grads, wanted_grads, strict=True):
        assert_close(found, want, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("family", ["dense", "btt", "monarch(blocks=4)", "low_rank(rank=16)"])
def test_a_step_of_the_gpt_compiled_and_in_a_graph_is_the_step_as_it_stands(family):
    """Blocks compiled, fused AdamW and the copy in bfloat16 included; and it never waits for the GPU."""
    ids = torch.arange(20000) ** 2 % 61
    task = Sequences("squares", "", "f", 61, 64, ids, ids, limit=400)
    recipe = Recipe(batch=16, base_width=128, base_depth=2, head=32, precision="bfloat16", warmup=5)
    trunk = Trunk(family=family, width=128, depth=2, rate=2**-8, seed=0, horizons=(100,), recipe=recipe)
    curves = []
    for compiled in (False, True):
        training = Training(trunk, task, Execution(device="cuda", compiled=compiled, graphed=compiled))
        list(training.advance(2 * CHUNK))
        curves.append([loss for _, loss in training.curve])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(*training._batch(training.step), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
