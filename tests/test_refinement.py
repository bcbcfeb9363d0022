"""Laws of alternating least squares: the error falls to where no factor can lower it, with and without moments."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear.projection.network import contract
from einlinear.projection.refinement import Target, balanced, descend

EXTRA = [el.BTT(rank=2, cores=3), el.Theta(theta=(0.4, 0.3, 0.3, 0.3, 0.3, 0.4, 0, 0.2, 0.1, 0.2))]


@pytest.fixture(params=[*el.families(), *EXTRA], ids=str)
def family(request):
    return request.param


@pytest.fixture
def weight(structure):
    return torch.randn(structure.d_out, structure.d_in, dtype=torch.float64)


def moments_of(d_in: int, tokens: int | None = None) -> Tensor:
    """Second moments of correlated inputs of very different sizes, singular with few tokens."""
    x = torch.randn(tokens or 4 * d_in, d_in, dtype=torch.float64) @ torch.randn(d_in, d_in, dtype=torch.float64)
    x = x * torch.logspace(0, 1.5, d_in, dtype=torch.float64)
    return x.mT @ x / len(x)


def error(weight: Tensor, structure: el.Structure, factors: list[Tensor]) -> float:
    return float((weight - el.dense(structure, factors)).norm() / weight.norm())


def weighted_error(weight: Tensor, structure: el.Structure, factors: list[Tensor], gram: Tensor | None) -> float:
    rest = weight - el.dense(structure, factors)
    return math.sqrt(float((rest * (rest if gram is None else rest @ gram)).sum()))


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "moments"])
def test_no_sweep_raises_the_error(structure, factors, weight, aware):
    gram = moments_of(structure.d_in) if aware else None
    errors = [weighted_error(weight, structure, factors, gram)]
    for _ in range(4):
        factors = el.refine(weight, structure, factors, 2, 0.0, gram)
        errors.append(weighted_error(weight, structure, factors, gram))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


def test_an_extrapolation_that_does_not_pay_is_taken_back():
    structure = el.BLAST(blocks=4, rank=4)(32, 32)
    weight = 1 / (1 + (torch.arange(32)[:, None] - torch.arange(32)).abs()).double()
    target = Target(weight, structure)
    for seed in range(3):
        torch.manual_seed(seed)
        start = [torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes]
        errors = [descend(target, start, sweeps, 0.0)[1] for sweeps in range(0, 60, 2)]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "moments"])
def test_a_solve_leaves_no_gradient_in_its_factor(structure, factors, weight, aware, monkeypatch):
    monkeypatch.setattr("einlinear.projection.solving.STEPS", 16)
    gram = moments_of(structure.d_in) if aware else None
    target = Target(weight, structure, gram)
    for position in range(len(factors)):
        before = [factor.clone() for factor in factors]
        for _ in range(3):  # a solve holds back a little, and conjugate gradients are not exact
            factors[position] = target.improved(factors, position)
        tracked = [factor.detach().requires_grad_(k == position) for k, factor in enumerate(factors)]
        rest = weight - el.dense(structure, tracked)
        (rest * (rest if gram is None else rest @ gram)).sum().backward()
        tried = [factor.detach().requires_grad_(k == position) for k, factor in enumerate(before)]
        rest = weight - el.dense(structure, tried)
        (rest * (rest if gram is None else rest @ gram)).sum().backward()
        assert tracked[position].grad.norm() < 1e-6 * tried[position].grad.norm() + 1e-9


@pytest.mark.parametrize("family", ["btt(rank=2, blocks=(4, 6))", "blast(blocks=4, rank=6)", "tensor_train(rank=6)"])
def test_conjugate_gradients_and_direct_solves_agree(family, monkeypatch):
    structure = el.structure(family)(36, 64)
    weight, gram = torch.randn(64, 36, dtype=torch.float64), moments_of(36)
    start = el.project(weight, structure)
    direct = el.refine(weight, structure, start, 5, 0.0, gram)
    monkeypatch.setattr("einlinear.projection.refinement.CHEAP", 0)
    monkeypatch.setattr("einlinear.projection.refinement.FORMED", 0)
    monkeypatch.setattr("einlinear.projection.solving.STEPS", 60)
    entries = []

    def counted(*operands):
        found = contract(*operands)
        entries.append(found.numel())
        return found

    monkeypatch.setattr("einlinear.projection.refinement.contract", counted)
    without = el.refine(weight, structure, start, 5, 0.0, gram)
    assert max(entries) <= 2 * weight.numel(), "nothing is held that is much larger than the matrix"
    errors = [weighted_error(weight, structure, found, gram) for found in (direct, without)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert errors[0] < 0.9 * weighted_error(weight, structure, start, gram)


@pytest.mark.parametrize("widths", [(36, 64), (97, 131)])
def test_moments_never_make_it_worse(structure, weight):
    gram = moments_of(structure.d_in)
    plain = weighted_error(weight, structure, el.project(weight, structure), gram)
    aware = weighted_error(weight, structure, el.project(weight, structure, gram), gram)
    assert aware <= plain * (1 + 1e-9)
    if el.parameters(structure) < 0.9 * weight.numel():
        assert aware < plain


@pytest.mark.parametrize("tokens", [None, 20], ids=["full rank", "rank 20"])
def test_low_rank_with_moments_is_the_optimum(widths, tokens):
    """‖(W − Ŵ) S‖² is at least what the singular values of W S beyond the rank sum to, S Sᵀ the moments."""
    d_in, d_out = widths
    if tokens:
        tokens = min(tokens, d_in - 4)
    weight, gram = torch.randn(d_out, d_in, dtype=torch.float64), moments_of(d_in, tokens)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()
    structure = el.LowRank(rank=5)(d_in, d_out)
    least = torch.linalg.svdvals(weight @ root)[5:].norm()
    found = el.project(weight, structure, gram)
    assert weighted_error(weight, structure, found, gram) == pytest.approx(float(least), rel=1e-6)
    refined = el.refine(weight, structure, found, 5, 0.0, gram)
    assert weighted_error(weight, structure, refined, gram) == pytest.approx(float(least), rel=1e-6)


def test_moments_within_blocks_alone_need_no_sweep():
    """Blocks of inputs that are not correlated with each other: the SVDs of W S are the optimum, S Sᵀ the moments."""
    structure = el.BTT(rank=2, blocks=(4, 6))(36, 48)
    weight, roots = torch.randn(48, 36, dtype=torch.float64), torch.randn(4, 9, 9, dtype=torch.float64)
    root = torch.block_diag(*roots * torch.logspace(0, 2, 9))
    blocks = (weight @ root).reshape(6, 8, 4, 9).transpose(1, 2)
    least = float(torch.linalg.svdvals(blocks)[..., 2:].norm())
    gram = root @ root.mT
    found = el.project(weight, structure, gram, sweeps=0)
    assert weighted_error(weight, structure, found, gram) == pytest.approx(least, rel=1e-6)
    swept = el.project(weight, structure, gram)
    assert weighted_error(weight, structure, swept, gram) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("family", [el.LowRank(rank=5), el.BTT(rank=2), el.Kronecker(), el.BLAST(4, 5)], ids=str)
@pytest.mark.parametrize("widths", [(36, 64), (97, 131)])
def test_members_are_recovered_whatever_the_moments(structure, factors):
    member, gram = el.dense(structure, factors), moments_of(structure.d_in)
    found = el.project(member, structure, gram)
    assert weighted_error(member, structure, found, gram) < 1e-6 * weighted_error(0 * member, structure, factors, gram)


@pytest.mark.parametrize("widths", [(36, 64)])
def test_equal_moments_change_nothing(structure, weight):
    """Where inputs are uncorrelated and of one size, errors are those of the matrix."""
    gram = 3 * torch.eye(structure.d_in, dtype=torch.float64)
    plain = weighted_error(weight, structure, el.project(weight, structure), None)
    aware = weighted_error(weight, structure, el.project(weight, structure, gram), None)
    assert aware == pytest.approx(plain, rel=0.01)
    assert aware <= plain * (1 + 1e-9)


@pytest.mark.parametrize(("blocks", "rank"), [(4, 8), (8, 8), (8, 16), (4, 32)])
def test_blast_members_are_recovered_from_nothing(blocks, rank):
    structure = el.BLAST(blocks=blocks, rank=rank)(128, 128)
    for seed in range(3):
        torch.manual_seed(seed)
        member = el.dense(structure, [torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes])
        assert (member - el.dense(structure, el.project(member, structure))).norm() < 1e-10 * member.norm()


@pytest.mark.parametrize("kind", ["low rank", "block-diagonal"])
def test_blast_holds_low_rank_and_block_diagonal_matrices(kind):
    structure = el.BLAST(blocks=4, rank=16)(64, 64)
    member = torch.randn(64, 16) @ torch.randn(16, 64)
    if kind == "block-diagonal":
        member = torch.block_diag(*torch.randn(4, 16, 16))
    found = el.project(member, structure)
    assert (member - el.dense(structure, found)).norm() < 1e-4 * member.norm()


@pytest.mark.parametrize("family", [el.BLAST(4, 12), el.TensorTrain(rank=4, cores=3), el.BTT(rank=4)], ids=str)
@pytest.mark.parametrize("widths", [(64, 64)])
def test_factors_survive_a_short_dtype(structure, weight):
    smooth = 1 / (1 + (torch.arange(64)[:, None] - torch.arange(64)).abs()).double()
    for given in (weight, smooth):
        found = el.project(given, structure)
        short = [factor.bfloat16().double() for factor in found]
        lost = (el.dense(structure, found) - el.dense(structure, short)).norm() / given.norm()
        assert lost < 3 * len(found) * 2**-9


def test_balancing_keeps_the_matrix_and_evens_every_bond(structure, factors):
    uneven = [factor * 10.0**k for k, factor in enumerate(factors)]
    found = balanced(structure, uneven)
    torch.testing.assert_close(el.dense(structure, found), el.dense(structure, uneven))
    norms = torch.stack([factor.norm() for factor in found])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize("family", [el.Dense(), el.BlockDiagonal(4)], ids=str)
def test_one_factor_alone_is_found_by_conjugate_gradients_too(family, monkeypatch):
    """As where its normal equations are too many to be formed: 1536 inputs in 2 blocks."""
    monkeypatch.setattr("einlinear.projection.refinement.CHEAP", 0)
    monkeypatch.setattr("einlinear.projection.refinement.FORMED", 0)
    monkeypatch.setattr("einlinear.projection.solving.STEPS", 60)
    structure = family(32, 24)
    member, start = ([torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes] for _ in range(2))
    weight = el.dense(structure, member)
    assert error(weight, structure, el.refine(weight, structure, start, 5, 0.0, moments_of(32))) < 1e-4


def test_a_tolerance_and_a_limit_end_it(monkeypatch):
    structure = el.BLAST(blocks=4, rank=6)(64, 64)
    weight = torch.randn(64, 64)
    start = [torch.randn(shape) for shape in structure.factor_shapes]
    solves = []
    improved = Target.improved
    monkeypatch.setattr(Target, "improved", lambda *args: solves.append(1) or improved(*args))
    counts = []
    for sweeps, tolerance in ((7, 0.0), (400, 1e-2), (400, 1e-3)):
        solves.clear()
        el.refine(weight, structure, start, sweeps, tolerance)
        counts.append(len(solves))
    assert counts[0] == 21 < counts[2]
    assert counts[1] < counts[2] < 1200
    torch.testing.assert_close(el.refine(weight, structure, start, 0), balanced(structure, start))


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


def test_a_network_is_contracted_in_any_order():
    """Against one einsum; an axis that stands twice means a diagonal."""
    operands = [("a", "b"), ("b", "c"), ("c", "d", "a"), ("d", "e"), ("e", "e", "f"), ("g",), ("b", "g"), ("f",)]
    sizes = dict(zip("abcdefg", range(2, 9), strict=True))
    tensors = [torch.randn([sizes[axis] for axis in axes], dtype=torch.float64) for axes in operands]
    for count in (1, 3, 6, 8):
        axes = {axis for operand in operands[:count] for axis in operand}
        for result in (tuple(sorted(axes))[:2], ()):
            spelled = ",".join("".join(operand) for operand in operands[:count]) + "->" + "".join(result)
            wanted = torch.einsum(spelled, *tensors[:count])
            torch.testing.assert_close(contract(operands[:count], tensors[:count], result), wanted)
