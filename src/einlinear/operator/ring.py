"""The simplest operators (a matrix, the unit, zero) and the ring that all of them form: products, sums, multiples."""

import math
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from einlinear.operator.base import Operator, OperatorError, Scalar, adjoint, broadcast, common
from einlinear.operator.tree import known, remembered, transformed


@dataclass(eq=False, repr=False)
class Dense(Operator):
    """A matrix that is written out, `[..., m, n]`."""

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim < 2:
            raise OperatorError(
                f"cannot make a Dense operator of a tensor of shape {tuple(self.matrix.shape)}: it needs two dimensions"
            )
        object.__setattr__(self, "matrix", inexact(self.matrix))

    @remembered
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def _matmul(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def _transpose(self) -> "Dense":
        return Dense(self.matrix.mT)

    def dense(self) -> Tensor:
        return self.matrix

    @property
    def flops(self) -> float:
        return 2.0 * math.prod(self.shape[-2:])


@dataclass(eq=False, repr=False)
class Fixed(Operator):
    """An operator that its settings fix: there is no tensor in it, so dtype and device are settings too."""

    dtype: torch.dtype = field(default=None, kw_only=True)  # type: ignore[assignment]
    device: torch.device = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or torch.get_default_dtype())
        object.__setattr__(self, "device", torch.device(self.device or torch.get_default_device()))

    def _conj(self) -> "Operator":
        return self


@dataclass(eq=False, repr=False)
class Identity(Fixed):
    """The unit of dimension `n`."""

    n: int

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.n))

    def _facts(self) -> set[str]:
        return {"psd", "unitary", "diagonal"}

    def _matmul(self, x: Tensor) -> Tensor:
        return x

    def _transpose(self) -> "Identity":
        return self

    @property
    def flops(self) -> float:
        return 0.0

    def _text(self) -> str:
        return f"Identity({self.n})"


@dataclass(eq=False, repr=False)
class Zero(Fixed):
    """The `m` × `n` operator that maps everything to zero."""

    m: int
    n: int

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.m, self.n))

    def _facts(self) -> set[str]:
        return {"psd", "diagonal"} if self.m == self.n else set()

    def _matmul(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-2], self.m, x.shape[-1])

    def _transpose(self) -> "Zero":
        return Zero(self.n, self.m, dtype=self.dtype, device=self.device)

    @property
    def flops(self) -> float:
        return 0.0


@dataclass(eq=False, repr=False)
class Product(Operator):
    """A B C …, applied from the right."""

    factors: tuple[Operator, ...]

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[factor.batch_shape for factor in self.factors])
        return torch.Size((*batch, self.factors[0].shape[-2], self.factors[-1].shape[-1]))

    def _facts(self) -> set[str]:
        shared = frozenset.intersection(*(factor.properties for factor in self.factors))
        facts = {*shared & {"unitary", "lower", "upper", "diagonal"}}
        left, middle = divmod(len(self.factors), 2)
        if all(adjoint(self.factors[k], self.factors[-1 - k]) for k in range(left)):
            centre = self.factors[left].properties if middle else {"psd", "hermitian"}
            facts |= centre & {"psd", "hermitian"}
        return facts

    def _matmul(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.matmul(x)
        return x

    def _transpose(self) -> "Operator":
        return Product(tuple(factor.T for factor in reversed(self.factors)))

    def _conj(self) -> "Operator":
        return Product(tuple(factor.conj() for factor in self.factors), claims=self.claims)

    def dense(self) -> Tensor:
        first = min(range(len(self.factors)), key=lambda k: self.factors[k].shape[-1])
        start = Product(self.factors[: first + 1]) if first + 1 < len(self.factors) else None
        if start is None:
            return super().dense()
        left = reduce(lambda x, factor: factor.matmul(x), reversed(self.factors[:first]), self.factors[first].dense())
        right = Product(self.factors[first + 1 :]).T if first + 2 < len(self.factors) else self.factors[-1].T
        return right.matmul(left.mT).mT.expand(self.shape)

    @property
    def flops(self) -> float:
        return sum(factor.flops for factor in self.factors)

    def _text(self) -> str:
        return " @ ".join(_bracketed(factor, Sum) for factor in self.factors)


@dataclass(eq=False, repr=False)
class Sum(Operator):
    """A + B + C + …"""

    terms: tuple[Operator, ...]

    @remembered
    def shape(self) -> torch.Size:
        batch = common(*[term.batch_shape for term in self.terms])
        return torch.Size((*batch, *self.terms[0].shape[-2:]))

    def _facts(self) -> set[str]:
        shared = frozenset.intersection(*(term.properties for term in self.terms))
        return {*shared} - {"unitary"}

    def _matmul(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.matmul(x) for term in self.terms))

    def _transpose(self) -> "Operator":
        return Sum(tuple(term.T for term in self.terms))

    def _conj(self) -> "Operator":
        return Sum(tuple(term.conj() for term in self.terms), claims=self.claims)

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense() for term in self.terms)).expand(self.shape)

    @property
    def flops(self) -> float:
        return sum(term.flops + term.shape[-2] for term in self.terms)

    def _text(self) -> str:
        return " + ".join(repr(term) for term in self.terms)


@dataclass(eq=False, repr=False)
class Scaled(Operator):
    """c A, with one c for each matrix of the batch."""

    c: Tensor
    of: Operator

    @remembered
    def shape(self) -> torch.Size:
        batch = common(tuple(self.c.shape), self.of.batch_shape)
        return torch.Size((*batch, *self.of.shape[-2:]))

    @remembered
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.c.dtype, self.of.dtype)

    def _facts(self) -> set[str]:
        kept = {"lower", "upper", "diagonal"} | (set() if self.c.is_complex() else {"hermitian"})
        facts = {*self.of.properties & kept}
        if "psd" in self.of.properties and not self.c.is_complex() and known(self.c >= 0):
            facts |= {"psd"}
        return facts

    def _matmul(self, x: Tensor) -> Tensor:
        return self.c[..., None, None] * self.of.matmul(x)

    def _transpose(self) -> "Operator":
        return Scaled(self.c, self.of.T)

    def _conj(self) -> "Operator":
        return Scaled(self.c.conj(), self.of.conj(), claims=self.claims)

    def dense(self) -> Tensor:
        return (self.c[..., None, None] * self.of.dense()).expand(self.shape)

    @property
    def flops(self) -> float:
        return self.of.flops + self.shape[-2]

    def _text(self) -> str:
        one = f"{self.c.item():.4g}" if self.c.numel() == 1 and not transformed(self.c) else "c"
        return f"{one}·{_bracketed(self.of, Sum, Product)}"


def product(*factors: Operator) -> Operator:
    """The product, flat: products within are dissolved, units dropped, multiples pulled out.

    Raises:
        OperatorError: where neighbours do not fit each other.
    """
    for left, right in pairwise(factors):
        if left.shape[-1] != right.shape[-2]:
            raise OperatorError(
                f"cannot multiply {left!r} by {right!r}: the first has {left.shape[-1]} columns, "
                f"the second {right.shape[-2]} rows"
            )
        broadcast("multiply", left, right)
    flat: list[Operator] = []
    scales: list[Tensor] = []
    for factor in factors:
        if isinstance(factor, Scaled):
            scales.append(factor.c)
            factor = factor.of
        flat += factor.factors if isinstance(factor, Product) and not factor.claims else [factor]
    kept = [factor for factor in flat if not isinstance(factor, Identity)] or flat[:1]
    joined = kept[0] if len(kept) == 1 else Product(tuple(kept))
    return multiple(reduce(torch.mul, scales), joined) if scales else joined


def total(*terms: Operator) -> Operator:
    """The sum, flat.

    Raises:
        OperatorError: where the terms have different shapes.
    """
    for term in terms[1:]:
        if term.shape[-2:] != terms[0].shape[-2:]:
            raise OperatorError(
                f"cannot add {terms[0]!r} and {term!r}: their shapes are {tuple(terms[0].shape)} "
                f"and {tuple(term.shape)}"
            )
        broadcast("add", terms[0], term)
    flat = [part for term in terms for part in (term.terms if isinstance(term, Sum) and not term.claims else [term])]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def multiple(c: Scalar, of: Operator) -> Operator:
    """c A, with the scalars of nested multiples joined."""
    if not isinstance(c, Tensor):
        dtype = of.dtype if isinstance(c, int | float) or of.dtype.is_complex else of.dtype.to_complex()
        c = torch.tensor(c, dtype=dtype, device=of.device)
    broadcast("scale", of, shape=c.shape)
    return Scaled(c * of.c, of.of) if isinstance(of, Scaled) else Scaled(inexact(c), of)


def lift(value: "Operator | Tensor") -> Operator:
    """An operator as it is, a tensor as a `Dense` one."""
    if isinstance(value, Operator):
        return value
    if isinstance(value, Tensor):
        return Dense(value)
    raise OperatorError(f"cannot use a {type(value).__name__} as an operator: pass an Operator or a tensor")


def inexact(tensor: Tensor, dimensions: int = 0) -> Tensor:
    """The tensor, in float64 where it holds integers or truth values: those are exact data.

    Raises:
        OperatorError: if it has fewer than so many dimensions.
    """
    if tensor.ndim < dimensions:
        raise OperatorError(
            f"cannot make an operator of a tensor of shape {tuple(tensor.shape)}: it needs at least {dimensions} "
            f"{'dimension' if dimensions == 1 else 'dimensions'}"
        )
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.to(torch.float64)


def _bracketed(operator: Operator, *weaker: type[Operator]) -> str:
    return f"({operator!r})" if isinstance(operator, weaker) and not operator.claims else repr(operator)
