"""Second moments of a layer's inputs: all that activation-aware projection needs to know of calibration data."""

import torch
from torch import Tensor

from einlinear.structure import StructureError

CHUNK = 8192
"""Vectors that are held in double precision at a time."""


class Moments:
    """Streams the second moments of inputs, in float64; never holds the inputs themselves.

    The output error of a layer whose weight W becomes Ŵ, summed over inputs x, is
    Σ ‖(W − Ŵ) x‖² = tr (W − Ŵ) (Σ x xᴴ) (W − Ŵ)ᴴ: it depends on the inputs through this matrix alone.

    Example:
        >>> moments = Moments(3)
        >>> moments.update(torch.eye(3)).update(torch.ones(2, 5, 3)).tokens
        13
        >>> moments.matrix.shape
        torch.Size([3, 3])
    """

    def __init__(self, d_in: int, device: torch.device | str | None = None) -> None:
        self._sum = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.tokens = 0
        """How many vectors have been seen."""

    @torch.no_grad()
    def update(self, x: Tensor) -> "Moments":
        """Counts every vector of `x`, `[..., d_in]`, real or complex.

        Raises:
            StructureError: for inputs of another width, or not finite; nothing is counted then.
        """
        d_in = len(self._sum)
        if x.ndim == 0 or x.shape[-1] != d_in:
            raise StructureError(
                f"cannot count inputs of shape {tuple(x.shape)}: the last dimension must be d_in = {d_in}"
            )
        rows = x.detach().reshape(-1, d_in)
        exact = torch.complex128 if x.is_complex() else torch.float64
        product = torch.zeros_like(self._sum, dtype=exact)
        for chunk in rows.split(CHUNK):
            chunk = chunk.to(self._sum.device, exact)
            product += chunk.mT @ chunk.conj()
        if not torch.isfinite(product).all():
            raise StructureError("cannot count inputs that are not finite (or overflow when squared); mend them first")
        self._sum = self._sum + product
        self.tokens += len(rows)
        return self

    @property
    def matrix(self) -> Tensor:
        """E[x xᴴ], `[d_in, d_in]`: the mean over tokens.

        Raises:
            StructureError: if no token has been seen.
        """
        if not self.tokens:
            raise StructureError(
                "cannot weigh by the moments of zero calibration tokens: pass some inputs to update(x) first"
            )
        return self._sum / self.tokens

    @property
    def importance(self) -> Tensor:
        """The root mean square of each input feature, `[d_in]`."""
        return self.matrix.diagonal().real.clamp(min=0).sqrt()

    def __repr__(self) -> str:
        return f"Moments(d_in={len(self._sum)}, tokens={self.tokens})"


def second_moments(moments: "Tensor | Moments", like: Tensor) -> Tensor:
    """The `[d_in, d_in]` matrix of `moments`, checked, in double precision on the device of the weight `like`.

    Raises:
        StructureError: for another shape, entries that are not finite, zero tokens, or a matrix that is not
            Hermitian and positive semi-definite.
    """
    matrix = moments.matrix if isinstance(moments, Moments) else moments.detach()
    d_in = like.shape[-1]
    if matrix.shape != (d_in, d_in):
        raise StructureError(
            f"cannot weigh by moments of shape {tuple(matrix.shape)}: the weight has {d_in} inputs, "
            f"so they are a [{d_in}, {d_in}] matrix, the sum of x xᵀ over calibration inputs"
        )
    matrix = matrix.to(like.device, torch.complex128 if like.is_complex() or matrix.is_complex() else torch.float64)
    if not torch.isfinite(matrix).all():
        raise StructureError("cannot weigh by moments with entries that are not finite; calibrate without them")
    diagonal = matrix.diagonal().real
    scale = diagonal.abs().max()
    if not scale:
        raise StructureError("cannot weigh by moments that are all zero; calibrate with inputs that are not zero")
    if (matrix - matrix.mH).abs().max() > 1e-6 * scale:
        raise StructureError("cannot weigh by moments that are not symmetric: pass the sum of x xᵀ over inputs x")
    matrix = (matrix + matrix.mH) / (2 * scale)
    # Positive semi-definite up to rounding, float32's included: a small shift must make it definite.
    shift = 1e-5 * torch.eye(d_in, dtype=matrix.dtype, device=matrix.device)
    if torch.linalg.cholesky_ex(matrix + shift).info:
        raise StructureError(
            "cannot weigh by moments that are not positive semi-definite: pass the sum of x xᵀ over inputs x"
        )
    return matrix * scale
