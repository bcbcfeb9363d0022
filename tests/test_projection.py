"""Laws of projection: what is in a family is found again, what is not is met at an optimum."""

import math
import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear.projection.nearest import closed_form, split
from einlinear.projection.refinement import Target

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


def overcomplete(family: el.Family, structure: el.Structure) -> bool:
    """Whether BLAST's rank exceeds what its blocks can tell apart."""
    return isinstance(family, el.BLAST) and family.rank > min(structure.sizes["n"], structure.sizes["m"])


def slope(weight: Tensor, structure: el.Structure, factors: list[Tensor]) -> float:
    """The largest gradient of the squared error over any factor, relative to that of a matrix of zeros."""
    factors = [factor.detach().requires_grad_() for factor in factors]
    rest = weight - el.dense(structure, factors)
    rest.square().sum().backward()
    scale = weight.norm().detach() * max(factor.norm() for factor in factors)
    return max(float(factor.grad.norm()) for factor in factors) / float(scale.detach())


def test_a_member_is_recovered(family, structure, factors):
    member = el.dense(structure, factors)
    found = el.project(member, structure)
    assert [tuple(factor.shape) for factor in found] == list(structure.factor_shapes)
    assert error(member, structure, found) < (0.05 if overcomplete(family, structure) else 1e-12)


def test_an_optimum_is_stationary(structure, weight):
    found = el.project(weight, structure)
    exact = closed_form(structure)
    refined = el.refine(weight, structure, found, sweeps=3)
    assert error(weight, structure, refined) == pytest.approx(
        error(weight, structure, found), rel=1e-10 if exact else 1e-3
    )
    assert slope(weight, structure, found) < (1e-13 if exact else 0.01)


def test_factors_are_balanced(structure, weight):
    if len(structure.factors) == 2:
        first, second = el.project(weight, structure)
        torch.testing.assert_close(first.norm(), second.norm())


@pytest.mark.parametrize("family", [el.LowRank, el.BTT, el.TensorTrain, lambda rank: el.BTT(rank=rank, blocks=(4, 6))])
def test_more_rank_is_never_worse(family, widths):
    weight = torch.randn(widths[1], widths[0], dtype=torch.float64)
    structures = [family(rank=rank)(*widths) for rank in (1, 2, 3, 5, 8)]
    errors = [error(weight, structure, el.project(weight, structure)) for structure in structures]
    assert all(more <= less + 1e-12 for less, more in pairwise(errors))


@pytest.mark.parametrize("family", [el.LowRank(rank=200), el.BTT(rank=200), el.Monarch(blocks=1)], ids=str)
def test_full_rank_and_beyond_loses_nothing(structure, weight):
    assert error(weight, structure, el.project(weight, structure)) < 1e-13


def discarded_beyond(matrix: Tensor, rank: int) -> Tensor:
    """The squares of the singular values beyond `rank`, summed."""
    return torch.linalg.svdvals(matrix)[..., rank:].square().sum()


def test_low_rank_error_is_the_discarded_singular_values(widths):
    weight = torch.randn(widths[1], widths[0], dtype=torch.float64)
    structure = el.LowRank(rank=5)(*widths)
    lost = discarded_beyond(weight, 5)
    assert error(weight, structure, el.project(weight, structure)) == pytest.approx(lost.sqrt() / weight.norm())


@pytest.mark.parametrize("rank", [1, 2])
def test_btt_error_sums_over_blocks(widths, rank):
    d_in, d_out = widths
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    structure = el.BTT(rank=rank, blocks=(4, 6))(d_in, d_out)
    a, e = math.ceil(d_in / 4), math.ceil(d_out / 6)
    blocks = [rows.split(a, dim=1) for rows in weight.split(e, dim=0)]
    lost = sum(discarded_beyond(block, rank) for row in blocks for block in row)
    assert error(weight, structure, el.project(weight, structure)) == pytest.approx(lost.sqrt() / weight.norm())


def test_kronecker_error_is_that_of_the_rearranged_matrix():
    # Van Loan and Pitsianis 1993: rows are the entries of A, columns those of B.
    weight = torch.randn(6 * 4, 5 * 7, dtype=torch.float64)
    structure = el.Structure.parse("i0 i1, o0 i0, o1 i1 -> o0 o1", i0=5, i1=7, o0=6, o1=4)
    a, b = el.project(weight, structure)
    torch.testing.assert_close(el.dense(structure, [a, b]), torch.kron(a, b))
    rearranged = weight.reshape(6, 4, 5, 7).transpose(1, 2).reshape(30, 28)
    assert error(weight, structure, [a, b]) == pytest.approx(discarded_beyond(rearranged, 1).sqrt() / weight.norm())


PASSING = el.Structure.parse("b i, r i, o r -> o b", b=4, i=6, o=5, r=2)
"""The same map for every entry of b, which no factor carries."""


@pytest.mark.parametrize("structure", [PASSING, PASSING.pad(d_in=23, d_out=19)], ids=repr)
def test_an_axis_that_no_factor_carries_is_the_same_map_throughout(structure, draw):
    member = el.dense(structure, draw(structure))
    assert error(member, structure, el.project(member, structure)) < 1e-12
    weight = torch.randn(structure.d_out, structure.d_in, dtype=torch.float64)
    found = error(weight, structure, el.project(weight, structure))
    others = [el.refine(weight, structure, draw(structure), sweeps=200) for _ in range(5)]
    assert found == pytest.approx(min(error(weight, structure, other) for other in others), rel=1e-4)


def test_its_nearest_map_is_that_of_the_mean():
    weight = torch.randn(20, 24, dtype=torch.float64)
    mean = weight.reshape(5, 4, 4, 6).diagonal(dim1=1, dim2=2).mean(-1)
    inner = el.LowRank(rank=2)(6, 5)
    wanted = el.dense(inner, el.project(mean, inner))
    found = el.dense(PASSING, el.project(weight, PASSING)).reshape(5, 4, 4, 6)
    torch.testing.assert_close(found, torch.einsum("oi,bc->obci", wanted, torch.eye(4, dtype=torch.float64)))


@pytest.mark.parametrize("family", [el.Monarch(blocks=4), el.BTT(rank=2), el.Butterfly(), el.LowRank(rank=3)], ids=str)
def test_complex_members_are_recovered(structure, draw):
    member = el.dense(structure, draw(structure, torch.complex128))
    found = el.project(member, structure)
    assert all(factor.is_complex() for factor in found)
    assert error(member, structure, found) < 1e-13


@pytest.mark.parametrize(("n", "split"), [(16, 4), (24, 4), (60, 6), (97, 1)])
def test_a_fourier_matrix_is_a_monarch(n, split):
    """Cooley and Tukey: with inputs j = a · split + g and outputs k = e · blocks + f, block (f, g) has rank one."""
    index = torch.arange(n, dtype=torch.float64)
    fourier = torch.exp(-2j * math.pi * index[:, None] * index / n)
    rest = n // split
    reads = torch.arange(n).reshape(rest, split).T.flatten()  # g a
    writes = torch.arange(n).reshape(split, rest).T.flatten()  # f e
    permuted = fourier[writes][:, reads]
    structure = el.BTT(blocks=(split, rest))(n, n)
    found = el.project(permuted, structure)
    assert (permuted - el.dense(structure, found)).abs().max() < 1e-10
    if split > 1:
        assert error(fourier, structure, el.project(fourier, structure)) > 0.1  # the permutation matters


@pytest.mark.parametrize(("d_in", "d_out", "blocks", "hidden"), [(24, 36, 4, 10), (30, 30, 3, 7), (26, 34, 4, 11)])
def test_monarchs_of_uneven_hidden_units_are_recovered(d_in, d_out, blocks, hidden):
    """As in the Monarch authors' code, where q hidden units of an input block go round the output blocks in turn.

    Block (f, g) owns ⌊q/b⌋ or ⌈q/b⌉ of them; with the larger number everywhere it is a BTT, padding included.
    """
    a, e = -(-d_in // blocks), -(-d_out // blocks)
    first = torch.randn(blocks, hidden, a, dtype=torch.float64)
    second = torch.randn(blocks, e, blocks, hidden, dtype=torch.float64)
    owned = torch.arange(hidden) % blocks == torch.arange(blocks)[:, None]
    member = torch.einsum("fegh,gha,fh->fega", second, first, owned.double())
    member = member.reshape(blocks * e, blocks * a)[:d_out, :d_in]
    structure = el.BTT(rank=-(-hidden // blocks), blocks=(blocks, blocks))(d_in, d_out)
    assert error(member, structure, el.project(member, structure)) < 1e-13
    fewer = el.BTT(rank=hidden // blocks, blocks=(blocks, blocks))(d_in, d_out)
    assert error(member, fewer, el.project(member, fewer)) > 0.01


@pytest.mark.parametrize(
    "family", [el.TensorTrain(rank=3, cores=3), el.TensorTrain(rank=2, cores=4), el.BTT(rank=2, cores=3)], ids=str
)
@pytest.mark.parametrize("widths", [(64, 64), (64, 81)], ids=str)
def test_splitting_off_keeps_its_error_bound(structure, weight):
    """TT-SVD (Oseledets 2011): each truncation adds at most what it discards, and the least error is at least each."""
    target = Target(weight, structure)
    axes, blocks = target.blocks()
    split_error = target.error(split(structure, axes, blocks))
    least = []
    for cut in range(1, len(structure.factors)):
        early = {axis for factor in structure.factors[:cut] for axis in factor}
        late = {axis for factor in structure.factors[cut:] for axis in factor}
        groups = [
            [axis for axis in axes if axis in early and axis in late],
            [axis for axis in axes if axis in early and axis not in late],
            [axis for axis in axes if axis not in early],
        ]
        matrix = blocks.permute([axes.index(axis) for group in groups for axis in group])
        matrix = matrix.reshape([structure.size(group) for group in groups])
        least.append(
            discarded_beyond(matrix, structure.sizes[f"r{cut - (axes[0] == 'o0' and 'r0' in structure.sizes)}"])
        )
    assert split_error**2 <= sum(least) * (1 + 1e-9)
    best = error(weight, structure, el.project(weight, structure)) * float(weight.norm())
    assert max(least) <= best**2 * (1 + 1e-9) <= split_error**2 * (1 + 2e-9)


@pytest.mark.parametrize("widths", [(36, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_short_dtype_costs_only_its_rounding(structure, weight, dtype):
    short = weight.to(dtype)
    for sweeps in (0, 3):
        found, reference = (el.project(w, structure, sweeps=sweeps) for w in (short, short.double()))
        assert {factor.dtype for factor in found} == {dtype}
        lost = error(short.double(), structure, [factor.double() for factor in found])
        assert lost == pytest.approx(error(short.double(), structure, reference), abs=4 * torch.finfo(dtype).eps)


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
        (weight, "low_rank(rank=2)", "not a Structure: make one"),
    ]
    for given, onto, why in cases:
        with pytest.raises(el.StructureError, match=why):
            el.project(given, onto)
        with pytest.raises(el.StructureError, match=why):
            el.refine(given, onto, el.project(weight, structure))
    with pytest.raises(el.StructureError, match="factors of shapes"):
        el.refine(weight, structure, [torch.randn(2, 2)])


def test_the_page_of_the_docs_runs_and_holds_what_was_measured():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "projection.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "projection.md", "exec"), {})
    benchmark = runpy.run_path(str(root / "benchmarks" / "projection.py"))
    assert benchmark["written"](page) == page
