import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear.kernels.junction import ACTIVATIONS, junction, nest

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [(37, 3, 20, 40, 24), (130, 2, 16, 130, 9), (600, 4, 8, 16, 8)]
"""Tokens, slices, in, hidden, out. The second needs two tiles of hidden features, and masks in each; in the
third, a program has several tiles of tokens."""


@pytest.mark.parametrize(
    ("activation", "with_bias", "sizes"),
    [*((activation, True, SIZES[0]) for activation in ACTIVATIONS)]
    + [("gelu", with_bias, sizes) for with_bias in (True, False) for sizes in SIZES[1:]],
    ids=str,
)
def test_a_junction_is_two_matmuls_around_an_activation(
    activation: str, with_bias: bool, sizes: tuple[int, ...]
) -> None:
    inputs = _inputs(sizes, with_bias)
    y, expected = junction(*inputs.values(), activation), _reference(activation, **inputs)
    _close("y", y, expected)
    direction = torch.randn_like(expected)
    named = {name: value for name, value in inputs.items() if value is not None}
    ours = torch.autograd.grad(y, named.values(), direction.float())
    theirs = torch.autograd.grad(expected, named.values(), direction)
    for name, mine, their in zip(named, ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


def test_a_junction_is_a_proper_operator() -> None:
    torch.library.opcheck(junction, (*_inputs((9, 2, 16, 16, 16), True).values(), "gelu"))


@pytest.mark.parametrize("family", [el.BTT(blocks=(4, 4), rank=2), el.BTT()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_nested_layers_compute_what_they_do_one_after_the_other(family: el.Family, bias: bool) -> None:
    mlp = _mlp(family, bias)
    nested = nest(mlp.up.structure, mlp.down.structure, "gelu")
    assert not isinstance(nested, str), nested
    x = torch.randn(3, 5, 64, requires_grad=True)
    fused = nested([*mlp.up.factors, *mlp.down.factors], x, mlp.up.bias, mlp.down.bias)
    unfused = mlp(x)
    assert fused.shape == unfused.shape
    _close("y", fused, unfused)
    leaves = {"x": x, **dict(mlp.named_parameters())}
    direction = torch.randn_like(unfused)
    ours = torch.autograd.grad(fused, leaves.values(), direction)
    theirs = torch.autograd.grad(unfused, leaves.values(), direction)
    for name, mine, their in zip(leaves, ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


@pytest.mark.parametrize(
    ("up", "down", "why"),
    [
        (el.LowRank()(64, 256), el.BTT()(256, 64), "two block-diagonal"),
        (el.BTT(blocks=(4, 8))(64, 256), el.BTT(blocks=(4, 8))(256, 64), "the second reads"),
        (el.BTT(blocks=(3, 3))(64, 256), el.BTT(blocks=(3, 3))(256, 64), "padded"),
        (el.BTT(blocks=(2, 2))(1024, 4096), el.BTT(blocks=(2, 2))(4096, 1024), "too large"),
    ],
)
def test_layers_that_do_not_nest_are_told_why(up: el.Structure, down: el.Structure, why: str) -> None:
    assert why in str(nest(up, down, "gelu"))


def test_an_mlp_is_its_layers_without_a_gpu() -> None:
    mlp = _mlp(el.LowRank(rank=4), True)
    x = torch.randn(5, 64)
    torch.testing.assert_close(mlp(x), mlp.down(torch.nn.functional.gelu(mlp.up(x))))
    assert "two block-diagonal" in mlp.unfused
    with pytest.raises(ValueError, match="relu2"):
        el.StructuredMLP(64, 256, "btt", activation="tanh")


def _mlp(family: el.Family, bias: bool) -> el.StructuredMLP:
    mlp = el.StructuredMLP(64, 256, family, "gelu", bias)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp


def _inputs(sizes: tuple[int, ...], with_bias: bool) -> dict[str, Tensor | None]:
    tokens, slices, width, hidden, out = sizes
    return {
        "z": torch.randn(width, slices, tokens, requires_grad=True),
        "up": (torch.randn(slices, hidden, width) / width**0.5).requires_grad_(),
        "bias": torch.randn(slices * hidden, requires_grad=True) if with_bias else None,
        "down": (torch.randn(slices, out, hidden) / hidden**0.5).requires_grad_(),
    }


def _reference(activation: str, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor) -> Tensor:
    hidden = torch.einsum("kbm,bhk->bhm", z.double(), up.double())
    if bias is not None:
        hidden = hidden + bias.double().view(*up.shape[:2], 1)
    return torch.einsum("bhm,bnh->bnm", ACTIVATIONS[activation](hidden), down.double())


def _close(what: str, mine: Tensor, theirs: Tensor) -> None:
    error = (mine.double() - theirs).norm() / theirs.double().norm()
    assert error < 2e-6, f"{what} differs by {error:.2g}"
