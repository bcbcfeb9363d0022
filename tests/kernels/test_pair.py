import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear.kernels import pair as module
from einlinear.kernels.chain import Tiles
from einlinear.kernels.kernel import CUDA_HALF
from einlinear.kernels.pair import Pair, pair

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(el.BTT(), (256, 256)), (el.BTT(rank=3), (240, 400)), (el.BTT(blocks=(8, 16)), (128, 128))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["token", "stages"])
@pytest.mark.parametrize(("family", "widths"), SHAPES, ids=str)
def test_a_layer_in_one_launch_is_the_reference_forward_and_each_gradient(
    family: el.Family, widths: tuple[int, int], way: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = family(*widths).canonical
    assert Pair().refuses(structure, CUDA_HALF) is None
    tokens = 3 if way == "token" else 41
    monkeypatch.setattr(module, "AGAIN", module.AGAIN if way == "token" else 0)
    x = torch.randn(tokens, widths[0], requires_grad=True)
    factors = [torch.randn(shape, requires_grad=True) for shape in structure.matrix_shapes]
    added = torch.randn(widths[1], requires_grad=True) if bias else None
    y = Pair().prepare(structure)(factors, x, added)
    expected = el.apply(structure, [f.double() for f in factors], x.double()) + (0 if added is None else added.double())
    leaves = {"x": x, "first": factors[0], "second": factors[1]} | ({} if added is None else {"bias": added})
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(y, leaves.values(), direction.float())
    theirs = torch.autograd.grad(expected, leaves.values(), direction)
    for name, mine, their in zip(("y", *leaves), (y, *ours), (expected, *theirs), strict=True):
        _close(name, mine, their)


@pytest.mark.parametrize("tokens", [2, 70])
def test_layers_that_share_an_input(tokens: int) -> None:
    structures = [el.BTT(rank=rank, blocks=(4, f))(64, out).canonical for rank, f, out in ((1, 8, 64), (2, 4, 48))]
    x = torch.randn(tokens, 64, requires_grad=True)
    factors = [[torch.randn(s, requires_grad=True) for s in structure.matrix_shapes] for structure in structures]
    biases = [torch.randn(structure.d_out, requires_grad=True) for structure in structures]
    firsts, seconds = zip(*factors, strict=True)
    ys = pair(x, firsts, seconds, biases)
    leaves = [x, *firsts, *seconds, *biases]
    expected = [
        el.apply(structure, [f.double() for f in fs], x.double()) + b.double()
        for structure, fs, b in zip(structures, factors, biases, strict=True)
    ]
    directions = [torch.randn_like(y) for y in expected]
    ours = torch.autograd.grad(ys, leaves, [d.float() for d in directions])
    theirs = torch.autograd.grad(expected, leaves, directions)
    for mine, their in zip((*ys, *ours), (*expected, *theirs), strict=True):
        _close("a result", mine, their)


def test_pair_is_a_proper_operator() -> None:
    shapes = el.BTT()(64, 64).canonical.matrix_shapes
    firsts, seconds = ([torch.randn(shape, requires_grad=True) for _ in range(2)] for shape in shapes)
    x = torch.randn(2, 64, requires_grad=True)
    torch.library.opcheck(pair, (x, firsts[:1], seconds[:1], [torch.randn(64)]))
    torch.library.opcheck(pair, (x, firsts, seconds, []), test_utils=("test_schema", "test_faketensor"))


def test_pair_is_chosen_for_few_tokens_only() -> None:
    structure = el.BTT()(1024, 1024).canonical
    few, many = ([k.seconds(structure, tokens, CUDA_HALF) for k in (Pair(), Tiles())] for tokens in (8, 4096))
    assert few[0] < few[1]
    assert many[0] > many[1]
    assert "two block-diagonal" in str(Pair().refuses(el.BlockDiagonal(blocks=4)(256, 256).canonical, CUDA_HALF))


def _close(what: str, mine: Tensor, their: Tensor) -> None:
    error = (mine - their).norm() / their.norm()
    assert error < 1e-6, f"{what} differs by {error:.2g}"
