"""An orthonormal Krylov basis for each column of a batch, grown one vector at a time."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import divide, norm


class Basis:
    """Rows `[..., k, room, n]`: the vectors of one column side by side, so that projections are batched matmuls."""

    def __init__(self, first: Tensor, room: int) -> None:
        """`first` is [..., n, k] with unit (or zero) columns; `room` vectors a column are expected, more fit."""
        n, k = first.shape[-2:]
        self.rows = first.new_zeros((*first.shape[:-2], k, room, n))
        self.size = 0
        self.append(first)

    def append(self, vector: Tensor) -> None:
        if self.size == self.rows.shape[-2]:
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)], -2)
        self.rows[..., self.size, :] = vector.mT
        self.size += 1

    def orthogonalise(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gram-Schmidt, twice: the coefficients [..., k, size], the unit rest [..., n, k] and its length [..., 1, k].

        A rest that is rounding alone counts as none: vector and length are exactly zero (a happy breakdown).
        """
        rows, before = self.rows[..., : self.size, :], norm(w)
        coefficients = w.new_zeros(rows.shape[:-1])
        for _ in range(2):
            part = (rows.conj() @ w.mT.unsqueeze(-1)).squeeze(-1)
            w = w - (rows.mT @ part.unsqueeze(-1)).squeeze(-1).mT
            coefficients = coefficients + part
        length = norm(w)
        length = torch.where(length > 10 * torch.finfo(length.dtype).eps * before, length, 0)
        return coefficients, divide(w, length), length

    def combine(self, weights: Tensor) -> Tensor:
        """The sums [..., n, k] of the basis with `weights` [..., k, j], j at most the size."""
        dtype = torch.promote_types(self.rows.dtype, weights.dtype)
        rows, weights = self.rows[..., : weights.shape[-1], :].to(dtype), weights.to(dtype)
        return (rows.mT @ weights.unsqueeze(-1)).squeeze(-1).mT


def complement(block: Tensor, against: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`block` [..., n, b] made orthonormal, and orthogonal to orthonormal columns `against` [..., n, m], m + b <= n.

    A direction that is rounding alone, for the Krylov space is exhausted, gives way to a random one.
    """
    eps, before = torch.finfo(block.dtype).eps, norm(block)

    def project(w: Tensor) -> Tensor:
        for _ in range(2):
            w = w - against @ (against.mH @ w)
        return w

    q, r = torch.linalg.qr(project(divide(block, before)))
    weak = (r.diagonal(dim1=-2, dim2=-1).abs() <= 100 * eps).unsqueeze(-2)
    if bool(weak.any()):
        q, _ = torch.linalg.qr(torch.where(weak, project(random(block.shape, block, generator)), project(q)))
    columns: Tensor = torch.linalg.qr(project(q))[0]
    return columns


def random(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian entries of the dtype and on the device of `like`, drawn where the generator lives."""
    home = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=home, generator=generator).to(like.device)
