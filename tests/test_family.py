"""The families: legal at every width, each the textbook's formula, and read back from their short text."""

import copy
import math
import pickle
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import hypothesis.strategies as some
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

import einlinear as el
import einlinear.family as registry
from einlinear.family import equal_split, split
from einlinear.structure import PADDING_TOLERANCE

AWKWARD = [(769, 1009), (1009, 769), (768, 50257), (50257, 768), (4096, 11008), (11008, 4096), (127, 8191)]


@pytest.fixture(params=[(16, 16), (36, 64), (97, 131), *AWKWARD], ids="{0[0]}to{0[1]}".format)
def any_widths(request):
    return request.param


def test_the_families_are_those_of_the_manual():
    names = {type(family).__name__ for family in el.families()}
    assert names >= {"Dense", "LowRank", "BlockDiagonal", "Kronecker", "TensorTrain", "Monarch", "BTT", "BLAST"}
    assert names >= {"Butterfly", "Theta"}
    assert [str(family) for family in el.families()] == sorted(str(family) for family in el.families())


def test_says_what_it_is_and_where_it_comes_from(family):
    assert family.source
    assert family.__doc__


def test_has_the_widths_asked_for(family, any_widths):
    structure = family(*any_widths)
    assert (structure.d_in, structure.d_out) == any_widths
    assert structure == family(*any_widths)
    assert eval(repr(structure), {"Structure": el.Structure}) == structure
    assert structure == structure.canonical


def test_pads_within_tolerance_and_in_the_open(family, any_widths):
    structure = family(*any_widths)
    assert 0 <= structure.pad_in <= PADDING_TOLERANCE * structure.d_in
    assert 0 <= structure.pad_out <= PADDING_TOLERANCE * structure.d_out
    assert (".pad(" in repr(structure)) == bool(structure.pad_in or structure.pad_out)


@pytest.mark.parametrize("wide", [769, 1009, 11008, 50257])
@pytest.mark.parametrize("narrow", [61, 64])
def test_no_input_is_ignored_and_no_output_always_zero(family, narrow, wide):
    for structure in (family(narrow, wide), family(wide, narrow).T):  # both d_in narrow: the matrix stays small
        # Positive factors cannot cancel, so an entry is zero only where the structure says so.
        matrix = el.dense(structure, [torch.ones(shape) for shape in structure.factor_shapes])
        assert (matrix.amax(0) > 0).all(), "an input is ignored"
        assert (matrix.amax(1) > 0).all(), "an output is always zero"


@pytest.mark.parametrize(
    "family, widths",
    [
        (el.BlockDiagonal(blocks=4), (1, 16)),
        (el.BlockDiagonal(blocks=4), (16, 1)),
        (el.BLAST(blocks=4, rank=2), (5, 16)),
        (el.BTT(blocks=(16, 4)), (17, 16)),
        (el.BTT(blocks=(4, 16)), (16, 17)),
        (el.Monarch(blocks=8), (9, 64)),
    ],
    ids=str,
)
def test_too_much_padding_is_refused_with_the_remedy(family, widths):
    with pytest.raises(el.StructureError, match=r"at most 15% of a width; choose sizes \(blocks, cores\)"):
        family(*widths)


def test_a_block_of_padding_alone_is_refused():
    with pytest.raises(el.StructureError, match="an input would be ignored or an output always zero; choose fewer"):
        el.BlockDiagonal(blocks=8)(14, 16)


@pytest.mark.parametrize(("width", "smooth"), [(7, 8), (97, 100), (769, 800), (1009, 1024), (11008, 11250)])
def test_a_butterfly_pads_to_the_next_product_of_twos_threes_and_fives(width, smooth):
    assert el.Butterfly()(width, width).pad_in == smooth - width


@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (-4, 8), (8, -3)], ids=str)
def test_widths_below_one_are_refused(family, widths):
    with pytest.raises(el.StructureError, match="at least 1"):
        family(*widths)


@pytest.mark.parametrize("family", [el.LowRank(), el.Monarch(), el.BTT(), el.TensorTrain(), el.Butterfly()], ids=str)
@pytest.mark.parametrize("widths", [(0, 8), (-4, 8), (8, -3), (2.5, 8), ("8", 8)], ids=str)
def test_widths_that_are_none_are_refused_with_default_settings(family, widths):
    with pytest.raises(el.StructureError, match="at least 1"):
        family(*widths)


# Text and settings


@pytest.mark.parametrize(
    "family",
    [
        *el.families(),
        el.BTT(),
        el.BTT(rank=4),
        el.BTT(rank=3, blocks=(4, 8)),
        el.BTT(cores=3),
        el.Monarch(),
        el.Kronecker(cores=3),
        el.LowRank(),
        el.Butterfly(radix=4),
        el.Theta((1, 0, 0, 0, 1, 0, 0.25)),
        el.Theta((0.4, 0.3, 0.3, 0.3, 0.4, 0.3, 0.1, 0.1, 0.1, 0.1)),
    ],
    ids=str,
)
def test_is_read_from_its_text(family):
    assert el.structure(str(family)) == el.structure(repr(family)) == family
    assert eval(repr(family), vars(el)) == family
    assert pickle.loads(pickle.dumps(family)) == copy.deepcopy(family) == family
    assert hash(copy.deepcopy(family)) == hash(family)


def test_text_is_forgiving_about_space_and_defaults():
    assert el.structure(" btt( rank = 4 ) ") == el.BTT(rank=4)
    assert str(el.BTT(rank=1)) == "btt"
    assert el.structure("dense()") == el.structure("dense") == el.structure("Dense") == el.Dense()
    assert el.structure("block_diagonal(blocks=2)") == el.structure("BlockDiagonal(blocks=2)")


@pytest.mark.parametrize(
    "text, says",
    [
        ("btx", "there is no family 'btx'; did you mean 'btt'?"),
        ("qqqq", "there is no family 'qqqq'; known families: blast, block_diagonal, btt, butterfly"),
        ("btt(rnk=4)", "btt has no setting 'rnk'; it has blocks, cores, rank"),
        ("dense(rank=4)", "dense has no setting 'rank'; it has no settings"),
        ("btt(4)", "settings are given by name, as in 'btt(rank=4)'"),
        ("btt(rank=2, rank=4)", "a setting is given twice"),
        ("btt(rank=4", "expected a family and its settings, as in 'btt(rank=4)'"),
        ("", "expected a family and its settings"),
        ("block diagonal", "expected a family and its settings"),
        ("btt(rank=four)", "expected settings of the form name=number"),
        ("btt(rank=)", "expected settings of the form name=number"),
        ("btt(rank=open('x'))", "expected settings of the form name=number"),
        ("btt()+()", "expected settings of the form name=number"),
        ("btt()(rank=2)", "expected settings of the form name=number"),
        ("block_diagonal", "missing 1 required positional argument: 'blocks'"),
        ("btt(rank=-1)", "cannot make the family btt: rank=-1, but it counts something; pass an integer of at least 1"),
        ("low_rank(rank=0)", "cannot make the family low_rank: rank=0"),
        ("btt(blocks=(0, 4))", "cannot make the family btt: blocks=(0, 4)"),
        ("btt(blocks=(4,))", "pass (in_blocks, out_blocks), such as (16, 16)"),
        ("btt(blocks=4)", "pass (in_blocks, out_blocks), such as (16, 16)"),
        ("monarch(blocks=(2, 4))", "BTT(blocks=(in_blocks, out_blocks)) takes two"),
        ("btt(rank=" + "-" * 5000 + "1)", "expected settings of the form name=number"),
        (None, "expected a family and its settings"),
        ("btt(cores=1)", "it needs at least 2 cores"),
        ("btt(cores=3, blocks=(4, 4))", "explicit blocks are those of 2 cores"),
        ("theta(theta=(1, 0))", "pass a tuple of 7 exponents, or 10 for 3 factors"),
        ("theta(theta=3)", "pass a tuple of 7 exponents, or 10 for 3 factors"),
        ("theta(theta=(2, 0, -1, 1, 0, 0, 0))", "every exponent lies between 0 and 1"),
        ("theta(theta=(.5, .2, 0, 1, 0, 0, 0))", "the exponents of the input sum to 0.7; make it 1"),
        ("theta(theta=(1, 0, 0, .5, 0, 0, 0))", "the exponents of the output sum to 0.5; make it 1"),
    ],
)
def test_text_that_cannot_be_read(text, says):
    with pytest.raises(el.StructureError) as caught:
        el.structure(text)
    assert says in str(caught.value)


def test_subclassing_registers(monkeypatch):
    monkeypatch.setattr(registry, "_families", {**registry._families})

    @dataclass(frozen=True, repr=False)
    class TwoLayers(el.Family):
        width: int = 3
        example: ClassVar = {"width": 5}

        def __call__(self, d_in, d_out):
            return el.LowRank(self.width)(d_in, d_out)

    assert el.structure("two_layers(width=4)") == TwoLayers(width=4)
    assert TwoLayers(width=5) in el.families()

    with pytest.raises(TypeError, match="already has one of that name; rename yours"):
        type("BTT", (el.Family,), {"__module__": "elsewhere", "__call__": TwoLayers.__call__})


# Splits of a width


@settings(max_examples=200, deadline=None, derandomize=True)
@given(some.integers(1, 10**5), some.lists(some.floats(0, 1), min_size=1, max_size=4).filter(lambda s: sum(s) > 0.1))
def test_a_split_has_the_width_or_slightly_more(width, weights):
    parts = split(width, [weight / sum(weights) for weight in weights])
    assert len(parts) == len(weights)
    assert width <= math.prod(parts) <= width * (1 + PADDING_TOLERANCE)


@pytest.mark.parametrize(
    "width, parts",
    [
        (11008, (86, 128)),
        (769, (22, 35)),
        (50257, (140, 359)),
        (1024, (32, 32)),
        (2048, (32, 64)),
        (768, (24, 32)),
        (4096, (64, 64)),
        (1, (1, 1)),
        (2, (1, 2)),
    ],
)
def test_the_balanced_split(width, parts):
    assert equal_split(width, 2) == parts


def test_more_parts():
    assert equal_split(4096, 3) == (16, 16, 16)
    assert equal_split(4096, 1) == (4096,)
    assert split(4096, (0.25, 0.75)) == (8, 512)
    assert split(4096, (0.0, 1.0)) == (1, 4096)


# Each family against its definition


def test_btt_in_its_documented_letters():
    structure = el.BTT(rank=3)(768, 3072)
    assert str(structure) == "g a, g r f a, f e g r -> f e"
    assert {structure.sizes["g"], structure.sizes["a"]} == {24, 32}
    assert {structure.sizes["f"], structure.sizes["e"]} == {48, 64}
    assert structure.sizes["r"] == 3


def test_blocks_are_those_of_the_input_and_of_the_output():
    structure = el.BTT(rank=2, blocks=(4, 8))(64, 96)
    assert structure.sizes == {"g": 4, "a": 16, "r": 2, "f": 8, "e": 12}


def test_11008_is_86_blocks_of_128():
    down, up = el.BTT()(11008, 4096), el.BTT()(4096, 11008)
    assert {down.sizes["g"], down.sizes["a"]} == {up.sizes["f"], up.sizes["e"]} == {86, 128}
    assert (down.pad_in, down.pad_out, up.pad_in, up.pad_out) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "d_in, d_out", [(1024, 1024), (2048, 2048), (512, 2048), (2048, 512), (768, 3072), (4096, 11008)]
)
def test_balanced_btt_reaches_full_rank_at_rank_one(d_in, d_out):
    assert el.generic_rank(el.BTT()(d_in, d_out)) == min(d_in, d_out)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_monarch_is_the_layer_of_its_paper(widths, blocks):
    rank = math.ceil(min(widths) / blocks**2)
    assert el.Monarch(blocks=blocks)(*widths) == el.BTT(rank=rank, blocks=(blocks, blocks))(*widths)
    assert el.Monarch()(*widths) == el.BTT(rank=1)(*widths)


def test_dense_is_its_factor(widths, draw):
    structure = el.Dense()(*widths)
    (factor,) = draw(structure)
    assert_close(el.dense(structure, [factor]), factor)


def test_low_rank_is_a_product(widths, draw):
    structure = el.LowRank(rank=3)(*widths)
    a, b = draw(structure)
    assert_close(el.dense(structure, [a, b]), b @ a)
    assert el.LowRank()(64, 100).sizes["r"] == 8


def test_block_diagonal_is_one(draw):
    structure = el.BlockDiagonal(blocks=4)(12, 20)
    (blocks,) = draw(structure)
    assert_close(el.dense(structure, [blocks]), torch.block_diag(*blocks))


@pytest.mark.parametrize("cores, widths", [(2, (12, 20)), (3, (27, 64))])
def test_kronecker_is_a_kronecker_product(cores, widths, draw):
    structure = el.Kronecker(cores=cores)(*widths)
    factors = draw(structure)
    assert_close(el.dense(structure, factors), reduce(torch.kron, factors))


def test_tensor_train_is_a_sum_of_kronecker_products(draw):
    structure = el.TensorTrain(rank=3)(12, 20)
    a, b = draw(structure)  # axes: o0 r1 i0 and o1 r1 i1
    wanted = sum(torch.kron(a[:, r].contiguous(), b[:, r].contiguous()) for r in range(3))
    assert_close(el.dense(structure, [a, b]), wanted)


def test_btt_is_a_grid_of_blocks_of_its_rank(draw):
    structure = el.BTT(rank=2, blocks=(3, 5))(12, 20)
    first, second = draw(structure)
    grid = el.dense(structure, [first, second]).reshape(5, 4, 3, 4).transpose(1, 2)
    for f in range(5):
        for g in range(3):
            assert_close(grid[f, g], second[f, :, g] @ first[g, :, f])
            assert torch.linalg.matrix_rank(grid[f, g]) == 2


@pytest.mark.parametrize("rank", [1, 2])
def test_more_cores_of_btt_are_a_product_of_block_diagonal_maps(rank, draw):
    """With the axes in place, each factor alone is a two-core BTT's stage on what the others leave alone."""
    structure = el.BTT(rank=rank, cores=3)(27, 64)
    a, b, c = draw(structure)  # i2 i1 r0 o0 i0, o0 i2 r1 o1 i1 r0, o0 o1 o2 i2 r1
    x = torch.randn(27, dtype=torch.float64)
    state = torch.einsum("kji,kjroi->okjr", x.reshape(3, 3, 3), a)
    state = torch.einsum("okjr,oksqjr->oqks", state, b)
    y = torch.einsum("oqks,oqpks->oqp", state, c)
    assert_close(el.apply(structure, [a, b, c], x), y.reshape(64))
    assert el.generic_rank(structure) == 27


def test_blast_blocks_share_their_bases(draw):
    structure = el.BLAST(blocks=3, rank=4)(12, 15)
    v, s, u = draw(structure)  # axes: j r n, r i j, i m r
    grid = el.dense(structure, [v, s, u]).reshape(3, 5, 3, 4).transpose(1, 2)
    for i in range(3):
        for j in range(3):
            assert_close(grid[i, j], u[i] @ torch.diag(s[:, i, j]) @ v[j])


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_butterfly_holds_the_hadamard_transform(bits):
    structure = el.Butterfly()(2**bits, 2**bits)
    assert len(structure.factors) == bits
    small = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    factors = [small.expand(slices, 2, 2) for slices, _, _ in structure.matrix_shapes]
    hadamard = reduce(torch.kron, [small] * bits).reshape(*[2] * bits, 2**bits)
    bit_reversed = hadamard.permute(*reversed(range(bits)), bits).reshape(2**bits, 2**bits)
    assert_close(el.dense(structure, factors), bit_reversed)
    assert el.parameters(structure) == 2 * 2**bits * bits


@pytest.mark.parametrize(
    "theta, family",
    [
        ((1, 0, 0, 0, 1, 0, 0.5), el.LowRank(rank=8)),
        ((0.5, 0, 0.5, 0, 0.5, 0.5, 0), el.BTT(rank=1)),
        ((0.5, 0, 0.5, 0, 0.5, 0.5, 1 / 3), el.BTT(rank=4)),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), el.Kronecker()),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 1 / 3), el.TensorTrain(rank=4)),
        ((0, 0, 1, 0, 0, 1, 0), el.BTT(rank=1, blocks=(64, 64))),
    ],
    ids=str,
)
def test_theta_passes_through_the_named_families(theta, family):
    point, named = el.Theta(theta)(64, 64), family(64, 64)
    measures = (el.parameters, el.flops, el.generic_rank, lambda s: sorted(x.std for x in el.spectral(s)))
    assert [measure(point) for measure in measures] == [measure(named) for measure in measures]


def test_theta_of_three_factors_uses_all_of_its_axes():
    structure = el.Theta((0.5, 0.25, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25, 0.25, 0.25))(256, 256)
    assert len(structure.factors) == 3
    assert set(structure.sizes) == {*"abcdef", "ab", "ac", "abc", "bc"}
    assert all(size == 4 for axis, size in structure.sizes.items() if len(axis) > 1)
