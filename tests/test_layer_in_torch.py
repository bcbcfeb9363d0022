"""`Linear` under everything that torch does to a layer: compilers, precisions, devices, copies and transforms."""

import copy
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.testing import assert_close

import einlinear as el


@pytest.fixture
def small(family, trained):
    """A layer that needs padding where the family pads, in float64."""
    return trained(el.Linear(15, 19, family_at(family, 15, 19), dtype=torch.float64))


def family_at(family, d_in, d_out):
    """The family with settings that the widths allow."""
    try:
        family(d_in, d_out)
    except el.StructureError:
        return type(family)(**{**family.example, "blocks": 2})
    return family


# Compilation, precision, devices


@pytest.mark.parametrize("options", [{}, {"bias": False, "cap": True}], ids=str)
def test_compiles_without_graph_breaks(family, options, trained, named_gradients, assert_same):
    torch._dynamo.reset()
    layer = trained(el.Linear(97, 131, family, **options))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for shape in [(4,), (2, 3)]:
        x = torch.randn(*shape, 97)
        assert_same(named_gradients(compiled, x), named_gradients(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [el.BTT(rank=2), el.Butterfly()], ids=str)
def test_compiles_to_machine_code(family, trained, named_gradients, assert_same):
    torch._dynamo.reset()
    layer = trained(el.Linear(36, 64, family))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="inductor")
    x = torch.randn(4, 36)
    assert_same(named_gradients(compiled, x), named_gradients(layer, x), rtol=1e-4, atol=1e-4)


def test_compiles_for_any_number_of_tokens(family):
    torch._dynamo.reset()
    layer = el.Linear(97, 131, family)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counted)
    limits = [limit for limit, _ in layer._plan.cpu.training if 1 < limit < math.inf]  # one token is a case of its own
    for some in (*map(int, limits), 10_000):
        compiled(torch.randn(some, 97))
    seen = counted.frame_count
    assert seen <= len(limits) + 1
    for tokens in (3, 5, 9, 70, 700, 7000):
        x = torch.randn(tokens, 97)
        assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    assert counted.frame_count == seen


def test_compiles_under_autocast(family, trained):
    torch._dynamo.reset()
    layer = trained(el.Linear(36, 64, family))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 36)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, layer(x))


def test_exports(family, trained):
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


def test_from_meta_to_memory(family, widths, options, assert_same):
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


@pytest.mark.parametrize("tokens", [3, 300])
def test_on_distributed_tensors(family, tokens, one_process, trained, named_gradients, assert_same):
    layer = trained(el.Linear(36, 64, family))
    x = torch.randn(tokens, 36)
    wanted = named_gradients(layer, x)
    spread = distribute_module(copy.deepcopy(layer), one_process)
    found = named_gradients(spread, distribute_tensor(x, one_process, [Shard(0)]))
    assert_same({name: tensor.full_tensor() for name, tensor in found.items()}, wanted, rtol=1e-4, atol=1e-4)


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


def test_survives_copies_and_checkpoints(family, widths, tmp_path, trained, named_gradients, assert_same):
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


def test_stochastic_weight_averaging(family, trained):
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


def test_gradients_of_a_functional_call(small, named_gradients, assert_same):
    parameters = {name: parameter.detach() for name, parameter in small.named_parameters()}
    x = torch.randn(3, 15, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(small, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    wanted = named_gradients(small, x)
    assert_same(found, {name: wanted[name] for name in found})
    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert_same({name: grad.sum(0) for name, grad in one_by_one.items()}, found)


def test_an_ensemble_in_one_call(family, trained):
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


def test_second_derivatives(family, trained):
    layer = trained(el.Linear(6, 4, family_at(family, 6, 4), dtype=torch.float64, cap=True))
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def of(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (x, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, (x, *parameters.values()), fast_mode=True)
