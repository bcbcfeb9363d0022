"""Operators that only move entries: selections of rows, permutations, and what is cut out by them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from einlinear.operator import Fixed, Operator, OperatorError, indexed, product, remembered, transformed


@dataclass(eq=False, repr=False)
class Selection(Fixed):
    """Takes the entries `index`, `[..., k]`, of a vector of `n`; transposed, puts them back among zeros."""

    index: Tensor
    n: int
    back: bool = False

    def __post_init__(self) -> None:
        self.device = self.device or self.index.device
        super().__post_init__()

    @remembered
    def shape(self) -> torch.Size:
        *batch, rows = self.index.shape
        return torch.Size((*batch, self.n, rows) if self.back else (*batch, rows, self.n))

    def _matmul(self, x: Tensor) -> Tensor:
        if self.index.ndim > 1:
            batch = torch.broadcast_shapes(self.index.shape[:-1], x.shape[:-2])
            index = self.index[..., None].expand(*batch, -1, x.shape[-1])
            x = x.expand(*batch, *x.shape[-2:])
            if not self.back:
                return x.gather(-2, index)
            return x.new_zeros(*batch, self.n, x.shape[-1]).scatter_add(-2, index, x)
        if not self.back:
            return x.index_select(-2, self.index)
        return x.new_zeros(*x.shape[:-2], self.n, x.shape[-1]).index_add(-2, self.index, x)

    def _transpose(self) -> Operator:
        return Selection(self.index, self.n, not self.back, dtype=self.dtype, device=self.device)

    @property
    def flops(self) -> float:
        return float(self.n)


@dataclass(eq=False, repr=False)
class Permutation(Fixed):
    """(P x)_i = x_index[i].

    Raises:
        OperatorError: if `index` does not hold every number below n once.
    """

    index: Tensor
    inverse_index: Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _sign: int | None = None

    def __post_init__(self) -> None:
        self.device = self.device or self.index.device
        super().__post_init__()
        if self.inverse_index is None:
            n = len(self.index)
            if not transformed() and not torch.equal(
                self.index.sort().values, torch.arange(n, device=self.index.device)
            ):
                raise OperatorError(f"cannot make a Permutation of {n} entries: each number below {n} must occur once")
            self.inverse_index = torch.argsort(self.index)

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((len(self.index), len(self.index)))

    def _facts(self) -> set[str]:
        return {"unitary"}

    def _matmul(self, x: Tensor) -> Tensor:
        return x.index_select(-2, self.index)

    def _transpose(self) -> "Permutation":
        return Permutation(self.inverse_index, self.index, self._sign, dtype=self.dtype, device=self.device)

    def sign(self) -> int:
        """+1 for an even permutation, −1 for an odd one."""
        if self._sign is None:
            self._sign = parity(self.index)
        return self._sign

    @property
    def flops(self) -> float:
        return float(len(self.index))


def parity(index: Tensor) -> int:
    """The sign of a permutation: n minus the number of its cycles decides.

    Each entry learns the smallest number of its cycle, over 1, 2, 4 … steps at once.
    """
    n = len(index)
    smallest, jump = torch.arange(n, device=index.device), index
    for _ in range(max(n - 1, 0).bit_length()):
        smallest = torch.minimum(smallest, smallest[jump])
        jump = jump[jump]
    cycles = int((smallest == torch.arange(n, device=index.device)).sum())
    return -1 if (n - cycles) % 2 else 1


def select(operator: Operator, rows: object, columns: object) -> Operator:
    """A[rows, columns] by slices, index tensors or masks, as S A Sᵀ."""
    m, n = operator.shape[-2:]
    left, right = (_selection(operator, size, chosen) for size, chosen in ((m, rows), (n, columns)))
    factors = [operator if left is None else product(left, operator)]
    return factors[0] if right is None else product(factors[0], right.T)


@indexed.register
def _(operator: Operator, index: Any) -> Operator | Tensor:
    given = index if isinstance(index, tuple) else (index,)
    given = given[1:] if given and given[0] is Ellipsis else given
    if not 1 <= len(given) <= 2 or any(part is None or part is Ellipsis for part in given):
        raise OperatorError(
            f"cannot index {operator!r} by {index!r}: pass what to take of its rows, or of its rows and columns"
        )
    sides = [int(part) if getattr(part, "ndim", None) == 0 else part for part in (*given, slice(None))[:2]]
    whole = [isinstance(part, int) and not isinstance(part, bool) for part in sides]
    if not any(whole) and any(isinstance(part, slice) for part in sides):
        return select(operator, *sides)
    rows, columns = (_places(operator, n, part) for n, part in zip(operator.shape[-2:], sides, strict=True))
    if not any(whole) and len(rows) != len(columns):
        raise OperatorError(
            f"cannot take entries of {operator!r} at {len(rows)} rows and {len(columns)} columns in pairs: give as "
            f"many of both, or take the submatrix by einlinear.linalg.select"
        )
    if whole[0] and not whole[1]:
        return operator.T.matmul(_units(operator.T, rows))[..., columns, 0]
    found = operator.matmul(_units(operator, columns))
    entries = found[..., rows, 0 if whole[1] else torch.arange(len(columns), device=operator.device)]
    return entries[..., 0] if all(whole) else entries


def _units(operator: Operator, places: Tensor) -> Tensor:
    """The columns of the unit matrix that these numbers name, `[n, k]`."""
    every = torch.arange(operator.shape[-1], device=operator.device)
    return (every[:, None] == places).to(operator.dtype)


def masked(operator: Operator, rows: Tensor, columns: Tensor | None = None) -> Operator:
    """The rows and columns where the masks, `[m]` and `[n]`, are true; one mask serves both sides."""
    return select(operator, rows, rows if columns is None else columns)


def _selection(operator: Operator, size: int, chosen: object) -> Selection | None:
    if isinstance(chosen, slice) and chosen == slice(None):
        return None
    if isinstance(chosen, int):
        raise OperatorError(f"cannot take a single row or column of {operator!r} as an operator: use a slice, or A[i]")
    return Selection(_places(operator, size, chosen), size, dtype=operator.dtype, device=operator.device)


def _places(operator: Operator, size: int, chosen: Any) -> Tensor:
    """The numbers below `size` that an index names, `[k]`."""
    try:
        if isinstance(chosen, list):
            chosen = torch.tensor(chosen, dtype=None if chosen else torch.int64, device=operator.device)
        places: Tensor = torch.arange(size, device=operator.device)[chosen].reshape(-1)
    except (IndexError, TypeError, ValueError) as error:
        raise OperatorError(f"cannot select from {operator!r}: {error}") from None
    return places
