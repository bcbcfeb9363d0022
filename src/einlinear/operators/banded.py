"""Banded operators: a few diagonals."""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Operator, OperatorError, inexact, remembered


@dataclass(eq=False, repr=False)
class Banded(Operator):
    """Square, zero but for some diagonals.

    Args:
        bands: `[..., diagonals, n]`; entry i of a diagonal of offset k stands in row i, column i + k
            (entries whose column would lie outside are not read).
        offsets: of the diagonals, each once; positive ones lie above the main diagonal.
    """

    bands: Tensor
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        self.bands, self.offsets = inexact(self.bands), tuple(self.offsets)
        if self.bands.ndim < 2 or self.bands.shape[-2] != len(self.offsets) or len({*self.offsets}) < len(self.offsets):
            raise OperatorError(
                f"cannot make a Banded operator of bands {tuple(self.bands.shape)} at the offsets {self.offsets}: "
                f"it needs one band `[..., n]` for each offset, and each offset once"
            )

    @remembered
    def shape(self) -> torch.Size:
        n = self.bands.shape[-1]
        return torch.Size((*self.bands.shape[:-2], n, n))

    @property
    def reach(self) -> tuple[int, int]:
        """How many diagonals below and above the main one."""
        return max(0, *(-k for k in self.offsets)), max(0, *self.offsets)

    def _facts(self) -> set[str]:
        below, above = self.reach
        return ({"upper"} if not below else set()) | ({"lower"} if not above else set())

    def band(self, offset: int) -> Tensor:
        """The diagonal of an offset as `torch.diagonal` gives it, `[..., n − |offset|]`."""
        entries = self.bands[..., self.offsets.index(offset), :]
        return entries[..., -offset:] if offset < 0 else entries[..., : entries.shape[-1] - offset]

    def _matmul(self, x: Tensor) -> Tensor:
        n, y = x.shape[-2], x.new_zeros(1)
        for offset in self.offsets:
            if abs(offset) < n:
                before, after = max(-offset, 0), max(offset, 0)
                moved = self.band(offset)[..., None] * x[..., after : n - before, :]
                y = y + torch.nn.functional.pad(moved, (0, 0, before, after))
        return y.expand(*torch.broadcast_shapes(self.batch_shape, x.shape[:-2]), *x.shape[-2:])

    def _transpose(self) -> "Banded":
        flipped = [self.bands[..., i, :].roll(k, -1) for i, k in enumerate(self.offsets)]
        return Banded(torch.stack(flipped, -2), tuple(-k for k in self.offsets))

    @property
    def flops(self) -> float:
        return 2.0 * len(self.offsets) * self.shape[-1]


def tridiagonal(lower: Tensor, main: Tensor, upper: Tensor) -> Banded:
    """The tridiagonal operator of three diagonals, `[..., n − 1]`, `[..., n]` and `[..., n − 1]`.

    It is known to be Hermitian where `upper` is `lower` (or its conjugate view).
    """
    if main.shape[-1] - 1 != lower.shape[-1] or lower.shape[-1] != upper.shape[-1]:
        raise OperatorError(
            f"cannot make a tridiagonal operator of diagonals of {lower.shape[-1]}, {main.shape[-1]} and "
            f"{upper.shape[-1]} entries: the outer two have one entry less than the main one"
        )
    pad = torch.nn.functional.pad
    bands = torch.broadcast_tensors(pad(lower, (1, 0)), main, pad(upper, (0, 1)))
    made = Banded(torch.stack(bands, -2), (-1, 0, 1))
    mirrored = lower is upper and not lower.is_complex() and not main.is_complex()
    return made.claim("hermitian") if mirrored else made
