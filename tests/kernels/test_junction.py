import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import einlinear as el
from einlinear.kernels.junction import ACTIVATIONS, junction, nest

triton = pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
tl = pytest.importorskip("triton.language")

from einlinear.kernels.tiles_junction import activate  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [(37, 3, 20, 40, 24), (130, 2, 16, 130, 9), (600, 4, 8, 16, 8)]
"""Tokens, slices, in, hidden, out. The second needs two tiles of hidden features, and masks in each; in the
third, a program has several tiles of tokens."""


@pytest.mark.parametrize(
    ("activation", "with_bias", "sizes", "parts"),
    [
        *((activation, True, SIZES[0], 1) for activation in ACTIVATIONS),
        ("gelu", False, SIZES[1], 1),
        ("relu2", True, SIZES[2], 1),
        ("silu", True, SIZES[0], 2),
        ("gelu", False, SIZES[1], 2),
        ("gelu", True, SIZES[2], 2),
    ],
    ids=str,
)
def test_a_junction_is_matmuls_around_an_activation(
    activation: str, with_bias: bool, sizes: tuple[int, ...], parts: int
) -> None:
    zs, ups, biases, down = _inputs(sizes, with_bias, parts)
    y, expected = junction(zs, ups, biases, down, activation), _reference(activation, zs, ups, biases, down)
    _close("y", y, expected)
    direction = torch.randn_like(expected)
    leaves = [*zs, *ups, *biases, down]
    ours = torch.autograd.grad(y, leaves, direction.float())
    theirs = torch.autograd.grad(expected, leaves, direction)
    names = [f"{name} {part}" for name in ("z", "up", "bias")[: 2 + with_bias] for part in range(parts)]
    for name, mine, their in zip([*names, "down"], ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


@triton.jit
def _activated(v, h, slope, COUNT: tl.constexpr, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    at = tl.arange(0, COUNT)
    value, derivative = activate(tl.load(v + at), ACTIVATION, SHORT)
    tl.store(h + at, value)
    tl.store(slope + at, derivative)


@pytest.mark.parametrize("short", [False, True], ids=["float32", "16 bits"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_and_its_derivative_are_close_to_those_in_float64(activation: str, short: bool) -> None:
    v = torch.cat([torch.linspace(-9, 9, 8191), torch.tensor([-1e4])])
    h, slope = torch.empty_like(v), torch.empty_like(v)
    _activated[(1,)](v, h, slope, len(v), activation, short)
    exact = v.double().requires_grad_()
    wanted = ACTIVATIONS[activation](exact)
    (derivative,) = torch.autograd.grad(wanted.sum(), exact)
    approximate = short and activation == "gelu"  # the others differ by the machine's tanh, which the interpreter lacks
    smooth = v != 0  # the derivative of ReLU has a step
    assert ((h - wanted) / (1 + wanted.abs())).abs().max() < (2.7e-5 if approximate else 2e-6)
    assert (slope - derivative)[smooth].abs().max() < (1.2e-4 if approximate else 2e-6)


def test_a_junction_in_16_bits_errs_no_more_than_matmuls_in_16_bits() -> None:
    for activation in ("gelu", "silu"):  # float16: the interpreter multiplies bfloat16 wrongly
        zs, ups, _, down = _inputs(SIZES[0], False, 1)
        operands = [tensor.detach().half().requires_grad_() for tensor in (*zs, *ups, down)]
        direction = torch.randn(3, 24, 37)

        def run(made: Tensor, leaves: list[Tensor], direction: Tensor = direction) -> list[Tensor]:
            return [made, *torch.autograd.grad(made, leaves, direction.to(made))]

        z, up, last = operands
        exact = [operand.detach().double().requires_grad_() for operand in operands]
        mine = run(junction([z], [up], [], last, activation), operands)
        stock = run(_reference(activation, [z], [up], [], last, torch.float16), operands)
        wanted = run(_reference(activation, exact[:1], exact[1:2], [], exact[2]), exact)
        for ours, theirs, want in zip(mine, stock, wanted, strict=True):
            assert (ours - want).norm() < 1.2 * (theirs - want).norm() + 1e-4 * want.norm()


@pytest.mark.parametrize("parts", [1, 2], ids=["plain", "gated"])
def test_a_junction_is_a_proper_operator(parts: int) -> None:
    torch.library.opcheck(junction, (*_inputs((9, 2, 16, 16, 16), True, parts), "gelu"))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("family", [el.BTT(blocks=(4, 4), rank=2), el.BTT()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_nested_layers_compute_what_they_do_one_after_the_other(family: el.Family, bias: bool, activation: str) -> None:
    mlp = _mlp(family, bias, activation)
    assert mlp.unfused is None
    layers = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
    x = torch.randn(3, 7, 64, requires_grad=True)  # 21 tokens: surplus ones are added
    hidden = [layer.bias for layer in layers if bias]
    fused = mlp._nested([[*layer.factors] for layer in layers], [*mlp.down.factors], x, hidden, mlp.down.bias)
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
    assert why in str(nest([up], down, "gelu"))


def test_an_mlp_is_its_layers_without_a_gpu() -> None:
    x, act = torch.randn(5, 64), torch.nn.functional
    mlp = _mlp(el.LowRank(rank=4), True)
    torch.testing.assert_close(mlp(x), mlp.down(act.gelu(mlp.up(x))))
    assert "two block-diagonal" in mlp.unfused
    gated = _mlp(el.BTT(), True, "swiglu")
    torch.testing.assert_close(gated(x), gated.down(act.silu(gated.gate(x)) * gated.up(x)))
    same = el.StructuredMLP.of(gated.up, gated.down, "silu", gated.gate)
    torch.testing.assert_close(same(x), gated(x))
    assert same.activation == "swiglu" and same.unfused is None
    with pytest.raises(ValueError, match="relu2"):
        el.StructuredMLP(64, 256, "btt", activation="tanh")


def test_a_gate_of_other_blocks_is_told_why() -> None:
    gate, up, down = (el.BTT(blocks=b)(64, 64) for b in ((4, 4), (8, 8), (4, 4)))
    assert "the gate has other blocks" in str(nest([gate, up], down, "silu"))


def _mlp(family: el.Family, bias: bool, activation: str = "gelu") -> el.StructuredMLP:
    mlp = el.StructuredMLP(64, 256, family, activation, bias)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp


def _inputs(
    sizes: tuple[int, ...], with_bias: bool, parts: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    tokens, slices, width, hidden, out = sizes
    zs = [torch.randn(width, slices, tokens, requires_grad=True) for _ in range(parts)]
    ups = [(torch.randn(slices, hidden, width) / width**0.5).requires_grad_() for _ in range(parts)]
    biases = [torch.randn(slices * hidden, requires_grad=True) for _ in range(parts if with_bias else 0)]
    return zs, ups, biases, (torch.randn(slices, out, hidden) / hidden**0.5).requires_grad_()


def _reference(
    activation: str,
    zs: list[Tensor],
    ups: list[Tensor],
    biases: list[Tensor],
    down: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    hidden = [torch.einsum("kbm,bhk->bhm", z.to(dtype), up.to(dtype)) for z, up in zip(zs, ups, strict=True)]
    if biases:
        hidden = [h + bias.to(dtype).view(*h.shape[:2], 1) for h, bias in zip(hidden, biases, strict=True)]
    product = ACTIVATIONS[activation](hidden[0]) * (hidden[1] if len(hidden) == 2 else 1)
    return torch.einsum("bhm,bnh->bnm", product, down.to(dtype))


def _close(what: str, mine: Tensor, theirs: Tensor) -> None:
    error = (mine.double() - theirs).norm() / theirs.double().norm()
    assert error < 2e-6, f"{what} differs by {error:.2g}"


def test_layers_of_an_mlp_may_be_replaced() -> None:
    """The junction was planned for those that were there: what takes their place runs as it stands."""
    mlp = el.StructuredMLP(64, 128, "btt(blocks=(4, 4))")
    assert mlp._is_as_planned() and copy.deepcopy(mlp)._is_as_planned()
    x = torch.randn(5, 64)
    mlp.up = el.Linear(64, 128, "low_rank(rank=4)")
    assert mlp.up is mlp.get_submodule("up") and not mlp._is_as_planned()
    assert_close(mlp(x), mlp.down(torch.nn.functional.gelu(mlp.up(x))))
    mlp.down = torch.nn.Linear(128, 64)
    assert_close(mlp(x), mlp.down(torch.nn.functional.gelu(mlp.up(x))))
