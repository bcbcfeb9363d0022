"""The laws of the core for einsums that nobody named: random axes, sizes and one to four factors."""

import math
import pickle
import random
from functools import partial
from itertools import count

import hypothesis.strategies as some
import torch
from hypothesis import HealthCheck, given, settings
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.kernels.chain import Chain
from einlinear.kernels.kernel import CPU
from einlinear.kernels.routed import ROUTED_KERNELS, RoutedKernel

LARGEST = 2**13  # entries of one step's state and factor together: what keeps an example below milliseconds
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def einsum(source: random.Random, sizes: tuple[int, ...]) -> el.Structure:
    """A legal structure: every axis is carried by some operands, those of the input or output by another too."""
    factors = source.randint(1, 4)
    ends = {0, factors + 1}
    operands: list[list[str]] = [[] for _ in range(factors + 2)]
    names = (f"{source.choice('abxyz')}{number}" for number in count())
    for _ in range(source.randint(2, 5)):
        carriers = {position for position in range(factors + 2) if source.random() < 0.4}
        if len(carriers) < 2 and not carriers - ends:
            carriers.add(source.randint(1, factors))
        axis = next(names)
        for position in carriers:
            operands[position].append(axis)
    for position, axes in enumerate(operands):
        if not axes:
            axis = next(names)
            axes.append(axis)
            neighbour = min(max(position + source.choice((-1, 1)), 1), factors)
            if neighbour != position:
                operands[neighbour].append(axis)
    for axes in operands:
        source.shuffle(axes)
    x, *rest, y = [" ".join(axes) for axes in operands]
    named = {axis: source.choice(sizes) for axes in operands for axis in axes}
    return el.Structure.parse(f"{', '.join([x, *rest])} -> {y}", **named)


def affordable(structure: el.Structure) -> bool:
    steps = [structure.size({*step.state, *step.factor}) for step in structure.steps]
    return max(steps) <= LARGEST and structure.d_in * max(steps) <= 2**18


def einsums(*sizes: int) -> some.SearchStrategy[el.Structure]:
    return some.builds(lambda source: einsum(source, sizes), some.randoms(use_true_random=False)).filter(affordable)


def factors_of(structure: el.Structure) -> list[torch.Tensor]:
    torch.manual_seed(math.prod(map(math.prod, structure.factor_shapes)))
    return [torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes]


def as_one_einsum(structure: el.Structure, factors: list[torch.Tensor]) -> torch.Tensor:
    """The matrix by its definition, all factors at once: axes common to input and output are a diagonal."""
    both = [axis for axis in structure.x if axis in structure.y]
    eyes = [torch.eye(structure.sizes[axis], dtype=torch.float64) for axis in both]
    number = {axis: position for position, axis in enumerate(structure.sizes)}
    primed = {axis: len(number) + position for position, axis in enumerate(both)}
    arguments: list[object] = []
    for factor, axes in zip(factors, structure.factors, strict=True):
        arguments += [factor, [number[axis] for axis in axes]]
    for axis, eye in zip(both, eyes, strict=True):
        arguments += [eye, [number[axis], primed[axis]]]
    ends = [number[axis] for axis in structure.y] + [primed.get(axis, number[axis]) for axis in structure.x]
    return torch.einsum(*arguments, ends).reshape(structure.d_out, structure.d_in)


@SETTINGS
@given(einsums(1, 2, 3, 4))
def test_survives_its_own_text_and_pickle(structure):
    assert eval(repr(structure), {"Structure": el.Structure}) == structure
    assert pickle.loads(pickle.dumps(structure)) == structure
    assert structure == structure.T.T


@SETTINGS
@given(einsums(1, 2, 3))
def test_every_axis_of_a_factor_plays_exactly_one_part(structure):
    for step in structure.steps:
        parts = (*step.batch, *step.new, *step.summed, *step.inner)
        assert sorted(parts) == sorted(step.factor)
        assert {*step.passive} == {*step.state} - {*step.factor}
        assert {*step.result} == {*step.batch, *step.new, *step.passive}
    for (slices, out, into), shape in zip(structure.matrix_shapes, structure.factor_shapes, strict=True):
        assert slices * out * into == math.prod(shape)


@SETTINGS
@given(einsums(1, 2, 3, 4))
def test_its_matrix_is_the_einsum_that_is_written(structure):
    factors = factors_of(structure)
    assert_close(el.dense(structure, factors), as_one_einsum(structure, factors))


@SETTINGS
@given(einsums(1, 2, 3, 4))
def test_applies_as_its_matrix(structure):
    factors = factors_of(structure)
    x = torch.randn(2, 3, structure.d_in, dtype=torch.float64)
    assert_close(el.apply(structure, factors, x), x @ el.dense(structure, factors).mT)


@SETTINGS
@given(einsums(1, 2, 3, 4))
def test_its_transpose_is_its_adjoint(structure):
    factors = factors_of(structure)
    assert_close(el.dense(structure.T, factors[::-1]), el.dense(structure, factors).mT)


@SETTINGS
@given(einsums(1, 2, 3, 4))
def test_the_canonical_order_is_the_same_map(structure):
    factors = factors_of(structure)
    orders = zip(structure.factors, structure.canonical.factors, strict=True)
    turned = [f.permute([have.index(a) for a in want]) for f, (have, want) in zip(factors, orders, strict=True)]
    matrices = [f.reshape(shape) for f, shape in zip(turned, structure.matrix_shapes, strict=True)]
    weight = el.dense(structure, factors)
    assert_close(el.dense(structure.canonical, turned), weight)
    assert_close(el.dense(structure.canonical, matrices), weight)


# Two conventions of torch's counter are avoided: products that sum over nothing, and sums over an axis of size 1.
@SETTINGS
@given(einsums(2, 3, 4).filter(lambda structure: all(step.summed for step in structure.steps)))
def test_flops_are_those_that_torch_counts(structure):
    x = torch.randn(5, structure.d_in, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        el.apply(structure, factors_of(structure), x)
    assert counter.get_total_flops() == 5 * el.flops(structure)
    assert el.parameters(structure) == sum(factor.numel() for factor in factors_of(structure))


# Where sizes are powers of two a maximal flow of bits exists, and so a matrix whose rank is the cut. For
# arbitrary sizes the cut is only a bound (Cui et al. 2016, Quantum max-flow/min-cut, arXiv:1508.04644).
@SETTINGS
@given(einsums(2, 4))
def test_generic_rank_is_the_rank_of_a_random_draw(structure):
    rank = torch.linalg.matrix_rank(el.dense(structure, factors_of(structure))).item()
    assert rank == el.generic_rank(structure)


@SETTINGS
@given(einsums(1, 2, 3, 5))
def test_generic_rank_bounds_every_rank(structure):
    rank = torch.linalg.matrix_rank(el.dense(structure, factors_of(structure))).item()
    assert rank <= el.generic_rank(structure) == el.generic_rank(structure.T)


@SETTINGS
@given(einsums(2, 3))
def test_the_cheapest_order_is_the_same_map_for_no_more_flops(structure):
    cheap = el.cheapest(structure)
    assert sorted(cheap.factors) == sorted(structure.factors)
    assert el.flops(cheap) <= el.flops(structure)
    factors = dict(zip(structure.factors, factors_of(structure), strict=True))
    if len(factors) == len(structure.factors):  # no two factors have the same axes
        reordered = [factors[axes] for axes in cheap.factors]
        assert_close(el.dense(cheap, reordered), el.dense(structure, [*factors.values()]))


def chains(tries: int = 3000) -> list[el.Structure]:
    """Those of many random einsums that are a chain of matmuls without a copy: about one in fifty."""
    drawn = (einsum(random.Random(seed), (2, 3, 5)).canonical for seed in range(tries))
    return [structure for structure in drawn if affordable(structure) and Chain().refuses(structure) is None]


def test_the_chain_is_the_reference_with_every_gradient():
    structures = chains()
    assert len(structures) > 30  # or the law would be empty
    for structure in structures:
        names = ["x", *(f"factor {k}" for k in range(len(structure.factors)))]
        leaves = [torch.randn(4, structure.d_in, dtype=torch.float64), *factors_of(structure)]
        grad = torch.randn(4, structure.d_out, dtype=torch.float64)
        results = []
        for run in (Chain().prepare(structure), partial(el.apply, structure)):
            x, *factors = [leaf.clone().requires_grad_() for leaf in leaves]
            y = run(factors, x)
            results.append([y, *torch.autograd.grad(y, (x, *factors), grad)])
        for name, got, wanted in zip(["output", *names], *results, strict=True):
            assert_close(got, wanted, msg=lambda text, name=name, at=structure: f"{name} of {at!r}: {text}")


def routed(source: random.Random, structure: el.Structure) -> el.Structure:
    """With experts, or any of its axes routed; any number of them active."""
    if source.random() < 0.5:
        experts = source.choice((1, 2, 3, 5, 8))
        return structure.mixture(experts, active=source.randint(1, experts))
    axis = source.choice([axis for axis in structure.sizes if any(axis in factor for factor in structure.factors)])
    return structure.route(axis, active=source.randint(1, structure.sizes[axis]))


@SETTINGS
@given(einsums(1, 2, 3, 4), some.randoms(use_true_random=False))
def test_a_layer_of_any_routed_einsum_is_the_reference_with_every_gradient(structure, source):
    structure = routed(source, structure)
    experts, active = structure.sizes[structure.routed], structure.active
    options = source.choice([{}, {"capacity": 0.5}, {"choice": "expert"}, {"choice": "expert", "capacity": 2.0}])
    layer = el.Linear(
        structure.d_in, structure.d_out, structure, dtype=torch.float64,
        router=el.Router(structure.d_in, experts, active, dtype=torch.float64, **options),
    )  # fmt: skip
    torch.manual_seed(structure.d_in)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    shape = source.choice([(), (0,), (1,), (2, 3), (11,)])
    x = torch.randn(*shape, structure.d_in, dtype=torch.float64, requires_grad=True)
    gate = layer.router(x).gate(math.prod(shape)).view(*shape, experts)
    results = []
    ways = [kernel for kernel in ROUTED_KERNELS if kernel.refuses(layer.structure, CPU) is None]
    for run in (el.apply(layer.structure, [*layer.factors], x, gate) + layer.bias, layer(x), *ways):
        if isinstance(run, RoutedKernel):
            tokens = x.reshape(-1, structure.d_in)
            flat = run.prepare(layer.structure)([*layer.factors], tokens, layer.router(x), layer.bias)
            run = flat.view(*shape, structure.d_out)
        results.append([run, *torch.autograd.grad(run.square().sum(), [x, *layer.parameters()])])
    for found in results[1:]:
        assert_close(found, results[0])
    assert el.balance_loss(layer).isfinite()
