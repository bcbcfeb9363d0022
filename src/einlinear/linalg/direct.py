"""Factorisations of a matrix that is written out, by LAPACK through torch; one clear sentence for what has none."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from einlinear.linalg.result import NearlySingular
from einlinear.operator import Dense, Operator, OperatorError, common, remembered, transformed
from einlinear.operators import Triangular

MEMORY = 2**27
"""Entries that a matrix may have to be written out: 1 GiB in float64."""
ENOUGH = 5e12
"""Floating-point operations up to which an exact answer is preferred to an estimate: minutes on a CPU's core."""


@dataclass(eq=False, repr=False)
class InverseLU(Operator):
    """A⁻¹ by P, L and U of A = PLU, `[..., n, n]`; `side` is what of it: "", "T" or "H"."""

    lu: Tensor
    pivots: Tensor
    side: str = ""

    @remembered
    def shape(self) -> torch.Size:
        return self.lu.shape

    def _matmul(self, x: Tensor) -> Tensor:
        batch = common(tuple(self.lu.shape[:-2]), tuple(x.shape[:-2]))
        x = x.expand(*batch, *x.shape[-2:])
        if self.side == "T" and self.lu.is_complex():
            return torch.linalg.lu_solve(self.lu, self.pivots, x.conj(), adjoint=True).conj()
        return torch.linalg.lu_solve(self.lu, self.pivots, x, adjoint=bool(self.side))

    def _transpose(self) -> "InverseLU":
        if self.side == "H":
            return InverseLU(self.lu.conj(), self.pivots)
        return replace(self, side="" if self.side else "T", claims=frozenset())

    def original(self) -> Operator:
        """A."""
        p, lower, upper = torch.lu_unpack(self.lu, self.pivots)
        matrix = p @ lower @ upper
        return Dense({"": matrix, "T": matrix.mT, "H": matrix.mH}[self.side])

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and logarithm of the determinant of A⁻¹."""
        diagonal = self.lu.diagonal(0, -2, -1)
        swapped = self.pivots != _places(diagonal.shape[-1], diagonal.device)
        logarithm = -diagonal.abs().log().sum(-1)
        if not diagonal.is_complex():
            odd = ((diagonal < 0) ^ swapped).sum(-1, dtype=diagonal.dtype).remainder(2)
            return 1 - 2 * odd, logarithm
        sign = (torch.sgn(diagonal) * torch.where(swapped, -1.0, 1.0)).prod(-1)
        return (sign if self.side == "H" else sign.conj()).resolve_conj(), logarithm

    @property
    def flops(self) -> float:
        return 2.0 * self.shape[-1] ** 2

    def _text(self) -> str:
        return f"LU⁻¹{self.side}({self.lu.shape[-1]}×{self.lu.shape[-1]})"


@lru_cache(maxsize=64)
def _places(n: int, device: torch.device) -> Tensor:
    """LAPACK's pivots where nothing is swapped."""
    return torch.arange(1, n + 1, device=device, dtype=torch.int32)


def written(operator: Operator) -> Tensor:
    """The matrix, in at least 32 bits.

    Raises:
        OperatorError: where it would have more than `MEMORY` entries.
    """
    m, n = operator.shape[-2:]
    if not isinstance(operator, Dense) and m * n > MEMORY:
        raise OperatorError(
            f"cannot write out {operator!r}: its {m * n:.3g} entries are more than the {MEMORY:.3g} that are allowed "
            f"for (einlinear.linalg.direct.MEMORY), and no rule answers this question without them"
        )
    matrix = operator.dense()
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def lu_inverse(operator: Operator) -> InverseLU:
    """A⁻¹ by LU with partial pivoting.

    Raises:
        OperatorError: where A is exactly singular; a warning where it is so to working precision.
    """
    lu, pivots, info = torch.linalg.lu_factor_ex(written(operator))
    if not transformed(lu) and nearly_singular(lu.diagonal(0, -2, -1)):
        if info.any():
            raise OperatorError(
                f"cannot invert {operator!r}: it is singular (pivot {int(info.max())} of its LU factorisation is "
                f"zero); pinv and lstsq answer in the sense of least squares"
            )
        warn_if_singular(operator, lu.diagonal(0, -2, -1))
    return InverseLU(lu, pivots)


def nearly_singular(pivots: Tensor) -> bool:
    """Whether the pivots, `[..., n]`, of any matrix span more than working precision, or one is zero."""
    if not pivots.numel():
        return False
    low, high = pivots.detach().abs().aminmax(dim=-1)
    return bool((low <= torch.finfo(low.dtype).eps * high).any())


def cholesky(operator: Operator) -> Triangular:
    """The lower L with A = L Lᴴ.

    Raises:
        OperatorError: where A is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(written(operator))
    if not transformed(lower) and info.any():
        raise OperatorError(
            f"cannot factorise {operator!r} as L Lᴴ: it is not positive definite (its leading minor of order "
            f"{int(info.max())} is not positive)"
        )
    return Triangular(lower)


def warn_if_singular(operator: Operator, pivots: Tensor) -> None:
    """Warns where the pivots, `[..., n]`, span more than working precision."""
    if nearly_singular(pivots):
        size = pivots.detach().abs()
        ratio = size.amin(-1) / size.amax(-1)
        warnings.warn(
            f"{operator!r} is singular to working precision (ratio of its pivots {float(ratio.min()):.2g}): "
            f"the answer may have no correct digit; pinv and lstsq answer in the sense of least squares",
            NearlySingular,
            stacklevel=3,
        )


def affordable(operator: Operator) -> bool:
    """Whether to write the operator out and factorise it: it fits, and costs less than `ENOUGH`."""
    m, n = operator.shape[-2:]
    return isinstance(operator, Dense) or (m * n <= MEMORY and cubic(operator) <= ENOUGH)


def cubic(operator: Operator) -> float:
    """Modelled operations to write out and factorise: n products and 2/3 n³ each, for the whole batch."""
    *batch, m, n = operator.shape
    each = 2 / 3 * max(m, n) * min(m, n) ** 2 + (0 if isinstance(operator, Dense) else min(m, n) * operator.flops)
    count = 1
    for size in batch:
        count *= size
    return count * each
