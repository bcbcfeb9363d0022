"""W of two factors, made by one kernel, forward and each gradient."""

import pytest
import torch

import einlinear as el
from einlinear.kernels.product import product, product_of

pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
pytestmark = pytest.mark.usefixtures("poisoned")

FAMILIES = [
    (el.BTT(), (36, 64)),
    (el.BTT(rank=3), (40, 24)),
    (el.Monarch(blocks=4), (64, 64)),
    (el.Kronecker(), (36, 64)),
    (el.TensorTrain(rank=2), (36, 64)),
    (el.LowRank(rank=5), (17, 30)),
]


@pytest.mark.parametrize(("family", "widths"), FAMILIES, ids=str)
def test_the_product_is_the_matrix(family: el.Family, widths: tuple[int, int]) -> None:
    structure = family(*widths).canonical
    found = product_of(structure)
    assert found is not None
    assert found.is_block == isinstance(family, el.BTT | el.Monarch)
    factors = [torch.randn(shape, requires_grad=True) for shape in structure.factor_shapes]
    weight = product(*factors, found.sizes, [*found.strides[0], *found.strides[1]])
    expected = el.dense(structure, [factor.double() for factor in factors])
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad(weight, factors, direction.float())
    theirs = torch.autograd.grad(expected, factors, direction)
    for name, mine, their in zip(("W", "first", "second"), (weight, *ours), (expected, *theirs), strict=True):
        error = (mine - their).norm() / their.norm()
        assert error < 1e-6, f"{name} differs by {error:.2g}"


def test_product_is_a_proper_operator() -> None:
    for family in (el.BTT(rank=2), el.Kronecker()):
        structure = family(16, 36).canonical
        found = product_of(structure)
        factors = [torch.randn(shape, requires_grad=True) for shape in structure.factor_shapes]
        torch.library.opcheck(product, (*factors, list(found.sizes), [*found.strides[0], *found.strides[1]]))


def test_what_is_no_product_of_two() -> None:
    assert product_of(el.BLAST(blocks=2, rank=2)(16, 16).canonical) is None
    assert product_of(el.BlockDiagonal(blocks=2)(16, 16).canonical) is None
    assert product_of(el.BTT(rank=64)(256, 256).canonical) is None
