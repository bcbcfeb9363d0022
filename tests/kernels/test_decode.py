import pytest
import torch

import einlinear as el
from einlinear.kernels.chain import Tiles
from einlinear.kernels.decode import AGAIN, FEW, Decode, decode
from einlinear.kernels.kernel import CUDA_HALF

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 150])
@pytest.mark.parametrize(("family", "widths"), [(el.BTT(), (256, 256)), (el.BTT(rank=3), (240, 400))], ids=str)
def test_a_few_tokens_get_what_many_do(family: el.Family, widths: tuple[int, int], tokens: int, bias: bool) -> None:
    structure = family(*widths).canonical
    assert Decode().refuses(structure, CUDA_HALF) is None
    x = torch.randn(tokens, widths[0], requires_grad=True)
    assert (x.numel() > AGAIN) == (tokens == 150)  # both ways of doing it
    factors = [torch.randn(shape, requires_grad=True) for shape in structure.matrix_shapes]
    added = torch.randn(widths[1], requires_grad=True) if bias else None
    y = Decode().prepare(structure)(factors, x, added)
    expected = el.apply(structure, [f.double() for f in factors], x.double()) + (0 if added is None else added.double())
    leaves = {"x": x, "first": factors[0], "second": factors[1]} | ({} if added is None else {"bias": added})
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(y, leaves.values(), direction.float())
    theirs = torch.autograd.grad(expected, leaves.values(), direction)
    for name, mine, their in zip(("y", *leaves), (y, *ours), (expected, *theirs), strict=True):
        error = (mine - their).norm() / their.norm()
        assert error < 1e-6, f"{name} differs by {error:.2g}"


def test_decode_is_a_proper_operator() -> None:
    shapes = el.BTT()(256, 256).canonical.matrix_shapes
    factors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    torch.library.opcheck(decode, (torch.randn(2, 256, requires_grad=True), *factors, torch.randn(256)))


def test_decode_is_chosen_for_few_tokens_only() -> None:
    structure = el.BTT()(1024, 1024).canonical
    costs = [
        [kernel.cost(structure, tokens, CUDA_HALF) for kernel in (Decode(), Tiles())] for tokens in (FEW - 1, FEW + 1)
    ]
    assert costs[0][0] < costs[0][1]
    assert costs[1][0] > costs[1][1]
    assert "two block-diagonal" in str(Decode().refuses(el.BlockDiagonal(blocks=4)(256, 256).canonical, CUDA_HALF))
