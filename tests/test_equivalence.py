"""Equal forms are equal sets of matrices, and only those; the space of candidates has each once."""

import pytest

import einlinear as el
from einlinear.equivalence import canonical


def parsed(expression, **sizes):
    return el.Structure.parse(expression, **sizes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("i, r i, o r -> o", {"i": 8, "r": 2, "o": 8}), ("x, b x, y b -> y", {"x": 8, "b": 2, "y": 8})),
        (("a b, c a b -> c", {"a": 2, "b": 4, "c": 8}), ("i, o i -> o", {"i": 8, "o": 8})),
        (("i u, r i u, o r -> o", {"i": 8, "u": 1, "r": 2, "o": 8}), ("i, r i, o r -> o", {"i": 8, "r": 2, "o": 8})),
        (("i, i, o i -> o", {"i": 8, "o": 8}), ("i, o i -> o", {"i": 8, "o": 8})),
        (
            ("a b, c a, d b -> c d", {"a": 2, "b": 4, "c": 8, "d": 4}),
            ("a b, d b, c a -> c d", {"a": 2, "b": 4, "c": 8, "d": 4}),
        ),
        (("i, e o i -> o", {"i": 8, "o": 8, "e": 3}), ("i, o i -> o", {"i": 8, "o": 8})),
    ],
    ids=["names", "merged axes", "axes of one", "a factor held by another", "order of factors", "a sum of weights"],
)
def test_the_same_maps_have_one_form(one, other):
    assert canonical(parsed(one[0], **one[1])) == canonical(parsed(other[0], **other[1]))


def test_the_form_keeps_what_dimension_of_the_set_of_matrices_says():
    """Two families of one form have sets of matrices of one dimension, the generic rank of their Jacobian."""
    import torch

    from einlinear.with_torch import dense

    def dimension(structure):
        torch.manual_seed(0)
        factors = tuple(torch.randn(shape, dtype=torch.float64) for shape in structure.factor_shapes)
        jacobian = torch.autograd.functional.jacobian(lambda *f: dense(structure, f).flatten(), factors)
        return int(torch.linalg.matrix_rank(torch.cat([part.flatten(1) for part in jacobian], dim=1)))

    forms = {}
    for candidate in el.candidates(8, exponents=(7,)):
        for text in (candidate.family, *candidate.equivalent):
            structure = el.structure(text)(8, 8)
            forms.setdefault(canonical(structure), set()).add((dimension(structure), el.generic_rank(structure)))
    assert len(forms) > 10 and all(len(found) == 1 for found in forms.values())


@pytest.mark.parametrize(
    ("one", "other"),
    [("btt(rank=1)", "btt(rank=2)"), ("monarch(blocks=4)", "monarch(blocks=8)"), ("low_rank(rank=4)", "dense")],
)
def test_different_maps_have_different_forms(one, other):
    assert canonical(el.structure(one)(64, 64)) != canonical(el.structure(other)(64, 64))


def test_a_gate_and_padding_are_part_of_the_form():
    plain = parsed("i, r i, o r -> o", i=8, r=4, o=8)
    assert canonical(plain.route("r", active=2)) != canonical(plain)
    assert canonical(plain.route("r", active=2)) != canonical(plain.route("r", active=3))
    assert canonical(parsed("i, r i, o r -> o", i=16, r=4, o=8).pad(d_in=15, d_out=8)) != canonical(
        parsed("i, r i, o r -> o", i=16, r=4, o=8)
    )


def test_candidates_are_distinct_cheap_and_in_their_corner():
    found = el.candidates(64, exponents=(7,), least_rank=0.5, most_sharing=0.4, costliest=0.8)
    shapes = ((64, 64), (64, 256), (256, 64))
    forms = [tuple(canonical(el.structure(c.family)(*shape)) for shape in shapes) for c in found]
    assert len(set(forms)) == len(found) > 20
    assert all(c.psi >= 0.5 and c.omega <= 0.4 and 0 < c.flops <= 0.8 for c in found)
    assert [c.flops for c in found] == sorted(c.flops for c in found)
    assert "dense" not in {c.family for c in found}
    twins = {twin for c in found for twin in c.equivalent}
    assert twins and not twins & {c.family for c in found}
    for c in found:
        if c.equivalent:  # the cheapest of its kind
            assert min(el.flops(el.structure(t)(64, 64)) for t in (c.family, *c.equivalent)) <= c.flops * 2 * 64 * 64
