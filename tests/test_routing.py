"""`Router`: what it chooses, what it weighs, and what it is trained by."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import einlinear as el
from einlinear.routing import SHARPNESS


def drawn(*arguments, **options) -> el.Router:
    router = el.Router(*arguments, **options)
    nn.init.normal_(router.weight)
    return router


def logits_of(router: el.Router, x: Tensor) -> Tensor:
    return x.flatten(0, -2) @ router.weight.T * (SHARPNESS / router.d_in)


def test_the_largest_logits_are_chosen_and_weighed_by_their_softmax():
    router, x = drawn(6, 5, 2), torch.randn(3, 7, 6)
    routing = router(x)
    values, index = logits_of(router, x).topk(2, dim=-1)
    assert_close(routing.chosen, index)
    assert_close(routing.weight, values.softmax(-1))
    assert_close(routing.gate(21).gather(1, index), routing.weight)
    assert_close(routing.gate(21).sum(1), torch.ones(21))
    assert ((routing.gate(21) > 0).sum(1) == 2).all()


def test_a_new_router_weighs_alike_and_loads_evenly():
    router = el.Router(6, 8, 2)
    routing = router(torch.randn(64, 6))
    assert_close(routing.weight, torch.full((64, 2), 0.5))
    assert (routing.chosen.flatten().bincount(minlength=8) == 16).all()


def test_a_step_moves_logits_alike_at_every_width():
    """All entries of an Adam-like update have one size; the logits it makes must not grow with the width."""
    moved = []
    for width in (64, 1024):
        router, x = el.Router(width, 4, 1), torch.randn(50, width)
        with torch.no_grad():
            router.weight += 0.01 * x[0].sign()
        router(x[:1])
        moved.append(router.latest.logits.max().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


def test_one_expert_weighs_one():
    routing = el.Router(6, 1, 1)(torch.randn(5, 6))
    assert_close(routing.gate(5), torch.ones(5, 1))


def test_stable_at_huge_logits():
    router, x = drawn(4, 6, 2), torch.randn(50, 4)
    with torch.no_grad():
        router.weight.mul_(1e4)
    routing = router(x.requires_grad_())
    loss = el.balance_loss(router, z=1e-9)
    assert routing.weight.isfinite().all() and loss.isfinite()
    (routing.weight.square().sum() + loss).backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_float32_under_autocast():
    router, x = drawn(64, 8, 2), torch.randn(100, 64)
    wanted = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x)
    assert found.weight.dtype == torch.float32
    assert_close(found.chosen, wanted.chosen)
    assert_close(found.weight, wanted.weight, rtol=0, atol=0)


def test_the_balance_loss_is_its_formula():
    router, x = drawn(6, 5, 2), torch.randn(40, 6)
    routing, logits = router(x), logits_of(router, x)
    share = routing.chosen.flatten().bincount(minlength=5) / 80
    wanted = 5 * (logits.softmax(-1).mean(0) * share).sum() + 0.3 * logits.logsumexp(-1).square().mean()
    assert_close(el.balance_loss(router, z=0.3), wanted)


def test_the_balance_loss_is_one_where_loads_are_even():
    router = el.Router(6, 4, 1)
    router(torch.randn(40, 6))
    assert_close(el.balance_loss(router, z=0.0), torch.tensor(1.0))


def test_its_gradient_evens_loads_out():
    torch.manual_seed(1)
    router, x = drawn(8, 4, 1), torch.randn(400, 8) + 1
    optimizer = torch.optim.SGD(router.parameters(), 0.3)
    router(x)
    before = max(el.router_statistics(router)[""].load)
    for _ in range(200):
        router(x)
        el.balance_loss(router, z=0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(el.router_statistics(router)[""].load) < 0.35 < 0.5 < before


class Two(nn.Module):
    def __init__(self, checkpointed: bool = False, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(el.Linear(8, 8, "btt", experts=4, active=2) for _ in range(2))
        self.checkpointed, self.options = checkpointed, {"use_reentrant": False, **options}
        for layer in self.layers:
            nn.init.normal_(layer.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, **self.options) if self.checkpointed else layer(x))
        return x


def gradients(model: Two, run, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    (run(x).square().sum() + 10 * el.balance_loss(model)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_losses_survive_checkpointing_and_compilation(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    model, x = Two(), torch.randn(5, 3, 8)
    wanted = gradients(model, model, x)
    for checkpointed in (False, True):
        model.checkpointed = checkpointed
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (model, compiled):
            for found, want in zip(gradients(model, run, x), wanted, strict=True):
                assert_close(found, want)


@pytest.mark.parametrize("options", [{}, {"choice": "expert"}, {"capacity": 0.5}, {"jitter": 0.1}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_router_is_trained_alike_under_checkpointing(options, autocast):
    model, x = Two(), torch.randn(5, 3, 8)
    for layer in model.layers:
        layer.router = drawn(8, 4, 2, **options)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)  # of the jitter
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(x).float()

    wanted = gradients(model, run, x)
    model.checkpointed = True
    for found, want in zip(gradients(model, run, x), wanted, strict=True):
        assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"choice": "expert"}, {"capacity": 0.5}], ids=str)
def test_a_batch_without_tokens_has_finite_losses_and_statistics(options):
    router = drawn(6, 4, 2, **options)
    router(torch.randn(0, 3, 6))
    assert el.router_statistics(router)[""] == el.routing.RouterStatistics((0.0,) * 4, 0.0, 0.0, 0)
    loss = el.balance_loss(router)
    loss.backward()
    el.rebalance(router)
    assert loss == 0 and (router.weight.grad == 0).all()
    assert router.bias is None or (router.bias == 0).all()


def test_what_is_recomputed_records_nothing():
    model = Two(checkpointed=True)
    gradients(model, model, torch.randn(5, 8))
    assert all(layer.router.latest is None for layer in model.layers)


def test_losses_that_would_be_lost_are_an_error():
    model, x = Two(checkpointed=True, use_reentrant=True), torch.randn(5, 8, requires_grad=True)
    model(x)
    with pytest.raises(RuntimeError, match=r"'layers\.0\.router' ran without recording gradients.*use_reentrant=False"):
        el.balance_loss(model)
    with pytest.raises(RuntimeError, match="no router of the model has run"):
        el.balance_loss(nn.Linear(2, 2))


def test_a_recorded_model_is_copied_and_pickled():
    model = Two()
    model(torch.randn(5, 8))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.layers[0].router.latest is None
        assert_close(copied.state_dict(), model.state_dict())
    assert model.layers[0].router.latest is not None


def test_evaluation_records_nothing():
    model = Two().eval()
    model(torch.randn(5, 8))
    assert el.router_statistics(model) == {}


def test_capacity_drops_what_comes_last_and_counts_it():
    router = drawn(6, 4, 2, capacity=0.5)
    x = torch.randn(40, 6)
    free = el.Router(6, 4, 2)
    free.weight = router.weight
    routing, whole = router(x), free(x)
    kept = routing.chosen < 4
    room = 10
    for expert in range(4):
        # First choices before second ones, earlier tokens before later ones.
        places = [(j, t) for j in range(2) for t in range(40) if whole.chosen[t, j] == expert]
        assert all(kept[t, j] == (place < room) for place, (j, t) in enumerate(sorted(places)))
    assert (routing.weight[~kept] == 0).all()
    statistics = el.router_statistics(router)[""]
    assert statistics.dropped == pytest.approx(1 - kept.float().mean().item())
    assert max(statistics.load) <= room / 80 + 1e-6


def test_what_a_capacity_drops_is_still_chosen_for_balance():
    """By what is kept, a router whose experts are all full would look even, and never be taught otherwise."""
    capped, free, x = el.Router(6, 4, 1, capacity=0.4), el.Router(6, 4, 1), torch.randn(400, 6)
    free.weight = capped.weight
    with torch.no_grad():
        x[:, 0] = torch.where(torch.arange(400) < 280, 1.0, -1.0)  # seven in ten tokens choose the first expert
        free.weight[0, 0] = 3.0
    capped(x), free(x)
    assert el.router_statistics(capped)[""].load == pytest.approx((0.1, 0.075, 0.075, 0.1), abs=0.03)
    losses = [el.balance_loss(router) for router in (capped, free)]
    assert_close(losses[0], losses[1])
    assert losses[0] > 1.8
    for router in (capped, free):
        el.rebalance(router)
    assert capped.bias.sign().tolist() == free.bias.sign().tolist() == [-1, 1, 1, 1]


def test_the_bias_keeps_its_steps_in_16_bits():
    router, x = el.Router(6, 4, 1), torch.randn(3, 6)
    router.bias.fill_(4.0)
    router.bfloat16()
    assert (router.weight.dtype, router.bias.dtype) == (torch.bfloat16, torch.float32)
    router(x.bfloat16())
    el.rebalance(router, 0.01)
    assert (router.bias - 4).abs() == pytest.approx([0.01] * 4, rel=1e-3)


def test_experts_that_choose_are_loaded_evenly():
    router, x = drawn(6, 4, 1, choice="expert"), torch.randn(40, 6)
    routing = router(x)
    share = logits_of(router, x).softmax(-1)
    values, index = share.T.topk(10, dim=-1)
    assert_close(routing.chosen, index)
    assert_close(routing.weight, values)
    assert el.router_statistics(router)[""].load == pytest.approx((0.25,) * 4)


def test_bias_balances_without_a_loss():
    torch.manual_seed(1)
    router, x = drawn(8, 4, 1, bias=True), torch.randn(400, 8) + 1
    plain = router(x)
    for _ in range(400):
        router(x)
        el.rebalance(router, 0.05)
    routing = router(x)
    assert max(el.router_statistics(router)[""].load) < 0.3 < (plain.chosen.flatten().bincount().max() / 400)
    # Weights know nothing of it.
    assert_close(routing.weight, torch.ones(400, 1))
    assert "bias" in router.state_dict() and not router.bias.requires_grad


def test_jitter_is_for_training():
    router, x = drawn(6, 4, 2, jitter=0.1), torch.randn(40, 6)
    assert (router(x).weight != router(x).weight).any()
    router.eval()
    assert_close(router(x).weight, router(x).weight, rtol=0, atol=0)


def test_statistics_name_the_dead():
    router = el.Router(3, 4, 1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [-9, -9, -9]]))
    router(torch.eye(3).repeat(5, 1))
    statistics = el.router_statistics(nn.ModuleDict({"a": router}))["a"]
    assert statistics.dead == (3,)
    assert statistics.load == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
    assert 0 < statistics.entropy < 0.1
    assert (statistics.tokens, statistics.dropped) == (15, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ((6, 4, 5), {}, "choose active between 1 and 4"),
        ((6, 4, 0), {}, "of 0 of 4 experts: pass two integers of at least 1"),
        ((6, 4, 1.5), {}, "of 1.5 of 4 experts: pass two integers"),
        ((6, "4", 2), {}, "of 2 of '4' experts: pass two integers"),
        ((6, 4, 2), {"choice": "token choice"}, "pass 'token' or 'expert'"),
        ((6, 4, 2), {"capacity": 0.0}, "capacity=0.0"),
        ((6, 4, 2), {"jitter": 1.0}, "jitter=1.0"),
        ((6, 4, 2), {"jitter": "a little"}, "jitter='a little'"),
        ((6, 4, 2), {"capacity": float("inf")}, "capacity=inf"),
        ((6, 4, 2), {"capacity": "2"}, "capacity='2'"),
        ((6, 4, 2), {"dtype": torch.int64}, "in torch.int64.*pass a real dtype"),
        ((0, 4, 2), {}, "for 0 features: pass an integer of at least 1"),
    ],
)
def test_settings_out_of_range_are_one_sentence(arguments, options, says):
    with pytest.raises(el.StructureError, match=says):
        el.Router(*arguments, **options)


def test_complex_logits_have_no_order():
    with pytest.raises(el.StructureError, match="pass a real dtype"):
        el.Linear(16, 16, "btt", experts=4, active=2, dtype=torch.complex64)


def test_an_input_that_does_not_fit():
    with pytest.raises(el.StructureError, match="its last dimension must be 6"):
        el.Router(6, 4, 2)(torch.randn(3, 5))
    with pytest.raises(el.StructureError, match=r"an input of shape \(\)"):
        el.Router(6, 4, 2)(torch.tensor(1.0))
