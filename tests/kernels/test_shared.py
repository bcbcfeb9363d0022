import pytest
import torch

import einlinear as el
from einlinear.kernels.shared import share

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 2, 521])  # one launch altogether; a shared first stage
def test_layers_of_one_input_compute_what_they_do_apart(tokens: int, bias: bool) -> None:
    layers = torch.nn.ModuleList(el.Linear(64, out, el.BTT(blocks=(8, 8)), bias) for out in (64, 128, 64))
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run = share([layer.structure for layer in layers])
    assert not isinstance(run, str), run
    x = torch.randn(tokens, 64, requires_grad=True)
    together = run([[*layer.factors] for layer in layers], x, [layer.bias for layer in layers if bias])
    apart = [layer(x) for layer in layers]
    leaves = {"x": x, **dict(layers.named_parameters())}
    directions = [torch.randn_like(y) for y in apart]
    ours = torch.autograd.grad(together, leaves.values(), directions)
    theirs = torch.autograd.grad(apart, leaves.values(), directions)
    for name, mine, their in zip(("q", "k", "v", *leaves), (*together, *ours), (*apart, *theirs), strict=True):
        assert mine.shape == their.shape
        error = (mine - their).norm()
        assert error <= 2e-6 * their.norm(), f"{name} differs by {error:.2g}"


def test_without_a_gpu_layers_run_one_after_the_other() -> None:
    layers = [el.Linear(16, 16, "btt"), torch.nn.Linear(16, 8)]
    x = torch.randn(3, 16)
    for mine, layer in zip(el.shared_input(x, *layers), layers, strict=True):
        torch.testing.assert_close(mine, layer(x))


def test_layers_that_cannot_share_are_told_why() -> None:
    assert "different blocks" in str(share([el.BTT(blocks=b)(256, 256) for b in ((8, 8), (16, 16))]))
    assert "two block-diagonal" in str(share([el.LowRank()(64, 64)] * 2))
    assert "padded" in str(share([el.BTT(blocks=(9, 9))(250, 250)] * 2))
