import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear.kernels import bottleneck as module
from einlinear.kernels.bottleneck import Bottleneck, bottleneck
from einlinear.kernels.kernel import CUDA_HALF

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [  # tokens, d_in, d_out, rank: no side a multiple of its tile, and the weights' gradients in both ways
    (1, 200, 136, 8),
    (37, 144, 264, 24),
    (70, 64, 72, 72),
    (0, 64, 64, 16),
]


@pytest.mark.parametrize("many", [0, 2048], ids=["stock", "one launch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_two_factors_in_one_launch_are_the_reference_forward_and_each_gradient(
    sizes: tuple[int, ...], bias: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SUMMED", many)
    tokens, d_in, d_out, rank = sizes
    structure = el.LowRank(rank=rank)(d_in, d_out).canonical
    assert Bottleneck().refuses(structure, CUDA_HALF) is None
    leaves = {
        "x": torch.randn(tokens, d_in, requires_grad=True),
        "first": torch.randn(structure.matrix_shapes[0], requires_grad=True),
        "second": torch.randn(structure.matrix_shapes[1], requires_grad=True),
    }
    added = torch.randn(d_out, requires_grad=True) if bias else None
    y = Bottleneck().prepare(structure)([leaves["first"], leaves["second"]], leaves["x"], added)
    factors = [leaves["first"].double(), leaves["second"].double()]
    expected = el.apply(structure, factors, leaves["x"].double()) + (0 if added is None else added.double())
    leaves |= {} if added is None else {"bias": added}
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(y, leaves.values(), direction.float())
    theirs = torch.autograd.grad(expected, leaves.values(), direction)
    for name, mine, their in zip(("y", *leaves), (y, *ours), (expected, *theirs), strict=True):
        _close(name, mine, their)


def test_a_bottleneck_takes_any_strides() -> None:
    x, first, second = torch.randn(48, 19).mT, torch.randn(1, 48, 16).mT, torch.randn(1, 16, 40).mT
    y, z = bottleneck(x, first, second, None)
    _close("z", z, x.double() @ first[0].double().mT)
    _close("y", y, x.double() @ first[0].double().mT @ second[0].double().mT)


@pytest.mark.parametrize("shapes", [((1, 8, 32), (1, 24, 8)), ((2, 24, 16), (3, 8, 16))], ids=["one block", "blocks"])
def test_a_gradient_has_a_gradient(shapes: tuple[tuple[int, ...], ...]) -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((5, 32), *shapes)]
    (g, made, a), (f, *_) = shapes

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    x, first, second = leaves
    state = torch.einsum("tga,grfa->tfgr", x.view(-1, g, a), first.view(g, made // f, f, a))
    y = torch.einsum("tfz,fez->tfe", state.flatten(2), second).flatten(1)
    mine, theirs = penalty(bottleneck(x, first, second, None)[0]), penalty(y)
    for ours, their in zip(mine, theirs, strict=True):
        _close("second derivative", ours, their)


@pytest.mark.parametrize("shapes", [((1, 8, 32), (1, 24, 8)), ((2, 24, 16), (3, 8, 16))], ids=["one block", "blocks"])
def test_a_bottleneck_is_a_proper_operator(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, first, second = (torch.randn(shape, requires_grad=True) for shape in ((5, 32), *shapes))
    torch.library.opcheck(bottleneck, (x, first, second, torch.randn(24, requires_grad=True)))


def test_what_a_bottleneck_cannot_do_is_said() -> None:
    assert "16 bits" in str(Bottleneck().refuses(el.LowRank()(256, 256)))
    assert "multiples of 8" in str(Bottleneck().refuses(el.LowRank(rank=45)(256, 256), CUDA_HALF))
    assert "multiples of 8" in str(Bottleneck().refuses(el.LowRank(rank=136)(256, 256), CUDA_HALF))
    assert "two plain factors" in str(Bottleneck().refuses(el.BTT()(256, 256).canonical, CUDA_HALF))
    with pytest.raises(ValueError, match="convert"):
        bottleneck(torch.randn(4, 16), torch.randn(1, 8, 16).double(), torch.randn(1, 16, 8).double(), None)


def _close(what: str, mine: Tensor, their: Tensor) -> None:
    error = (mine - their).norm() / their.norm() if their.any() else mine.norm()
    assert error < 1e-6, f"{what} differs by {error:.2g}"
