"""Sparse operators, by their nonzero entries in any order."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear.operator import Operator, OperatorError, inexact, remembered, transformed


@dataclass(eq=False, repr=False)
class Sparse(Operator):
    """Entries `values`, `[..., nonzeros]`, in the places `(rows, columns)`, each `[nonzeros]`.

    Places come in any order; entries of one place add up. Gradients flow to the values.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    size: tuple[int, int]
    _sorted: tuple[Tensor, Tensor] | None = None
    """By rows: the order of the entries, and where each row starts in it."""

    def __post_init__(self) -> None:
        self.values, self.size = inexact(self.values), (int(self.size[0]), int(self.size[1]))
        count = self.values.shape[-1]
        if self.rows.shape != (count,) or self.columns.shape != (count,):
            raise OperatorError(
                f"cannot make a Sparse operator of {count} values with {tuple(self.rows.shape)} rows and "
                f"{tuple(self.columns.shape)} columns: each value has one of each"
            )
        if count and not transformed():
            for name, places, limit in (("row", self.rows, self.size[0]), ("column", self.columns, self.size[1])):
                low, high = int(places.min()), int(places.max())
                if low < 0 or high >= limit:
                    raise OperatorError(
                        f"cannot make a Sparse operator of shape {self.size}: it has a {name} "
                        f"{low if low < 0 else high}, and {name}s are numbered 0 to {limit - 1}"
                    )

    @classmethod
    def of(cls, tensor: Tensor) -> "Sparse":
        """From a torch sparse tensor of two dimensions, COO (coalesced or not) or CSR."""
        coo = tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse_coo()
        if coo.sparse_dim() != 2 or coo.dense_dim():
            raise OperatorError(f"cannot make a Sparse operator of a sparse tensor of shape {tuple(tensor.shape)}")
        rows, columns = coo._indices()
        return cls(coo._values(), rows, columns, (tensor.shape[0], tensor.shape[1]))

    @classmethod
    def csr(cls, crow: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> "Sparse":
        """From compressed rows: row i holds the entries `crow[i]` to `crow[i + 1]`."""
        rows = torch.repeat_interleave(torch.arange(size[0], device=crow.device), crow.diff())
        return cls(values, rows, columns, size)

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-1], *self.size))

    def _matmul(self, x: Tensor) -> Tensor:
        if self.values.ndim == 1 and not transformed(self.values, x) and x.element_size() > 2:
            if self._sorted is None:
                self._sorted = _compressed(self.rows, self.size[0])
            flat = x.movedim(-2, 0).reshape(x.shape[-2], -1)
            y = _Multiply.apply(self.values, flat, self.rows, self.columns, self.size, *self._sorted)
            return y.reshape(self.size[0], *x.shape[:-2], x.shape[-1]).movedim(0, -2)
        terms = self.values[..., None] * x.index_select(-2, self.columns)
        return terms.new_zeros(*terms.shape[:-2], self.size[0], terms.shape[-1]).index_add(-2, self.rows, terms)

    def _transpose(self) -> "Sparse":
        return Sparse(self.values, self.columns, self.rows, (self.size[1], self.size[0]))

    def diagonal(self) -> Tensor:
        """The main diagonal, `[..., min(m, n)]`."""
        on = (self.rows == self.columns).nonzero()[:, 0]
        zero = self.values.new_zeros(*self.values.shape[:-1], min(self.size))
        return zero.index_add(-1, self.rows[on], self.values[..., on])

    def _text(self) -> str:
        return f"{super()._text()[:-1]}, {len(self.rows)} entries)"


class _Multiply(torch.autograd.Function):
    """One sparse matmul by compressed rows; its gradients are a sparse matmul and a sampled product."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, rows: Tensor, columns: Tensor, size: Any, order: Tensor, starts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, x, rows, columns)
        ctx.size = size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
            matrix = torch.sparse_csr_tensor(starts, columns[order], values[order], size, check_invariants=False)
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, x, rows, columns = ctx.saved_tensors
        to_x = to_values = None
        if ctx.needs_input_grad[0]:
            to_values = (gradient.index_select(0, rows) * x.index_select(0, columns).conj()).sum(-1)
        if ctx.needs_input_grad[1]:
            to_x = Sparse(values.conj(), columns, rows, ctx.size[::-1])._matmul(gradient)
        return to_values, to_x, None, None, None, None, None


def _compressed(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return order, starts
