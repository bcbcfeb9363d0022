from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from einlinear.operator import Operator, OperatorError, remembered, transformed

ENTRIES = 2**22
"""Of the matrix that are held at a time."""


@dataclass(eq=False, repr=False)
class Kernel(Operator):
    """K_ij = k(x_i, z_j), never held whole: made in chunks of rows whenever it is applied.

    Args:
        function: makes a block, `(x [..., p, d], z [..., q, d], *parameters) -> [..., p, q]`.
        x: points of the rows, `[..., m, d]`.
        z: points of the columns, `[..., n, d]`; without them those of the rows, and the operator
            counts as Hermitian.
        parameters: tensors that gradients flow to.
        transposed: whether this is Kᵀ.
    """

    function: Callable[..., Tensor]
    x: Tensor
    z: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()
    transposed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.x.ndim < 2 or (self.z is not None and self.z.shape[-1] != self.x.shape[-1]):
            shapes = [tuple(points.shape) for points in (self.x, self.z) if points is not None]
            raise OperatorError(
                f"cannot make a Kernel of points of shapes {shapes}: pass `[..., points, dimensions]`, as many "
                f"dimensions for rows as for columns"
            )

    @property
    def columns(self) -> Tensor:
        """The points of the columns."""
        return self.x if self.z is None else self.z

    @remembered
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.x.shape[:-2], self.columns.shape[:-2])
        sides = (self.x.shape[-2], self.columns.shape[-2])
        return torch.Size((*batch, *(sides[::-1] if self.transposed else sides)))

    def _facts(self) -> set[str]:
        return {"hermitian"} if self.z is None else set()

    def _chunks(self) -> list[Tensor]:
        rows = max(1, ENTRIES // max(1, self.columns.shape[-2] * max(1, self.x[..., 0, 0].numel())))
        return list(self.x.split(rows, -2))

    def _block(self, points: Tensor) -> Tensor:
        return self.function(points, self.columns, *self.parameters)

    def _matmul(self, v: Tensor) -> Tensor:
        def rows(points: Tensor, v: Tensor) -> Tensor:
            return self._block(points) @ v

        def columns(points: Tensor, v: Tensor) -> Tensor:
            return self._block(points).mT @ v

        chunks = self._chunks()
        if not self.transposed:
            return torch.cat([self._run(rows, points, v, len(chunks)) for points in chunks], -2)
        parts = v.split([points.shape[-2] for points in chunks], -2)
        return torch.stack(
            [self._run(columns, points, part, len(chunks)) for points, part in zip(chunks, parts, strict=True)]
        ).sum(0)

    def _run(self, apply: Callable[[Tensor, Tensor], Tensor], points: Tensor, v: Tensor, chunks: int) -> Tensor:
        """Keeps no block for the backward pass where there are several."""
        if chunks == 1 or not torch.is_grad_enabled() or transformed(points, v):
            return apply(points, v)
        kept: Tensor = checkpoint(apply, points, v, use_reentrant=False)
        return kept

    def dense(self) -> Tensor:
        block = self._block(self.x)
        return (block.mT if self.transposed else block).expand(self.shape)

    def entries(self) -> Tensor:
        """The diagonal, `[..., n]`, point by point."""
        pairs = self.function(self.x[..., :, None, :], self.columns[..., :, None, :], *self.parameters)
        return pairs[..., 0, 0].expand(*self.batch_shape, self.shape[-1])

    def _transpose(self) -> "Kernel":
        return Kernel(self.function, self.x, self.z, self.parameters, transposed=not self.transposed)

    @property
    def flops(self) -> float:
        return 2.0 * (self.x.shape[-1] + 4) * self.shape[-1] * self.shape[-2]
