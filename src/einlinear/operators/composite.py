"""Compositions by ⊗, ⊕ and side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from einlinear.operator import (
    Operator,
    OperatorError,
    Scaled,
    Zero,
    broadcast,
    common,
    lift,
    multiple,
    remembered,
    size_text,
)

Side = tuple[Operator, ...]


@dataclass(eq=False, repr=False)
class Kronecker(Operator):
    """A ⊗ B ⊗ …: acts on each index of a vector that is read as an array, the last index fastest."""

    factors: Side

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[factor.batch_shape for factor in self.factors])
        m, n = [math.prod([factor.shape[side] for factor in self.factors]) for side in (-2, -1)]
        return torch.Size((*batch, m, n))

    def _facts(self) -> set[str]:
        return {*frozenset.intersection(*(factor.properties for factor in self.factors))}

    def _matmul(self, x: Tensor) -> Tensor:
        # Each factor reads its index as columns and leaves it in front: no copy but the first, and k ends last.
        k = x.shape[-1]
        if 0 in x.shape or 0 in self.shape:  # a size of which nothing follows for the others
            return x.new_zeros(*common(tuple(x.shape[:-2]), self.batch_shape), self.shape[-2], k)
        x = x.mT
        for factor in reversed(self.factors):
            batch = x.shape[:-2]
            x = factor.matmul(x.reshape(*batch, -1, factor.shape[-1]).mT)
        return x.reshape(*x.shape[:-2], self.shape[-2], k)

    def _transpose(self) -> Operator:
        return Kronecker(tuple(factor.T for factor in self.factors))

    def _conj(self) -> Operator:
        return Kronecker(tuple(factor.conj() for factor in self.factors), claims=self.claims)

    def dense(self) -> Tensor:
        return reduce(_outer, (factor.dense() for factor in self.factors)).expand(self.shape)

    @property
    def flops(self) -> float:
        n = self.shape[-1]
        done, total = 1, 0.0
        for factor in reversed(self.factors):
            n //= max(factor.shape[-1], 1)
            total += factor.flops * n * done
            done *= factor.shape[-2]
        return total

    def _text(self) -> str:
        return " ⊗ ".join(_inside(factor) for factor in self.factors)


@dataclass(eq=False, repr=False)
class KroneckerSum(Operator):
    """A ⊕ B ⊕ … = A⊗I⊗… + I⊗B⊗… + …"""

    terms: Side

    def __post_init__(self) -> None:
        for term in self.terms:
            if not term.square:
                raise OperatorError(f"cannot make a Kronecker sum of {term!r}: its terms are square")

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[term.batch_shape for term in self.terms])
        n = math.prod([term.shape[-1] for term in self.terms])
        return torch.Size((*batch, n, n))

    def _facts(self) -> set[str]:
        return {*frozenset.intersection(*(term.properties for term in self.terms))} - {"unitary"}

    def _matmul(self, x: Tensor) -> Tensor:
        *batch, n, k = x.shape
        if 0 in x.shape:
            return x.new_zeros(*common(tuple(batch), self.batch_shape), n, k)
        before, parts = 1, []
        for term in self.terms:
            size = term.shape[-1]
            first = x.reshape(*batch, before, size, -1).transpose(-3, -2)
            applied = term.matmul(first.reshape(*batch, size, -1))
            lead = applied.shape[:-2]
            parts.append(applied.reshape(*lead, size, before, -1).transpose(-3, -2).reshape(*lead, n, k))
            before *= size
        return reduce(torch.add, parts)

    def _transpose(self) -> Operator:
        return KroneckerSum(tuple(term.T for term in self.terms))

    def _conj(self) -> Operator:
        return KroneckerSum(tuple(term.conj() for term in self.terms), claims=self.claims)

    @property
    def flops(self) -> float:
        n = self.shape[-1]
        return sum((term.flops + term.shape[-1]) * n / max(term.shape[-1], 1) for term in self.terms)

    def _text(self) -> str:
        return " ⊕ ".join(_inside(term) for term in self.terms)


@dataclass(eq=False, repr=False)
class BlockDiagonal(Operator):
    """Blocks of one size down the diagonal: one tensor `[..., blocks, m, n]`, or any operator with a batch.

    The last dimension of its batch becomes the place on the diagonal.
    """

    of: Operator

    def __post_init__(self) -> None:
        self.of = lift(self.of)
        if not self.of.batch_shape:
            raise OperatorError(f"cannot make a BlockDiagonal of {self.of!r}: it needs a batch `[..., blocks, m, n]`")

    @remembered
    def shape(self) -> torch.Size:
        *batch, b, m, n = self.of.shape
        return torch.Size((*batch, b * m, b * n))

    def _facts(self) -> set[str]:
        return {*self.of.properties} if self.of.square else set()

    def _matmul(self, x: Tensor) -> Tensor:
        *_, b, m, n = self.of.shape
        y = self.of.matmul(x.reshape(*x.shape[:-2], b, n, x.shape[-1]))
        return y.reshape(*y.shape[:-3], b * m, x.shape[-1])

    def _transpose(self) -> Operator:
        return BlockDiagonal(self.of.T)

    def _conj(self) -> Operator:
        return BlockDiagonal(self.of.conj(), claims=self.claims)

    @property
    def flops(self) -> float:
        return self.of.flops * self.of.shape[-3]

    def _text(self) -> str:
        return f"BlockDiagonal({self.of!r})"


@dataclass(eq=False, repr=False)
class DirectSum(Operator):
    """Different operators down the diagonal."""

    blocks: Side

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[block.batch_shape for block in self.blocks])
        return torch.Size((*batch, *[sum([block.shape[side] for block in self.blocks]) for side in (-2, -1)]))

    def _facts(self) -> set[str]:
        if not all(block.square for block in self.blocks):
            return set()
        return {*frozenset.intersection(*(block.properties for block in self.blocks))}

    def _matmul(self, x: Tensor) -> Tensor:
        parts = x.split([block.shape[-1] for block in self.blocks], -2)
        return _stack([block.matmul(part) for block, part in zip(self.blocks, parts, strict=True)], -2)

    def _transpose(self) -> Operator:
        return DirectSum(tuple(block.T for block in self.blocks))

    def _conj(self) -> Operator:
        return DirectSum(tuple(block.conj() for block in self.blocks), claims=self.claims)

    @property
    def flops(self) -> float:
        return sum(block.flops for block in self.blocks)

    def _text(self) -> str:
        return f"DirectSum({', '.join(map(repr, self.blocks))})"


@dataclass(eq=False, repr=False)
class Block(Operator):
    """A matrix of operators, row by row."""

    rows: tuple[Side, ...]

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[part.batch_shape for row in self.rows for part in row])
        return torch.Size(
            (*batch, sum(row[0].shape[-2] for row in self.rows), sum(part.shape[-1] for part in self.rows[0]))
        )

    def _matmul(self, x: Tensor) -> Tensor:
        parts = x.split([part.shape[-1] for part in self.rows[0]], -2)
        return _stack(
            [reduce(torch.add, (a.matmul(part) for a, part in zip(row, parts, strict=True))) for row in self.rows], -2
        )

    def _transpose(self) -> Operator:
        return Block(tuple(tuple(part.T for part in column) for column in zip(*self.rows, strict=True)))

    def _conj(self) -> Operator:
        return Block(tuple(tuple(part.conj() for part in row) for row in self.rows), claims=self.claims)

    @property
    def flops(self) -> float:
        return sum(part.flops for row in self.rows for part in row)

    def _text(self) -> str:
        return f"Block({size_text(self)}: {'; '.join(', '.join(map(repr, row)) for row in self.rows)})"


def kron(*factors: Operator | Tensor) -> Operator:
    """A ⊗ B ⊗ …, flat, with multiples pulled out."""
    return _flat(Kronecker, "multiply", factors)


def kronsum(*terms: Operator | Tensor) -> Operator:
    """A ⊕ B ⊕ … = A⊗I + I⊗B, flat."""
    lifted = [lift(term) for term in terms]
    broadcast("add", *lifted)
    flat = [part for term in lifted for part in (term.terms if isinstance(term, KroneckerSum) else (term,))]
    return flat[0] if len(flat) == 1 else KroneckerSum(tuple(flat))


def block_diag(*blocks: Operator | Tensor) -> Operator:
    """Operators or matrices down the diagonal."""
    lifted = [lift(block) for block in blocks]
    broadcast("join", *lifted)
    return lifted[0] if len(lifted) == 1 else DirectSum(tuple(lifted))


def block(rows: Sequence[Sequence[Operator | Tensor | None]]) -> Operator:
    """The matrix of operators written row by row; None stands for zero.

    Raises:
        OperatorError: where a row's heights or a column's widths differ, or cannot be told.
    """
    lifted = [[None if part is None else lift(part) for part in row] for row in rows]
    parts = [part for row in lifted for part in row if part is not None]
    if not parts or len({len(row) for row in lifted}) != 1:
        raise OperatorError("cannot make a block operator: pass rows of equal length with at least one operator each")
    broadcast("join", *parts)
    heights = [_common(row, -2, f"row {i}") for i, row in enumerate(lifted)]
    widths = [_common(column, -1, f"column {j}") for j, column in enumerate(zip(*lifted, strict=True))]
    like = {"dtype": parts[0].dtype, "device": parts[0].device}
    return Block(
        tuple(
            tuple(part or Zero(m, n, **like) for part, n in zip(row, widths, strict=True))  # type: ignore[arg-type]
            for row, m in zip(lifted, heights, strict=True)
        )
    )


def concatenate(parts: Sequence[Operator | Tensor], dim: int = 0) -> Operator:
    """Operators one below the other (`dim=0` or −2) or side by side (`dim=1` or −1)."""
    return block([[part] for part in parts] if dim in (0, -2) else [list(parts)])


def _common(parts: Sequence[Operator | None], side: int, place: str) -> int:
    sizes = {part.shape[side] for part in parts if part is not None}
    if len(sizes) != 1:
        what = {-2: "heights", -1: "widths"}[side]
        raise OperatorError(f"cannot make a block operator: {place} has parts of {what} {sorted(sizes) or 'unknown'}")
    return sizes.pop()


def _flat(kind: Callable[[Side], Operator], doing: str, parts: Sequence[Operator | Tensor]) -> Operator:
    scales: list[Tensor] = []
    flat: list[Operator] = []
    for part in map(lift, parts):
        if isinstance(part, Scaled):
            scales.append(part.c)
            part = part.of
        flat += part.factors if isinstance(part, Kronecker) and not part.claims else [part]
    broadcast(doing, *flat)
    joined = flat[0] if len(flat) == 1 else kind(tuple(flat))
    return multiple(reduce(torch.mul, scales), joined) if scales else joined


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a ⊗ b with batches."""
    both = a[..., :, None, :, None] * b[..., None, :, None, :]
    return both.reshape(*both.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])


def _stack(parts: Sequence[Tensor], dim: int) -> Tensor:
    batch = common(*[part.shape[:-2] for part in parts])
    return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], dim)


def _inside(operator: Operator) -> str:
    plain = len(repr(operator).split(" ")) == 1 or isinstance(operator, BlockDiagonal)
    return repr(operator) if plain else f"({operator!r})"
