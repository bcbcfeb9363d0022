"""Where the families stand among all einsums: the values of Searching for Efficient Linear Layers."""

import math
from dataclasses import dataclass, replace

import pytest

import einlinear as el
import einlinear.family as registry

TT_POINT = (1 / 3, 2 / 3, 0, 3 / 4, 1 / 4, 0, 0)


@pytest.mark.parametrize(
    "family, psi, nu, omega",
    [
        (el.Dense(), 1, 1, 0),
        (el.Monarch(), 1, 1 / 2, 0),
        (el.Monarch(blocks=4), 1, 1, 0),  # a fixed number of blocks stays a fixed fraction of dense
        (el.BTT(rank=4), 1, 1 / 2, 0),
        (el.BTT(cores=3), 1, 1 / 3, 0),
        (el.Kronecker(), 1, 1 / 2, 1 / 2),
        (el.Kronecker(cores=3), 1, 1 / 3, 2 / 3),
        (el.TensorTrain(rank=4), 1, 1 / 2, 1 / 2),
        (el.BlockDiagonal(blocks=4), 1, 1, 0),
        (el.LowRank(rank=8), 0, 0, 0),
        (el.LowRank(), 1 / 2, 1 / 2, 0),
        (el.BLAST(blocks=4, rank=8), 0, 0, 0),
        (el.Butterfly(), 1, 0, 0),  # n log n: a logarithm counts as exponent 0
        (el.Theta((1, 0, 0, 1, 0, 0, 0)), 1, 1, 0),
        (el.Theta((1, 0, 0, 0, 1, 0, 1 / 4)), 1 / 4, 1 / 4, 0),
        (el.Theta((1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0)), 1, 1 / 2, 1 / 2),
        (el.Theta((1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0)), 1, 1 / 2, 0),
        (el.Theta((4 / 5, 0, 1 / 5, 0, 4 / 5, 1 / 5, 1 / 10)), 1 / 2, 3 / 10, 0),
        (el.Theta(TT_POINT), 7 / 12, 3 / 4, 2 / 3),
    ],
    ids=str,
)
def test_known_values(family, psi, nu, omega):
    assert el.taxonomy(family) == pytest.approx((psi, nu, omega), abs=0.006)


def test_the_other_order_of_the_tensor_train_example(monkeypatch):
    """The order is part of a structure: with B first the same matrix is cheaper, ν = 1/3 where A first has 3/4."""
    monkeypatch.setattr(registry, "_families", {**registry._families})

    @dataclass(frozen=True, repr=False)
    class Reversed(el.Family):
        def __call__(self, d_in, d_out):
            structure = el.Theta(TT_POINT)(d_in, d_out)
            return replace(structure, factors=structure.factors[::-1])

    assert el.taxonomy(Reversed()) == pytest.approx((7 / 12, 1 / 3, 1 / 4), abs=0.006)


def test_exponents_are_those_of_the_formulas():
    """ν = max(δφρ, βγρ), ω = 1 + ν - size, ψ = min(1, βδργφ, αεργφ), for a point with all seven exponents."""
    a, b, g, d, e, f, r = theta = (0.3, 0.3, 0.4, 0.2, 0.5, 0.3, 0.1)
    nu, size = max(d + f + r, b + g + r), max(f + d + r + g + a, f + e + r + g + b)
    wanted = (min(1, b + d + r + g + f, a + e + r + g + f), nu, 1 + nu - size)
    assert el.taxonomy(el.Theta(theta)) == pytest.approx(wanted, abs=0.011)


def test_exponents_are_plain_numbers(family):
    assert all(math.copysign(1, value) == 1 for value in el.taxonomy(family) if value == 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("btt", r"it is of type str; pass a family, as el\.structure\('btt'\)"),
        (el.BTT()(64, 64), "a structure of one width, and exponents take a family"),
        (el.Monarch, r"it is a class; pass a family, as el\.Monarch\(\)"),
        (None, "it is of type NoneType; pass a family"),
    ],
)
def test_what_is_no_family_is_refused_in_a_sentence(given, said):
    with pytest.raises(el.StructureError, match=said):
        el.taxonomy(given)
