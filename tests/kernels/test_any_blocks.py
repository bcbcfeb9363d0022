"""The GPU kernels for blocks, ranks and numbers of tokens that nobody chose, none at all among them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import hypothesis.strategies as some
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from torch import Tensor

import einlinear as el
from einlinear.kernels import KERNELS
from einlinear.kernels.junction import ACTIVATIONS, nest
from einlinear.kernels.kernel import CUDA_HALF, InTriton
from einlinear.kernels.shared import share

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

SETTINGS = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
BLOCKS, SIZES = some.sampled_from([1, 3, 5, 8]), some.sampled_from([8, 9, 16, 17])
TOKENS, RANKS = some.sampled_from([0, 1, 3, 17]), some.sampled_from([1, 2, 3])
SHAPES = some.tuples(BLOCKS, SIZES, BLOCKS, SIZES, RANKS)
BOOLS = some.booleans()


def btt(blocks: int, size: int, later: int, out: int, rank: int) -> el.Structure:
    """So many blocks of one size to so many of another."""
    try:
        return el.BTT(rank, blocks=(blocks, later))(blocks * size, later * out).canonical
    except el.StructureError:
        assume(False)
        raise


def drawn(structure: el.Structure) -> list[Tensor]:
    return [torch.randn(shape) / math.sqrt(shape[-1]) for shape in structure.matrix_shapes]


def compare(
    run: Callable[..., Sequence[Tensor]], wanted: Callable[..., Sequence[Tensor]], leaves: dict[str, Tensor]
) -> None:
    """Outputs and the gradients of each leaf; what is wanted is made in float64."""
    ours, theirs = (
        {name: leaf.to(kind).clone().requires_grad_() for name, leaf in leaves.items()}
        for kind in (torch.float32, torch.float64)
    )
    mine, exact = list(run(*ours.values())), list(wanted(*theirs.values()))
    directions = [torch.randn_like(y) for y in exact]
    found = torch.autograd.grad(mine, ours.values(), [direction.float() for direction in directions])
    right = torch.autograd.grad(exact, theirs.values(), directions)
    names = [*(f"output {k}" for k in range(len(mine))), *(f"gradient of {name}" for name in leaves)]
    for name, got, want in zip(names, (*mine, *found), (*exact, *right), strict=True):
        assert got.shape == want.shape, name
        error = (got.double() - want).norm()
        assert error <= 1e-5 * want.norm() + 1e-6, f"{name} differs by {error:.2g} of {want.norm():.2g}"


@SETTINGS
@given(SHAPES, TOKENS, BOOLS)
@example((8, 8, 8, 9, 1), 0, True)
def test_a_layer_is_the_reference_with_every_gradient(sizes, tokens, bias):
    structure = btt(*sizes)
    fitting = [k for k in KERNELS if isinstance(k, InTriton) and k.refuses(structure, CUDA_HALF) is None]
    assume(fitting)
    x, (first, second) = torch.randn(tokens, structure.d_in), drawn(structure)
    leaves = {"x": x, "first": first, "second": second} | ({"bias": torch.randn(structure.d_out)} if bias else {})

    def run(prepared, x, first, second, bias=None):
        return [prepared([first, second], x, bias)]

    def wanted(x, first, second, bias=0):
        return [el.apply(structure, [first, second], x) + bias]

    for kernel in fitting:
        compare(partial(run, kernel.prepare(structure)), wanted, leaves)


@SETTINGS
@given(
    SHAPES,
    BLOCKS,
    SIZES,
    RANKS,
    TOKENS,
    BOOLS,
    some.sampled_from([*ACTIVATIONS]),
)
@example((3, 8, 5, 9, 2), 2, 8, 1, 0, True, "silu")
def test_an_mlp_is_its_layers_with_every_gradient(sizes, later, out, rank, tokens, gated, activation):
    up, down = btt(*sizes), btt(sizes[2], sizes[3], later, out, rank)
    nested = nest([up] * (1 + gated), down, activation)
    assume(not isinstance(nested, str))
    ups = [drawn(up) for _ in range(1 + gated)]
    biases = [torch.randn(up.d_out) for _ in ups]
    tensors = [torch.randn(2, tokens, up.d_in), *(f for pair in ups for f in pair), *drawn(down), *biases]
    count = len(ups)

    def parts(x, *rest):
        pairs = [rest[2 * k : 2 * k + 2] for k in range(count + 1)]
        return x, pairs[:-1], pairs[-1], rest[2 * count + 2 :]

    def run(*tensors):
        x, pairs, last, added = parts(*tensors)
        return [nested(pairs, last, x, added)]

    def wanted(*tensors):
        x, pairs, last, added = parts(*tensors)
        made = [el.apply(up, pair, x) + bias for pair, bias in zip(pairs, added, strict=True)]
        hidden = ACTIVATIONS[activation](made[0])
        return [el.apply(down, last, hidden * made[1] if gated else hidden)]

    names = ["x", *(f"up {k}" for k in range(2 * count)), "onward", "out", *(f"bias {k}" for k in range(count))]
    compare(run, wanted, dict(zip(names, tensors, strict=True)))


@SETTINGS
@given(BLOCKS, SIZES, some.lists(some.tuples(BLOCKS, SIZES, RANKS), min_size=2, max_size=2), TOKENS)
def test_layers_of_one_input_are_those_apart(blocks, size, others, tokens):
    structures = [btt(blocks, size, later, out, rank) for later, out, rank in others]
    together = share(structures)
    assume(not isinstance(together, str))
    factors = [factor for structure in structures for factor in drawn(structure)]
    leaves = {"x": torch.randn(tokens, blocks * size)} | {f"factor {k}": factor for k, factor in enumerate(factors)}

    def pairs(factors):
        return [factors[2 * k : 2 * k + 2] for k in range(len(structures))]

    def wanted(x, *factors):
        return [el.apply(structure, pair, x) for structure, pair in zip(structures, pairs(factors), strict=True)]

    compare(lambda x, *factors: together(pairs(factors), x), wanted, leaves)
