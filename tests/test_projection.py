"""Laws of projection: what is in a family is found again, what is not is met at an optimum."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import einlinear as el

EXTRA = [
    el.BTT(rank=2, cores=3),
    el.Butterfly(radix=4),
    el.Theta(theta=(0.4, 0.3, 0.3, 0.3, 0.3, 0.4, 0, 0.2, 0.1, 0.2)),
]


@pytest.fixture(params=[*el.families(), *EXTRA], ids=str)
def family(request):
    return request.param


@pytest.fixture
def weight(structure):
    return torch.randn(structure.d_out, structure.d_in, dtype=torch.float64)


def error(weight: Tensor, structure: el.Structure, factors: list[Tensor]) -> float:
    return float((weight - el.dense(structure, factors)).norm() / weight.norm())


def misled_by_padding(family: el.Family, structure: el.Structure) -> bool:
    """Whether padding takes a staircase, not a rectangle, from a factor's blocks: see `einlinear.project`."""
    padded = structure.pad_in or structure.pad_out
    return bool(padded) and isinstance(family, el.Kronecker | el.TensorTrain | el.Theta)


def test_a_member_of_a_nested_family_is_recovered(family, structure, factors):
    member = el.dense(structure, factors)
    found = el.project(member, structure)
    assert [tuple(factor.shape) for factor in found] == list(structure.factor_shapes)
    if not (isinstance(family, el.BLAST) or misled_by_padding(family, structure)):
        assert error(member, structure, found) < 1e-13
    else:
        assert error(member, structure, found) < 1


def test_an_optimum_is_stationary(family, structure, weight):
    if misled_by_padding(family, structure):
        return
    found = el.project(weight, structure)
    if two := len(found) <= 2:
        refined = el.refine(weight, structure, found, sweeps=3)
        assert error(weight, structure, refined) == pytest.approx(error(weight, structure, found), rel=1e-10)
    else:
        found = el.refine(weight, structure, found)  # optimal in the factor solved for last
    found = [factor.requires_grad_() for factor in found]
    (weight - el.dense(structure, found)).square().sum().backward()
    for factor in found if two else found[-1:]:
        assert factor.grad.abs().max() < 1e-10


def test_factors_are_balanced(structure, weight):
    if len(structure.factors) == 2:
        first, second = el.project(weight, structure)
        torch.testing.assert_close(first.norm(), second.norm())


def test_refining_never_raises_the_error(structure, weight):
    found = el.project(weight, structure)
    errors = [error(weight, structure, found)]
    for _ in range(5):
        found = el.refine(weight, structure, found)
        errors.append(error(weight, structure, found))
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    assert errors[0] <= 1


@pytest.mark.parametrize(
    ("family", "widths", "gain"),
    [
        (el.BLAST(blocks=4, rank=6), (36, 64), 0.9),
        (el.Butterfly(), (64, 36), 0.98),
        (el.TensorTrain(rank=3, cores=3), (16, 16), 0.998),
        (el.Kronecker(), (97, 131), 0.99999),
        (el.Theta(theta=(0.4, 0.2, 0.4, 0.2, 0.4, 0.4, 0.1)), (97, 131), 0.999),
    ],
    ids=str,
)
def test_refining_helps_where_splitting_is_not_optimal(structure, weight, gain):
    found = el.project(weight, structure)
    assert error(weight, structure, el.refine(weight, structure, found, sweeps=10)) < gain * error(
        weight, structure, found
    )


@pytest.mark.parametrize("family", [el.Kronecker(), el.TensorTrain(rank=3), el.TensorTrain(rank=3, cores=3)], ids=str)
@pytest.mark.parametrize("widths", [(97, 131)])
def test_refining_recovers_a_member_whose_padding_misled_the_split(structure, factors):
    assert structure.pad_in and structure.pad_out
    member = el.dense(structure, factors)
    assert error(member, structure, el.refine(member, structure, el.project(member, structure), sweeps=60)) < 1e-9


@pytest.mark.parametrize("family", [el.BLAST(blocks=4, rank=5)], ids=str)
@pytest.mark.parametrize("widths", [(36, 64), (97, 131)])
def test_refining_recovers_a_member_from_nearby(structure, factors):
    member = el.dense(structure, factors)
    nearby = [factor * (1 + 0.05 * torch.randn_like(factor)) for factor in factors]
    assert error(member, structure, nearby) > 0.05
    assert error(member, structure, el.refine(member, structure, nearby, sweeps=100)) < 1e-4


@pytest.mark.parametrize("family", [el.LowRank, el.BTT, el.TensorTrain, lambda rank: el.BTT(rank=rank, blocks=(4, 6))])
def test_more_rank_is_never_worse(family, widths):
    weight = torch.randn(widths[1], widths[0], dtype=torch.float64)
    structures = [family(rank=rank)(*widths) for rank in (1, 2, 3, 5, 8)]
    errors = [error(weight, structure, el.project(weight, structure)) for structure in structures]
    assert all(more <= less + 1e-12 for less, more in pairwise(errors))


@pytest.mark.parametrize("family", [el.LowRank(rank=200), el.BTT(rank=200), el.Monarch(blocks=1)], ids=str)
def test_full_rank_and_beyond_loses_nothing(structure, weight):
    assert error(weight, structure, el.project(weight, structure)) < 1e-13


def discarded(matrix: Tensor, rank: int) -> Tensor:
    """The squares of the singular values beyond `rank`, summed."""
    return torch.linalg.svdvals(matrix)[..., rank:].square().sum()


def test_low_rank_error_is_the_discarded_singular_values(widths):
    weight = torch.randn(widths[1], widths[0], dtype=torch.float64)
    structure = el.LowRank(rank=5)(*widths)
    lost = discarded(weight, 5)
    assert error(weight, structure, el.project(weight, structure)) == pytest.approx(lost.sqrt() / weight.norm())


@pytest.mark.parametrize("rank", [1, 2])
def test_btt_error_sums_over_blocks(widths, rank):
    d_in, d_out = widths
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    structure = el.BTT(rank=rank, blocks=(4, 6))(d_in, d_out)
    a, e = math.ceil(d_in / 4), math.ceil(d_out / 6)
    blocks = [rows.split(a, dim=1) for rows in weight.split(e, dim=0)]
    lost = sum(discarded(block, rank) for row in blocks for block in row)
    assert error(weight, structure, el.project(weight, structure)) == pytest.approx(lost.sqrt() / weight.norm())


def test_kronecker_error_is_that_of_the_rearranged_matrix():
    # Van Loan and Pitsianis 1993: rows are the entries of A, columns those of B.
    weight = torch.randn(6 * 4, 5 * 7, dtype=torch.float64)
    structure = el.Structure.parse("i0 i1, o0 i0, o1 i1 -> o0 o1", i0=5, i1=7, o0=6, o1=4)
    a, b = el.project(weight, structure)
    torch.testing.assert_close(el.dense(structure, [a, b]), torch.kron(a, b))
    rearranged = weight.reshape(6, 4, 5, 7).transpose(1, 2).reshape(30, 28)
    assert error(weight, structure, [a, b]) == pytest.approx(discarded(rearranged, 1).sqrt() / weight.norm())


@pytest.mark.parametrize("family", [el.Monarch(blocks=4), el.BTT(rank=2), el.Butterfly(), el.LowRank(rank=3)], ids=str)
def test_complex_members_are_recovered(structure, draw):
    member = el.dense(structure, draw(structure, torch.complex128))
    found = el.project(member, structure)
    assert all(factor.is_complex() for factor in found)
    assert error(member, structure, found) < 1e-13
    disturbed = [factor + 0.01 * torch.randn_like(factor) for factor in found]
    assert error(member, structure, el.refine(member, structure, disturbed, 3)) < error(member, structure, disturbed)


@pytest.mark.parametrize("widths", [(36, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_short_dtype_costs_only_its_rounding(structure, weight, dtype):
    short = weight.to(dtype)
    for find in (el.project, lambda w, s: el.refine(w, s, el.project(w, s))):
        found, reference = find(short, structure), find(short.double(), structure)
        assert {factor.dtype for factor in found} == {dtype}
        lost = error(short.double(), structure, [factor.double() for factor in found])
        assert lost == pytest.approx(error(short.double(), structure, reference), abs=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("expression", ["i, e o i -> o", "i, e r i, o r -> o", "i, r i, e o r -> o"])
def test_an_axis_of_one_factor_alone_is_shared_out_evenly(expression):
    sizes = {axis: size for axis, size in {"i": 6, "o": 5, "e": 3, "r": 5}.items() if axis in expression}
    structure = el.Structure.parse(expression, **sizes)
    weight = torch.randn(5, 6, dtype=torch.float64)
    found = el.project(weight, structure)
    assert error(weight, structure, found) < 1e-13
    disturbed = [factor + 0.1 * torch.randn_like(factor) for factor in found]
    assert error(weight, structure, el.refine(weight, structure, disturbed)) < 1e-13


def test_refining_reads_the_layers_own_factors_and_leaves_them_alone():
    layer = el.Linear(36, 64, el.BTT(rank=2))
    weight = torch.randn(64, 36)
    before = [factor.detach().clone() for factor in layer.factors]
    found = el.refine(weight, layer.structure, layer.factors)
    assert error(weight, layer.structure, found) < error(weight, layer.structure, before)
    assert not any(factor.requires_grad for factor in found)
    torch.testing.assert_close(list(layer.factors), before)


def test_what_cannot_be_projected_is_refused_in_a_sentence():
    structure = el.LowRank(rank=2)(8, 6)
    weight = torch.randn(6, 8)
    bad = weight.clone()
    bad[2, 3] = math.nan
    cases = [
        (weight.T, structure, r"shape \(8, 6\).*\[d_out, d_in\] = \[6, 8\]"),
        (bad, structure, "not finite"),
        (weight / 0, structure, "not finite"),
        (weight, structure.route("r", active=1), "routed"),
        (weight.int(), structure, "floating point"),
        (weight.to("meta"), structure, "meta"),
    ]
    for given, onto, why in cases:
        with pytest.raises(el.StructureError, match=why):
            el.project(given, onto)
        with pytest.raises(el.StructureError, match=why):
            el.refine(given, onto, el.project(weight, structure))
    with pytest.raises(el.StructureError, match="factors of shapes"):
        el.refine(weight, structure, [torch.randn(2, 2)])
