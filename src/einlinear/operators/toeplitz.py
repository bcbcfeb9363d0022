"""Operators that the discrete Fourier transform diagonalises, or nearly: circulant, Toeplitz, the transform itself."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Fixed, Operator, OperatorError, inexact, remembered


@dataclass(eq=False, repr=False)
class Fourier(Fixed):
    """The discrete Fourier transform of length `n`: entries exp(−2πi jk / n), divided by √n unless `unitary=False`.

    `inverted` is its adjoint: the inverse transform where it is unitary.
    """

    n: int
    unitary: bool = True
    inverted: bool = False

    def __post_init__(self) -> None:
        self.dtype = (self.dtype or torch.get_default_dtype()).to_complex()
        super().__post_init__()

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.n))

    def _facts(self) -> set[str]:
        return {"unitary"} if self.unitary else set()

    def _matmul(self, x: Tensor) -> Tensor:
        norm = "ortho" if self.unitary else "forward" if self.inverted else "backward"
        return (torch.fft.ifft if self.inverted else torch.fft.fft)(x, dim=-2, norm=norm)

    def _transpose(self) -> "Fourier":
        return self

    def _conj(self) -> "Fourier":
        return Fourier(self.n, self.unitary, not self.inverted, dtype=self.dtype, device=self.device)

    @property
    def flops(self) -> float:
        return _transform_flops(self.n)


@dataclass(eq=False, repr=False)
class Circulant(Operator):
    """C_ij = column[(i − j) mod n], from its first column `[..., n]`; C = Fᴴ diag(F column) F."""

    column: Tensor

    def __post_init__(self) -> None:
        self.column = inexact(self.column, 1)

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((*self.column.shape, self.column.shape[-1]))

    def eigenvalues(self) -> Tensor:
        """The transform of the first column: the eigenvalues, in the order of the frequencies."""
        return torch.fft.fft(self.column) if self.column.shape[-1] else self.column.to(self.dtype.to_complex())

    def _matmul(self, x: Tensor) -> Tensor:
        return _convolve(self.column, x, self.column.shape[-1])

    def _transpose(self) -> "Circulant":
        return Circulant(self.column.flip(-1).roll(1, -1))

    @property
    def flops(self) -> float:
        return 3 * _transform_flops(self.shape[-1])


@dataclass(eq=False, repr=False)
class Toeplitz(Operator):
    """T_ij = column[i − j] on and below the diagonal, row[j − i] above it.

    Args:
        column: the first column, `[..., m]`.
        row: the first row, `[..., n]`; its first entry is not read. Without it the operator is
            Hermitian: the row is the column's conjugate, and the diagonal its real part.
    """

    column: Tensor
    row: Tensor | None = None

    def __post_init__(self) -> None:
        self.column = inexact(self.column, 1)
        if self.row is not None:
            self.row = inexact(self.row, 1)
            dtype = torch.promote_types(self.column.dtype, self.row.dtype)
            self.column, self.row = self.column.to(dtype), self.row.to(dtype)

    @property
    def first_column(self) -> Tensor:
        """The first column, `[..., m]`."""
        if self.row is not None or not self.column.is_complex():
            return self.column
        return torch.cat([self.column[..., :1].real.to(self.column.dtype), self.column[..., 1:]], -1)

    @property
    def first_row(self) -> Tensor:
        """The first row, `[..., n]`; its first entry is the column's."""
        if self.row is None:
            return self.first_column.conj()
        return torch.cat([self.column[..., :1].expand(*self.row.shape[:-1], 1), self.row[..., 1:]], -1)

    @remembered
    def shape(self) -> torch.Size:
        row = self.column if self.row is None else self.row
        batch = torch.broadcast_shapes(self.column.shape[:-1], row.shape[:-1])
        return torch.Size((*batch, self.column.shape[-1], row.shape[-1]))

    def _facts(self) -> set[str]:
        return {"hermitian"} if self.row is None else set()

    def ring(self) -> Tensor:
        """The first column of the circulant matrix that holds this one in its corner."""
        column, row = self.first_column, self.first_row[..., 1:].flip(-1)
        batch = torch.broadcast_shapes(column.shape[:-1], row.shape[:-1])
        return torch.cat([column.expand(*batch, -1), row.expand(*batch, -1)], -1)

    def _matmul(self, x: Tensor) -> Tensor:
        m, n = self.shape[-2:]
        return _convolve(self.ring(), x, m + n - 1)[..., :m, :]

    def _transpose(self) -> "Toeplitz":
        return Toeplitz(self.first_row, self.first_column)

    def dense(self) -> Tensor:
        m, n = self.shape[-2:]
        place = torch.arange(m, device=self.device)[:, None] - torch.arange(n, device=self.device)
        return self.ring()[..., place % max(m + n - 1, 1)]

    @property
    def flops(self) -> float:
        return 3 * _transform_flops(sum(self.shape[-2:]))


def hankel(column: Tensor, row: Tensor) -> Operator:
    """H_ij = column[i + j], continued by `row` (the last row): a Toeplitz operator on reversed columns."""
    from einlinear.operators.selection import Permutation

    entries = torch.cat([column, row[..., 1:]], -1)
    m, n = column.shape[-1], row.shape[-1]
    if m == 0 or n == 0:
        raise OperatorError("cannot make a Hankel operator without entries: pass its first column and its last row")
    toeplitz = Toeplitz(entries[..., n - 1 :], entries[..., :n].flip(-1))
    reverse = Permutation(torch.arange(n - 1, -1, -1, device=column.device), dtype=toeplitz.dtype)
    return toeplitz @ reverse


def _convolve(column: Tensor, x: Tensor, length: int) -> Tensor:
    """The circular convolution of `column`, `[..., ≤ length]`, with each column of `x`, padded with zeros."""
    if length == 0 or x.shape[-1] == 0:
        return x.new_zeros(*torch.broadcast_shapes(column.shape[:-1], x.shape[:-2]), length, x.shape[-1])
    if not column.is_complex() and not x.is_complex():
        spectrum = torch.fft.rfft(column, length)[..., None] * torch.fft.rfft(x, length, dim=-2)
        return torch.fft.irfft(spectrum, length, dim=-2)
    spectrum = torch.fft.fft(column, length)[..., None] * torch.fft.fft(x, length, dim=-2)
    return torch.fft.ifft(spectrum, dim=-2)


def _transform_flops(n: int) -> float:
    return 5.0 * n * math.log2(max(n, 2))
