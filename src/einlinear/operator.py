"""What linear algebra works on: a linear map that can be applied, transposed, composed and differentiated.

Here are the map itself, its simplest leaves (a matrix, the unit, zero) and the ring they form:
products, sums and multiples. Everything else is in `einlinear.operators`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce, singledispatch
from itertools import pairwise
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

Batch = tuple[int, ...]
Scalar = Tensor | complex

IMPLIED = {
    "psd": {"hermitian"},
    "diagonal": {"lower", "upper"},
}
PROPERTIES = ("hermitian", "psd", "unitary", "lower", "upper", "diagonal")
"""What may be known of an operator: A = Aᴴ; that and xᴴAx ≥ 0; AᴴA = I; zero above, below, off the diagonal."""

CHECK_TOLERANCE = {2: 5e-2, 4: 1e-3, 8: 1e-8}
"""By bytes of a real number: the relative deviation at which a probe contradicts a claim."""


T = TypeVar("T")


class remembered(Generic[T]):
    """A property that is computed once. Unlike functools' it needs no lock, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, of: None, owner: type) -> "remembered[T]": ...
    @overload
    def __get__(self, of: object, owner: type) -> T: ...
    def __get__(self, of: object | None, owner: type) -> "remembered[T] | T":
        if of is None:
            return self
        value = self.compute(of)
        if not torch.compiler.is_compiling():
            of.__dict__[self.name] = value
        return value


class OperatorError(ValueError):
    """Anything a user can get wrong about an operator, or ask of one that has no answer."""


@dataclass(eq=False, repr=False)
class Operator(ABC):
    """A matrix `[..., m, n]` that is known by what it does; the dimensions before the last two are a batch.

    Subclasses are dataclasses, never changed once made. A field that is a tensor, an operator or a tuple of these is
    a *part*: `tensors` are all floating-point ones within, in order, and `with_tensors` rebuilds
    the operator on others. Any other field is a setting.

    `claims` are properties that the user asserts (`claim`); those that follow from how the operator
    is built need no claim. `properties` has both.
    """

    claims: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """`[*batch, rows, columns]`."""

    @abstractmethod
    def _matmul(self, x: Tensor) -> Tensor:
        """`matmul` for an `x` that fits and has this operator's dtype (or its complex one)."""

    @abstractmethod
    def _transpose(self) -> "Operator":
        """Aᵀ, without claims."""

    def _facts(self) -> set[str]:
        """The properties that hold by construction."""
        return set()

    @property
    def batch_shape(self) -> Batch:
        return tuple(self.shape[:-2])

    @property
    def square(self) -> bool:
        return self.shape[-1] == self.shape[-2]

    @remembered
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that gradients flow to: every floating-point tensor within, in order."""
        return tuple(_leaves(self))

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same composition on other leaves, in the order of `tensors`."""
        if len(tensors) != len(self.tensors):
            raise OperatorError(
                f"cannot rebuild {self!r}: it has {len(self.tensors)} tensors, {len(tensors)} were given"
            )
        rebuilt: Self = _refilled(self, iter(tensors))
        return rebuilt

    @remembered
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, [part.dtype for part in _parts(self)])

    @remembered
    def device(self) -> torch.device:
        return _parts(self)[0].device

    @remembered
    def properties(self) -> frozenset[str]:
        """All that is known: proved by construction, claimed, and what follows from either."""
        known = self._facts() | self.claims
        known |= {implied for name in known for implied in IMPLIED.get(name, ())}
        if {"lower", "upper"} <= known or ("hermitian" in known and known & {"lower", "upper"}):
            known |= {"diagonal", "lower", "upper"}
        if "diagonal" in known and self.square and not self.dtype.is_complex:
            known |= {"hermitian"}
        return frozenset(known)

    def claim(self, *properties: str, check: bool = False) -> Self:
        """This operator with properties that you know of and its construction does not show.

        Args:
            properties: of `PROPERTIES`.
            check: whether to test each by two random probes, which refutes a wrong claim almost surely.

        Raises:
            OperatorError: for an unknown property, or a claim that a probe contradicts.
        """
        if unknown := [name for name in properties if name not in PROPERTIES]:
            raise OperatorError(f"cannot claim {unknown[0]!r} of {self!r}: the properties are {', '.join(PROPERTIES)}")
        if not self.square:
            raise OperatorError(f"cannot claim {', '.join(properties)} of {self!r}: it is not square")
        if check:
            for name in properties:
                refute(self, name)
        claimed = copy.copy(self)
        for cached in [name for name in vars(claimed) if name not in self.__dataclass_fields__]:
            del claimed.__dict__[cached]
        object.__setattr__(claimed, "claims", self.claims | {*properties})
        return claimed

    def matmul(self, x: Tensor) -> Tensor:
        """A x for the columns of `x`, `[..., n, k]`; returns `[..., m, k]`. Batches broadcast."""
        if x.ndim < 2 or x.shape[-2] != self.shape[-1]:
            raise OperatorError(
                f"cannot apply {self!r} to a tensor of shape {tuple(x.shape)}: "
                f"its dimension before the last must be {self.shape[-1]}"
            )
        if x.dtype == self.dtype:
            return self._matmul(x)
        if x.is_complex() and not self.dtype.is_complex:
            real, imaginary = self.matmul(torch.cat([x.real, x.imag], -1)).chunk(2, -1)
            return torch.complex(real, imaginary)
        dtype = torch.promote_types(x.dtype, self.dtype)
        return self.to(dtype)._matmul(x.to(dtype))

    def matvec(self, x: Tensor) -> Tensor:
        """A x for each vector of `x`, `[..., n]`; returns `[..., m]`."""
        return self.matmul(x[..., None])[..., 0]

    def rmatmul(self, y: Tensor) -> Tensor:
        """Aᵀ y for the columns of `y`, `[..., m, k]`; returns `[..., n, k]`."""
        return self.T.matmul(y)

    def dense(self) -> Tensor:
        """The matrix itself, `[..., m, n]`."""
        written = self._matmul(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device))
        return written.expand(self.shape)

    def to(self, target: torch.dtype | torch.device | str) -> Self:
        """The same operator in another dtype (what is complex stays complex) or on another device."""
        moved: Self = _moved(self, target)
        return moved

    @property
    def T(self) -> "Operator":
        """The transpose."""
        return _claiming(self._transpose(), frozenset(_TRANSPOSED.get(name, name) for name in self.claims))

    @property
    def H(self) -> "Operator":
        """The conjugate transpose."""
        return self.T.conj()

    def conj(self) -> "Operator":
        """The complex conjugate; the operator itself where it is real."""
        return self._conj() if self.dtype.is_complex else self

    def _conj(self) -> "Operator":
        return self.with_tensors(*(tensor.conj() for tensor in self.tensors))

    @property
    def flops(self) -> float:
        """Modelled floating-point operations to apply it to one vector."""
        return 2.0 * sum(tensor.numel() for tensor in self.tensors)

    @overload
    def __matmul__(self, other: "Operator") -> "Operator": ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: "Operator | Tensor") -> "Operator | Tensor":
        """The product with an operator, a matrix `[..., n, k]` or a vector `[n]`."""
        if isinstance(other, Operator):
            return product(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.matmul(other) if other.ndim > 1 else self.matvec(other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self.T.matmul(other.mT).mT if other.ndim > 1 else self.T.matvec(other)

    def __add__(self, other: "Operator | Tensor") -> "Operator":
        return total(self, lift(other))

    def __radd__(self, other: Tensor) -> "Operator":
        return total(lift(other), self)

    def __sub__(self, other: "Operator | Tensor") -> "Operator":
        return total(self, -lift(other))

    def __rsub__(self, other: Tensor) -> "Operator":
        return total(lift(other), -self)

    def __neg__(self) -> "Operator":
        return multiple(-1.0, self)

    def __mul__(self, other: Scalar) -> "Operator":
        return multiple(other, self)

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar) -> "Operator":
        return multiple(1 / other, self)

    # So that `array * A` of NumPy asks this class rather than its own elements.
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`tensor @ A`, `tensor + A`, `tensor - A` and `tensor * A`."""
        left: Any
        left, right = args[:2] if len(args) > 1 else (None, None)
        if not isinstance(right, Operator):
            return NotImplemented
        if function in (Tensor.matmul, Tensor.__matmul__):
            if torch.compiler.is_compiling() and right._compiled_left(left):
                return right.__matmul__(left)
            return right.__rmatmul__(left)
        if function in (Tensor.add, Tensor.__add__):
            return right.__radd__(left)
        if function in (Tensor.mul, Tensor.__mul__):
            return right.__mul__(left)
        if function in (Tensor.sub, Tensor.__sub__):
            return right.__rsub__(left)
        return NotImplemented

    def _compiled_left(self, x: Tensor) -> bool:
        """Whether this is `A @ x`: Dynamo presents `x @ A` in the same way, so that shapes must tell."""
        fits_left = x.shape[-2 if x.ndim > 1 else -1] == self.shape[-1]
        fits_right = x.shape[-1] == self.shape[-2]
        if fits_left and fits_right:
            raise OperatorError(
                "torch.compile cannot tell A @ x from x @ A here: write A.matmul(x), A.matvec(x) or A.T.matmul(x.mT).mT"
            )
        return fits_left

    def __getitem__(self, index: Any) -> "Operator | Tensor":
        """What `A.dense()[..., *index]` holds: single rows, columns and entries as tensors, a submatrix as an operator.

        `index` is for rows, or for rows and columns: whole numbers, slices, index tensors, lists or masks. Two lists
        or tensors name entries in pairs, as in torch; `einlinear.linalg.select` takes the submatrix of all pairs.
        """
        return indexed(self, index)

    __iter__ = None  # a matrix is no sequence, for all that it can be indexed

    def __repr__(self) -> str:
        text = self._text()
        return f"{text}.claim({', '.join(map(repr, sorted(self.claims)))})" if self.claims else text

    def _text(self) -> str:
        return f"{type(self).__name__}({size_text(self)})"


_TRANSPOSED = {"lower": "upper", "upper": "lower"}


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


def common(*batches: Batch) -> Batch:
    """The shape that batches broadcast to; at once where they are equal, as nearly always."""
    first, *others = batches
    if all(other == first for other in others):
        return first
    return torch.broadcast_shapes(*batches)


def broadcast(doing: str, *operators: Operator, shape: Batch = ()) -> Batch:
    """The common batch of operators, or a sentence where there is none."""
    if not operators:
        raise OperatorError(f"cannot {doing} operators: pass at least one")
    batches = [operator.batch_shape for operator in operators]
    try:
        return common(tuple(shape), *batches) if shape else common(*batches)
    except RuntimeError:
        found = ", ".join(str(tuple(batch)) for batch in [*([shape] if shape else []), *batches])
        raise OperatorError(f"cannot {doing} operators whose batches {found} do not broadcast") from None


@singledispatch
def indexed(operator: Operator, index: Any) -> "Operator | Tensor":
    """What `operator[index]` is. It takes operators of selection, so that `einlinear.operators.selection` says it."""
    raise TypeError(f"cannot index a {type(operator).__name__}")


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


def transformed(*tensors: Tensor) -> bool:
    """Whether values may not be looked at: under torch.compile, a `torch.func` transform or forward mode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def known(condition: Tensor) -> bool:
    """Whether a condition holds everywhere and may be looked at."""
    return not transformed(condition) and bool(condition.all())


def same(a: Operator, b: Operator) -> bool:
    """Whether two operators are one composition on the same memory."""
    if a is b:
        return True
    if type(a) is not type(b) or a.shape != b.shape or len(a.tensors) != len(b.tensors) or transformed():
        return False
    views = zip(a.tensors, b.tensors, strict=True)
    return _settings(a) == _settings(b) and all(_same_view(x, y) for x, y in views)


def adjoint(a: Operator, b: Operator) -> bool:
    """Whether b is aᴴ on the same memory."""
    if type(a) is not type(b) or a.shape[-2:] != b.shape[:-3:-1] or transformed():
        return False
    mine, other = a.tensors, b.tensors
    # Most pairs differ in their first tensor already: only the others are worth a transpose.
    if len(mine) != len(other) or (mine and {t.data_ptr() for t in mine} != {t.data_ptr() for t in other}):
        return False
    return same(a.H, b)


def refute(operator: Operator, name: str) -> None:
    """Tests a property by two random probes.

    Raises:
        OperatorError: if a probe contradicts it.
    """
    n = operator.shape[-1]
    x, y = (torch.randn(n, 2, dtype=operator.dtype, device=operator.device) for _ in range(2))
    ax, ay = operator.matmul(x), operator.matmul(y)
    scale = ax.norm() * y.norm() + torch.finfo(operator.dtype).tiny
    half = torch.arange(n, device=operator.device)[:, None] < n // 2
    deviation = {
        "hermitian": lambda: (y.mH @ ax - (x.mH @ ay).mH).norm() / scale,
        "psd": lambda: (-(x.conj() * ax).sum(-2).real).clamp(min=0).max() / scale,
        "unitary": lambda: (ax.mH @ ay - x.mH @ y).norm() / (x.norm() * y.norm()),
        "lower": lambda: (operator.matmul(x * ~half) * half).norm() / scale,
        "upper": lambda: (operator.matmul(x * half) * ~half).norm() / scale,
    }
    wanted = {"psd": ("hermitian", "psd"), "diagonal": ("lower", "upper")}.get(name, (name,))
    worst = max(float(deviation[part]().detach()) for part in wanted)
    if not worst <= CHECK_TOLERANCE[torch.finfo(operator.dtype).bits // 8]:
        raise OperatorError(f"cannot claim {name!r} of {operator!r}: a random probe deviates from it by {worst:.2g}")


def size_text(operator: Operator) -> str:
    """The shape, as in `5×3` or `2, 5×3`."""
    *batch, m, n = operator.shape
    return ", ".join([*map(str, batch), f"{m}×{n}"])


def _bracketed(operator: Operator, *weaker: type[Operator]) -> str:
    return f"({operator!r})" if isinstance(operator, weaker) and not operator.claims else repr(operator)


def _claiming(operator: Operator, claims: frozenset[str]) -> Operator:
    return operator.claim(*claims) if claims - operator.claims else operator


def _parts(operator: Operator) -> list[Tensor | Operator]:
    """The operators and floating-point tensors directly within."""
    found: list[Tensor | Operator] = []
    queue = [operator.__dict__[name] for name in operator.__dataclass_fields__]
    for part in queue:
        if isinstance(part, Operator) or (isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())):
            found.append(part)
        elif isinstance(part, tuple):
            queue += part
    return found


def _leaves(part: object) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        if part.is_floating_point() or part.is_complex():
            yield part
    elif isinstance(part, Operator):
        for name in part.__dataclass_fields__:
            yield from _leaves(getattr(part, name))
    elif isinstance(part, tuple):
        for item in part:
            yield from _leaves(item)


def _refilled(part: Any, supply: Iterator[Tensor]) -> Any:
    if isinstance(part, Tensor):
        return next(supply) if part.is_floating_point() or part.is_complex() else part
    if isinstance(part, Operator):
        new = object.__new__(type(part))
        for name in part.__dataclass_fields__:
            object.__setattr__(new, name, _refilled(getattr(part, name), supply))
        return new
    return tuple(_refilled(item, supply) for item in part) if type(part) is tuple else part


def _moved(part: Any, target: torch.dtype | torch.device | str) -> Any:
    if isinstance(part, Operator):
        new = object.__new__(type(part))
        for name in part.__dataclass_fields__:
            object.__setattr__(new, name, _moved(getattr(part, name), target))
        return new
    if type(part) is tuple:
        return tuple(_moved(item, target) for item in part)
    if not isinstance(target, torch.dtype):
        return (
            part.to(target)
            if isinstance(part, Tensor)
            else torch.device(target)
            if isinstance(part, torch.device)
            else part
        )
    kind = part.dtype if isinstance(part, Tensor) else part
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        return part
    wanted = target.to_complex() if kind.is_complex and not target.is_complex else target
    return part.to(wanted) if isinstance(part, Tensor) else wanted


def _settings(part: object) -> object:
    """An operator without its floating-point tensors, for comparison."""
    if isinstance(part, Tensor):
        return None if part.is_floating_point() or part.is_complex() else (part.data_ptr(), part.shape, part.stride())
    if isinstance(part, Operator):
        return (type(part), *(_settings(getattr(part, name)) for name in part.__dataclass_fields__ if name != "claims"))
    return tuple(_settings(item) for item in part) if type(part) is tuple else part


def _same_view(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x.is_conj()) == (
        y.data_ptr(),
        y.shape,
        y.stride(),
        y.dtype,
        y.is_conj(),
    )
