"""Laws of allocation: the best choice there is, never worse for more budget, within a hundredth of what was asked."""

import random
from itertools import pairwise, product

import pytest
import torch

import einlinear as el
from einlinear.compression import allocation


def random_curve(draw: random.Random, points: int) -> el.Curve:
    d_in, d_out = draw.choice([(20, 30), (16, 16), (40, 10)])
    costs = sorted(draw.sample(range(1, d_in * d_out + 1), points))
    errors = sorted((draw.random() * 10 for _ in costs), reverse=True)
    draw.shuffle(errors[1:-1])
    made = [el.Point(el.LowRank(rank=k + 1), c, 2 * c, e) for k, (c, e) in enumerate(zip(costs, errors, strict=True))]
    return el.Curve(d_in, d_out, 12.0, tuple(made))


def least(curves: dict[str, el.Curve], asked: float, cost: str) -> float:
    """By trying everything."""
    sums = [
        (sum(getattr(p, cost) for p in choice), sum(p.error for p in choice))
        for choice in product(*(curve.points for curve in curves.values()))
    ]
    return min(error for spent, error in sums if spent <= asked)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_budget_is_better(seed, cost):
    draw = random.Random(seed)
    curves = {name: random_curve(draw, draw.choice([2, 4, 6])) for name in "abcd"}
    dense = sum(curve.dense(cost) for curve in curves.values())
    floor = sum(min(getattr(p, cost) for p in curve.points) for curve in curves.values())
    for _ in range(15):
        budget = draw.uniform(floor / dense, 1)
        found = el.allocate(curves, budget, cost)
        assert found.error == pytest.approx(sum(point.error for point in found.chosen.values()))
        assert found.share <= budget * (1 + 1e-9)
        assert found.error == pytest.approx(least(curves, budget * dense, cost))
        assert found.bound <= found.error


@pytest.mark.parametrize("states", [4, allocation.STATES])
def test_more_budget_is_never_worse(monkeypatch, states):
    """Even where so many choices are open that some are dropped."""
    monkeypatch.setattr(allocation, "STATES", states)
    draw = random.Random(5)
    curves = {f"layer {k}": random_curve(draw, 9) for k in range(12)}
    errors = [el.allocate(curves, 0.02 + 0.98 * k / 300).error for k in range(301) if 0.02 + 0.98 * k / 300 > 0.15]
    assert all(more <= less + 1e-12 for less, more in pairwise(errors))


@pytest.mark.parametrize("name", ["low_rank", "btt", "auto"])
@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_the_budget_asked_for_is_met(name, cost):
    offered = el.layer_candidates(name, 128, 96)
    weights = {f"h.{k}": torch.randn(96, 128) * torch.logspace(0, -k / 4, 128) for k in range(12)}
    curves = {key: el.error_curve(weight, offered) for key, weight in weights.items()}
    for budget in (0.3, 0.45, 0.8):
        found = el.allocate(curves, budget, cost)
        assert 0.99 * budget <= found.share <= budget
        assert found.error - found.bound < 0.05 * found.error
        assert found.chosen["h.0"].parameters > found.chosen["h.11"].parameters  # what decays faster gets less


def test_relative_errors_give_quiet_layers_their_share():
    weight = torch.randn(32, 32) * torch.logspace(0, -1, 32)
    curves = {
        key: el.error_curve(s * weight, el.layer_candidates("low_rank", 32, 32)) for key, s in (("a", 1), ("b", 10))
    }
    loud, fair = (el.allocate(curves, 0.5, relative=relative) for relative in (False, True))
    assert loud.chosen["a"].parameters < loud.chosen["b"].parameters
    assert abs(fair.chosen["a"].parameters - fair.chosen["b"].parameters) <= 64


def test_what_a_layer_counts_for_decides_what_it_gets():
    weight = torch.randn(32, 32) * torch.logspace(0, -1, 32)
    curves = {key: el.error_curve(weight, el.layer_candidates("low_rank", 32, 32)) for key in ("a", "b")}
    even, first = (el.allocate(curves, 0.5, weights={"a": a, "b": 1.0}) for a in (1.0, 100.0))
    assert abs(even.chosen["a"].parameters - even.chosen["b"].parameters) <= 64
    assert first.chosen["a"].parameters > 1.5 * first.chosen["b"].parameters
    assert 0.9 * 0.5 < first.share <= 0.5
    kept = el.allocate(curves, 0.5, weights={"a": 100.0, "b": 1.0}, floor=0.9).chosen["b"].parameters
    assert first.chosen["b"].parameters < 0.9 * 512 - 64 <= kept <= 512
    with pytest.raises(el.StructureError, match="from 0 to 1"):
        el.allocate(curves, 0.5, floor=2)


def test_a_plan_is_read_back_and_drives_a_conversion(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32, bias=False))
    curves = {
        n: el.error_curve(model[int(n)].weight, el.layer_candidates("auto", *w))
        for n, w in (("0", (32, 48)), ("2", (48, 32)))
    }
    found = el.allocate(curves, 0.4)
    path = tmp_path / "plan.toml"
    path.write_text(found.plan)
    assert el.read_plan(path) == found.rules
    assert all(name in str(found) for name in curves)
    report = el.convert(model, el.read_plan(path))
    assert {row.name for row in report.rows} == {name for name, rule in found.rules.items() if rule}
    for row in report.rows:
        assert row.parameters_after == found.chosen[row.name].parameters
        curve, point = curves[row.name], found.chosen[row.name]
        assert row.error == pytest.approx((point.error / curve.total) ** 0.5, rel=1e-3)
    path.write_text('[layers]\n"a \\" b" = "dense"\n"c" = "btt(rank=2)"\n')
    assert el.read_plan(path) == {'a " b': None, "c": el.BTT(rank=2)}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected one table"),
        ("layers = 3", "expected one table"),
        ("[layers]\n", "expected one table"),
        ('x = 1\n[layers]\n"a" = "btt"', "expected one table"),
        ('[layers]\n"a" = "btt', "plan.toml"),
        ('[layers]\n"a" = 3', "structure of 'a'"),
        ('[layers]\nh.0 = "btt"', "quote the layer's name"),
        ('[layers]\n"a" = "btt(rank=0)"', "layer 'a'.*rank=0"),
        ('[layers]\n"a" = "bbt"', "layer 'a'.*did you mean 'btt'"),
        ('[layers]\n"a" = "btt"\n"a" = "btt"', "plan.toml"),
    ],
)
def test_a_bad_plan_is_refused_in_a_sentence(tmp_path, text, why):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(el.StructureError, match=why):
        el.read_plan(path)


def test_a_bad_budget_is_refused_in_a_sentence():
    curve = el.error_curve(torch.randn(8, 8), el.layer_candidates("low_rank", 8, 8))
    for budget in (0, -1, 1.01, float("nan"), 50):
        with pytest.raises(el.StructureError, match="above 0 and at most 1"):
            el.allocate({"a": curve}, budget)
    with pytest.raises(el.StructureError, match=r"cheapest.*0\.2500"):
        el.allocate({"a": curve}, 0.1)
    with pytest.raises(el.StructureError, match="no layers"):
        el.allocate({}, 0.5)
    with pytest.raises(el.StructureError, match="'parameters' or 'flops'"):
        el.allocate({"a": curve}, 0.5, "seconds")


@pytest.mark.parametrize("family", [*el.families(), "auto"], ids=str)
def test_candidates_are_many_and_never_dearer_than_dense(family):
    name = str(family).partition("(")[0]
    found = el.layer_candidates(name, 64, 96)
    costs = [el.parameters(candidate(64, 96)) for candidate in found]
    assert costs == sorted(costs)
    assert costs[-1] <= 64 * 96
    assert len({*found}) == len(found)
    if hasattr(family, "rank"):
        assert len(found) > 10
        assert costs[-1] > 0.8 * 64 * 96
    assert el.layer_candidates(str(family), 64, 96) in ((family,), found)


def test_candidates_that_are_none_are_refused():
    with pytest.raises(el.StructureError, match="did you mean 'btt'"):
        el.layer_candidates("bt", 8, 8)
    with pytest.raises(el.StructureError, match="none fits"):
        el.layer_candidates("low_rank(rank=7)", 8, 8)


@pytest.mark.parametrize("family", ["low_rank", "btt", "tensor_train", "block_diagonal", "blast"])
@pytest.mark.parametrize("aware", [False, True], ids=["plain", "moments"])
def test_a_curve_is_what_projecting_leaves(family, aware):
    weight = torch.randn(24, 32, dtype=torch.float64)
    gram = el.Moments(32).update(torch.randn(99, 32) @ torch.randn(32, 32)) if aware else None
    offered = el.layer_candidates(family, 32, 24)[:: 40 if family == "blast" else 9]
    curve = el.error_curve(weight, offered, gram)
    assert len(curve.points) == len(offered)
    closed = family == "low_rank" or (not aware and family != "blast")
    for point in curve.points:
        structure = point.family(32, 24)
        rest = weight - el.dense(structure, el.project(weight, structure, gram))
        left = float((rest * (rest if gram is None else rest @ gram.matrix)).sum())
        assert point.parameters == el.parameters(structure)
        assert point.flops == el.flops(structure)
        if closed:
            assert point.error == pytest.approx(left, rel=1e-6, abs=1e-9 * curve.total)
        else:
            assert point.error < 3 * left + 0.02 * curve.total
            assert point.error > 0.2 * left
