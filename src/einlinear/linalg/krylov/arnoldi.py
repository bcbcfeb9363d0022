"""The Arnoldi recurrence for any square matrix, one Krylov space a column."""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import Basis
from einlinear.linalg.krylov.lanczos import Function, finite
from einlinear.linalg.krylov.system import Matmul, starts, widened
from einlinear.linalg.result import LinAlgError


@dataclass(frozen=True)
class Hessenberg:
    """Upper Hessenberg matrices H [..., k, m, m], one a column, and the `rest` [..., k] below their last entries."""

    entries: Tensor
    rest: Tensor

    def matrix(self) -> Tensor:
        return self.entries

    def first_column(self, function: Function) -> Tensor:
        """f(H) e₁, [..., k, m], complex only where it must be."""
        return matrix_function(self.entries, function)[..., 0]

    def quadrature(self, function: Function) -> Tensor:
        """e₁ᵀ f(H) e₁, [..., k]."""
        return self.first_column(function)[..., 0]


def matrix_function(matrix: Tensor, function: Function) -> Tensor:
    """f(M) of small square matrices [..., m, m] by their eigenvectors; exp by scaling and squaring.

    A matrix whose eigenvectors are as good as dependent (a defective one) has no accurate f(M) this way: LinAlgError.
    Names known to torch or scipy are safe there: exp always, log and sqrt through scipy.
    """
    if function is torch.exp:
        exponential: Tensor = torch.linalg.matrix_exp(matrix)
        return exponential
    nodes, vectors = torch.linalg.eig(matrix)
    values = finite(function, nodes)
    eps = torch.finfo(matrix.dtype).eps
    if bool((torch.linalg.cond(vectors) > eps**-0.5).any()):
        return _by_schur(matrix, function)
    result: Tensor = torch.linalg.solve(vectors, vectors * values.unsqueeze(-2), left=False)
    if not matrix.is_complex() and bool(result.imag.abs().max() <= eps**0.5 * result.abs().max()):
        return result.real
    return result


def _by_schur(matrix: Tensor, function: Function) -> Tensor:
    known = {torch.log: "logm", torch.sqrt: "sqrtm"}
    if function not in known:
        raise LinAlgError("f(A): the matrix is as good as defective, and only exp, log and sqrt are safe for such")
    try:
        from scipy import linalg  # type: ignore[import-untyped]
    except ImportError as missing:
        raise LinAlgError("f(A): log and sqrt of a matrix as good as defective need scipy") from missing
    flat = matrix.flatten(0, -3) if matrix.ndim > 2 else matrix.unsqueeze(0)
    done = [torch.as_tensor(getattr(linalg, known[function])(entry.cpu().resolve_conj().numpy())) for entry in flat]
    return torch.stack(done).to(matrix.device).reshape(matrix.shape)


class Arnoldi:
    """The recurrence A V = V H + rest from each column of `start` [..., n, k], taken as far as asked."""

    def __init__(self, matmul: Matmul, start: Tensor) -> None:
        self.product = widened(matmul, start.dtype)
        self.vector, self.length = starts("arnoldi", start)
        self.basis = Basis(self.vector, min(32, start.shape[-2]))
        self._columns: list[Tensor] = []
        self._rests: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._columns)

    @property
    def exhausted(self) -> bool:
        return self.steps >= self.vector.shape[-2] or not bool(self.vector.any())

    def advance(self, steps: int) -> Hessenberg:
        """So many further steps, and H so far."""
        for _ in range(steps):
            if self.steps and self.exhausted:
                break
            w = self.product(self.vector)
            if w.shape != self.vector.shape:
                raise ValueError(
                    "arnoldi takes square operators and a start broadcast against their batch: the product of "
                    f"{list(self.vector.shape)} came out as {list(w.shape)}"
                )
            coefficients, self.vector, rest = self.basis.orthogonalise(w)
            self.basis.append(self.vector)
            self._columns.append(coefficients)
            self._rests.append(rest.squeeze(-2))
        m = self.steps
        entries = torch.stack([torch.nn.functional.pad(c, (0, m - c.shape[-1])) for c in self._columns], -1)
        below = torch.stack(self._rests, -1)
        if m > 1:
            entries = entries + torch.diag_embed(below[..., :-1], -1)
        # Behind an exhausted space: the first entry again, so that functions are evaluated within the field of values.
        ended = (
            torch.cat([torch.zeros_like(below[..., :1], dtype=torch.bool), below[..., :-1] == 0], -1).cummax(-1).values
        )
        entries = entries + torch.diag_embed(torch.where(ended, entries[..., :1, 0], 0))
        if not bool(torch.isfinite(entries).all()):
            raise LinAlgError("arnoldi: the product with the operator gave NaN or overflowed")
        return Hessenberg(entries, below[..., -1])
