"""Layers of experts: every family, sparse in fact, and the same as the reference contraction of all experts."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear.kernels.routed import Everyone, EveryoneRunner, ExpertSorted, SlotsRunner, routed_plan

KERNELS = (Everyone(), ExpertSorted())


def drawn(module):
    for part in module.modules():
        if isinstance(part, el.Router):
            nn.init.normal_(part.weight)
    return module


def by(kernel, layer: el.Linear) -> el.Linear:
    """The layer, always run by a kernel."""
    run = ((float("inf"), kernel.prepare(layer.structure)),)
    layer._routed_plan = dataclasses.replace(layer._routed_plan, cpu=run)
    return layer


def reference(layer: el.Linear, x: Tensor, routing: el.Routing | None = None) -> Tensor:
    routing = routing or layer.router(x)
    gate = routing.gate(x[..., 0].numel()).to(x.dtype).view(*x.shape[:-1], -1)
    y = el.apply(layer.structure, layer.effective_factors(), x, gate)
    y = y if layer.bias is None else y + layer.bias
    return y if layer.shared is None else y + layer.shared(x)


# What it computes


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_family_is_the_reference_with_every_gradient(
    family, widths, kernel, trained, named_gradients, assert_same
):
    layer = drawn(trained(el.Linear(*widths, family, experts=5, active=2, dtype=torch.float64)))
    x = torch.randn(3, 5, widths[0], dtype=torch.float64)
    slow = copy.deepcopy(layer)
    slow.forward = lambda x: reference(slow, x)
    found = named_gradients(by(kernel, layer), x)
    assert_same(found, named_gradients(slow, x))
    assert all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("options", [{"choice": "expert"}, {"capacity": 0.5}, {"bias": True}], ids=str)
def test_every_kind_of_routing_is_the_reference(options, trained, named_gradients, assert_same):
    router = el.Router(36, 4, 2, dtype=torch.float64, **options)
    layer = drawn(trained(el.Linear(36, 64, "btt", experts=4, active=2, router=router, shared=True).double()))
    x, slow = torch.randn(30, 36, dtype=torch.float64), copy.deepcopy(layer)
    slow.forward = lambda x: reference(slow, x)
    assert_same(named_gradients(by(ExpertSorted(), layer), x), named_gradients(slow, x))


def test_all_experts_with_equal_gates_are_the_unrouted_layer(family, widths):
    structure = family(*widths).canonical
    layer = el.Linear(*widths, family, bias=False, experts=3, active=3, dtype=torch.float64)
    pairs = zip(layer.factors, structure.matrix_shapes, strict=True)
    one = [factor.detach().view(3, *shape) for factor, shape in pairs]
    x = torch.randn(7, widths[0], dtype=torch.float64)
    outputs = [el.apply(structure, [factor[e] for factor in one], x) for e in range(3)]
    assert_close(layer(x), sum(outputs) / 3)  # a new router weighs all experts alike
    # A routed rank of which all entries run is that of the plain layer.
    if "r" in structure.sizes:
        whole = el.Linear(*widths, structure.route("r", active=structure.sizes["r"]), bias=False, dtype=torch.float64)
        rank = structure.sizes["r"]
        ungated = el.Routing(torch.arange(rank).expand(7, -1), torch.ones(7, rank, dtype=torch.float64), rank)
        factors = [f.detach() for f in whole.factors]
        plain = [
            factor.view(whole.structure.shape(axes)).permute([axes.index(a) for a in target])
            for factor, axes, target in zip(factors, whole.structure.factors, structure.factors, strict=True)
        ]
        assert_close(whole(x, ungated), el.apply(structure, [f.contiguous() for f in plain], x))


def test_one_expert_is_the_plain_layer(family, widths):
    layer = el.Linear(*widths, family, experts=1, active=1)
    plain = el.Linear(*widths, family)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("router")})
    x = torch.randn(5, widths[0])
    assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_gradient_of_a_gate_that_is_zero(kernel, family):
    layer = by(kernel, el.Linear(36, 64, family, experts=4, active=2, router=False, dtype=torch.float64))
    x = torch.randn(9, 36, dtype=torch.float64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weight = torch.tensor([[0.0, 1.0]] * 9, dtype=torch.float64, requires_grad=True)
    y = layer(x, el.Routing(index, weight, 4))
    (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    expected = reference(layer, x, el.Routing(index, weight, 4))
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    assert_close(gradient, wanted)
    assert gradient[:, 0].abs().min() > 0


def test_idle_experts_learn_nothing():
    layer = el.Linear(36, 64, "btt", experts=4, active=1)
    with torch.no_grad():
        layer.router.weight[2] = 9.0
    layer(torch.rand(9, 36)).sum().backward()
    for factor in layer.factors:
        busy = factor.grad.view(4, -1).abs().sum(1) > 0
        assert busy.tolist() == [False, False, True, False]


# What it costs


@pytest.mark.parametrize("experts", [4, 16])
def test_the_work_is_that_of_the_active_experts(family, experts):
    layer = drawn(by(ExpertSorted(), el.Linear(36, 64, family, bias=False, experts=experts, active=2)))
    routing, x = layer.router(x := torch.randn(50, 36)), x
    with FlopCounterMode(display=False) as counter:
        layer(x, routing)
    assert counter.get_total_flops() == 50 * el.flops(layer.structure) == 50 * 2 * el.flops(layer.structure.expert)


def test_memory_kept_for_gradients_is_that_of_the_active_experts(family):
    def kept(experts: int, active: int) -> int:
        layer = drawn(by(ExpertSorted(), el.Linear(36, 64, family, experts=experts, active=active)))
        x, sizes = torch.randn(200, 36, requires_grad=True), {}
        owned = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
        routing = layer.router(x)

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x, routing)
        del y
        return sum(size for place, size in sizes.items() if place not in owned)

    few, many, more = kept(4, 2), kept(64, 2), kept(64, 8)
    assert many < 1.05 * few
    assert 2.5 * many < more


def test_start_and_rates_are_those_of_one_expert(family, widths):
    plain, layer = el.Linear(*widths, family), el.Linear(*widths, family, experts=8, active=2)
    stacked = [(8 * slices, *rest) for slices, *rest in plain.structure.matrix_shapes]
    assert layer.structure.matrix_shapes == tuple(stacked)
    for optimizer in ("adamw", "sgd", "muon"):
        ours, theirs = (
            {name: group["lr_mult"] for group in el.parameter_groups(m, 1.0, readout=None, optimizer=optimizer)
             for name in group["param_names"]} for m in (layer, plain)
        )  # fmt: skip
        assert ours.pop("router.weight") == 1.0
        assert ours == theirs
    ours, theirs = ([scale.std for scale in el.spectral(m.structure)] for m in (layer, plain))
    assert ours == theirs


def test_the_planner_takes_sorting_where_experts_are_many():
    few, many = (el.BTT()(1024, 1024).mixture(experts, active=2) for experts in (2, 8))
    assert "by 'all experts'" in el.explain(few, tokens=1024)
    assert "by 'expert-sorted'" in el.explain(many, tokens=1024)
    assert "by 'set-sorted'" in el.explain(many, tokens=16384, device="cuda", dtype=torch.bfloat16)
    too_many = el.explain(el.BTT()(1024, 1024).mixture(32, active=2), device="cuda", dtype=torch.bfloat16)
    assert "more than 256 sets" in too_many
    assert "numbers of 16 bits" in el.explain(many, device="cuda")


def test_what_is_explained_is_what_runs(family):
    structure = family(64, 64).mixture(8, active=2).canonical
    runners = {"all experts": EveryoneRunner, "expert-sorted": SlotsRunner}
    for tokens in (0, 1, 3, 4, 5, 40, 1000, 5000):
        said = el.explain(structure, tokens=tokens).split("'")
        (runs,) = [part for part in said if part in runners]
        runner = routed_plan(structure)._runner([], torch.empty(tokens, 64), tokens)
        assert type(runner) is runners[runs]


# In torch


def test_compiles_without_graph_breaks(family, named_gradients, assert_same):
    torch._dynamo.reset()
    layer = drawn(el.Linear(97, 131, family, experts=6, active=2))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for shape in [(4,), (2, 3)]:
        x = torch.randn(*shape, 97)
        assert_same(named_gradients(compiled, x), named_gradients(layer, x), rtol=1e-4, atol=1e-4)


def test_under_autocast():
    layer = drawn(el.Linear(36, 64, "btt", experts=4, active=2))
    x = torch.randn(50, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(shape):
    layer = drawn(el.Linear(36, 64, "btt", experts=4, active=2))
    assert layer(torch.randn(*shape, 36)).shape == (*shape, 64)


def test_deterministic_mode():
    layer = drawn(el.Linear(36, 64, "btt", experts=4, active=2))
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(50, 36, requires_grad=True)
        first, second = (torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_the_operators_are_proper():
    from einlinear.kernels.slots import by_token, collect, grouped, grouped_weight, spread

    slots = by_token(torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.rand(3, 2), 3)
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    torch.library.opcheck(grouped, (a, b, slots.offsets, "mk,nk->mn", 6))
    torch.library.opcheck(grouped_weight, (a, torch.randn(6, 4), slots.offsets, "mk,nk->mn", 6))
    torch.library.opcheck(spread, (torch.randn(3, 5, requires_grad=True), slots.token, slots.inverse))
    torch.library.opcheck(collect, (a, slots.token, slots.inverse, 3))
    torch.library.opcheck(collect, (a, slots.token, None, 3))


# Mixtures of MLPs


@pytest.mark.parametrize("family", ["dense", "btt", "low_rank(rank=4)"])
def test_a_mixture_of_mlps_is_the_sum_of_its_experts(family):
    mlp = drawn(el.MixtureMLP(97, 131, family, "silu", experts=5, active=2, dtype=torch.float64))
    x = torch.randn(4, 7, 97, dtype=torch.float64)
    gate = mlp.up.router(x).gate(28).view(4, 7, 5)
    one = [[f.detach().chunk(5)[e] for f in layer.factors] for layer in (mlp.up, mlp.down) for e in range(5)]
    wanted = sum(
        gate[..., [e]] * el.apply(mlp.down.structure.expert, one[5 + e], nn.functional.silu(
            el.apply(mlp.up.structure.expert, one[e], x))) for e in range(5)
    )  # fmt: skip
    assert_close(mlp(x), wanted)
    tokens = x.flatten(0, 1)
    torch._dynamo.reset()
    assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), wanted)
    everywhere = mlp._all(tokens, list(mlp.up.factors), list(mlp.down.factors), mlp.up.router(x))
    assert_close(everywhere, wanted.flatten(0, 1))


# Conversion


def test_converted_layers_start_as_without_experts():
    model = nn.Sequential(nn.Linear(36, 64), nn.GELU(), nn.Linear(64, 36))
    plain, x = copy.deepcopy(model), torch.randn(9, 36)
    el.convert(plain, {"*": el.BTT(rank=2)})
    report = el.convert(model, {"*": el.BTT(rank=2)}, experts=16, active=2)
    assert_close(model(x), plain(x))
    assert [layer.structure.active for layer in (model[0], model[2])] == [2, 2]
    row = report.rows[0]
    assert row.flops_after == el.flops(model[0].structure) + 2 * 36 * 16
    assert 0 < row.error < 1
    assert "another map for each token" in el.convert(model, "dense", weights="reverse").skipped["0"]


def test_a_short_text_has_experts():
    family = el.structure("mixture(of='btt(rank=2)', experts=8, active=2)")
    assert family == el.Mixture("btt(rank=2)", 8, 2)
    assert el.structure(str(family)) == family and family not in el.families()
    assert family(64, 64).canonical == el.Linear(64, 64, "btt(rank=2)", experts=8, active=2).structure


def test_saved_and_loaded(tmp_path):
    router = el.Router(16, 4, 2, jitter=0.1, capacity=2.0)
    model = nn.Sequential(
        drawn(el.Linear(16, 24, "btt", experts=4, active=2, router=router, shared=True)),
        el.Linear(24, 16, "low_rank(rank=2)", experts=3, active=1, router=False),
    )
    el.save(model, tmp_path / "model.safetensors")
    plain = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    loaded = el.load(tmp_path / "model.safetensors", plain)
    assert str(loaded) == str(model)
    assert_close(loaded.state_dict(), model.state_dict())


# What is refused

ROUTED_INPUT = el.BTT(blocks=(2, 2))(8, 8).route("g", active=1)


def test_a_map_whose_input_is_routed_is_skipped_or_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    assert "one of the input or output" in el.convert(model, {"*": ROUTED_INPUT}).skipped["0"]
    with pytest.raises(el.StructureError, match=r"which the rule '0' names.*one of the input or output"):
        el.convert(model, {"0": ROUTED_INPUT})
    assert el.convert(model, {"*": ROUTED_INPUT}, weights="init").rows


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: el.Linear(8, 8, "btt", experts=2, active=3), "it has 2; choose active between 1 and 2"),
        (lambda: el.Linear(8, 8, "btt", experts=0, active=1), "pass an integer of at least 1"),
        (lambda: el.Linear(8, 8, "btt", experts=4), "pass both, or neither"),
        (lambda: el.BTT()(8, 8).route("q", active=1), "cannot route axis 'q'.*it has only"),
        (lambda: el.BTT()(8, 8).mixture(4, active=1).mixture(2, active=1), "'expert' is routed already"),
        (lambda: el.Linear(8, 8, "btt", experts=4, active=2, router=False)(torch.randn(3, 8)), "without a gate"),
        (lambda: el.Linear(8, 8, "btt", router=el.Router(8, 4, 2)), "with a router: pass experts="),
        (lambda: el.Linear(8, 8, "btt", experts=4, active=2, router=el.Router(8, 4, 1)), "for 2 of 4 experts"),
        (lambda: el.Linear(8, 8, "btt", shared=True), "with a shared expert: pass experts="),
        (lambda: el.Linear(8, 8, "btt")(torch.randn(3, 8), el.Router(8, 4, 2)(torch.randn(3, 8))), "it has no experts"),
        (
            lambda: el.Linear(8, 8, "btt", experts=4, active=2)(torch.rand(3, 8), el.Router(8, 4, 2)(torch.rand(5, 8))),
            "to 3 tokens.*route the same tokens",
        ),
        (lambda: el.Linear(8, 8, "btt", experts=4, active=2).to_dense(), "another map for each token"),
        (lambda: el.Mixture("mixture(of='btt', experts=2, active=1)", 2, 1), "has experts already; name what one"),
        (lambda: el.Linear(8, 8, "btt", experts=4, active=2, router="expert"), "with router='expert': pass None"),
        (lambda: el.Linear(8, 8, "btt", experts=2, active=1)(torch.rand(3, 8), torch.rand(3, 2)), "of type Tensor"),
        (lambda: el.Linear(8, 8, ROUTED_INPUT, shared=True), "'g' is one of the input or output; route another"),
        (lambda: el.Linear.from_dense(nn.Linear(8, 8), ROUTED_INPUT), "'g' is one of the input or output"),
        (lambda: el.MixtureMLP(8, 8, experts=2, active=1, router=False), "None for a new Router"),
        (lambda: el.MixtureMLP(8, 8, experts=None, active=None), "of None MLPs.*pass an integer"),
        (lambda: el.Mixture("btt", 2, 3), "choose active between 1 and 2"),
        (lambda: el.Linear(8, 8, "btt", experts=4, active=1.5), "with 1.5 active entries: it has 4"),
        (lambda: el.Linear(8, 8, "btt", experts=4, active="2"), "with '2' active entries: it has 4"),
        (lambda: el.Mixture("btt", 4.0, 2), "experts=4.0, but it counts something"),
        (lambda: el.structure("mixture(of='btt', experts=4, active='2')"), "active='2', but it counts something"),
    ],
)
def test_errors_are_one_sentence(make, says):
    with pytest.raises(el.StructureError, match=says):
        make()


@pytest.mark.parametrize("compiling", [True, False])
def test_compiled_layers_run_no_expert_that_is_not_chosen(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts on all tokens are for exports alone; torch 2.11 says of torch.compile too that it is exporting."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: compiling)
    layer, x = el.Linear(64, 64, "btt", experts=8, active=1), torch.randn(4096, 64)
    plan = layer._routed_plan
    assert (plan._runner([*layer.factors], x, len(x)) is plan.plain) is not compiling
