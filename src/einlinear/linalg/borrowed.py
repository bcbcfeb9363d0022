"""What is borrowed from scipy (the extra `lab`): functions of defective matrices, banded and sparse factorisations."""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einlinear.operator import Fixed, Operator, remembered
from einlinear.operators import Banded, Sparse
from einlinear.operators.selection import parity


def scipy(module: str, doing: str) -> Any:
    """A module of scipy, or a sentence where there is none."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'cannot {doing} without scipy, which is not installed: pip install "einlinear[lab]"', name=error.name
        ) from error


def has_scipy() -> bool:
    """Whether scipy is there."""
    return importlib.util.find_spec("scipy") is not None


def matrix_function(matrix: Tensor, name: str, p: float | None) -> Tensor:
    """log, or the power p, of each matrix `[..., n, n]` by its Schur form; complex where it must be."""
    linalg = scipy("linalg", f"take the {name} of a matrix with dependent eigenvectors")
    numpy = importlib.import_module("numpy")

    def one(a: Any) -> Any:
        try:
            if name == "log":
                return linalg.logm(a)
            return linalg.sqrtm(a) if p == 0.5 else linalg.fractional_matrix_power(a, p)
        except (ValueError, linalg.LinAlgError):  # met an infinite entry on its way
            return numpy.full_like(a, math.nan)

    flat = matrix.detach().cpu().resolve_conj().reshape(-1, *matrix.shape[-2:])
    flat = flat.to(torch.complex128 if matrix.is_complex() else torch.float64)
    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a result is seen by whoever asked for it
        made = torch.as_tensor(numpy.stack([numpy.asarray(one(a)) for a in flat.numpy()]))
    made = made.reshape(matrix.shape).to(matrix.device)
    if made.is_complex() and not matrix.is_complex() and bool(made.imag.abs().max() <= 1e-10 * made.abs().max()):
        made = made.real
    return made.to(matrix.dtype.to_complex() if made.is_complex() else matrix.dtype)


@dataclass(eq=False, repr=False)
class Borrowed(Fixed):
    """A⁻¹ by a factorisation that scipy holds: no tensors, so no gradients (`Refined` gives them).

    `substitute(b, side)` takes and gives NumPy columns `[n, k]`; `side` is "N", "T" or "H".
    """

    n: int
    substitute: Callable[[Any, str], Any]
    side: str = "N"
    work: float = 0.0

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.n, self.n))

    def _matmul(self, x: Tensor) -> Tensor:
        solved: Tensor = _Substitution.apply(x, self)
        return solved

    def solved(self, x: Tensor) -> Tensor:
        """A⁻¹ x, without gradients."""
        columns = x.movedim(-2, 0).reshape(self.n, -1).detach().cpu().resolve_conj().numpy()
        solved = torch.as_tensor(self.substitute(columns, self.side)).to(x.device)
        return solved.reshape(self.n, *x.shape[:-2], x.shape[-1]).movedim(0, -2)

    def _transpose(self) -> "Borrowed":
        if self.side == "H":
            return replace(self, side="N")._conj()
        return replace(self, side={"N": "T", "T": "N"}[self.side])

    def _conj(self) -> "Borrowed":
        if self.side != "N":
            return replace(self, side={"T": "H", "H": "T"}[self.side])
        substitute = self.substitute
        return replace(self, substitute=lambda b, side: substitute(b.conj(), side).conj())

    @property
    def flops(self) -> float:
        return self.work


class _Substitution(torch.autograd.Function):
    """Linear in the right-hand side: its derivative is the adjoint substitution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Borrowed) -> Tensor:
        ctx.by = by
        return by.solved(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.by.H.matmul(gradient), None


@dataclass(frozen=True)
class Factorised:
    """Sign and logarithm of the determinant of A, with A⁻¹ (None where A is singular)."""

    sign: complex
    logarithm: float
    inverse: Borrowed | None


def _factorised(
    like: Operator, pivots: Any, swaps: int, substitute: Callable[[Any, str], Any], work: float
) -> Factorised:
    numpy = importlib.import_module("numpy")
    size = numpy.abs(pivots)
    if not bool((size > 0).all()):
        return Factorised(0.0, -math.inf, None)
    sign = complex(numpy.prod(pivots / size)) * (-1) ** swaps
    inverse = Borrowed(like.shape[-1], substitute, work=work, dtype=like.dtype, device=like.device)
    return Factorised(sign if like.dtype.is_complex else sign.real, float(numpy.log(size).sum()), inverse)


def banded_lu(operator: Banded) -> Factorised:
    """LAPACK's LU of a band matrix with partial pivoting: O(n below (below + above))."""
    lapack = scipy("linalg.lapack", "factorise a banded operator")
    numpy = importlib.import_module("numpy")
    n, (below, above) = operator.shape[-1], operator.reach
    bands = operator.bands.detach().cpu().resolve_conj().numpy()
    stored = numpy.zeros((2 * below + above + 1, n), dtype=bands.dtype, order="F")
    for k, offset in enumerate(operator.offsets):
        if abs(offset) < n:
            row = bands[k]
            entries = row[-offset:] if offset < 0 else row[: n - offset]
            stored[below + above - offset, max(offset, 0) : n + min(offset, 0)] = entries
    factor, solve = lapack.get_lapack_funcs(("gbtrf", "gbtrs"), (stored,))
    lu, pivots, _ = factor(stored, below, above)
    sides = {"N": 0, "T": 1, "H": 2}

    def substitute(b: Any, side: str) -> Any:
        return solve(lu, below, above, b.astype(lu.dtype, copy=False), pivots, trans=sides[side])[0]

    swaps = int((pivots != numpy.arange(n)).sum())
    return _factorised(operator, lu[below + above], swaps, substitute, 2.0 * n * (2 * below + above))


def _band_solver(operator: Banded) -> Callable[..., Any]:
    """LAPACK's eigensolver for a Hermitian band matrix, which takes what to select."""
    linalg = scipy("linalg", "find the eigenvalues of a banded operator")
    numpy = importlib.import_module("numpy")
    n, (below, _) = operator.shape[-1], operator.reach
    bands = operator.bands.detach().cpu().resolve_conj().numpy()
    stored = numpy.zeros((max(below, 1) + 1, n), dtype=bands.dtype)
    for k, offset in enumerate(operator.offsets):
        if -n < offset <= 0:
            stored[-offset, : n + offset] = bands[k][-offset:]
    if below <= 1 and not operator.dtype.is_complex:
        return partial(linalg.eigh_tridiagonal, stored[0], stored[1, :-1])
    return partial(linalg.eig_banded, stored, lower=True)


def banded_eigenvalues(operator: Banded) -> Tensor:
    """All eigenvalues of a Hermitian band matrix, ascending, without gradients."""
    return torch.as_tensor(_band_solver(operator)(eigvals_only=True)).to(operator.device)


def banded_eigenpairs(operator: Banded, k: int, which: str) -> tuple[Tensor, Tensor]:
    """The k eigenpairs of a Hermitian band matrix that `which` names: "LA", "SA" or "SM"; "LM" gives k of each end.

    By bisection and inverse iteration: O(n k) for a tridiagonal one, however close its eigenvalues are.
    """
    numpy = importlib.import_module("numpy")
    solve, n = _band_solver(operator), operator.shape[-1]
    if which == "SM":
        low = int(numpy.abs(solve(eigvals_only=True)).argsort()[:k].min())
        ranges = [(low, low + k - 1)]
    elif which == "LM" and 2 * k < n:
        ranges = [(0, k - 1), (n - k, n - 1)]
    else:
        ranges = [{"SA": (0, k - 1), "LA": (n - k, n - 1)}.get(which, (0, n - 1))]
    values, vectors = zip(*(solve(select="i", select_range=chosen) for chosen in ranges), strict=True)
    made = (torch.as_tensor(numpy.concatenate(values)), torch.as_tensor(numpy.concatenate(vectors, -1)))
    return made[0].to(operator.device), made[1].to(operator.dtype).to(operator.device)


def sparse_lu(operator: Sparse) -> Factorised:
    """SuperLU's factorisation with partial pivoting and a fill-reducing order of columns."""
    linalg = scipy("sparse.linalg", "factorise a sparse operator")
    try:
        factors = linalg.splu(to_csr(operator).tocsc())
    except RuntimeError as error:
        if "singular" not in str(error):
            raise
        return Factorised(0.0, -math.inf, None)
    swaps = _parity(factors.perm_r) + _parity(factors.perm_c)
    return _factorised(operator, factors.U.diagonal(), swaps, factors.solve, 2.0 * (factors.L.nnz + factors.U.nnz))


def to_csr(operator: Sparse) -> Any:
    """As a scipy matrix, entries of one place added up."""
    sparse = scipy("sparse", "convert a sparse operator")
    places = (operator.rows.cpu().numpy(), operator.columns.cpu().numpy())
    return sparse.coo_matrix(
        (operator.values.detach().cpu().resolve_conj().numpy(), places), shape=operator.size
    ).tocsr()


def fill(operator: Sparse) -> float:
    """A bound on the entries of the factors: n times the bandwidth in the order of reverse Cuthill and McKee."""
    graph = scipy("sparse.csgraph", "order a sparse operator")
    numpy = importlib.import_module("numpy")
    matrix = to_csr(operator)
    order = graph.reverse_cuthill_mckee(matrix, symmetric_mode=False)
    place = numpy.empty_like(order)
    place[order] = numpy.arange(len(order))
    entries = matrix.tocoo()
    width = int(numpy.abs(place[entries.row] - place[entries.col]).max()) if entries.nnz else 0
    return float(operator.size[0] * (2 * width + 1))


def _parity(order: Any) -> int:
    return 0 if parity(torch.as_tensor(order, dtype=torch.int64)) > 0 else 1
