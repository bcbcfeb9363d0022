"""`Linear` in `nn.Linear`'s place: every family survives everything that users do to a layer."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import einlinear as el

OPTIONS = [{}, {"bias": False}, {"cap": True}, {"zero": True}]


@pytest.fixture(params=OPTIONS, ids=str)
def options(request):
    return request.param


@pytest.fixture
def layer(family, widths):
    return trained(el.Linear(*widths, family))


@pytest.fixture
def small(family):
    """A layer that needs padding where the family pads, in float64."""
    return trained(el.Linear(15, 19, family_at(family, 15, 19), dtype=torch.float64))


def family_at(family, d_in, d_out):
    """The family with settings that the widths allow."""
    try:
        family(d_in, d_out)
    except el.StructureError:
        return type(family)(**{**family.example, "blocks": 2})
    return family


def trained(layer):
    """Every parameter away from the values it starts at, so that none can be forgotten unnoticed."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def reference(layer, x):
    y = el.apply(layer.structure, layer.effective_factors(), x)
    return y if layer.bias is None else y + layer.bias


def named_gradients(layer, x):
    """The output's sum of squares, and the gradients of input and parameters by name."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return {"output": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def assert_same(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# In nn.Linear's place


def test_takes_the_arguments_of_nn_linear_in_their_order():
    layer = el.Linear(6, 4, "low_rank(rank=2)", False, "cpu", torch.float64)
    assert (layer.in_features, layer.out_features, layer.bias) == (6, 4, None)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert el.Linear(6, 4, "dense").bias.shape == (4,)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_any_leading_dimensions(layer, shape):
    x = torch.randn(*shape, layer.in_features)
    y = layer(x)
    assert y.shape == (*shape, layer.out_features)
    assert_close(y, reference(layer, x), rtol=1e-4, atol=1e-5)


def test_is_its_structure_with_every_gradient(family, widths, options):
    layer = trained(el.Linear(*widths, family, **options).double())
    x = torch.randn(3, 5, widths[0], dtype=torch.float64)
    found = named_gradients(layer, x)
    slow = copy.deepcopy(layer)
    slow.forward = lambda x: reference(slow, x)
    assert_same(found, named_gradients(slow, x))
    assert all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_contiguous(family, widths, bias):
    layer = el.Linear(*widths, family, bias=bias)
    for shape in [(4,), (2, 3), (), (2, 0)]:
        y = layer(torch.randn(*shape, widths[0]))
        assert y.is_contiguous()
        y.view(-1)


def test_inputs_of_any_strides(layer):
    wide = torch.randn(layer.in_features, 6, 2)
    for x in (wide[..., 0].mT, wide.permute(2, 1, 0), wide[:, :1, 0].mT.expand(3, -1), wide.flatten(1).mT[::2]):
        assert not x.is_contiguous()
        assert_close(layer(x), reference(layer, x), rtol=1e-4, atol=1e-5)


def test_no_tokens_have_zero_gradients(family):
    layer = trained(el.Linear(97, 131, family, cap=True))
    found = named_gradients(layer, torch.randn(0, 97))
    assert found["x"].shape == (0, 97)
    assert all((found[name] == 0).all() for name, _ in layer.named_parameters())


def test_activation_checkpointing(layer):
    x = torch.randn(3, layer.in_features)
    wanted = named_gradients(layer, x)
    again = copy.deepcopy(layer)
    again.forward = lambda x: checkpoint(layer.__class__.forward, again, x, use_reentrant=False)
    assert_same(named_gradients(again, x), wanted)


def test_the_input_is_left_as_it_was(layer):
    x = torch.randn(3, layer.in_features)
    before = x.clone()
    layer(x)
    assert_close(x, before, rtol=0, atol=0)


def test_parameters_are_plain_contiguous_stacks_of_matrices(layer):
    assert [tuple(factor.shape) for factor in layer.factors] == [*layer.structure.matrix_shapes]
    for parameter in layer.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_contiguous()
        assert not vars(parameter)
    assert sum(factor.numel() for factor in layer.factors) == el.parameters(layer.structure)


def test_there_is_no_weight_to_take_for_a_matrix(layer):
    assert not hasattr(layer, "weight")


def test_says_what_it_is(layer):
    assert repr(layer.structure) in repr(layer)
    assert "bias=True, cap=False, zero=False" in repr(layer)


def test_starts_at_the_spectral_initialisation(family):
    layer = el.Linear(1024, 1024, family)
    for factor, scale in zip(layer.factors, el.spectral(layer.structure), strict=True):
        spread = 6 / (2 * factor.numel()) ** 0.5
        assert factor.std().item() == pytest.approx(scale.std, rel=max(spread, 0.01))
        assert abs(factor.mean().item()) < 6 * scale.std / factor.numel() ** 0.5
    assert (layer.bias == 0).all()


def test_two_layers_start_differently_and_one_seed_alike(family):
    torch.manual_seed(3)
    first, second = el.Linear(36, 64, family), el.Linear(36, 64, family)
    torch.manual_seed(3)
    again = el.Linear(36, 64, family)
    for a, b, c in zip(first.factors, second.factors, again.factors, strict=True):
        assert not torch.equal(a, b)
        assert_close(a, c, rtol=0, atol=0)


def test_learns(family, options):
    layer = el.Linear(36, 64, family, **options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, wanted = torch.randn(8, 36), torch.randn(8, 64)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append((layer(x) - wanted).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


# Compilation, precision, devices


@pytest.mark.parametrize("options", [{}, {"bias": False, "cap": True}], ids=str)
def test_compiles_without_graph_breaks(family, options):
    torch._dynamo.reset()
    layer = trained(el.Linear(97, 131, family, **options))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for shape in [(4,), (2, 3)]:
        x = torch.randn(*shape, 97)
        eager = named_gradients(layer, x)
        found = named_gradients(compiled, x)
        found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
        assert_same(found, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [el.BTT(rank=2), el.Butterfly()], ids=str)
def test_compiles_to_machine_code(family):
    torch._dynamo.reset()
    layer = trained(el.Linear(36, 64, family))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="inductor")
    x = torch.randn(4, 36)
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in named_gradients(compiled, x).items()}
    assert_same(found, named_gradients(layer, x), rtol=1e-4, atol=1e-4)


def test_compiles_for_any_number_of_tokens(family):
    torch._dynamo.reset()
    layer = el.Linear(97, 131, family)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counted)
    for few_and_many in (2, 5000):  # on either side of the threshold beyond which W is made
        compiled(torch.randn(few_and_many, 97))
    seen = counted.frame_count
    for tokens in (3, 5, 9, 700):
        x = torch.randn(tokens, 97)
        assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    assert counted.frame_count == seen


def test_compiles_under_autocast(family):
    torch._dynamo.reset()
    layer = trained(el.Linear(36, 64, family))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, layer(x))


def test_exports(family):
    layer = trained(el.Linear(36, 64, family))
    x = torch.randn(3, 36)
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_its_dtype(layer, dtype):
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("cap", [False, True])
def test_a_bfloat16_layer_stays_one(family, cap):
    layer = el.Linear(36, 64, family, dtype=torch.bfloat16, cap=cap)
    y = layer(torch.randn(3, 36, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_under_a_bfloat16_default(family):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = el.Linear(97, 131, family, cap=True)
        y = layer(torch.randn(3, 97))
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in layer.parameters()} == {y.dtype} == {torch.bfloat16}
    assert y.isfinite().all()


def test_from_meta_to_memory(family, widths, options):
    torch.manual_seed(5)
    wanted = el.Linear(*widths, family, **options)
    with torch.device("meta"):
        layer = el.Linear(*widths, family, **options)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(torch.randn(3, widths[0], device="meta")).shape == (3, widths[1])
    layer.to_empty(device="cpu")
    torch.manual_seed(5)
    layer.reset_parameters()
    assert_same(dict(layer.named_parameters()), dict(wanted.named_parameters()), rtol=0, atol=0)
    x = torch.randn(3, widths[0])
    assert_close(layer(x), wanted(x))


def test_device_and_dtype_of_all_parameters(family):
    layer = el.Linear(36, 64, family, device="meta", dtype=torch.float64, cap=True)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


# Copies and checkpoints


def copies(layer):
    yield "deepcopy", copy.deepcopy(layer)
    yield "pickle", pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for assign in (False, True):
        twin = el.Linear(layer.in_features, layer.out_features, layer.structure, cap=True)
        twin.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        buffer.seek(0)
        yield f"load_state_dict(assign={assign})", twin
    with torch.device("meta"):
        twin = el.Linear(layer.in_features, layer.out_features, layer.structure, cap=True)
    twin.load_state_dict(layer.state_dict(), assign=True)
    yield "from meta", twin


def test_survives_copies_and_checkpoints(family, widths, tmp_path):
    layer = trained(el.Linear(*widths, family, cap=True))
    save_model(layer, tmp_path / "layer.safetensors")
    loaded = el.Linear(*widths, family, cap=True)
    load_model(loaded, tmp_path / "layer.safetensors")
    x = torch.randn(3, widths[0])
    wanted = named_gradients(layer, x)
    for how, twin in [*copies(layer), ("safetensors", loaded)]:
        assert twin.structure == layer.structure, how
        assert_same(named_gradients(twin, x), wanted)


def test_a_checkpoint_holds_plain_names(family):
    names = [name for name, _ in el.Linear(16, 16, family, cap=True).named_parameters()]
    count = len(family(16, 16).factors)
    assert sorted(names) == sorted(["bias", "gains", *(f"factors.{k}" for k in range(count))])


def test_stochastic_weight_averaging(family):
    layer = trained(el.Linear(36, 64, family))
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    x = torch.randn(3, 36)
    assert_close(average(x), layer(x))


# Transforms and derivatives


def test_maps_over_inputs(small):
    x = torch.randn(3, 4, 15, dtype=torch.float64)
    assert_close(torch.func.vmap(small)(x), small(x))
    assert_close(torch.func.vmap(small, in_dims=1, out_dims=1)(x), small(x))


def test_forward_mode(small):
    x, tangent = torch.randn(2, 3, 15, dtype=torch.float64)
    y, moved = torch.func.jvp(small, (x,), (tangent,))
    assert_close(y, small(x))
    assert_close(moved, small(tangent) - small.bias)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert_close(torch.autograd.forward_ad.unpack_dual(small(dual)).tangent, moved)


def test_gradients_of_a_functional_call(small):
    parameters = {name: parameter.detach() for name, parameter in small.named_parameters()}
    x = torch.randn(3, 15, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(small, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    wanted = named_gradients(small, x)
    assert_same(found, {name: wanted[name] for name in found})
    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert_same({name: grad.sum(0) for name, grad in one_by_one.items()}, found)


def test_an_ensemble_in_one_call(family):
    layers = [trained(el.Linear(36, 64, family)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 36)

    def one(parameters, buffers, x):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    together = torch.func.vmap(one, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_close(together, torch.stack([layer(x) for layer in layers]), rtol=1e-4, atol=1e-4)


def test_jacobian_and_hessian(small):
    x = torch.randn(15, dtype=torch.float64)
    matrix = el.dense(small.structure, list(small.factors))
    assert_close(torch.func.jacrev(small)(x), matrix)
    assert_close(torch.func.jacfwd(small)(x), matrix)
    assert_close(torch.func.hessian(lambda x: small(x).square().sum() / 2)(x), matrix.mT @ matrix)


def test_second_derivatives(family):
    layer = trained(el.Linear(6, 4, family_at(family, 6, 4), dtype=torch.float64, cap=True))
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def of(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (x, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, (x, *parameters.values()), fast_mode=True)


# Options


def test_the_cap_changes_nothing_at_the_start_but_for_what_lies_above_it(family):
    layer = el.Linear(36, 64, family, cap=True)
    for factor, effective, scale in zip(
        layer.factors, layer.effective_factors(), el.spectral(layer.structure), strict=True
    ):
        assert effective.square().mean().sqrt() <= scale.std * (1 + 1e-5)
        with torch.no_grad():
            factor.mul_(0.1)
    for factor, effective in zip(layer.factors, layer.effective_factors(), strict=True):
        assert_close(effective, factor)  # below the ceiling the cap does nothing


def test_the_cap_is_a_ceiling_and_the_gain_scales(family):
    layer = el.Linear(36, 64, family, cap=True)
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(100)
        layer.gains.fill_(3)
    for effective, scale in zip(layer.effective_factors(), el.spectral(layer.structure), strict=True):
        assert_close(effective.square().mean().sqrt().item(), 3 * scale.std, rtol=1e-4, atol=0)


def test_a_zero_start_has_finite_gradients_under_the_cap(family):
    layer = el.Linear(36, 64, family, cap=True, zero=True)
    assert (layer.factors[-1] == 0).all()
    assert all((factor != 0).any() for factor in [*layer.factors][:-1])
    y = layer(torch.randn(3, 36))
    assert (y == 0).all()
    (y - 1).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.factors[-1].grad.abs().max() > 0


# To and from dense layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cap", [True, False])
def test_to_dense_computes_the_same(family, widths, bias, cap):
    layer = trained(el.Linear(*widths, family, bias=bias, cap=cap, dtype=torch.float64))
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    x = torch.randn(3, widths[0], dtype=torch.float64)
    assert_close(dense(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_of_its_own_kind_computes_the_same(bias):
    for family in (el.Dense(), el.LowRank(rank=3), el.Kronecker(), el.BTT(rank=2), el.Monarch(blocks=4)):
        dense = el.Linear(36, 64, family, bias=bias, dtype=torch.float64).to_dense()
        layer = el.Linear.from_dense(dense, family)
        x = torch.randn(3, 36, dtype=torch.float64)
        assert_close(layer(x), dense(x))
        assert (layer.bias is None) == (not bias)


def test_from_dense_keeps_bias_dtype_and_is_no_worse_than_nothing(family, widths):
    dense = nn.Linear(*widths, dtype=torch.float64)
    layer = el.Linear.from_dense(dense, str(family))
    assert_close(layer.bias, dense.bias)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert (layer.to_dense().weight - dense.weight).norm() <= dense.weight.norm()


# What it accepts as a family


def test_a_family_its_text_or_a_structure():
    family = el.BTT(rank=2)
    wanted = family(97, 131)
    for given in (family, "btt(rank=2)", "BTT(rank=2)", wanted):
        assert el.Linear(97, 131, given).structure == wanted


def test_a_structure_is_stored_as_matrices():
    written = el.Structure.parse("g a, a f r g, g e f r -> f e", g=2, a=4, r=3, f=5, e=2)
    layer = el.Linear(8, 10, written)
    assert layer.structure == written.canonical
    x = torch.randn(3, 8)
    assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize(
    "family, error, says",
    [
        (el.BTT()(16, 25), el.StructureError, "cannot make a layer from 16 to 36 features: .* maps 16 to 25"),
        (el.BTT(rank=2)(16, 36).route("r", active=1), el.StructureError, "a routed structure needs a gate"),
        ("btx", el.StructureError, "did you mean 'btt'"),
        (el.BTT(blocks=(15, 2)), el.StructureError, "choose sizes"),
    ],
    ids=str,
)
def test_what_cannot_be_a_layer(family, error, says):
    with pytest.raises(error, match=says):
        el.Linear(16, 36, family)


@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (-1, 8)], ids=str)
def test_widths_below_one(family, widths):
    with pytest.raises(el.StructureError, match="at least 1"):
        el.Linear(*widths, family)


@pytest.mark.parametrize("shape", [(), (3, 15), (16, 1)], ids=str)
def test_an_input_of_the_wrong_width(shape):
    with pytest.raises(el.StructureError, match="its last dimension must be d_in = 16"):
        el.Linear(16, 36, "btt")(torch.randn(shape))


@pytest.mark.parametrize("widths", [(769, 1009), (48, 50257), (64, 11008)], ids=str)
def test_awkward_widths(family, widths):
    layer = el.Linear(*widths, family)
    x = torch.randn(2, widths[0])
    assert_close(layer(x), reference(layer, x), rtol=1e-3, atol=1e-4)
