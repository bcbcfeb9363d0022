import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear import launches
from einlinear.kernels.bottleneck import Bottleneck, bottleneck
from einlinear.kernels.kernel import CUDA_HALF
from einlinear.launches import Launch, Sums

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

CASES = [  # no side a multiple of its tile
    (1, el.LowRank(rank=8), (200, 136)),
    (37, el.LowRank(rank=24), (144, 264)),
    (70, el.LowRank(rank=72), (64, 72)),
    (0, el.LowRank(rank=16), (64, 64)),
    (37, el.Monarch(blocks=2), (96, 64)),
    (70, el.BTT(rank=24, blocks=(2, 3)), (48, 120)),
    (0, el.Monarch(blocks=2), (64, 64)),
]


@pytest.mark.parametrize("ways", ["stock weights", "together", "apart and ranges"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "family", "widths"), CASES, ids=str)
def test_two_factors_of_few_blocks_are_the_reference_forward_and_each_gradient(
    tokens: int, family: el.Family, widths: tuple[int, int], bias: bool, ways: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = family(*widths).canonical
    assert Bottleneck().refuses(structure, CUDA_HALF) is None
    if ways == "stock weights":
        monkeypatch.setattr(launches, "weights", lambda sizes, tokens: (None, 0.0))
    elif ways == "apart and ranges" and structure.matrix_shapes[0][0] > 1:
        monkeypatch.setattr(launches, "weights", lambda sizes, tokens: (Sums(16, 32, 16, splits=3), 0.0))
        monkeypatch.setattr(launches, "forward", lambda *_: (Launch(32, 16, 16, apart=True), 0.0))
    leaves = {
        "x": torch.randn(tokens, widths[0], requires_grad=True),
        "first": torch.randn(structure.matrix_shapes[0], requires_grad=True),
        "second": torch.randn(structure.matrix_shapes[1], requires_grad=True),
    }
    added = torch.randn(widths[1], requires_grad=True) if bias else None
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
    assert "up to 8 blocks" in str(Bottleneck().refuses(el.BTT()(256, 256).canonical, CUDA_HALF))
    assert "two plain factors" in str(Bottleneck().refuses(el.Kronecker()(256, 256).canonical, CUDA_HALF))
    with pytest.raises(ValueError, match="convert"):
        bottleneck(torch.randn(4, 16), torch.randn(1, 8, 16).double(), torch.randn(1, 16, 8).double(), None)


def _close(what: str, mine: Tensor, their: Tensor) -> None:
    error = (mine - their).norm() / their.norm() if their.any() else mine.norm()
    assert error < 1e-6, f"{what} differs by {error:.2g}"
