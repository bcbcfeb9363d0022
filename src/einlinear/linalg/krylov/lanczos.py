"""The Lanczos recurrence for Hermitian matrices, one Krylov space a column."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import Basis
from einlinear.linalg.krylov.system import Matmul, divide, dot, norm, starts, widened
from einlinear.linalg.result import LinAlgError

Function = Callable[[Tensor], Tensor]
"""An elementwise function of eigenvalues, such as `torch.log`."""


@dataclass(frozen=True)
class Tridiagonal:
    """Hermitian tridiagonal matrices T, one a column: `diagonal` [..., k, m] and `off` [..., k, m - 1], both real.

    `rest` [..., k] is the entry of `off` that comes next.
    Where a Krylov space was exhausted `off` is zero from there on and the diagonal repeats its first entry, so that a
    function of T is evaluated within the spectrum.
    """

    diagonal: Tensor
    off: Tensor
    rest: Tensor

    def matrix(self) -> Tensor:
        return torch.diag_embed(self.diagonal) + torch.diag_embed(self.off, 1) + torch.diag_embed(self.off, -1)

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix())
        return values, vectors

    def quadrature(self, function: Function) -> Tensor:
        """e₁ᵀ f(T) e₁, [..., k]: Gauss's rule for vᴴ f(A) v / |v|² (Golub and Meurant 1994)."""
        nodes, vectors = self.eigh()
        return (finite(function, nodes) * vectors[..., 0, :] ** 2).sum(-1)

    def first_column(self, function: Function) -> Tensor:
        """f(T) e₁, [..., k, m]."""
        nodes, vectors = self.eigh()
        values = finite(function, nodes)
        return (vectors.to(values.dtype) @ (values * vectors[..., 0, :]).unsqueeze(-1)).squeeze(-1)


def finite(function: Function, nodes: Tensor) -> Tensor:
    values = function(nodes)
    if not bool(torch.isfinite(values).all()):
        low, high = (f"{bound:.3g}" for bound in (nodes.real.min().item(), nodes.real.max().item()))
        raise LinAlgError(f"the function is not finite on the spectrum found, between {low} and {high}")
    return values


class Lanczos:
    """The recurrence A V = V T + rest from each column of `start` [..., n, k], taken as far as asked; A Hermitian.

    With `reorthogonalise` the basis is kept and every new vector made orthogonal to it, twice. Without, memory is
    three vectors a column however many steps; ghost copies of eigenvalues then appear, which leave quadrature intact
    (Greenbaum 1989).
    """

    def __init__(
        self,
        matmul: Matmul,
        start: Tensor,
        *,
        reorthogonalise: bool = True,
        visit: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """`visit(j, vector)` sees each basis vector in turn."""
        self.product = widened(matmul, start.dtype)
        self.vector, self.length = starts("lanczos", start)
        self.basis = Basis(self.vector, min(32, start.shape[-2])) if reorthogonalise else None
        self.visit = visit
        self._before, self._beta = torch.zeros_like(self.vector), torch.zeros_like(self.length)
        self._size = self._beta
        self._diagonal: list[Tensor] = []
        self._off: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether every column's Krylov space is: T then holds all there is to know."""
        full = self.basis is not None and self.steps >= self.vector.shape[-2]
        return full or not bool(self.vector.any())

    def advance(self, steps: int) -> Tridiagonal:
        """So many further steps, and T so far."""
        for _ in range(steps):
            if self.steps and self.exhausted:
                break
            self._step()
        diagonal = torch.cat(self._diagonal, -2)
        off = torch.cat(self._off[:-1], -2) if self.steps > 1 else diagonal[..., :0, :]
        if not bool(torch.isfinite(diagonal).all()):
            raise LinAlgError("lanczos: the product with the operator gave NaN or overflowed")
        return Tridiagonal(diagonal.mT, off.mT, self._off[-1].squeeze(-2))

    def _step(self) -> None:
        v = self.vector
        if self.visit is not None:
            self.visit(self.steps, v)
        w = self.product(v)
        if w.shape != v.shape:
            raise ValueError(
                "lanczos takes square operators and a start broadcast against their batch: the product of "
                f"{list(v.shape)} came out as {list(w.shape)}"
            )
        alpha = dot(v, w).real
        if self._diagonal:
            alpha = torch.where(norm(v) == 0, self._diagonal[0], alpha)
        w = w - alpha * v - self._beta * self._before
        self._size = torch.maximum(self._size, torch.maximum(alpha.abs(), self._beta))
        self._before = v
        if self.basis is None:
            beta = norm(w)
            v = divide(w, beta)
        else:
            _, v, beta = self.basis.orthogonalise(w)
        ended = beta <= 10 * torch.finfo(beta.dtype).eps * self._size
        self.vector, self._beta = torch.where(ended, 0, v), torch.where(ended, 0, beta)
        if self.basis is not None:
            self.basis.append(self.vector)
        self._diagonal.append(alpha)
        self._off.append(self._beta)
