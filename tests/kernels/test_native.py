"""Compiled chains compute what the reference does, with every gradient; and others serve where they cannot."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import toolchain
from einlinear.kernels import Choice
from einlinear.kernels import native as module
from einlinear.kernels.kernel import CUDA
from einlinear.kernels.native import Native

pytestmark = pytest.mark.skipif(toolchain.refusal() is not None, reason=str(toolchain.refusal()))

FAMILIES = [
    el.BTT(rank=1),
    el.BTT(rank=3),
    el.Monarch(blocks=3),
    el.BLAST(blocks=3, rank=5),
    el.BlockDiagonal(blocks=3),
    el.LowRank(rank=7),
    el.Kronecker(),
    el.TensorTrain(rank=3),
    el.TensorTrain(rank=2, cores=3),
]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Of a result in the Euclidean norm: that of its own type alone, rounded to nearest; the sums are float32."""
PAIRS = {torch.bfloat16: 2.8e-3}
"""The same for each factor, where what lies between two of them is rounded too."""


def drawn(structure, tokens, dtype=torch.float32):
    """An input, a bias, the factors as a layer has them, and a gradient of the output."""
    leaves = {"x": torch.randn(tokens, structure.d_in), "bias": torch.randn(structure.d_out)}
    for k, shape in enumerate(structure.matrix_shapes):
        leaves[f"factor {k}"] = torch.randn(shape) * shape[-1] ** -0.5
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}, torch.randn(tokens, structure.d_out).to(dtype)


def by_reference(structure):
    shapes = structure.factor_shapes

    def run(factors, x, bias=None):
        y = el.apply(structure, [factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)], x)
        return y if bias is None else y + bias

    return run


def with_gradients(run, leaves, grad):
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    x, bias, *factors = own.values()
    y = run(factors, x, bias)
    return {"output": y.detach(), **dict(zip(own, torch.autograd.grad(y, [*own.values()], grad), strict=True))}


def assert_near(found, wanted, dtype, rounding=ROUNDING):
    """`wanted` in float64."""
    for name, exact in wanted.items():
        assert found[name].shape == exact.shape, name
        error = (found[name].double() - exact).norm()
        assert error <= rounding[dtype] * exact.norm(), f"{name}: {error / exact.norm()}"


def assert_is_the_reference(structure, tokens, dtype):
    leaves, grad = drawn(structure, tokens, dtype)
    run = Native().prepare(structure)
    found = with_gradients(run, leaves, grad)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    rounding = ROUNDING
    if dtype == torch.bfloat16 and module._plan(run.maps, len(run.links)):
        rounding = {dtype: PAIRS[dtype] * len(structure.factors) ** 0.5}
    assert_near(found, with_gradients(by_reference(structure), exact, grad.double()), dtype, rounding)
    x, bias, *factors = leaves.values()
    assert torch.equal(run(factors, x, bias), found["output"])  # nothing recorded


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("widths", [(36, 48), (48, 96), (480, 240), (105, 231)], ids=str)
def test_is_the_reference_with_every_gradient(family, widths, dtype):
    """Fewer tokens than are packed for, whole groups of rows and what is left of them, blocks of odd sides."""
    structure = replace(family(*widths).canonical, pad_in=0, pad_out=0)
    assert Native().refuses(structure) is None
    for tokens in (0, 1, 2, 5, 6, 12, 67):
        assert_is_the_reference(structure, tokens, dtype)


@pytest.fixture(scope="module")
def emulated():
    """The compiled code with AMX's tile instructions, whatever the processor, each replaced by what it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "OPTIONS", (*toolchain.OPTIONS, "-DEMULATE_TILES"))
        return toolchain.library.__wrapped__()


@pytest.fixture
def tiles(emulated, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: emulated)
    for name in ("_plan", "_size"):
        monkeypatch.setattr(module, name, lru_cache(getattr(module, name).__wrapped__))


needs_pairs = pytest.mark.skipif(
    "avx512_bf16" not in toolchain.processor(), reason="this processor cannot multiply pairs of bfloat16"
)


@needs_pairs
@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("widths", [(36, 48), (480, 240), (105, 231), (256, 1024)], ids=str)
def test_tiles_are_the_reference(family, widths):
    """Rows and sums that fill tiles and that do not, neighbours in one slice and in two, tokens beyond a group."""
    structure = replace(family(*widths).canonical, pad_in=0, pad_out=0)
    run = Native().prepare(structure)
    assert (module._plan(run.maps, len(run.links)) is None) == any(step.passive for step in structure.steps)
    for tokens in (6, 16, 31, 67, 133):
        assert_is_the_reference(structure, tokens, torch.bfloat16)


@needs_pairs
def test_pairs_are_multiplied_where_little_of_it_is_padding():
    for family, wanted in (
        (el.BTT(rank=2), True),
        (el.Monarch(blocks=4), True),
        (el.BTT(rank=1, blocks=(3, 5)), False),
    ):
        run = Native().prepare(family(1024, 1024).canonical if wanted else family(15, 15).canonical)
        assert (module._plan(run.maps, len(run.links)) is not None) == wanted, family


def test_any_strides():
    structure = el.BTT(rank=2)(36, 48).canonical
    run, same = Native().prepare(structure), by_reference(structure)
    leaves, _ = drawn(structure, 9)
    _, bias, *factors = leaves.values()
    base, wide = torch.randn(36, 10), torch.randn(5, 80)
    for x in (base.mT, wide[:, :36], wide[:, 1:73:2], wide[:1, :36].expand(4, 36), wide.as_strided((3, 36), (7, 1))):
        assert_close(run(factors, x, bias), same(factors, x, bias))
    twisted = [factor.mT.contiguous().mT for factor in factors]
    assert_close(run(twisted, base.mT, bias.repeat_interleave(2)[::2]), same(factors, base.mT, bias))
    for grad in (torch.randn(48, 9).mT, torch.ones(()).expand(9, 48)):
        found = with_gradients(run, leaves | {"factor 0": twisted[0]}, grad)
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        assert_near(found, with_gradients(same, exact, grad.double()), torch.float32)
    real = torch._neg_view(torch.randn(4, 36))  # as a conjugate's imaginary part is: negated when it is read
    assert real.is_neg() and real.is_contiguous()
    assert_close(run(factors, real), same(factors, real.clone()))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("frozen", ["x", "bias", "factor 0", "factor 1"])
def test_only_the_gradients_that_are_asked_for(frozen, tokens):
    structure = el.BTT(rank=2)(36, 48).canonical
    leaves, grad = drawn(structure, tokens)
    own = {name: leaf.clone().requires_grad_(name != frozen) for name, leaf in leaves.items()}
    x, bias, *factors = own.values()
    Native().prepare(structure)(factors, x, bias).backward(grad)
    wanted = with_gradients(by_reference(structure), {k: v.double() for k, v in leaves.items()}, grad.double())
    assert own[frozen].grad is None
    found = {name: leaf.grad for name, leaf in own.items() if name != frozen}
    assert_near(found, {name: wanted[name] for name in found}, torch.float32)


@pytest.mark.parametrize("family", [el.BTT(rank=2), el.LowRank(rank=3), el.TensorTrain(rank=2, cores=3)], ids=str)
def test_second_derivatives(family):
    structure = replace(family(36, 48).canonical, pad_in=0, pad_out=0)
    leaves, grad = drawn(structure, 5)

    def twice(run, leaves, grad):
        own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        x, bias, *factors = own.values()
        y = run(factors, x, bias)
        first = torch.autograd.grad(y, [x, *factors], grad, create_graph=True)
        return dict(zip(own, torch.autograd.grad(sum(g.square().sum() for g in first), [x, *factors]), strict=False))

    wanted = twice(by_reference(structure), {k: v.double() for k, v in leaves.items()}, grad.double())
    assert_near(twice(Native().prepare(structure), leaves, grad), wanted, torch.float32)


@pytest.fixture(params=["as it is", "tiles"])
def either(request):
    """What this processor has, and tiles where they can be emulated."""
    if request.param == "tiles":
        if "avx512_bf16" not in toolchain.processor():
            pytest.skip("this processor cannot multiply pairs of bfloat16")
        request.getfixturevalue("tiles")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [el.BTT(rank=3), el.Kronecker(), el.LowRank(rank=5)], ids=str)
def test_numbers_that_are_not_finite_spread_as_in_the_reference(family, dtype):
    """Sums read padding beside them, which must not reach the result."""
    for widths in ((36, 48), (64, 256)):
        structure = family(*widths).canonical
        run, same = Native().prepare(structure), by_reference(structure)
        for tokens in (2, 20):
            leaves, grad = drawn(structure, tokens, dtype)
            leaves["x"][0, 3], leaves["x"][1, 4], grad[1, 7] = math.inf, math.nan, math.nan
            exact = {name: leaf.double() for name, leaf in leaves.items()}  # some bfloat16 of torch's spreads further
            found, wanted = with_gradients(run, leaves, grad), with_gradients(same, exact, grad.double())
            for name in wanted:
                assert torch.equal(found[name].isfinite(), wanted[name].isfinite()), name


def test_what_is_kept_in_memory_does_not_reach_the_next_call():
    small, large = (family(36, 48).canonical for family in (el.BTT(rank=1), el.BTT(rank=5)))
    for structure, tokens in ((large, 70), (small, 3), (large, 2), (small, 70)):
        leaves, _ = drawn(structure, tokens)
        x, bias, *factors = leaves.values()
        with torch.inference_mode():
            inside = Native().prepare(structure)(factors, x, bias)
        assert_close(inside, by_reference(structure)(factors, x, bias))
        assert_close(Native().prepare(structure)(factors, x, bias), inside)


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(module, "SHARED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_two_threads_share_tokens_and_repeat_to_the_bit():
    structure = el.BTT(rank=3)(36, 48).canonical
    for tokens in (0, 1, 5, 6, 20, 200):
        assert_is_the_reference(structure, tokens, torch.float32)
    leaves, grad = drawn(structure, 500)
    one, other = (with_gradients(Native().prepare(structure), leaves, grad) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("threads", "either")
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_call_stays_within_the_memory_that_it_asked_for(family, monkeypatch):
    pieces = []

    def guarded(mode, maps, count, tokens, threads, plan):
        size = module._size(mode, maps, count, min(tokens, module.MANY), threads, plan)
        pieces.append((torch.full((size + 512,), 7.0), size))
        return pieces[-1][0].data_ptr()

    monkeypatch.setattr(module, "_memory", guarded)
    for widths in ((36, 48), (105, 231), (320, 64)):
        structure = replace(family(*widths).canonical, pad_in=0, pad_out=0)
        for tokens in (1, 7, 40, 130):
            for dtype in (torch.float32, torch.bfloat16):
                assert_is_the_reference(structure, tokens, dtype)
    assert pieces and all(bool((piece[size:] == 7).all()) for piece, size in pieces)


def test_calls_from_several_threads_do_not_meet():
    structure = el.BTT(rank=3)(36, 48).canonical
    run, same = Native().prepare(structure), by_reference(structure)
    cases = [drawn(structure, 10 + k)[0] for k in range(16)]

    def apply(leaves):
        x, bias, *factors = leaves.values()
        return [run(factors, x, bias) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for leaves, found in zip(cases, pool.map(apply, cases), strict=True):
            x, bias, *factors = leaves.values()
            assert_close(found, [same(factors, x, bias)] * 50)


# As a layer


@pytest.fixture(params=[el.BTT(rank=2), el.Kronecker()], ids=str)
def layer(request):
    """A layer that runs so for any number of tokens."""
    made = el.Linear(36, 48, request.param)
    always = ((math.inf, Native().prepare(made.structure)),)
    made._plan = replace(made._plan, cpu=Choice(always, always), cpu_half=Choice(always, always))
    return made


def test_a_layer_compiles_without_breaks_and_maps_and_differentiates(layer):
    x = torch.randn(5, 36)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))
    ours, theirs = (torch.autograd.grad(run(x).square().sum(), [*layer.parameters()]) for run in (compiled, layer))
    assert_close(ours, theirs)
    assert_close(torch.func.vmap(layer)(x), layer(x))
    slopes = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    (wanted,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert_close(slopes, wanted)


def test_a_layer_is_traced_and_takes_batches_of_gradients(layer):
    x = torch.randn(5, 36)
    traced = torch.jit.trace(layer, x)
    assert_close(traced(torch.ones(7, 36)), layer(torch.ones(7, 36)))
    y, grads = layer(x.requires_grad_()), torch.randn(3, 5, 48)
    leaves = [x, *layer.parameters()]
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))))


def test_a_tensor_of_another_kind_takes_another_way(layer):
    seen = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    y = layer(torch.ones(5, 36).as_subclass(Own))
    assert {*seen} & {"bmm", "matmul", "linear"}
    assert_close(y.as_subclass(torch.Tensor), layer(torch.ones(5, 36)))


def test_autocast_copies_and_pickles(layer):
    x = torch.randn(9, 36)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_work_is_counted(layer):
    x = torch.randn(5, 36, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    sizes = layer.structure.size
    first, second = (2 * 5 * sizes({*step.state, *step.factor}) for step in layer.structure.steps)
    assert counter.get_total_flops() == (first + second) + first + 2 * (first + second)


def test_the_operators_are_registered_soundly(layer):
    run = Native().prepare(layer.structure)
    weights = [
        f.detach().reshape(link.weight).requires_grad_() for f, link in zip(layer.factors, run.links, strict=True)
    ]
    x = torch.randn(7, 36, requires_grad=True)
    arguments = (x, weights, torch.randn(48), run.specs, run.views, 48)
    torch.library.opcheck(torch.ops.einlinear.native.default, arguments)


# Where it cannot


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_numbers_take_another_way(dtype):
    structure = el.BTT(rank=2)(36, 48).canonical
    leaves, grad = drawn(structure, 5, dtype)
    found, wanted = (
        with_gradients(run, leaves, grad) for run in (Native().prepare(structure), by_reference(structure))
    )
    for name in wanted:
        assert_close(found[name], wanted[name])


def test_types_that_do_not_match_are_torchs_affair(layer):
    with pytest.raises(RuntimeError, match=r"expected scalar type|same dtype"):
        layer(torch.randn(5, 36, dtype=torch.bfloat16))


def test_without_the_compiled_code_others_serve(layer, monkeypatch):
    leaves, grad = drawn(layer.structure, 9)
    run = Native().prepare(layer.structure)
    wanted, compiled = with_gradients(run, leaves, grad), torch.compile(layer, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(module, "library", lambda: None)
    found = with_gradients(run, leaves, grad)
    for name in wanted:
        assert_close(found[name], wanted[name])
    y = compiled(leaves["x"])
    assert_close(y, layer(leaves["x"]))
    assert_close(
        torch.autograd.grad(y.sum(), layer.factors[0]), torch.autograd.grad(layer(leaves["x"]).sum(), layer.factors[0])
    )


def test_what_it_refuses_it_refuses_in_a_sentence(monkeypatch):
    assert "compiled for CPUs" in Native().refuses(el.BTT()(16, 16).canonical, CUDA)
    assert "do not lie together" in Native().refuses(el.Butterfly()(16, 16).canonical)
    monkeypatch.setenv("EINLINEAR_NATIVE", "0")
    assert "turns compiled code off" in Native().refuses(el.BTT()(16, 16).canonical)
