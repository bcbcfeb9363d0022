"""Gradients of linear algebra by the implicit-function theorem: what a solver did on its way is never recorded.

Everything rests on a few functions that autograd cannot see into, each with a rule of its own:

* `solve`: x = A⁻¹ b, dx = A⁻¹ (db - dA x), one further solve with the adjoint;
* `attach`: a number that somebody has found, with d value = Re Σ leftᴴ dA right: log-determinants, traces of
  functions, quadratic forms and eigenvalues differ only in what stands left and right;
* `eigenvectors` and `apply_function`, in `einlinear.linalg.spectral`.

The rules are written in functions of this module, hence differentiable again, to any order. Memory: the
solution and what the operator's product saves; nothing grows with the iterations.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import dot


class Map(Protocol):
    """What a gradient needs to know of an operator."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that gradients flow to."""

    @property
    def H(self) -> "Map": ...

    def matmul(self, x: Tensor, /) -> Tensor: ...

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same operator on other leaves."""


Solver = Callable[[Any, Tensor], Tensor]
"""x of A x = b from an operator, of which `matmul`, `H` and `shape` are sure, and b [..., n, k]; called with Aᴴ
too."""


class Mapped:
    """An operator under `torch.vmap`, seen from outside: each leaf and each product has one more leading dimension."""

    def __init__(self, inner: Map, tensors: tuple[Tensor, ...], count: int, adjoint: bool = False) -> None:
        self.inner, self.tensors, self.count, self.adjoint = inner, tensors, count, adjoint

    @property
    def shape(self) -> torch.Size:
        *batch, m, n = self.inner.shape
        return torch.Size((self.count, *batch, *((n, m) if self.adjoint else (m, n))))

    @property
    def H(self) -> "Mapped":
        return Mapped(self.inner, self.tensors, self.count, not self.adjoint)

    def with_tensors(self, *tensors: Tensor) -> "Mapped":
        return Mapped(self.inner, tensors, self.count, self.adjoint)

    def matmul(self, x: Tensor) -> Tensor:
        def one(column: Tensor, *tensors: Tensor) -> Tensor:
            inner = self.inner.with_tensors(*tensors)
            return (inner.H if self.adjoint else inner).matmul(column)

        return torch.vmap(one)(x, *self.tensors)


def _lead(x: Tensor, dim: int | None, count: int) -> Tensor:
    """The mapped dimension in front; one is made where there is none."""
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def pull(operator: Map, tensors: Sequence[Tensor], needed: Sequence[bool], left: Tensor, right: Tensor) -> list[Any]:
    """The gradients of Re Σ leftᴴ A(tensors) right by the tensors that are `needed`, None for the others."""
    chosen = [i for i, wanted in enumerate(needed) if wanted]
    if not chosen:
        return [None] * len(tensors)

    def image(*some: Tensor) -> Tensor:
        leaves = list(tensors)
        for i, leaf in zip(chosen, some, strict=True):
            leaves[i] = leaf
        return operator.with_tensors(*leaves).matmul(right)

    pair: Any = torch.func.vjp(image, *(tensors[i] for i in chosen))
    out, back = pair
    found = dict(zip(chosen, back(left.to(out.dtype).expand_as(out)), strict=True))
    return [found.get(i) for i in range(len(tensors))]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(operator: Map, solver: Solver, rhs: Tensor, *tensors: Tensor) -> Tensor:
        return solver(operator.with_tensors(*tensors), rhs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.solver, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        x, *tensors = ctx.saved_tensors
        dual = solve(ctx.operator.with_tensors(*tensors).H, gradient, ctx.solver)
        return None, None, dual, *pull(ctx.operator, tensors, ctx.needs_input_grad[3:], -dual, x)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operator: Map, solver: Solver, rhs: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        leaves = tuple(_lead(leaf, dim, count) for leaf, dim in zip(tensors, in_dims[3:], strict=True))
        return _Solve.apply(Mapped(operator, leaves, count), solver, _lead(rhs, in_dims[2], count), *leaves), 0  # type: ignore[no-untyped-call]


def solve(operator: Map, rhs: Tensor, solver: Solver) -> Tensor:
    """A⁻¹ b for `rhs` [..., n, k] by `solver`, differentiable by the operator's tensors and by b, to any order."""
    batch = torch.broadcast_shapes(operator.shape[:-2], rhs.shape[:-2])
    found: Tensor = _Solve.apply(operator, solver, rhs.expand(*batch, *rhs.shape[-2:]), *operator.tensors)  # type: ignore[no-untyped-call]
    return found


class _LeastSquares(torch.autograd.Function):
    @staticmethod
    def forward(operator: Map, solver: Solver, rhs: Tensor, *tensors: Tensor) -> Tensor:
        return solver(operator.with_tensors(*tensors), rhs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.solver, rhs, *tensors = inputs
        ctx.save_for_backward(output, rhs, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        # Golub and Pereyra 1973: dx = A⁺ (db - dA x) + (AᴴA)⁺ dAᴴ r + (1 - A⁺A) dAᴴ (AAᴴ)⁺ b.
        x, rhs, *tensors = ctx.saved_tensors
        a = ctx.operator.with_tensors(*tensors)
        dual = least_squares(a.H, gradient, ctx.solver)
        left = torch.cat([-dual, rhs - a.matmul(x), least_squares(a.H, x, ctx.solver)], -1)
        inside = least_squares(a, a.matmul(gradient), ctx.solver)
        right = torch.cat([x, least_squares(a, dual, ctx.solver), gradient - inside], -1)
        return None, None, dual, *pull(ctx.operator, tensors, ctx.needs_input_grad[3:], left, right)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operator: Map, solver: Solver, rhs: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        leaves = tuple(_lead(leaf, dim, count) for leaf, dim in zip(tensors, in_dims[3:], strict=True))
        return _LeastSquares.apply(Mapped(operator, leaves, count), solver, _lead(rhs, in_dims[2], count), *leaves), 0  # type: ignore[no-untyped-call]


def least_squares(operator: Map, rhs: Tensor, solver: Solver) -> Tensor:
    """A⁺ b for A: m x n and `rhs` [..., m, k]; `solver` finds least squares of least norm, for the adjoint too.

    Differentiable where the rank does not change, to any order.
    """
    batch = torch.broadcast_shapes(operator.shape[:-2], rhs.shape[:-2])
    found: Tensor = _LeastSquares.apply(operator, solver, rhs.expand(*batch, *rhs.shape[-2:]), *operator.tensors)  # type: ignore[no-untyped-call]
    return found


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Map, value: Tensor, left: Tensor, right: Tensor, *tensors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, _, left, right, *tensors = inputs
        ctx.save_for_backward(left, right, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        left, right, *tensors = ctx.saved_tensors
        share = gradient.unsqueeze(-2) if gradient.ndim == left.ndim - 1 else gradient[..., None, None]
        grads = pull(ctx.operator, tensors, ctx.needs_input_grad[4:], share * left, right)
        return None, None, None, None, *grads


def attach(value: Tensor, operator: Map, left: Tensor, right: Tensor) -> Tensor:
    """`value`, with the derivative Re Σ leftᴴ dA right (of complex values: without the Re).

    `value` is [..., k], one number a column of `left` [..., m, k] and `right` [..., n, k], or [...], the sum over
    columns. For second derivatives left and right must be differentiable themselves; by the value alone they are not
    asked.
    """
    found: Tensor = _Attach.apply(operator, value.detach(), left, right, *operator.tensors)  # type: ignore[no-untyped-call]
    return found


def logdet(value: Tensor, operator: Map, probe: Tensor, solver: Solver) -> Tensor:
    """The log-determinant `value` [...], with the gradient tr A⁻¹ dA as estimated by `probe` [..., n, m], E[z zᴴ] = 1.

    Unbiased by the same probes as the value; exact with the columns of the unit times sqrt(n).
    """
    if not wanted(operator):
        return value
    return attach(value, operator, solve(operator.H, probe, solver) / probe.shape[-1], probe)


def quadratic(operator: Map, rhs: Tensor, solver: Solver) -> Tensor:
    """bᴴ A⁻¹ b [..., k] of Hermitian A, for each column of `rhs` [..., n, k]; its gradient needs no further solve."""
    return _form(operator, rhs, solve(operator, rhs, solver))


def _form(operator: Map, rhs: Tensor, x: Tensor) -> Tensor:
    """bᴴ x, x = A⁻¹ b: the derivative is 2 xᴴ db - xᴴ dA x."""
    form = attach(dot(rhs, x).squeeze(-2).real, operator, -x, x)
    return form + attach(torch.zeros_like(form), _Entries(rhs), 2 * x, torch.ones_like(x[..., :1, :]))


def quadratic_and_logdet(
    value: Tensor, operator: Map, rhs: Tensor, probe: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    """bᴴ A⁻¹ b [..., k] and log det A [...], whose `value` somebody has found, for Hermitian A: a Gaussian likelihood.

    One solve for right-hand sides and probes together; the backward needs no further one.
    """
    batch = torch.broadcast_shapes(operator.shape[:-2], rhs.shape[:-2], probe.shape[:-2])
    both = torch.cat([each.expand(*batch, *each.shape[-2:]) for each in (rhs, probe)], -1)
    x, z = solve(operator, both, solver).split([rhs.shape[-1], probe.shape[-1]], -1)
    return _form(operator, rhs, x), attach(value, operator, z / probe.shape[-1], probe)


class _Entries:
    """A tensor as the operator that multiplies one number a column by it, so that `attach` can differentiate by it."""

    def __init__(self, entries: Tensor) -> None:
        self.tensors = (entries,)
        self.shape = torch.Size((*entries.shape[:-1], 1))

    @property
    def H(self) -> "_Entries":
        raise NotImplementedError("only products are needed of a tensor seen as an operator")

    def with_tensors(self, *tensors: Tensor) -> "_Entries":
        return _Entries(*tensors)

    def matmul(self, x: Tensor) -> Tensor:
        return self.tensors[0] * x


def wanted(operator: Map) -> bool:
    """Whether a gradient by the operator's tensors may be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operator.tensors)
