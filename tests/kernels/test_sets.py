"""Routing and set-sorted tiles in Triton's interpreter, against float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear import routing
from einlinear.kernels.routed import SetSorted
from einlinear.kernels.select import route
from einlinear.kernels.set_pair import routed_pair, set_pair
from einlinear.kernels.set_result import routed_result, set_result
from einlinear.kernels.sets import PIECE, RUN, Sizes, set_layout

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [  # tokens, experts, active, family, d_in, d_out
    (41, 3, 2, el.BTT(), 64, 96),
    (7, 2, 1, el.BTT(rank=2), 64, 64),
    (5, 3, 3, el.BTT(), 72, 64),
    (300, 2, 1, el.BTT(blocks=(2, 2)), 32, 32),  # more tokens of a set than one run or tile takes
]


def _drawn(tokens: int, experts: int, active: int, family: el.Family, d_in: int, d_out: int) -> dict[str, Tensor]:
    one = family(d_in, d_out).canonical
    first, second = (torch.randn(experts, *shape) / shape[-1] ** 0.5 for shape in one.matrix_shapes)
    index = torch.stack([torch.randperm(experts)[:active] for _ in range(tokens)])
    if tokens > 256:
        index[:290] = 1
    weight = torch.rand(tokens, active)
    weight[0, 0] = 0
    named = {"x": torch.randn(tokens, d_in), "first": first, "second": second, "bias": torch.randn(d_out)}
    named["weight"] = weight
    return {"index": index, **{name: value.requires_grad_() for name, value in named.items()}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_set_sorted_tiles_are_the_reference_with_every_gradient(case) -> None:
    tokens, experts, active, family, d_in, d_out = case
    drawn = _drawn(*case)
    x, first, second, bias, index, weight = (drawn[n] for n in ("x", "first", "second", "bias", "index", "weight"))
    y, _ = set_pair(x, first, second, bias, index, weight, *set_layout(index, weight.detach(), experts))
    structure = family(d_in, d_out).mixture(experts, active=active).canonical
    exact = {name: value.detach().double().requires_grad_() for name, value in drawn.items() if name != "index"}
    gate = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, index, exact["weight"])
    factors = [exact[n].reshape(shape) for n, shape in zip(("first", "second"), structure.factor_shapes, strict=True)]
    expected = el.apply(structure, factors, exact["x"], gate) + exact["bias"]
    _close("y", y, expected)
    direction = torch.randn_like(y)
    ours = torch.autograd.grad(y, [drawn[name] for name in exact], direction)
    theirs = torch.autograd.grad(expected, list(exact.values()), direction.double())
    for name, mine, their in zip(exact, ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, 5.0, 0.0])], ids=["without bias", "with bias"])
def test_a_layer_with_its_router_is_the_two_after_each_other(bias: Tensor | None) -> None:
    drawn, router = _drawn(*CASES[0]), torch.randn(3, 64, requires_grad=True)
    named = {name: drawn[name] for name in ("x", "first", "second", "bias")} | {"router": router}
    y, logits, index, *_ = routed_pair(drawn["x"], router, 0.5, bias, drawn["first"], drawn["second"], drawn["bias"], 2)
    apart, chosen, weight = route(drawn["x"], router, 0.5, bias, 2)
    layout = set_layout(chosen, weight.detach(), 3)
    expected, _ = set_pair(*(drawn[n] for n in ("x", "first", "second", "bias")), chosen, weight, *layout)
    assert (y == expected).all()
    assert (logits == apart).all()
    assert (index == chosen).all()
    for used in ([0], [1], [0, 1]):  # a loss of the output, of the logits, of both
        directions = [torch.randn_like(value) for value in (y, logits)]
        mine, theirs = (
            torch.autograd.grad(
                [outputs[i] for i in used], list(named.values()), [directions[i] for i in used],
                retain_graph=True, materialize_grads=True,
            )
            for outputs in ((y, logits), (expected, apart))
        )  # fmt: skip
        for name, one, other in zip(named, mine, theirs, strict=True):
            if other.any() or one.any():
                _close(f"the gradient of {name}", one, other)


def test_a_layer_joins_its_router_and_says_what_was_chosen(monkeypatch) -> None:
    layer, x = el.Linear(64, 64, "btt", experts=3, active=2), torch.randn(2, 9, 64, requires_grad=True)
    torch.nn.init.normal_(layer.router.weight)
    expected = layer(x)
    wanted = layer.router.latest
    loss = expected.square().sum() + el.balance_loss(layer)
    theirs = torch.autograd.grad(loss, [x, *layer.parameters()])
    runner = SetSorted().prepare(layer.structure)
    layer._routed_plan = replace(layer._routed_plan, cpu=((math.inf, runner),))
    monkeypatch.setattr(routing, "routes", lambda tokens, experts: True)
    calls = []
    monkeypatch.setattr(el.Router, "forward", lambda router, x: calls.append(x))
    y = layer(x)
    assert not calls
    assert (layer.router.latest.chosen == wanted.chosen).all()
    _close("the result", y, expected)
    loss = y.square().sum() + el.balance_loss(layer)
    ours = torch.autograd.grad(loss, [x, *layer.parameters()])
    for (name, _), mine, their in zip([("x", x), *layer.named_parameters()], ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    _close("compiled", compiled, expected)
    (el.balance_loss(layer) + compiled.sum()).backward()  # its logits are outputs of the graph
    layer.eval()(x)
    assert layer.router.latest is None
    with torch.no_grad():  # another operator, which keeps no state
        assert (layer(x) == y).all()
        assert (torch.compile(layer, fullgraph=True, backend="aot_eager")(x) == y).all()
    # What a user hangs on a router, and what is not a choice alone, goes the long way.
    joins = layer.router.joins(x)
    assert joins
    layer.router.register_forward_pre_hook(lambda module, inputs: None)
    assert not layer.router.joins(x)
    for options in ({"choice": "expert"}, {"capacity": 1.0}, {"jitter": 0.1}):
        assert not el.Router(64, 3, 2, **options).joins(x)


@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, 9.0, 0.0])], ids=["without bias", "with bias"])
def test_routing_is_that_of_the_router(bias: Tensor | None) -> None:
    router = el.Router(40, 3, 2, bias=bias is not None)
    torch.nn.init.normal_(router.weight)
    if bias is not None:
        router.bias.copy_(bias)
    x = torch.randn(70, 40, requires_grad=True)
    wanted = router(x)
    logits, index, weight = route(x, router.weight, router.scale, router.bias, 2)
    assert (index == wanted.chosen).all()
    _close("weights", weight, wanted.weight)
    _close("logits", logits, router.latest.logits)
    directions = torch.randn_like(weight), torch.randn_like(logits)
    leaves = (x, router.weight)
    ours = torch.autograd.grad((weight, logits), leaves, directions)
    theirs = torch.autograd.grad((wanted.weight, router.latest.logits), leaves, directions)
    for name, mine, their in zip(("x", "weight"), ours, theirs, strict=True):
        _close(f"the gradient of {name}", mine, their)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_whatever_the_logits_each_token_has_experts_of_its_own(monkeypatch) -> None:
    """Tokens are sorted by sets of experts: twice the same, or one that is none, would be written anywhere."""
    monkeypatch.setattr(routing, "routes", lambda tokens, experts: True)
    for active in (2, 5):
        router, x = el.Router(24, 5, active), torch.randn(9, 24)
        torch.nn.init.normal_(router.weight)
        whole = router(x)
        x[3, 0], x[5, 1], x[6, 1] = math.nan, math.inf, -math.inf
        x[7] *= 1e30
        found = router(x)
        assert (found.chosen[[0, 1, 2, 4, 8]] == whole.chosen[[0, 1, 2, 4, 8]]).all()
        assert all(sorted({*token}) == sorted(token) for token in found.chosen.tolist())
        assert ((found.chosen >= 0) & (found.chosen < 5)).all()


def test_a_new_router_spreads_its_tokens_like_the_kernel() -> None:
    router, x = el.Router(16, 5, 2), torch.randn(33, 16)
    _, index, weight = route(x, router.weight, router.scale, None, 2)
    assert (index.sort(-1).values == router(x).chosen.sort(-1).values).all()
    assert (weight == 0.5).all()


def test_the_operators_are_proper() -> None:
    drawn = _drawn(9, 2, 1, el.BTT(), 64, 64)
    layout = set_layout(drawn["index"], drawn["weight"].detach(), 2)
    names = ("x", "first", "second", "bias", "index", "weight")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(set_pair, (*(drawn[name] for name in names), *layout), test_utils=checks)
    routed = (
        drawn["x"],
        torch.randn(2, 64, requires_grad=True),
        0.5,
        None,
        *(drawn[n] for n in ("first", "second", "bias")),
    )
    torch.library.opcheck(routed_pair, (*routed, 1), test_utils=checks)
    values = [value.detach() if isinstance(value, Tensor) else value for value in routed]
    torch.library.opcheck(routed_result, (*values, 1), test_utils=("test_schema", "test_faketensor"))
    given = [drawn[name].detach() for name in ("x", "first", "second", "bias", "index", "weight")]
    torch.library.opcheck(set_result, given, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(route, (drawn["x"], torch.randn(3, 64, requires_grad=True), 0.5, None, 2), test_utils=checks)


def test_a_layout_has_room_for_any_routing() -> None:
    """Every set padded to a multiple of 16 at each of its experts, every expert to a piece, and sets cut into runs."""
    for tokens, experts, active in [(1, 4, 2), (100, 4, 2), (1000, 16, 2), (16384, 8, 2), (100000, 16, 2)]:
        sizes = Sizes(tokens, experts, active)
        index = torch.stack([torch.randperm(experts)[:active] for _ in range(tokens)]).sort(-1).values
        for chosen in (index, index[:1].expand(tokens, active)):
            sets, count = chosen.unique(dim=0, return_counts=True)
            rooms = torch.zeros(experts, dtype=torch.int64)
            rooms.index_add_(0, sets.flatten(), (-(-count // 16) * 16).repeat_interleave(active))
            assert (-(-rooms // PIECE) * PIECE).sum() <= sizes.slots
            assert (-(-count // RUN)).sum() <= sizes.runs


def _close(what: str, mine: Tensor, theirs: Tensor) -> None:
    error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < 1e-6, f"{what} differs by {error:.2g}"
