"""Layers of structures that nobody named, on inputs that nobody chose: every kernel, each gradient, by name."""

import random

import hypothesis.strategies as some
import torch
from hypothesis import HealthCheck, given, settings
from test_any_einsum import affordable, einsum

import einlinear as el
from einlinear.contract import pad_last
from einlinear.kernels import KERNELS
from einlinear.kernels.kernel import Target

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
WIDTHS = some.sampled_from([1, 2, 3, 7, 8, 13, 16, 30, 36, 49, 64, 97])
FAMILIES = [
    "low_rank", "low_rank(rank=3)", "low_rank(rank=17)", "block_diagonal(blocks=3)", "kronecker", "monarch",
    "monarch(blocks=4)", "btt", "btt(rank=5)", "btt(rank=2,cores=3)", "btt(rank=2,blocks=(8,2))",
    "blast(blocks=2,rank=3)", "tensor_train(rank=3,cores=3)", "butterfly", "dense",
    "theta(theta=(0.4,0.2,0.4,0.2,0.4,0.4,0.2))",
]  # fmt: skip
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
BATCHES = some.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (33,), (2, 1, 65), (260,)])


def structures(seed: int, family: str, d_in: int, d_out: int) -> el.Structure:
    """The family at these widths or, where it cannot be had, an einsum out of thin air."""
    try:
        return el.structure(family)(d_in, d_out)
    except el.StructureError:
        source = random.Random(seed)
        return next(s for s in iter(lambda: einsum(source, (1, 2, 3, 4)), None) if affordable(s))


STRUCTURES = some.builds(structures, some.integers(0, 10**6), some.sampled_from(FAMILIES), WIDTHS, WIDTHS)


def laid(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers, lying in memory otherwise."""
    if how == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if how == "turned" and x.ndim > 1:
        return x.mT.contiguous().mT
    if how == "offset":
        return torch.cat([x[..., :1], x], -1)[..., 1:]
    if how == "expanded" and x.ndim > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@SETTINGS
@given(
    STRUCTURES,
    some.sampled_from([*TOLERANCES]),
    BATCHES,
    some.sampled_from(["plain", "strided", "turned", "offset", "expanded"]),
    some.booleans(),
    some.integers(0, 7),
)
def test_every_kernel_is_the_reference_with_every_gradient(structure, dtype, batch, how, bias, asked):
    layer = el.Linear(structure.d_in, structure.d_out, structure, bias, dtype=dtype)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source).to(dtype))
    x = laid(torch.randn(*batch, structure.d_in, generator=source).to(dtype), how)
    leaves = {"x": x.detach().requires_grad_(), **dict(layer.named_parameters())}
    for position, leaf in enumerate(leaves.values()):  # some are frozen
        leaf.requires_grad_(asked == 0 or position % 3 != asked % 3)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    factors = [leaf for name, leaf in exact.items() if name.startswith("factors")]
    wanted = el.apply(layer.structure, factors, exact["x"]) + exact.get("bias", 0)
    direction = torch.randn(wanted.shape, generator=source).to(dtype)
    right = dict(
        zip(exact, torch.autograd.grad(wanted, exact.values(), direction.double(), allow_unused=True), strict=True)
    )

    def compare(name, got, want):
        assert got.shape == want.shape, f"{name}: {got.shape}"
        error = (got.double() - want).norm()
        assert error <= TOLERANCES[dtype] * want.norm() + 1e-30, f"{name} differs by {error:.2g} of {want.norm():.2g}"

    spec = layer.structure
    ways = {k.name: k.prepare(spec) for k in KERNELS if k.refuses(spec, Target.of("cpu", dtype)) is None}
    for way, run in {"the layer": None, **ways}.items():
        if run is None:
            y = layer(leaves["x"])
        else:
            tokens = pad_last(leaves["x"], spec.pad_in).reshape(-1, spec.d_in + spec.pad_in)
            y = run([*layer.factors], tokens, None if layer.bias is None else pad_last(layer.bias, spec.pad_out))
            y = y[:, : spec.d_out].reshape(wanted.shape)
        compare(f"output by {way}", y, wanted)
        needed = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(y, needed.values(), direction) if needed else ()
        for name, got in zip(needed, found, strict=True):
            compare(f"gradient of {name} by {way}", got, right[name].reshape(got.shape))
