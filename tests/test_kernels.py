"""Every kernel computes what the reference does, gradients by name, on memory poisoned with NaN."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import clock_cpu, toolchain
from einlinear.kernels import KERNELS, Choice, _choice, plan
from einlinear.kernels import pairwise as pairwise_module
from einlinear.kernels.blocked import Blocked, BlockedRunner, Turned, transposed
from einlinear.kernels.chain import Chain, Columns
from einlinear.kernels.kernel import CPU, CPU_HALF, CUDA, CUDA_HALF, Kernel
from einlinear.kernels.native import Native
from einlinear.kernels.pairwise import pairwise
from einlinear.kernels.reference import Materialised, Reference, Rows

CHAINED = [
    el.Dense(),
    el.LowRank(rank=3),
    el.BlockDiagonal(blocks=4),
    el.Kronecker(),
    el.Kronecker(cores=3),
    el.TensorTrain(rank=2),
    el.TensorTrain(rank=3, cores=3),
    el.BTT(rank=1),
    el.BTT(rank=3),
    el.BTT(rank=1, blocks=(1, 4)),
    el.Monarch(blocks=3),
    el.BLAST(blocks=3, rank=5),
]
"""What runs as a chain of matmuls without a copy."""


EVERYWHERE = [Rows(), Columns(), Chain(), Blocked(), Turned(), Native(), Reference(), Materialised()]


@pytest.fixture(params=EVERYWHERE, ids=lambda kernel: kernel.name)
def kernel(request) -> Kernel:
    return request.param


@pytest.fixture(params=[0, 1, 7], ids="{} tokens".format)
def tokens(request) -> int:
    return request.param


def with_gradients(run, leaves, grad):
    """The output of `run` and the gradient of every leaf, by name; leaves are first tensors of their own."""
    own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    x, bias, *factors = own.values()
    y = run(factors, x, bias)
    return {"output": y, **dict(zip(own, torch.autograd.grad(y, [*own.values()], grad), strict=True))}


def by_reference(structure):
    return lambda factors, x, bias: el.apply(structure, factors, x) + bias


def leaves_of(structure, factors, *tokens, dtype=torch.float64):
    """An input, a bias and the factors, by name."""
    leaves = {"x": (*tokens, structure.d_in), "bias": (structure.d_out,)}
    drawn = {name: torch.randn(shape, dtype=dtype) for name, shape in leaves.items()}
    return drawn | {f"factor {k}": factor for k, factor in enumerate(factors)}


@pytest.mark.usefixtures("poisoned")
def test_is_the_reference_with_every_gradient(kernel, structure, factors, tokens, assert_same):
    if refusal := kernel.refuses(structure):
        assert_is_a_reason(refusal)
        return
    whole = replace(structure, pad_in=0, pad_out=0)
    leaves = leaves_of(whole, factors, tokens)
    grad = torch.randn(tokens, whole.d_out, dtype=torch.float64)
    found = with_gradients(kernel.prepare(structure), leaves, grad)
    assert_same(found, with_gradients(by_reference(whole), leaves, grad))
    assert found["output"].is_contiguous()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("family", CHAINED, ids=str)
@pytest.mark.parametrize("widths", [(12, 20), (27, 64), (97, 131), (131, 97)], ids=str)
def test_the_chain_at_odd_sizes(family, widths, draw, assert_same):
    structure = family(*widths)
    assert Chain().refuses(structure) is None
    leaves = leaves_of(structure, draw(structure), 2, 3)
    grad = torch.randn(2, 3, structure.d_out, dtype=torch.float64)
    runner = Chain().prepare(structure)
    always = ((math.inf, runner),)
    chained = replace(plan(structure), cpu=Choice(always, always))
    assert_same(with_gradients(chained, leaves, grad), with_gradients(by_reference(structure), leaves, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_keeps_the_dtype(kernel, dtype, draw):
    structure = el.BTT(rank=2)(16, 36)
    factors = [factor.to(dtype) for factor in draw(structure)]
    x = torch.randn(5, 16).to(dtype)
    y = kernel.prepare(structure)(factors, x)
    assert y.dtype == dtype
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    assert_close(y, el.apply(structure, factors, x), rtol=tolerance, atol=tolerance)


def test_complex_gradients_are_those_of_the_reference(assert_same):
    structure = el.BTT(rank=2)(16, 36)
    factors = [torch.randn(shape, dtype=torch.complex128) for shape in structure.factor_shapes]
    leaves = leaves_of(structure, factors, 5, dtype=torch.complex128)
    grad = torch.randn(5, 36, dtype=torch.complex128)
    found = with_gradients(Chain().prepare(structure), leaves, grad)
    assert_same(found, with_gradients(by_reference(structure), leaves, grad))


@pytest.mark.parametrize("family", CHAINED, ids=str)
def test_inputs_of_any_strides(family, draw):
    structure = family(36, 64)
    factors = draw(structure)
    base = torch.randn(36, 10, dtype=torch.float64)
    wide = torch.randn(5, 72, dtype=torch.float64)
    for x in (base.mT, wide[:, ::2], base.mT[::2], wide[:1, :36].expand(4, 36), wide.as_strided((3, 36), (7, 1))):
        assert_close(plan(structure)(factors, x), el.apply(structure, factors, x))
    twisted = [factor.mT.contiguous().mT for factor in factors]
    assert_close(plan(structure)(twisted, base.mT), el.apply(structure, factors, base.mT))


@pytest.mark.parametrize("family", [el.BTT(rank=2), el.Kronecker(), el.BLAST(blocks=2, rank=2)], ids=str)
def test_second_derivatives(family, draw):
    structure = family(8, 6)
    run, leaves = Chain().prepare(structure), [torch.randn(2, 8, dtype=torch.float64), *draw(structure)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda x, *factors: run(factors, x), leaves)
    assert torch.autograd.gradgradcheck(lambda x, *factors: run(factors, x), leaves)


# Blocks of tokens

BLOCKED = [el.BTT(rank=1), el.BTT(rank=3), el.Monarch(blocks=3), el.BLAST(blocks=3, rank=5)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("family", BLOCKED, ids=str)
@pytest.mark.parametrize("kind", [Blocked(), Turned()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [0, 1, 4, 11])
def test_blocks_of_tokens_are_the_reference_with_every_gradient(family, kind, tokens, draw, assert_same):
    """Whole blocks, a last one that is shorter, and none."""
    structure = family(36, 48)
    assert kind.refuses(structure) is None
    leaves = leaves_of(structure, draw(structure), tokens)
    grad = torch.randn(tokens, 48, dtype=torch.float64)
    runner = replace(kind.prepare(structure), block=4)
    assert_same(with_gradients(runner, leaves, grad), with_gradients(by_reference(structure), leaves, grad))


@pytest.mark.parametrize("kind", [Blocked(), Turned()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("family", [el.BTT(rank=2), el.BLAST(blocks=2, rank=2)], ids=str)
def test_blocks_of_tokens_any_strides_complex_and_second_derivatives(kind, family, draw, assert_same):
    structure = family(8, 6)
    run = replace(kind.prepare(structure), block=2)
    x, factors = torch.randn(8, 3, dtype=torch.complex128).mT, [f.to(torch.complex128) for f in draw(structure)]
    leaves = leaves_of(structure, factors, 3, dtype=torch.complex128) | {"x": x}
    grad = torch.randn(6, 3, dtype=torch.complex128).mT
    assert_same(with_gradients(run, leaves, grad), with_gradients(by_reference(structure), leaves, grad))
    leaves = [leaf.real.clone().requires_grad_() for leaf in (x, *factors)]
    assert torch.autograd.gradgradcheck(lambda x, *factors: run(factors, x), leaves)


@pytest.mark.parametrize("kind", [Blocked(), Turned()], ids=lambda kernel: kernel.name)
def test_blocks_of_tokens_are_registered_soundly_and_repeat_to_the_bit(kind, draw):
    structure = el.BTT(rank=3)(36, 48)
    run = kind.prepare(structure)
    assert isinstance(run, BlockedRunner)
    weights = [f.reshape(link.weight).requires_grad_() for f, link in zip(draw(structure), run.links, strict=True)]
    x, views = torch.randn(7, 36, dtype=torch.float64, requires_grad=True), [n for link in run.links for n in link.view]
    arguments = (x, weights, torch.randn(48, dtype=torch.float64), run.specs, views, 48, 4)
    torch.library.opcheck(torch.ops.einlinear.blocked.default, arguments)
    one, other = (torch.autograd.grad(run(weights, x).square().sum(), [x, *weights]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("frozen", ["x", "factor 0", "factor 1"])
def test_blocks_of_tokens_compute_only_the_gradients_that_are_asked_for(frozen, draw, assert_same):
    structure = el.BTT(rank=2)(36, 48)
    leaves = leaves_of(structure, draw(structure), 5)
    own = {name: leaf.clone().requires_grad_(name != frozen) for name, leaf in leaves.items()}
    y = replace(Blocked().prepare(structure), block=2)([own["factor 0"], own["factor 1"]], own["x"], own["bias"])
    asked = {name: leaf for name, leaf in own.items() if name != frozen}
    with FlopCounterMode(display=False) as counter:
        found = dict(zip(asked, torch.autograd.grad(y, [*asked.values()], torch.ones_like(y)), strict=True))
    wanted = with_gradients(by_reference(structure), leaves, torch.ones_like(y))
    assert_same(found, {name: wanted[name] for name in found})
    first, second = (
        2 * 5 * structure.size(step.passive) * factor.numel()
        for step, factor in zip(structure.steps, (leaves["factor 0"], leaves["factor 1"]), strict=True)
    )
    parts = {"x": first, "factor 0": first, "factor 1": second}
    assert counter.get_total_flops() == first + second + sum(parts.values()) - parts[frozen]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_that_run_in_blocks_can_be_mapped_and_differentiated_by_torch_func(dtype):
    layer = el.Linear(64, 64, el.BTT(rank=4), dtype=dtype)
    run = replace(Turned().prepare(layer.structure), block=4)
    always = Choice(((math.inf, run),), ((math.inf, run),))
    layer._plan = replace(layer._plan, cpu=always, cpu_half=always)
    x, tolerance = torch.randn(3, 5, 64, dtype=dtype), {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}
    assert_close(torch.func.vmap(layer)(x), layer(x), **tolerance)
    assert_close(torch.func.vmap(layer, in_dims=1, out_dims=1)(x), layer(x), **tolerance)
    slopes = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x.flatten(0, 1))
    x.requires_grad_()
    assert_close(slopes, torch.autograd.grad(layer(x).sum(), x)[0].flatten(0, 1), **tolerance)


@pytest.fixture
def zen(monkeypatch):
    """Chooses as on that processor, with a compiler and without one."""
    monkeypatch.setattr(clock_cpu, "kind", lambda: "avx512")

    def choose(structure, compiled):
        monkeypatch.setattr(toolchain, "refusal", lambda: None if compiled else "there is no compiler here")
        return plan.__wrapped__(structure)

    return choose


def test_on_a_cpu_compiled_code_runs_chains_where_there_is_a_compiler(zen):
    for family in (el.BTT(rank=1), el.BTT(rank=4), el.Monarch(blocks=16), el.Kronecker()):
        found = zen(structure := family(1024, 1024), compiled=True)
        for tokens in (1, 16, 1024):
            assert found.cpu(tokens, False) == Native().prepare(structure)
        assert found.cpu_half(1, False) == Native().prepare(structure)
    assert zen(el.BTT(rank=1)(1024, 1024), compiled=True).cpu(1024, True) == Native().prepare(
        el.BTT(rank=1)(1024, 1024)
    )


def test_on_a_cpu_without_a_compiler_tokens_are_columns_and_wide_states_go_in_blocks(zen):
    slim, wide, lone = el.BTT(rank=1)(1024, 1024), el.BTT(rank=4)(1024, 1024), el.LowRank()(1024, 1024)
    assert zen(slim, False).cpu(16, False) == zen(slim, False).cpu(1024, True) == Columns().prepare(slim)
    assert zen(slim, False).cpu_half(1024, False) == Rows().prepare(slim)
    huge, in_blocks = el.BTT(rank=4)(4096, 4096), (Blocked(), Turned())
    assert zen(huge, False).cpu(1024, False) in [kernel.prepare(huge) for kernel in in_blocks]
    assert zen(wide, False).cpu_half(1024, False) in [kernel.prepare(wide) for kernel in in_blocks]
    assert zen(lone, False).cpu(1024, False) == Columns().prepare(lone)
    assert "a CPU's cache" in Blocked().refuses(wide, CUDA)
    assert "CPUs alone" in Rows().refuses(wide, CUDA)


def test_blocks_keep_their_memory_for_the_next_call_and_any_mode():
    """What a call leaves behind does not reach the next: other sizes, types and `inference_mode`."""
    run = Blocked().prepare(structure := el.BTT(rank=2)(36, 48))
    for dtype, tokens in ((torch.float64, 9), (torch.float32, 9), (torch.float64, 4), (torch.float64, 30)):
        factors = [torch.randn(shape, dtype=dtype) for shape in structure.matrix_shapes]
        x = torch.randn(tokens, 36, dtype=dtype)
        with torch.inference_mode():
            inside = replace(run, block=4)(factors, x)
        assert_close(inside, el.apply(structure, factors, x))
        assert_close(replace(run, block=3)(factors, x), inside)


def test_a_float32_matrix_is_transposed():
    for rows, columns in ((1, 5), (7, 3), (64, 48)):
        matrix = torch.randn(rows, columns)
        assert torch.equal(transposed(matrix), matrix.mT)


# The custom operation under the chain

CONTRACTIONS = [
    "mgk,gnk->gnm",
    "gkm,gnk->gnm",
    "gkm,gnk->mgn",
    "mgk,gnk->mgn",
    "mkg,gnk->gnm",
    "bkm,bnk->mbn",
    "mk,nk->mn",
    "mk,nk->nm",
    "km,nk->nm",
    "bkq,nk->bnq",
    "bkq,knq->bqn",
]


def operands(spec, odd=0, **options):
    """Two tensors of the axes that `spec` names, each axis of another size."""
    size = {letter: 2 + odd + position for position, letter in enumerate("bgkmnq")}
    left, _ = spec.split("->")
    return [torch.randn([size[name] for name in axes], dtype=torch.float64, **options) for axes in left.split(",")]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spec", CONTRACTIONS)
@pytest.mark.parametrize("odd", [0, 1])
def test_the_operation_is_the_einsum_that_it_names(spec, odd):
    a, b = operands(spec, odd)
    assert_close(pairwise(a, b, spec), torch.einsum(spec, a, b))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spec", CONTRACTIONS)
def test_a_long_odd_axis_is_cut_into_an_aligned_part_and_the_rest(spec, monkeypatch):
    """As on a GPU, where odd rows are slow; forward, each gradient, and the strides that compilers are told of."""
    monkeypatch.setattr(pairwise_module, "LONG", 4)
    monkeypatch.setattr(pairwise_module, "ALIGNED", 4)
    monkeypatch.setattr(pairwise_module, "CUTS", ("cpu",))
    a, b = operands(spec, odd=1, requires_grad=True)
    y, expected = pairwise(a, b, spec), torch.einsum(spec, a, b)
    direction = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(result, (a, b), direction) for result in (y, expected))
    for mine, their in zip((y, *ours), (expected, *theirs), strict=True):
        assert_close(mine, their)
    torch.library.opcheck(torch.ops.einlinear.pairwise.default, (a, b, spec))


@pytest.mark.parametrize("spec", CONTRACTIONS)
def test_the_operation_is_registered_soundly(spec):
    torch.library.opcheck(torch.ops.einlinear.pairwise.default, (*operands(spec, requires_grad=True), spec))


def test_the_operation_counts_its_flops():
    with FlopCounterMode(display=False) as counter:
        pairwise(torch.randn(5, 2, 3), torch.randn(2, 7, 3), "mgk,gnk->gnm")
    assert counter.get_total_flops() == 2 * 5 * 2 * 3 * 7


def test_only_the_gradients_that_are_asked_for_are_computed():
    a, b = torch.randn(5, 2, 3, requires_grad=True), torch.randn(2, 7, 3)
    with FlopCounterMode(display=False) as counter:
        pairwise(a, b, "mgk,gnk->gnm").sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 2 * 3 * 7)


# Choice


TARGETS = [CPU, CPU_HALF, CUDA, CUDA_HALF]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=["cpu", "cpu half", "cuda", "half"])
@pytest.mark.parametrize("family", [*CHAINED, *el.families()], ids=str)
def test_a_plan_takes_what_is_modelled_fastest(family, target, training):
    """At the upper end of the range of tokens that a choice is for; elsewhere it may be a little off."""
    structure = family(64, 64).canonical
    fitting = [kernel for kernel in KERNELS if kernel.refuses(structure, target) is None]
    choice = _choice(structure, target)
    for tokens in (1, 4, 8, 128, 2048, 131072, 10_000_000):
        run = choice(tokens, training)
        chosen = [kernel for kernel in fitting if kernel.prepare(structure) == run]
        least = min(kernel.seconds(structure, tokens, target, training) for kernel in fitting)
        assert min(kernel.seconds(structure, tokens, target, training) for kernel in chosen) <= 1.0001 * least


@pytest.mark.parametrize("tokens, wanted", [(0, "few"), (5, "few"), (6, "some"), (9, "some"), (10, "many")])
def test_a_choice_parts_tokens_at_its_limits_and_knows_training(tokens, wanted):
    limits = ((5, "few"), (9, "some"), (math.inf, "many"))
    choice = Choice(limits, tuple((limit, f"{name}, training") for limit, name in limits))
    assert choice(tokens, False) == wanted
    assert choice(tokens, True) == f"{wanted}, training"


@pytest.mark.parametrize("records", [False, True])
def test_a_plan_asks_for_training_where_gradients_are_recorded(records):
    ran = []

    def runner(name):
        return lambda factors, x, bias=None: ran.append(name) or x.new_zeros(len(x), 36)

    choice = Choice(((math.inf, runner("forward")),), ((math.inf, runner("training")),))
    layer = el.Linear(16, 36, "btt")
    layer._plan = replace(layer._plan, cpu=choice)
    with torch.set_grad_enabled(records):
        layer(torch.zeros(3, 16))
    layer.requires_grad_(False)(torch.zeros(3, 16))
    assert ran == ["training" if records else "forward", "forward"]


def test_the_matrix_is_made_for_many_tokens_of_a_structure_dearer_than_dense(zen):
    dear = el.BTT(rank=16)(64, 64)
    assert el.flops(dear) > 2 * 64 * 64
    found = zen(dear, compiled=True).cpu
    assert found(1, False) == Native().prepare(dear)
    assert found(10**6, False) == Materialised().prepare(dear)


def test_the_matrix_is_never_made_for_a_structure_cheaper_than_dense():
    structure = el.BTT(rank=1)(1024, 1024)
    cheap = {kernel.prepare(structure) for kernel in (Rows(), Columns(), Chain(), Blocked(), Turned(), Native())}
    assert {run for _, run in plan(structure).cpu.forward} <= cheap


def test_all_choices_compute_the_same(draw):
    structure = el.BTT(rank=16)(64, 64)
    factors, found = draw(structure), plan(structure)
    x = torch.randn(2000, 64, dtype=torch.float64)
    assert found.cpu(1, False) != found.cpu(2000, False)
    few = torch.cat([found(factors, rows) for rows in x.split(1)])
    assert_close(found(factors, x), few)
    assert_close(few, el.apply(structure, factors, x))


def test_explain_says_what_runs_and_why(zen):
    zen(el.BTT()(16, 16), compiled=True)
    cheap = el.explain(el.BTT(rank=1)(1024, 1024))
    assert cheap == el.explain(el.BTT(rank=1)(1024, 1024), "cpu", torch.float32, 1024)
    assert "runs 1024 tokens by 'native' on cpu in torch.float32, forward" in cheap
    assert "chain         fits, modelled" in cheap
    dear = el.BTT(rank=16)(64, 64)
    assert "by 'native'" in el.explain(dear, tokens=1)
    assert "by 'materialised'" in el.explain(dear, tokens=10**6)
    assert "forward and backward" in el.explain(dear, tokens=10**6, training=True)
    zen(dear, compiled=False)
    told = el.explain(el.BTT(rank=1)(1024, 1024), dtype=torch.bfloat16)
    assert "by 'rows'" in told and "native        there is no compiler here" in told


@pytest.mark.parametrize("family", el.families(), ids=str)
def test_explain_lists_every_kernel_with_its_time_or_its_reason(family):
    structure = family(36, 64)
    lines = el.explain(structure, tokens=10).splitlines()
    assert lines[0] == repr(structure)
    for kernel, line in zip(KERNELS, lines[2:], strict=True):
        assert line.split()[0] == kernel.name
        assert (kernel.refuses(structure.canonical) or "fits, modelled ") in line


@pytest.mark.parametrize("tokens", [0, 1, 3, 70, 520, 1500, 2048, 2049, 10**7])
def test_what_is_explained_is_what_runs(zen, tokens):
    for family in (el.BTT(rank=4), el.BTT(rank=16), el.Monarch(blocks=4), el.LowRank(rank=64)):
        found = zen(structure := family(256, 256), compiled=False)
        for choice, dtype in ((found.cpu, torch.float32), (found.cpu_half, torch.bfloat16)):
            told = el.explain(structure, dtype=dtype, tokens=tokens)
            name = told.split("by '")[1].split("'")[0]
            kernel = next(kernel for kernel in KERNELS if kernel.name == name)
            assert choice(tokens, False) == kernel.prepare(structure), told


def test_explain_knows_each_gpu_by_its_number_and_no_other_device():
    structure = el.BTT()(64, 64)
    told = el.explain(structure, "cuda:1", torch.bfloat16)
    assert told == el.explain(structure, torch.device("cuda:1"), torch.bfloat16)
    assert told.replace("cuda:1", "cuda") == el.explain(structure, "cuda", torch.bfloat16)
    for wrong, why in (("tpu", "pass cpu or cuda"), ("cpux", "pass cpu or cuda")):
        with pytest.raises(el.StructureError, match=why):
            el.explain(structure, wrong)


def test_explain_compares_with_the_dense_layer_that_seconds_foretells():
    for structure in (el.LowRank(rank=2)(8, 4), el.BTT()(1024, 1024)):
        dense = el.Dense()(structure.d_in, structure.d_out)
        times = min(
            float(line.split(" of dense")[0].split(", ")[-1])
            for line in el.explain(structure, tokens=64).splitlines()
            if "of dense" in line
        )
        assert times == pytest.approx(el.seconds(structure, 64) / el.seconds(dense, 64), rel=0.01)


def test_explain_of_something_else():
    with pytest.raises(TypeError, match=r"in torch\.int8: pass a torch"):
        el.explain(el.BTT()(16, 16), dtype=torch.int8)
    for tokens in (-1, 1.5, "many"):
        with pytest.raises(ValueError, match="pass a whole number"):
            el.explain(el.BTT()(16, 16), tokens=tokens)
    with pytest.raises(TypeError, match="cannot explain a int: pass a Structure"):
        el.explain(3)
    with pytest.raises(TypeError, match="in 'bfloat16': pass a torch"):
        el.explain(el.BTT()(16, 16), dtype="bfloat16")


# Refusals


def assert_is_a_reason(refusal):
    assert isinstance(refusal, str)
    assert len(refusal.split()) > 3


@pytest.mark.parametrize(
    "structure, says",
    [
        (el.Structure.parse("i, i r, o r -> o", i=2, r=3, o=4), "not written in the order batch, new, summed"),
        (el.Structure.parse("i, e o i -> o", i=2, e=3, o=4), "an axis to itself, which only a router gives a use"),
        (el.Structure.parse("i, o i, o -> o", i=2, o=4), "it sums over nothing or makes nothing"),
        (el.Theta((0.4, 0.2, 0.4, 0.2, 0.4, 0.4, 0.1))(64, 64), "repeated over some axes and shared by others"),
        (el.Butterfly()(16, 16), "do not lie together"),
    ],
    ids=str,
)
def test_what_the_chain_refuses_it_refuses_in_a_sentence(structure, says):
    refusal = Chain().refuses(structure)
    assert_is_a_reason(refusal)
    assert says in refusal


@pytest.mark.parametrize("family", [el.Butterfly(), el.Theta((0.4, 0.2, 0.4, 0.2, 0.4, 0.4, 0.1))], ids=str)
def test_what_the_chain_refuses_still_runs(family, draw):
    structure = family(36, 64)
    factors = draw(structure)
    x = torch.randn(5, 36, dtype=torch.float64)
    assert_close(plan(structure)(factors, x), el.apply(structure, factors, x))


def test_a_wrong_width_is_refused_in_a_sentence(draw):
    structure = el.BTT()(16, 36)
    with pytest.raises(el.StructureError, match="its last dimension must be d_in = 16"):
        plan(structure)(draw(structure), torch.randn(5, 17, dtype=torch.float64))


def test_a_routed_structure_has_kernels_of_its_own():
    structure = el.BTT(rank=4)(16, 16).route("r", active=1)
    told = el.explain(structure, tokens=8)
    assert "expert-sorted" in told and "chain" not in told
    assert Chain().refuses(structure.canonical) == "its routed axis takes a gate"
