"""The language: what is written is what is read, and a fault is pointed at."""

import copy
import dataclasses
import pickle

import pytest

import einlinear as el

Structure = el.Structure

LOW_RANK = Structure.parse("i, r i, o r -> o", i=7, r=2, o=5)
EXPERTS = Structure.parse("i, e o i -> o", i=7, e=3, o=5)
BLOCKS = Structure.parse("g a, g r f a, f e g r -> f e", g=2, a=4, r=3, f=5, e=2)
EXAMPLES = [
    LOW_RANK,
    EXPERTS,
    BLOCKS,
    BLOCKS.pad(d_in=7, d_out=9),
    BLOCKS.route("r", active=2),
    BLOCKS.pad(d_in=7, d_out=10).route("r", active=1),
    EXPERTS.route("e", active=3),
]


@pytest.fixture(params=EXAMPLES, ids=repr)
def example(request):
    return request.param


def test_survives_its_own_text(example):
    read = eval(repr(example), {"Structure": Structure})
    assert read == example
    assert hash(read) == hash(example)
    assert repr(read) == repr(example)


def test_survives_pickle_and_deepcopy(example):
    _ = example.steps, example.sizes  # what is worked out once must not get in the way
    for twin in (pickle.loads(pickle.dumps(example)), copy.deepcopy(example), copy.copy(example)):
        assert twin == example
        assert hash(twin) == hash(example)
        assert twin.steps == example.steps


def test_examples_all_differ():
    assert len({*EXAMPLES}) == len(EXAMPLES)


def test_the_order_of_sizes_is_irrelevant():
    other = Structure.parse("i, r i, o r -> o", o=5, r=2, i=7)
    assert other == LOW_RANK
    assert hash(other) == hash(LOW_RANK)
    assert repr(other) == repr(LOW_RANK)


def test_spaces_are_irrelevant_where_nothing_needs_them():
    assert Structure.parse("i,r i,o r->o", i=7, r=2, o=5) == LOW_RANK
    assert Structure.parse("  i ,r   i, o r  ->  o ", i=7, r=2, o=5) == LOW_RANK


def test_other_sizes_make_another_structure():
    assert Structure.parse("i, r i, o r -> o", i=7, r=3, o=5) != LOW_RANK


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LOW_RANK.pad_in = 3


def test_widths_and_shapes():
    padded = BLOCKS.pad(d_in=7, d_out=9)
    assert (BLOCKS.d_in, BLOCKS.d_out) == (8, 10)
    assert (padded.d_in, padded.d_out) == (7, 9)
    assert padded.factor_shapes == BLOCKS.factor_shapes == ((2, 3, 5, 4), (5, 2, 2, 3))
    assert BLOCKS.matrix_shapes == ((2, 15, 4), (5, 2, 6))
    assert BLOCKS.describe(("g", "a")) == "g=2 a=4"


def test_every_axis_of_a_step_plays_one_part():
    first, second = BLOCKS.steps
    assert (first.batch, first.new, first.summed, first.passive, first.inner) == (("g",), ("r", "f"), ("a",), (), ())
    assert (second.batch, second.new, second.summed, second.passive) == (("f",), ("e",), ("g", "r"), ())
    assert first.result == second.state
    assert second.result == BLOCKS.y
    (expert,) = EXPERTS.steps
    assert expert.inner == ("e",)
    one, two = Structure.parse("a b, c a, d b -> c d", a=2, b=3, c=4, d=5).steps
    assert (one.passive, two.passive) == (("b",), ("c",))


def test_transposing_twice_changes_nothing(example):
    assert example == example.T.T
    assert (example.T.d_in, example.T.d_out) == (example.d_out, example.d_in)
    assert example.T.factors == example.factors[::-1]
    assert (example.T.routed, example.T.active) == (example.routed, example.active)


def test_canonical_orders_axes_as_batch_new_summed():
    written = Structure.parse("g a, a f r g, g e f r -> f e", g=2, a=4, r=3, f=5, e=2)
    assert str(written.canonical) == "g a, g f r a, f e g r -> f e"
    assert written.canonical.canonical == written.canonical
    assert written.canonical.matrix_shapes == written.matrix_shapes


def test_a_route_is_shown_and_kept_by_padding():
    routed = BLOCKS.route("r", active=2)
    assert (routed.routed, routed.active) == ("r", 2)
    assert routed.pad(d_in=7, d_out=10).routed == "r"
    assert repr(routed).endswith(".route('r', active=2)")


# The expression, its sizes, what is said, and the column it points at.
FAULTS = [
    ("i, r i, o r", dict(i=2, r=2, o=2), "expected '-> output axes' at the end", 11),
    ("i -> i", dict(i=2), "expected ', factor axes' after the input", 1),
    ("i, r i, o r -> o, r", dict(i=2, r=2, o=2), "only one output may follow '->'", 16),
    ("i, r i, o r -> o -> r", dict(i=2, r=2, o=2), "'-' is not part of an axis name", 17),
    ("i, r(i), o r -> o", dict(i=2, r=2, o=2), "'(' is not part of an axis name", 4),
    ("..., r i, o r -> o", dict(i=2, r=2, o=2), "'.' is not part of an axis name", 0),
    ("i, 2r i, o r -> o", dict(i=2, r=2, o=2), "'2' is not part of an axis name", 3),
    ("i, r i, o r -> o*", dict(i=2, r=2, o=2), "'*' is not part of an axis name", 16),
    (", r i, o r -> o", dict(i=2, r=2, o=2), "an operand without axes; each needs at least one", 0),
    ("i, , o i -> o", dict(i=2, o=2), "an operand without axes; each needs at least one", 3),
    ("i, o i ->", dict(i=2, o=2), "an operand without axes; each needs at least one", 9),
    ("i, r i i, o r -> o", dict(i=2, r=2, o=2), "axis 'i' appears twice in one operand", 7),
    ("i i, r i, o r -> o", dict(i=2, r=2, o=2), "axis 'i' appears twice in one operand", 2),
    ("i, r i, o r -> o o", dict(i=2, r=2, o=2), "axis 'o' appears twice in one operand", 17),
    ("i j, o i -> o", dict(i=2, j=2, o=2), "axis 'j' of the input is neither summed nor kept; add it to a factor", 2),
    ("i, o i -> o q", dict(i=2, o=2, q=2), "axis 'q' of the output comes from nowhere; add it to a factor", 12),
    ("i, r i, o r -> o", dict(i=2, o=2), "axis 'r' has no size; pass r=...", 3),
    ("i, r i, o r -> o", dict(i=0, r=2, o=2), "axis 'i' has size 0; pass an integer of at least 1", 0),
    ("i, r i, o r -> o", dict(i=2, r=-3, o=2), "axis 'r' has size -3; pass an integer of at least 1", 3),
    ("i, r i, o r -> o", dict(i=2, r=2, o=2.5), "axis 'o' has size 2.5; pass an integer of at least 1", 8),
    ("i, r i, o r -> o", dict(i=2, r=True, o=2), "axis 'r' has size True; pass an integer of at least 1", 3),
    ("i, r i, o r -> o", dict(i=2, r="2", o=2), "axis 'r' has size '2'; pass an integer of at least 1", 3),
    ("rank_1, rank_10 rank_1 -> rank_10", dict(rank_1=2), "axis 'rank_10' has no size; pass rank_10=...", 8),
]


@pytest.mark.parametrize("expression, sizes, says, column", FAULTS)
def test_a_fault_has_a_caret_under_it(expression, sizes, says, column):
    with pytest.raises(el.StructureError) as caught:
        Structure.parse(expression, **sizes)
    assert str(caught.value) == f"cannot read the structure\n    {expression}\n    {' ' * column}^ {says}"


def test_sizes_of_axes_that_are_not_there():
    with pytest.raises(el.StructureError, match="sizes were given for q, z, which it does not name; leave them out"):
        Structure.parse("i, o i -> o", i=2, o=2, z=1, q=3)


def test_a_structure_error_is_a_value_error():
    assert issubclass(el.StructureError, ValueError)


@pytest.mark.parametrize("d_in, d_out, side", [(6, 10, "input"), (9, 10, "input"), (8, 8, "output"), (8, 0, "output")])
def test_padding_past_its_tolerance_names_the_remedy(d_in, d_out, side):
    with pytest.raises(el.StructureError) as caught:
        BLOCKS.pad(d_in=d_in, d_out=d_out)
    message = str(caught.value)
    assert f"cannot fit the {side} width {d_out if side == 'output' else d_in}" in message
    assert "may add at most 15% of a width" in message
    assert "choose sizes (blocks, cores)" in message


def test_padding_never_kills_an_input_or_an_output():
    grid = Structure.parse("g a, g e a -> g e", g=8, a=2, e=2)
    with pytest.raises(el.StructureError, match=r"at g=7 one side of the map would be padding alone.*fewer blocks"):
        grid.pad(d_in=14, d_out=16)
    with pytest.raises(el.StructureError, match=r"at g=7 one side"):
        grid.pad(d_in=16, d_out=14)
    assert grid.pad(d_in=15, d_out=16).pad_in == 1


def test_padding_to_the_same_widths_is_no_padding():
    assert BLOCKS.pad(d_in=8, d_out=10) == BLOCKS
    assert ".pad" not in repr(BLOCKS)


@pytest.mark.parametrize(
    "axis, active, says",
    [
        ("z", 1, "cannot route axis 'z' of .*: it has only g, a, r, f, e"),
        ("r", 0, "with 0 active entries: it has 3; choose active between 1 and 3"),
        ("r", 4, "with 4 active entries: it has 3; choose active between 1 and 3"),
        ("r", -1, "with -1 active entries"),
    ],
)
def test_routes_that_cannot_be(axis, active, says):
    with pytest.raises(el.StructureError, match=says):
        BLOCKS.route(axis, active=active)


def test_a_second_axis_is_not_routed_in_place_of_the_first():
    once = BLOCKS.route("r", active=2)
    assert once.route("r", active=1) == BLOCKS.route("r", active=1)
    with pytest.raises(el.StructureError, match="its axis 'r' is routed already, and a map has one such"):
        once.route("g", active=1)


def test_an_axis_that_no_factor_carries_cannot_be_routed():
    passing = el.Structure.parse("b i, o i -> b o", b=4, i=3, o=5)
    with pytest.raises(el.StructureError, match="no factor carries it, so a gate would choose nothing"):
        passing.route("b", active=2)
