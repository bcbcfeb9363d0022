"""Gradients of what a matrix's spectrum gives: eigenpairs, f(A) b, tr f(A); of Hermitian matrices unless said."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from einlinear.linalg.implicit import Map, Mapped, Solver, _lead, attach, pull, solve, wanted
from einlinear.linalg.krylov.lanczos import Function, Lanczos
from einlinear.linalg.krylov.system import dot
from einlinear.linalg.result import LinAlgError

Runner = Callable[[Any, Tensor, Function], Tensor]
"""f(A) b from an operator, b [..., n, k] and f."""


def derivative(function: Function) -> Function:
    """f', elementwise, by autograd."""

    def slope(nodes: Tensor) -> Tensor:
        pair: Any = torch.func.vjp(function, nodes)
        found: Tensor = pair[1](torch.ones_like(pair[0]))[0]
        return found

    return slope


class Deflated:
    """P (A - λ) P + V Vᴴ on columns, each with its own λ [..., k]; P = 1 - V Vᴴ."""

    def __init__(self, inner: Map, values: Tensor, vectors: Tensor) -> None:
        self.inner, self.values, self.vectors = inner, values, vectors

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inner.tensors, self.values, self.vectors)

    @property
    def H(self) -> "Deflated":
        return self

    def with_tensors(self, *tensors: Tensor) -> "Deflated":
        return Deflated(self.inner.with_tensors(*tensors[:-2]), *tensors[-2:])

    def matmul(self, x: Tensor) -> Tensor:
        v = self.vectors
        inside = v @ (v.mH @ x)
        outside = x - inside
        image = self.inner.matmul(outside) - outside * self.values.unsqueeze(-2)
        return image - v @ (v.mH @ image) + inside


class _Eigenvectors(torch.autograd.Function):
    @staticmethod
    def forward(operator: Map, solver: Solver, vectors: Tensor, *tensors: Tensor) -> Tensor:
        return vectors.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.solver, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        v, *tensors = ctx.saved_tensors
        a = ctx.operator.with_tensors(*tensors)
        values = dot(v, a.matmul(v)).squeeze(-2).real
        # (λ - A)⁺ on the gradient: by gaps of eigenvalues within the span of the vectors, by a solve outside of it.
        gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
        small = gaps.abs() <= torch.finfo(values.dtype).eps ** 0.5 * values.abs().amax((-1), keepdim=True).unsqueeze(-1)
        share = torch.where(small, 0, 1 / torch.where(small, 1, gaps)) * (v.mH @ gradient)
        outside = gradient - v @ (v.mH @ gradient)
        left = v @ share - solve(Deflated(a, values, v), outside, ctx.solver)
        return None, None, None, *pull(ctx.operator, tensors, ctx.needs_input_grad[3:], left, v)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operator: Map, solver: Solver, vectors: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        leaves = tuple(_lead(leaf, dim, count) for leaf, dim in zip(tensors, in_dims[3:], strict=True))
        return _Eigenvectors.apply(  # type: ignore[no-untyped-call]
            Mapped(operator, leaves, count), solver, _lead(vectors, in_dims[2], count), *leaves
        ), 0


def eigenpairs(operator: Map, values: Tensor, vectors: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Eigenpairs that somebody has found, values [..., k] and orthonormal vectors [..., n, k], made differentiable.

    To any order; A Hermitian. `solver` meets A - λ outside the vectors' span, which is definite for a whole end of
    the spectrum and Hermitian always: `minres` serves. Within a repeated eigenvalue vectors have no derivative;
    theirs is taken as zero, which is right for every function that does not depend on their choice.
    """
    if not wanted(operator):
        return values, vectors
    v: Tensor = _Eigenvectors.apply(operator, solver, vectors.detach(), *operator.tensors)  # type: ignore[no-untyped-call]
    return attach(values, operator, v, v), v


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        raise LinAlgError("second derivatives of eigenvalues need a Hermitian matrix, or a dense eigendecomposition")


def eigenvalues(operator: Map, values: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """Simple eigenvalues [..., k] of any square A, from right and left eigenvectors [..., n, k]: dλ = yᴴ dA v / yᴴ v.

    First derivatives; a second one is refused.
    """
    if not wanted(operator):
        return values
    left = left / dot(left, right).conj()
    once = [_FirstOrder.apply(each, *operator.tensors) for each in (left, right)]  # type: ignore[no-untyped-call]
    return attach(values, operator, *once)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(operator: Map, function: Function, run: Runner, rhs: Tensor, *tensors: Tensor) -> Tensor:
        return run(operator.with_tensors(*tensors), rhs, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.function, ctx.run, rhs, *tensors = inputs
        ctx.save_for_backward(rhs, *tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
        if gradient is None:  # only second derivatives ask about this value
            return (None,) * len(ctx.needs_input_grad)
        rhs, *tensors = ctx.saved_tensors
        a = ctx.operator.with_tensors(*tensors)
        needed = ctx.needs_input_grad[4:]
        dual = apply_function(a, gradient, ctx.function, ctx.run) if ctx.needs_input_grad[3] else None
        if not any(needed):
            return None, None, None, dual, *(None for _ in tensors)
        if not torch.is_grad_enabled():
            left, right = frechet(a.matmul, rhs, gradient, ctx.function)
            return None, None, None, dual, *pull(ctx.operator, tensors, needed, left, right)
        chosen = [i for i, is_needed in enumerate(needed) if is_needed]
        expansion = chebyshev(a.matmul, rhs, ctx.function)

        def image(*some: Tensor) -> Tensor:
            leaves = list(tensors)
            for i, leaf in zip(chosen, some, strict=True):
                leaves[i] = leaf
            return expansion(ctx.operator.with_tensors(*leaves).matmul, rhs)

        pair: Any = torch.func.vjp(image, *(tensors[i] for i in chosen))
        out, back = pair
        found = dict(zip(chosen, back(gradient.to(out.dtype)), strict=True))
        return None, None, None, dual, *(found.get(i) for i in range(len(tensors)))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        operator: Map,
        function: Function,
        run: Runner,
        rhs: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int]:
        count = info.batch_size
        leaves = tuple(_lead(leaf, dim, count) for leaf, dim in zip(tensors, in_dims[4:], strict=True))
        mapped = Mapped(operator, leaves, count)
        return _Function.apply(mapped, function, run, _lead(rhs, in_dims[3], count), *leaves), 0  # type: ignore[no-untyped-call]


def apply_function(operator: Map, rhs: Tensor, function: Function, run: Runner) -> Tensor:
    """f(A) b for Hermitian A and `rhs` [..., n, k] by `run`, differentiable by the operator's tensors and by b.

    The gradient by A keeps two Krylov bases (`frechet`), as long as the value needs. Second derivatives go through a
    Chebyshev expansion of f over the spectrum, whose every product autograd records: for small or well-conditioned A.
    """
    batch = torch.broadcast_shapes(operator.shape[:-2], rhs.shape[:-2])
    found: Tensor = _Function.apply(operator, function, run, rhs.expand(*batch, *rhs.shape[-2:]), *operator.tensors)  # type: ignore[no-untyped-call]
    return found


def trace_function(value: Tensor, operator: Map, probe: Tensor, function: Function, run: Runner) -> Tensor:
    """tr f(A) `value` [...] of Hermitian A, with the gradient tr f'(A) dA as estimated by `probe` [..., n, m].

    `run` finds f'(A) z once, with the same probes; in two passes memory does not grow with the steps.
    """
    if not wanted(operator):
        return value
    left = apply_function(operator, probe, derivative(function), run)
    return attach(value, operator, left / probe.shape[-1], probe)


@torch.no_grad()
def frechet(
    matmul: Callable[[Tensor], Tensor], rhs: Tensor, gradient: Tensor, function: Function
) -> tuple[Tensor, Tensor]:
    """Columns L, R [..., n, K] with gᴴ (d f(A)) b = Σ Lᴴ dA R, from the Krylov spaces of g and b.

    In eigenvectors d f(A) is dA times the divided differences of f (Daleckii and Krein 1965); Ritz vectors stand for
    them.
    """
    sides = []
    for start in (gradient, rhs):
        process = Lanczos(matmul, start)
        steps, change = 0, torch.inf
        before = torch.zeros(())
        while change > 1e-2 * torch.finfo(process.length.dtype).eps ** 0.5 and not process.exhausted and steps < 1000:
            t = process.advance(max(16, steps // 2))
            steps, column = process.steps, t.first_column(function)
            if before.ndim:
                known = torch.nn.functional.pad(before, (0, column.shape[-1] - before.shape[-1]))
                change = float((column - known).norm() / column.norm())
            before = column
        t = process.advance(0)
        nodes, y = t.eigh()
        assert process.basis is not None
        ritz = y.mT.to(rhs.dtype) @ process.basis.rows[..., : nodes.shape[-1], :]
        sides.append((nodes, ritz, y[..., 0, :] * process.length.mT))
    (sigma, u, g), (theta, w, b) = sides
    gap = sigma.unsqueeze(-1) - theta.unsqueeze(-2)
    size = torch.maximum(sigma.abs().amax(-1), theta.abs().amax(-1))[..., None, None]
    close = gap.abs() <= torch.finfo(gap.dtype).eps ** (1 / 3) * size
    quotient = (function(sigma).unsqueeze(-1) - function(theta).unsqueeze(-2)) / torch.where(close, 1, gap)
    middle = (sigma.unsqueeze(-1) + theta.unsqueeze(-2)) / 2
    weights = g.unsqueeze(-1) * torch.where(close, derivative(function)(middle), quotient) * b.unsqueeze(-2)
    left = weights.mT.to(u.dtype) @ u  # [..., k, j, n]
    return left.flatten(-3, -2).mT, w.flatten(-3, -2).mT


def chebyshev(
    matmul: Callable[[Tensor], Tensor], rhs: Tensor, function: Function, limit: int = 2000
) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """(matmul, b) -> p(A) b made of products alone, p a polynomial that is f on A's spectrum to rounding."""
    with torch.no_grad():
        nodes, _ = Lanczos(matmul, rhs.detach()).advance(min(rhs.shape[-2], 60)).eigh()
    low, high = float(nodes.min()), float(nodes.max())
    margin = 0.02 * (high - low) + 1e-8 * max(abs(low), abs(high), 1e-300)
    low, high = (low - margin if low <= 0 else max(low - margin, low / 1.5)), high + margin
    middle, half = (high + low) / 2, (high - low) / 2
    degree = 16
    while True:
        j = torch.arange(degree)
        # cos of k (2j + 1) pi / (2 degree), the multiple reduced while it is an integer: exact for high degrees too.
        cosines = torch.cos((j[:, None] * (2 * j + 1) % (4 * degree)).double() * (torch.pi / (2 * degree)))
        weights = 2 / degree * cosines @ function(middle + half * cosines[1])
        weights[0] /= 2
        tail = float(weights[-degree // 4 :].abs().max() / weights.abs().max())
        if tail < 10 * torch.finfo(nodes.dtype).eps:
            break
        if degree >= limit or not bool(torch.isfinite(weights).all()):
            raise LinAlgError("second derivatives of f(A) b need an f that is smooth over the spectrum; it is not here")
        degree *= 2
    numbers = weights.tolist()

    def expansion(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
        def scaled(x: Tensor) -> Tensor:
            return (product(x) - middle * x) / half

        before, here = b, scaled(b)
        total: Tensor = numbers[0] * before + numbers[1] * here
        for weight in numbers[2:]:
            before, here = here, 2 * scaled(here) - before
            total = total + weight * here
        return total

    return expansion
