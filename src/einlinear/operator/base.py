"""The linear map: applied, transposed, composed, and what is known of it."""

import copy
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Self, overload

import torch
from torch import Tensor

from einlinear.operator.tree import Tree, fields, remembered, same, transformed

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


class OperatorError(ValueError):
    """Anything a user can get wrong about an operator, or ask of one that has no answer."""


@dataclass(eq=False, repr=False)
class Operator(Tree):
    """A matrix `[..., m, n]` that is known by what it does; the dimensions before the last two are a batch.

    Subclasses are dataclasses, never changed once made. A field that is a tensor, an operator or a tuple of these is
    a *part*: `tensors` are all floating-point ones within, in order, and `with_tensors` rebuilds
    the operator on others. Any other field is a setting.

    `claims` are properties that the user asserts (`claim`); those that follow from how the operator
    is built need no claim. `properties` has both.
    """

    claims: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    def shape(self) -> torch.Size:
        """`[*batch, rows, columns]`."""
        raise NotImplementedError

    def _matmul(self, x: Tensor) -> Tensor:
        """`matmul` for an `x` that fits and has this operator's dtype (or its complex one)."""
        raise NotImplementedError

    def _transpose(self) -> "Operator":
        """Aᵀ, without claims."""
        raise NotImplementedError

    def _facts(self) -> set[str]:
        """The properties that hold by construction."""
        return set()

    @property
    def batch_shape(self) -> Batch:
        return tuple(self.shape[:-2])

    @property
    def square(self) -> bool:
        return self.shape[-1] == self.shape[-2]

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same composition on other leaves, in the order of `tensors`."""
        if len(tensors) != len(self.tensors):
            raise OperatorError(
                f"cannot rebuild {self!r}: it has {len(self.tensors)} tensors, {len(tensors)} were given"
            )
        return self.refilled(iter(tensors))

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
        for cached in [name for name in vars(claimed) if name not in fields(type(self))]:
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
        if self.tensors and x.device != self.device:
            raise OperatorError(
                f"cannot apply {self!r}, which is on {self.device}, to a tensor on {x.device}: move one by .to(device)"
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
            return ring.product(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.matmul(other) if other.ndim > 1 else self.matvec(other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return self.T.matmul(other.mT).mT if other.ndim > 1 else self.T.matvec(other)

    def __add__(self, other: "Operator | Tensor") -> "Operator":
        return ring.total(self, ring.lift(other))

    def __radd__(self, other: Tensor) -> "Operator":
        return ring.total(ring.lift(other), self)

    def __sub__(self, other: "Operator | Tensor") -> "Operator":
        return ring.total(self, -ring.lift(other))

    def __rsub__(self, other: Tensor) -> "Operator":
        return ring.total(ring.lift(other), -self)

    def __neg__(self) -> "Operator":
        return ring.multiple(-1.0, self)

    def __mul__(self, other: Scalar) -> "Operator":
        return ring.multiple(other, self)

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar) -> "Operator":
        return ring.multiple(1 / other, self)

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


def common(*batches: Batch) -> Batch:
    """The shape that batches broadcast to; at once where they are equal, as nearly always."""
    first, *others = batches
    if all(other == first for other in others):
        return first
    joined: torch.Size = torch.broadcast_shapes(*batches)
    return joined


def broadcast(doing: str, *operators: Operator, shape: Batch = ()) -> Batch:
    """The common batch of operators, or a sentence where there is none."""
    if not operators:
        raise OperatorError(f"cannot {doing} operators: pass at least one")
    devices = {operator.device for operator in operators if operator.tensors}
    if len(devices) > 1:
        raise OperatorError(
            f"cannot {doing} operators on different devices ({', '.join(sorted(map(str, devices)))}): move them by "
            f".to(device)"
        )
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


def _claiming(operator: Operator, claims: frozenset[str]) -> Operator:
    return operator.claim(*claims) if claims - operator.claims else operator


from einlinear.operator import ring  # noqa: E402  (it is made of the class above)
