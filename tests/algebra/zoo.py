"""One operator of every kind, for the laws that all of them keep."""

import math

import torch
from torch import Tensor

import einlinear as el

la = el.linalg
Batch = tuple[int, ...]


def gaussian(x, z, width):
    """The kernel exp(−‖x − z‖² / width)."""
    return (-(x[..., :, None, :] - z[..., None, :, :]).square().sum(-1) / width).exp()


def plain(x, z):
    return gaussian(x, z, 1.0)


class Draw:
    """Random tensors of one dtype and batch."""

    def __init__(self, dtype: torch.dtype, batch: Batch = ()) -> None:
        self.dtype, self.batch, self.generator = dtype, batch, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn((*self.batch, *shape), dtype=self.dtype, generator=self.generator)

    def structure(self, family, *widths):
        spec = family if isinstance(family, el.Structure) else family(*widths)
        return la.operator(spec, [self(*shape) for shape in spec.factor_shapes])


def conjugated(Q, B):
    """Q B Qᴴ."""
    return Q @ B @ Q.H


ODD = el.Structure.parse("i j, i a j, a b i -> b j", i=3, j=2, a=3, b=3)
"""Axes that one factor leaves alone, and one that both sides share."""

MAKERS = {
    "dense": lambda r: la.Dense(r(5, 5)),
    "wide": lambda r: la.Dense(r(3, 5)),
    "diagonal": lambda r: la.Diagonal(r(6)),
    "identity": lambda r: la.Identity(4, dtype=r.dtype),
    "multiple of the unit": lambda r: r() * la.Identity(4, dtype=r.dtype),
    "zero": lambda r: la.Zero(3, 4, dtype=r.dtype),
    "lower": lambda r: la.Triangular(r(5, 5)),
    "upper with unit diagonal": lambda r: la.Triangular(r(5, 5), upper=True, unit=True),
    "inverse of lower": lambda r: la.Triangular(r(5, 5) + 5 * torch.eye(5, dtype=r.dtype)).inverse(),
    "odd permutation": lambda r: la.Permutation(torch.tensor([2, 0, 3, 1, 4, 5]), dtype=r.dtype),
    "selection": lambda r: la.Selection(torch.tensor([2, 0, 2]), 5, dtype=r.dtype),
    "Kronecker": lambda r: la.kron(r(2, 2), r(3, 3), r(2, 2)),
    "rectangular Kronecker": lambda r: la.kron(r(2, 3), r(3, 2)),
    "Kronecker sum": lambda r: la.kronsum(r(2, 2), r(3, 3), r(2, 2)),
    "Hermitian Kronecker sum": lambda r: la.kronsum(*(la.Dense(a @ a.mH).claim("psd") for a in (r(3, 3), r(2, 2)))),
    "Kronecker and unit": lambda r: la.kron(r(2, 2), r(3, 3)) + 2 * la.Identity(6, dtype=r.dtype),
    "block-diagonal": lambda r: la.BlockDiagonal(r(3, 2, 2)),
    "rectangular blocks": lambda r: la.BlockDiagonal(r(3, 2, 4)),
    "direct sum": lambda r: la.block_diag(r(2, 2), la.Diagonal(r(3))),
    "block": lambda r: la.block([[r(2, 2), r(2, 3)], [None, la.Diagonal(r(3))]]),
    "block to eliminate": lambda r: la.block([[la.Diagonal(r(4)), r(4, 2)], [r(2, 4), r(2, 2)]]),
    "concatenated": lambda r: la.concatenate([r(2, 3), r(1, 3)]),
    "Toeplitz": lambda r: la.Toeplitz(r(5), r(5)),
    "rectangular Toeplitz": lambda r: la.Toeplitz(r(3), r(6)),
    "Hermitian Toeplitz": lambda r: la.Toeplitz(r(5)),
    "circulant": lambda r: la.Circulant(r(6)),
    "Hankel": lambda r: la.hankel(r(4), r(3)),
    "banded": lambda r: la.Banded(r(3, 6), (-2, 0, 1)),
    "long band": lambda r: la.Banded(r(3, 20) + 3, (-1, 0, 2)),
    "tridiagonal": lambda r: la.tridiagonal(r(4), r(5), r(4)),
    "reflections": lambda r: la.Householder(r(5, 2)),
    "Householder with scales": lambda r: la.Householder(r(5, 3), r(3)),
    "diagonal and low rank": lambda r: la.LowRankUpdate(la.Diagonal(r(5)), r(5, 2), r(5, 2)),
    "low rank with a core": lambda r: la.LowRankUpdate(la.Diagonal(r(5)), r(5, 2), core=la.Dense(r(2, 2))),
    "sum that is low rank": lambda r: la.Dense(r(6, 2)) @ la.Dense(r(2, 6)) + la.Diagonal(r(6)),
    "sparse, shuffled, with duplicates": lambda r: la.Sparse(
        r(5), torch.tensor([3, 0, 3, 1, 0]), torch.tensor([1, 2, 1, 0, 0]), (4, 5)
    ),
    "square sparse": lambda r: la.Sparse(
        r(8), torch.tensor([2, 0, 1, 3, 0, 1, 0, 2]), torch.tensor([0, 3, 1, 2, 0, 1, 0, 3]), (4, 4)
    ),
    "BTT": lambda r: r.structure(el.BTT(rank=2), 12, 12),
    "Monarch": lambda r: r.structure(el.Monarch(4), 16, 16),
    "structure that is Kronecker": lambda r: r.structure(el.Kronecker(), 6, 8),
    "low-rank structure": lambda r: r.structure(el.LowRank(2), 5, 6),
    "structure with shared axes": lambda r: r.structure(ODD),
    "padded structure": lambda r: r.structure(el.BTT(), 13, 11),
    "tensor train": lambda r: r.structure(el.TensorTrain(2, 3), 8, 27),
    "BLAST": lambda r: r.structure(el.BLAST(2, 3), 8, 6),
    "product": lambda r: la.Dense(r(5, 5)) @ la.Triangular(r(5, 5)),
    "sum": lambda r: la.Dense(r(5, 5)) + 2 * la.Triangular(r(5, 5)),
    "negative multiple": lambda r: -3 * la.Dense(r(5, 5)),
    "conjugated by reflections": lambda r: conjugated(la.Householder(r(5, 2)), la.Diagonal(r(5))),
    "sliced": lambda r: la.select(la.Dense(r(5, 5)), slice(1, 4), torch.tensor([0, 2])),
}
REAL = {
    "kernel": lambda r: la.Kernel(gaussian, r(5, 2), r(4, 2), (torch.ones((), dtype=r.dtype),)),
    "kernel of one set": lambda r: la.Kernel(plain, r(5, 2)),
}
UNBATCHED = {
    "Jacobian": lambda r: la.Jacobian(lambda x: torch.stack([x[0] * x[1], x.sin().sum(), x[2] ** 2, x[0]]), r(3)),
    "Hessian": lambda r: la.Hessian(lambda x: (x.sin() * x.prod()).sum(), r(4)),
    "Gauss-Newton": lambda r: la.gauss_newton(lambda x: x.sin() * x.sum(), r(4)),
    "Fisher": lambda r: la.fisher(lambda x: x.sin() * x.sum(), r(4)),
}
COMPLEX = {
    "Fourier": lambda r: la.Fourier(5, dtype=r.dtype),
    "Fourier without scale": lambda r: la.Fourier(4, unitary=False, dtype=r.dtype),
}
NAMES = [*MAKERS, *REAL, *UNBATCHED, *COMPLEX]


def make(name: str, dtype: torch.dtype, batch: Batch = ()):
    """The operator of that name, or None where it has no such dtype or batch."""
    draw = Draw(dtype, batch)
    if name in MAKERS:
        return MAKERS[name](draw)
    if name in COMPLEX:
        return COMPLEX[name](draw) if dtype.is_complex else None
    if dtype.is_complex or (name in UNBATCHED and batch):
        return None
    return {**REAL, **UNBATCHED}[name](draw)


def poisson(n: int, dtype: torch.dtype = torch.float64):
    """The second difference with zero boundaries: eigenvalues 4 sin²(kπ / 2(n + 1)), determinant n + 1."""
    off = torch.full((n - 1,), -1.0, dtype=dtype)
    return la.tridiagonal(off, torch.full((n,), 2.0, dtype=dtype), off).claim("psd")


def poisson_values(n: int) -> Tensor:
    return 4 * torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * math.pi / (2 * (n + 1))) ** 2
