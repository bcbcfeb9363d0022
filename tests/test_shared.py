"""Layers of one structure on one input, run as one: the same outputs and gradients of the layers' own parameters."""

import pytest
import torch

import einlinear as el
from einlinear.kernels import native
from einlinear.kernels.joint import join
from einlinear.shared import Together

JOINT = ("dense", "btt(rank=2)", "monarch(blocks=4)")


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_structure_compute_what_they_do_apart(family: el.Family, bias: bool) -> None:
    layers = torch.nn.ModuleList(el.Linear(48, 36, family, bias) for _ in range(3))
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 700, 48, requires_grad=True)
    together, apart = el.shared_input(x, *layers), [layer(x) for layer in layers]
    leaves = {"x": x, **dict(layers.named_parameters())}
    directions = [torch.randn_like(y) for y in apart]
    ours = torch.autograd.grad(together, leaves.values(), directions)
    theirs = torch.autograd.grad(apart, leaves.values(), directions)
    for name, mine, their in zip(("q", "k", "v", *leaves), (*together, *ours), (*apart, *theirs), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", JOINT)
@pytest.mark.parametrize(("tokens", "matmuls"), [(1000, 1), (1, 3)])
def test_many_tokens_are_read_once(family: str, tokens: int, matmuls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in torch's own matmuls, without compiled code; a few tokens are not worth the copy of the factors."""
    monkeypatch.setattr(native, "library", lambda: None)
    layers = [el.Linear(64, 64, family, bias=False) for _ in range(3)]
    with torch.profiler.profile() as profiled, torch.no_grad():
        el.shared_input(torch.randn(tokens, 64), *layers)
    found = sum(event.count for event in profiled.key_averages() if event.key in ("aten::mm", "aten::bmm"))
    assert found == matmuls * len(layers[0].factors)


def test_what_does_not_run_as_one_is_told_why_and_runs_apart() -> None:
    assert "batch of them" in str(join(el.LowRank()(64, 64), 3))
    assert "padded" in str(join(el.BTT(blocks=(9, 9))(250, 250), 2))
    assert "copy in memory" in str(join(el.BTT(cores=3)(64, 64).canonical, 2))
    assert Together.of(el.Linear(8, 8, "dense")).joint is None
    mixed = [el.Linear(16, 16, "btt"), torch.nn.Linear(16, 8), el.Linear(16, 16, "btt", bias=False)]
    x = torch.randn(300, 16)
    for layers in (mixed, mixed[::2]):
        for mine, layer in zip(el.shared_input(x, *layers), layers, strict=True):
            torch.testing.assert_close(mine, layer(x))


def test_hooks_on_a_layer_are_called() -> None:
    layers, seen = [el.Linear(64, 64, "btt") for _ in range(3)], []
    layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, mine, _ = el.shared_input(torch.randn(1000, 64), *layers)
    assert seen
    assert seen[0] is mine


def test_planned_once_it_compiles_without_a_break() -> None:
    layers = [el.Linear(64, 64, "btt", bias=False) for _ in range(3)]
    together, x = Together.of(*layers), torch.randn(1000, 64)
    compiled = torch.compile(lambda x: together(x, *layers), fullgraph=True, backend="eager")
    for mine, layer in zip(compiled(x), layers, strict=True):
        torch.testing.assert_close(mine, layer(x))


def test_compiled_layers_run_by_the_same_kernels() -> None:
    """Not by the plain matmuls that only an export needs: torch.compile says of itself that it is exporting."""
    graphs = []
    layer = el.Linear(1024, 1024, "btt(rank=4)", bias=False)  # whose wide states go in blocks

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=keep)(torch.randn(300, 1024))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(name.startswith(("einlinear.native", "einlinear.blocked")) for name in called) == 1, called
