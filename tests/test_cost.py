"""Costs and ranks from the spec alone, against formulas, torch's counter and numerical ranks."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.kernels.reference import Rows

TT_POINT = (1 / 3, 2 / 3, 0, 3 / 4, 1 / 4, 0, 0)
POINTS = [
    (1, 0, 0, 0, 1, 0, 0.25),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0),
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0),
    (0.8, 0, 0.2, 0, 0.8, 0.2, 0.1),
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25),
    (0.4, 0.3, 0.3, 0.2, 0.4, 0.4, 0.2),
    (0.2, 0.3, 0.5, 0.5, 0.3, 0.2, 0.5),
    TT_POINT,
]


@pytest.fixture(params=POINTS, ids=str)
def point(request):
    return el.Theta(request.param)(4096, 4096)


def size_of(structure, axes):
    """|αβγ...| of docs/mathematics.md's notation; an axis that is left out has size 1."""
    return structure.size(axis for axis in axes if axis in structure.sizes)


def reversed_order(structure):
    return replace(structure, factors=structure.factors[::-1])


def test_parameters_are_the_entries_of_the_factors(structure):
    assert el.parameters(structure) == sum(out * into * n for n, out, into in structure.matrix_shapes)


def test_flops_are_those_that_torch_counts(structure, factors):
    x = torch.randn(5, structure.d_in, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        el.apply(structure, factors, x)
    assert counter.get_total_flops() == 5 * el.flops(structure)


def test_a_layer_costs_what_its_structure_says(structure):
    layer = el.Linear(structure.d_in, structure.d_out, structure, bias=False)
    with FlopCounterMode(display=False) as counter:  # step by step: plans make W of tiny layers
        Rows().prepare(structure)(list(layer.factors), torch.randn(2, structure.size(structure.x)))
    assert counter.get_total_flops() == 2 * el.flops(structure)
    assert sum(parameter.numel() for parameter in layer.parameters()) == el.parameters(structure)


def test_cost_of_two_factors_in_either_order(point):
    n = 4096
    first = n * size_of(point, "dfr") + n * size_of(point, "bgr")
    second = n * size_of(point, "efr") + n * size_of(point, "agr")
    assert el.flops(point) == 2 * first
    assert el.flops(reversed_order(point)) == 2 * second
    assert el.flops(el.cheapest(point)) == 2 * min(first, second)


def test_rank_of_two_factors(point):
    cuts = size_of(point, "bdrgf"), size_of(point, "aergf")
    assert el.generic_rank(point) == el.generic_rank(reversed_order(point)) == min(4096, *cuts)


def test_rank_is_the_rank_of_a_random_draw(structure, factors):
    rank = torch.linalg.matrix_rank(el.dense(structure, factors)).item()
    assert rank == el.generic_rank(structure) == el.generic_rank(structure.T)


def test_the_tensor_train_example_has_exponent_seven_twelfths():
    """It is a Kronecker product, whose ranks multiply: min(α, δ) · min(β, ε) = d^(1/3 + 1/4), and not d.

    Here at d = 64 with the powers of two nearest to 64^θ.
    """
    structure = el.Structure.parse("b a, d a, e b -> e d", a=4, b=16, d=32, e=2)
    factors = [torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes]
    rank = torch.linalg.matrix_rank(el.dense(structure, factors)).item()
    assert rank == el.generic_rank(structure) == 4 * 2 < 64
    assert el.generic_rank(el.Theta(TT_POINT)(2**12, 2**12)) == 2**7


def test_a_block_axis_is_cut_once():
    """γ is carried by the input and both factors, but a copy tensor is cut at the cost of its size, not twice."""
    assert el.generic_rank(el.BTT(rank=1, blocks=(8, 8))(64, 64)) == 64
    assert el.generic_rank(el.BTT(rank=1, blocks=(4, 4))(64, 64)) == 16
    assert el.generic_rank(el.BTT(rank=3, blocks=(4, 4))(64, 64)) == 48


@pytest.mark.parametrize(
    "family, parameters, flops, rank",
    [
        (el.Dense(), 1024 * 1024, 2 * 1024 * 1024, 1024),
        (el.LowRank(rank=64), 2 * 1024 * 64, 4 * 1024 * 64, 64),
        (el.BlockDiagonal(blocks=4), 1024 * 256, 2 * 1024 * 256, 1024),
        (el.Kronecker(), 2 * 32 * 32, 4 * 1024 * 32, 1024),
        (el.BTT(rank=1), 2 * 1024 * 32, 4 * 1024 * 32, 1024),
        (el.BTT(rank=4), 8 * 1024 * 32, 16 * 1024 * 32, 1024),
        (el.Monarch(blocks=4), 2 * 1024 * 256, 4 * 1024 * 256, 1024),
        (el.BLAST(blocks=4, rank=64), 2 * 1024 * 64 + 64 * 16, 4 * 1024 * 64 + 2 * 64 * 16, 256),
        (el.Butterfly(), 2 * 1024 * 10, 4 * 1024 * 10, 1024),
    ],
    ids=str,
)
def test_known_values_at_width_1024(family, parameters, flops, rank):
    structure = family(1024, 1024)
    assert (el.parameters(structure), el.flops(structure), el.generic_rank(structure)) == (parameters, flops, rank)


def test_padding_is_counted():
    full = el.BlockDiagonal(blocks=4)(100, 100)
    padded = el.BlockDiagonal(blocks=4)(98, 98)
    assert (padded.d_in, padded.pad_in) == (98, 2)
    assert el.flops(padded) == el.flops(full)
    assert el.parameters(padded) == el.parameters(full)


def test_a_routed_axis_costs_its_active_entries():
    full = el.BTT(rank=4)(64, 64)
    assert el.flops(full.route("r", active=1)) * 4 == el.flops(full) == el.flops(full.route("r", active=4))
    assert el.parameters(full.route("r", active=1)) == el.parameters(full)
    assert el.generic_rank(el.LowRank(rank=8)(64, 64).route("r", active=2)) == 2
    experts = el.Structure.parse("i, e o i -> o", i=6, e=4, o=5)
    assert el.flops(experts.route("e", active=2)) == 2 * 2 * 6 * 5
    assert el.flops(experts) == 2 * 6 * 5  # the experts' weights are summed once, not for each vector


def test_the_cheapest_order_of_the_tensor_train_example_is_the_other_one():
    structure = el.Theta(TT_POINT)(2**12, 2**12)
    cheap = el.cheapest(structure)
    assert cheap == reversed_order(structure)
    assert el.flops(structure) == 2 * (2**12 * 2**9 + 2**12 * 2**8)
    assert el.flops(cheap) == 2 * (2**12 * 2**3 + 2**12 * 2**4)


def test_the_cheapest_order_of_many_factors_is_this_or_its_reverse():
    structure = el.Kronecker(cores=7)(2**7, 3**7)
    assert el.cheapest(structure) in (structure, reversed_order(structure))
    assert el.flops(el.cheapest(structure)) == min(el.flops(structure), el.flops(reversed_order(structure)))


def test_costs_of_layers_too_large_to_allocate():
    structure = el.BTT(rank=1)(2**40, 2**40)
    assert el.parameters(structure) == 2 * 2**60
    assert el.generic_rank(structure) == 2**40


@pytest.mark.parametrize("count", [el.flops, el.parameters, el.generic_rank, el.cheapest])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("btt", r"of 'btt': it is a text; .* el\.structure\('btt'\)\(512, 512\)"),
        (el.Monarch(), r"it is a family; give it widths, as in Monarch\(\)\(512, 512\)"),
        (el.Monarch, r"it is a family; give it widths, as in Monarch\(\)\(512, 512\)"),
        (64, "it is of type int; pass a Structure, as in el"),
    ],
)
def test_what_is_no_structure_is_refused_in_a_sentence(count, given, said):
    with pytest.raises(el.StructureError, match=said):
        count(given)
