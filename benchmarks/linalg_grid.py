"""Every question of linear algebra about many operators, judged against the written-out matrix: the wrong cells.

    python benchmarks/linalg_grid.py [--draws 400] [--seed 0] [--results linalg_grid.csv] [--only kron --ask solve]

Matrices are random, singular, indefinite, defective, nearly singular, graded, with repeated eigenvalues, 1 × 1,
empty, rectangular, not contiguous or with gradients, in float32, float64 and complex128, alone or in a batch; one or
two levels of compositions are drawn over them. Beside them stand named matrices whose spectra are known in closed
form. The reference is composed in NumPy by this file and never asks the library. What may deviate is what rounding
may: unit roundoff times a modest number times the condition of the question. A refusal (`OperatorError`) and a
warning are right only where the reference has no answer, or none to working precision.
"""

import argparse
import csv
import math
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

import einlinear as el
from einlinear.lab.bench import provenance

la = el.linalg
RESULTS = Path(__file__).parent / "results" / "linalg_grid.csv"
Array = NDArray[Any]
DTYPES = (torch.float32, torch.float64, torch.complex128)


@dataclass
class Case:
    """An operator and its matrix `[*batch, m, n]` in double precision; `tags` say what is peculiar about it."""

    name: str
    A: Any
    D: Array
    tags: frozenset[str] = field(default=frozenset())

    @property
    def square(self) -> bool:
        return bool(self.D.shape[-1] == self.D.shape[-2])

    @property
    def eps(self) -> float:
        return float(torch.finfo(self.A.dtype).eps)

    @property
    def hermitian(self) -> bool:
        return self.square and bool(np.array_equal(self.D, adjoint(self.D)))


class Wrong(AssertionError):
    """A cell that is wrong."""


def adjoint(x: Array) -> Array:
    return np.conj(np.swapaxes(x, -1, -2))


def wide(x: Any) -> Array:
    """In double precision, an operator written out."""
    if isinstance(x, el.Operator):
        x = x.dense()
    made = x.detach().resolve_conj().numpy()
    return np.asarray(made, np.complex128 if np.iscomplexobj(made) else np.float64)


def matrices(x: Array) -> Iterator[Array]:
    yield from x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else [x]


def size(x: Array) -> float:
    return float(np.abs(x).max()) if x.size else 0.0


def close(found: Any, wanted: Array, tolerance: float, what: str, scale: float | None = None) -> None:
    """Equal to `tolerance` of `scale`, by default the largest entry."""
    found = wide(found)
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {found.shape}, wanted {wanted.shape}")
    if not wanted.size:
        return
    if not np.isfinite(found).all() and np.isfinite(wanted).all():
        raise Wrong(f"{what}: not finite")
    scale = size(wanted) if scale is None else scale
    error = size(found - wanted)
    if not error <= tolerance * scale + 1e-300:
        raise Wrong(f"{what}: off by {error:.2g} of {scale:.2g}, allowed {tolerance:.2g}")


# Leaves: ------------------------------------------------------------------------------------------------------------


class Draw:
    """Matrices of one dtype and batch, as tensors; their double-precision values are taken from the tensors."""

    def __init__(self, seed: int, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
        self.dtype, self.batch = dtype, batch
        self.rng, self.choice = np.random.default_rng(seed), random.Random(seed)

    def normal(self, *shape: int) -> Array:
        x = self.rng.standard_normal((*self.batch, *shape))
        return x + 1j * self.rng.standard_normal(x.shape) if self.dtype.is_complex else x

    def tensor(self, x: Array) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(x)).to(self.dtype)

    def orthogonal(self, n: int) -> Array:
        return np.linalg.qr(self.normal(n, n))[0]

    def integers(self, *shape: int) -> Array:
        x = self.rng.integers(-3, 4, (*self.batch, *shape)).astype(float)
        return x + 1j * self.rng.integers(-3, 4, x.shape) if self.dtype.is_complex else x


def spiced(r: Draw, n: int, spice: str) -> Array:
    """A square matrix that is peculiar in the way named."""
    if spice == "singular":
        x = r.integers(n, n)
        x[..., -1, :] = x[..., 0, :]
        return x
    if spice == "zero":
        return np.zeros((*r.batch, n, n))
    if spice == "semidefinite":
        x = r.integers(n, max(n - 1, 1))
        return x @ adjoint(x)
    if spice == "indefinite":
        x = r.integers(n, n)
        return x + adjoint(x)
    if spice == "definite":
        x = r.integers(n, n)
        return x @ adjoint(x) + np.eye(n)
    if spice == "defective":
        x = 2 * np.eye(n) + np.diag(np.ones(n - 1), 1)
        return np.broadcast_to(x, (*r.batch, n, n)).copy()
    if spice == "nilpotent":
        return np.broadcast_to(np.diag(np.ones(n - 1), 1), (*r.batch, n, n)).copy()
    if spice == "negative":  # real negative eigenvalues, not symmetric: on the cut of log and of roots
        return -np.diag(np.arange(1.0, n + 1)) + np.triu(r.integers(n, n), 1)
    if spice == "repeated":
        q = r.orthogonal(n)
        return (q * np.where(np.arange(n) < n // 2, 1.0, 3.0)) @ adjoint(q)
    if spice == "reflection":
        q = r.orthogonal(n)
        return (q * np.where(np.arange(n) < n // 2, 1.0, -1.0)) @ adjoint(q)
    if spice == "nearly singular":
        q, p = r.orthogonal(n), r.orthogonal(n)
        return (q * np.geomspace(1, 1e-4 if r.dtype == torch.float32 else 1e-9, n)) @ p
    if spice == "graded":
        return r.normal(n, n) * np.geomspace(1, 1e-6, n)[:, None]
    if spice == "large":
        return r.normal(n, n) * 1e8
    if spice == "small":
        return r.normal(n, n) * 1e-12
    return r.normal(n, n)


SPICES = (
    "random", "random", "singular", "zero", "semidefinite", "indefinite", "definite", "defective", "nilpotent",
    "negative", "repeated", "reflection", "nearly singular", "graded", "large", "small",
)  # fmt: skip


def layout(r: Draw, x: Array) -> Tensor:
    """The same values, in one of several memory layouts, perhaps asking for gradients."""
    t = r.tensor(x)
    how = r.choice.randrange(4)
    if how == 0 and t.ndim >= 2:
        t = t.mT.contiguous().mT
    elif how == 1:
        t = torch.stack([t, t], -1)[..., 0]
    elif how == 2:
        t.requires_grad_()
    return t


def known_of(D: Array, choice: random.Random) -> list[str]:
    """Claims that are true of the matrix, or none."""
    if D.shape[-1] != D.shape[-2] or not np.array_equal(D, adjoint(D)) or choice.random() < 0.4:
        return []
    values = np.linalg.eigvalsh(D)
    return ["psd"] if values.size and (values > 1e-9).all() else ["hermitian"]


def dense(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 2, 3, 3, 4]) if n is None else n
    spice = r.choice.choice(SPICES)
    t = layout(r, spiced(r, n, spice))
    D = wide(t)
    A = la.Dense(t)
    if claims := known_of(D, r.choice):
        A = A.claim(*claims)
    return Case(f"{spice}[{n}]", A, D, frozenset([spice]))


def diagonal(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 2, 4]) if n is None else n
    v = r.integers(n) if r.choice.random() < 0.5 else r.normal(n)
    t = layout(r, v)
    return Case("diagonal", la.Diagonal(t), wide(t)[..., None] * np.eye(n))


def identity(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 2, 3]) if n is None else n
    return Case("unit", la.Identity(n, dtype=r.dtype), np.eye(n))


def triangular(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    upper, unit = r.choice.random() < 0.5, r.choice.random() < 0.3
    t = layout(r, r.integers(n, n))
    D = wide(t)
    D = np.triu(D) if upper else np.tril(D)
    if unit:
        D[..., range(n), range(n)] = 1
    return Case("triangle", la.Triangular(t, upper=upper, unit=unit), D)


def toeplitz(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    c, w = r.tensor(r.integers(n)), r.tensor(r.integers(n))
    if r.choice.random() < 0.5:
        c = c.clone()
        c[..., 0] = c[..., 0].real.to(c.dtype)
        A, row = la.Toeplitz(c), wide(c).conj()
    else:
        A, row = la.Toeplitz(c, w), wide(w)
    column = wide(c)
    D = np.empty((*r.batch, n, n), column.dtype)
    for i in range(n):
        for j in range(n):
            D[..., i, j] = column[..., i - j] if i >= j else row[..., j - i]
    return Case("Toeplitz", A, D)


def circulant(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    c = layout(r, r.integers(n))
    D = np.stack([np.roll(wide(c), k, -1) for k in range(n)], -1)
    return Case("circulant", la.Circulant(c), D)


def permutation(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    index = r.rng.permutation(n)
    return Case("permutation", la.Permutation(torch.as_tensor(index), dtype=r.dtype), np.eye(n)[index])


def reflections(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    v = layout(r, r.normal(n, r.choice.choice([1, 2])))
    D = np.broadcast_to(np.eye(n), (*r.batch, n, n))
    for j in range(v.shape[-1]):
        w = wide(v)[..., :, j : j + 1]
        D = D @ (np.eye(n) - 2 * w @ adjoint(w) / (adjoint(w) @ w))
    return Case("reflections", la.Householder(v), D)


def banded(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 12]) if n is None else n
    offsets = r.choice.choice([(0,), (-1, 0, 1), (0, 1), (-2, 1), (0, 2)])
    bands = layout(r, r.integers(len(offsets), n))
    D = np.zeros((*r.batch, n, n), wide(bands).dtype)
    for k, offset in enumerate(offsets):
        for i in range(n):
            if 0 <= i + offset < n:
                D[..., i, i + offset] = wide(bands)[..., k, i]
    return Case(f"band{offsets}", la.Banded(bands, offsets), D)


def sparse(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3, 4]) if n is None else n
    count = 2 * n
    rows, columns = r.rng.integers(0, n, (2, count))
    t = layout(r, r.integers(count))
    D = np.zeros((*r.batch, n, n), wide(t).dtype)
    for k in range(count):
        D[..., rows[k], columns[k]] += wide(t)[..., k]
    return Case("sparse", la.Sparse(t, torch.as_tensor(rows), torch.as_tensor(columns), (n, n)), D)


def zero(r: Draw, n: int | None = None) -> Case:
    n = r.choice.choice([1, 3]) if n is None else n
    return Case("zero", la.Zero(n, n, dtype=r.dtype), np.zeros((n, n)))


def blocks(r: Draw, n: int | None = None) -> Case:
    m = 2 if n is None or n % 2 == 0 else 1
    b = 2 if n is None else n // m
    if b == 0:
        return dense(r, n)
    parts = [spiced(r, m, r.choice.choice(SPICES)) for _ in range(b)]
    t = layout(r, np.stack(parts, -3))
    D = np.zeros((*r.batch, b * m, b * m), wide(t).dtype)
    for k in range(b):
        D[..., k * m : (k + 1) * m, k * m : (k + 1) * m] = wide(t)[..., k, :, :]
    return Case("blocks", la.BlockDiagonal(t), D)


def structure(r: Draw, n: int | None = None) -> Case:
    if n not in (None, 4):
        return dense(r, n)
    family = r.choice.choice([el.Monarch(2), el.BTT(), el.Kronecker(), el.LowRank(2), el.TensorTrain(1, 2)])
    spec = family(4, 4)
    factors = [r.tensor(r.normal(*shape)) for shape in spec.factor_shapes]
    letters = {axis: chr(97 + k) for k, axis in enumerate(spec.sizes)}
    write = "".join(letters[a] for a in spec.x) + "," if False else ""
    inputs = ",".join("..." + "".join(letters[a] for a in axes) for axes in spec.factors)
    both = "".join(letters[a] for a in spec.y) + "Z"
    eye = np.eye(4).reshape(*(spec.sizes[a] for a in spec.x), 4)
    first = "".join(letters[a] for a in spec.x) + "Z"
    D = np.einsum(f"{write}{first},{inputs}->...{both}", eye, *map(wide, factors)).reshape(*r.batch, 4, 4)
    return Case(f"{family!r}", la.operator(spec, factors), D)


LEAVES = (
    dense, dense, dense, dense, diagonal, identity, triangular, toeplitz, circulant, permutation, reflections, banded,
    sparse, zero, blocks, structure,
)  # fmt: skip


# Compositions: ------------------------------------------------------------------------------------------------------


def kron(*parts: Array) -> Array:
    made = parts[0]
    for x in parts[1:]:
        y = made[..., :, None, :, None] * x[..., None, :, None, :]
        made = y.reshape(*y.shape[:-4], y.shape[-4] * y.shape[-3], y.shape[-2] * y.shape[-1])
    return made


def compose(r: Draw, level: int) -> Case:
    """A random composition of at most so many levels."""
    if level == 0:
        return r.choice.choice(LEAVES)(r)
    how = r.choice.choice(list(WAYS))
    made = WAYS[how](r, level)
    return made


def sub(r: Draw, level: int, n: int | None = None) -> Case:
    """A part: of size n, where that is asked for."""
    if n is None:
        return compose(r, level - 1 if r.choice.random() < 0.6 else 0)
    return r.choice.choice(LEAVES)(r, n)


def _two(r: Draw, level: int) -> tuple[Case, Case]:
    a = sub(r, level)
    return a, sub(r, level, a.D.shape[-1])


def _product(r: Draw, level: int) -> Case:
    a, b = _two(r, level)
    return Case(f"({a.name} @ {b.name})", a.A @ b.A, a.D @ b.D)


def _sum(r: Draw, level: int) -> Case:
    a, b = _two(r, level)
    if a.D.shape[-2:] != b.D.shape[-2:]:
        return a
    sign = r.choice.choice([1, -1])
    return Case(f"({a.name} + {sign} {b.name})", a.A + b.A if sign > 0 else a.A - b.A, a.D + sign * b.D)


def _kron(r: Draw, level: int) -> Case:
    a, b = sub(r, 1), sub(r, 1)
    return Case(f"({a.name} ⊗ {b.name})", la.kron(a.A, b.A), kron(a.D, b.D))


def _kronsum(r: Draw, level: int) -> Case:
    a, b = sub(r, 1), sub(r, 1)
    if not (a.square and b.square):
        return a
    D = kron(a.D, np.eye(b.D.shape[-1])) + kron(np.eye(a.D.shape[-1]), b.D)
    return Case(f"({a.name} ⊕ {b.name})", la.kronsum(a.A, b.A), D)


def _shift(r: Draw, level: int) -> Case:
    a = sub(r, level)
    if not a.square:
        return a
    n, c = a.D.shape[-1], r.choice.choice([1.0, -2.0, 0.5])
    return Case(f"({a.name} + {c})", a.A + c * la.Identity(n, dtype=r.dtype), a.D + c * np.eye(n))


def _scale(r: Draw, level: int) -> Case:
    a = sub(r, level)
    c = r.choice.choice([2.0, -3.0, 0.0, -1.0, 1e-3, *([1j, -1 - 2j] if r.dtype.is_complex else [])])
    return Case(f"{c} {a.name}", c * a.A, c * a.D)


def _adjoint(r: Draw, level: int) -> Case:
    a = sub(r, level)
    if r.choice.random() < 0.5:
        return Case(f"{a.name}.H", a.A.H, adjoint(a.D))
    return Case(f"{a.name}.T", a.A.T, np.swapaxes(a.D, -1, -2))


def _gram(r: Draw, level: int) -> Case:
    a = sub(r, level)
    return Case(f"gram {a.name}", a.A @ a.A.H, a.D @ adjoint(a.D))


def _conjugated(r: Draw, level: int) -> Case:
    a = sub(r, level)
    if not a.square:
        return a
    q = r.choice.choice([reflections, permutation])(r, a.D.shape[-1])
    return Case(f"Q {a.name} Qᴴ", q.A @ a.A @ q.A.H, q.D @ a.D @ adjoint(q.D))


def _broadcast(*parts: Array) -> list[Array]:
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in parts))
    return [np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in parts]


def _direct(r: Draw, level: int) -> Case:
    a, b = sub(r, level), sub(r, level)
    x, y = _broadcast(a.D, b.D)
    zeros = [np.zeros((*x.shape[:-2], *s)) for s in ((x.shape[-2], y.shape[-1]), (y.shape[-2], x.shape[-1]))]
    D = np.concatenate([np.concatenate([x, zeros[0]], -1), np.concatenate([zeros[1], y], -1)], -2)
    return Case(f"({a.name} ⊞ {b.name})", la.block_diag(a.A, b.A), D)


def _block(r: Draw, level: int) -> Case:
    a = sub(r, level)
    if not a.square or not a.D.shape[-1]:
        return a
    n = a.D.shape[-1]
    b, c, d = (r.tensor(r.integers(*shape)) for shape in ((n, 2), (2, n), (2, 2)))
    x, *rest = _broadcast(a.D, wide(b), wide(c), wide(d))
    D = np.concatenate([np.concatenate([x, rest[0]], -1), np.concatenate([rest[1], rest[2]], -1)], -2)
    return Case(f"block {a.name}", la.block([[a.A, b], [c, d]]), D)


def _update(r: Draw, level: int) -> Case:
    a = sub(r, level)
    if not a.square or not a.D.shape[-1]:
        return a
    u, v = (r.tensor(r.integers(a.D.shape[-1], 1)) for _ in range(2))
    if r.choice.random() < 0.5:
        return Case(f"{a.name} + uuᴴ", la.LowRankUpdate(a.A, u), a.D + wide(u) @ adjoint(wide(u)))
    if r.choice.random() < 0.5:
        return Case(f"{a.name} + u@vᴴ", a.A + la.Dense(u) @ la.Dense(v).H, a.D + wide(u) @ adjoint(wide(v)))
    return Case(f"{a.name} + uvᴴ", la.LowRankUpdate(a.A, u, v), a.D + wide(u) @ adjoint(wide(v)))


def _select(r: Draw, level: int) -> Case:
    a = sub(r, level)
    m = max(a.D.shape[-2] - 1, 1)
    return Case(f"{a.name}[:{m}]", la.select(a.A, slice(0, m), slice(None)), a.D[..., :m, :])


def _rectangle(r: Draw, level: int) -> Case:
    m, n = r.choice.choice([(2, 3), (4, 2), (3, 1), (1, 3)])
    t = layout(r, r.integers(m, n))
    if r.choice.random() < 0.5:
        return Case(f"rectangle[{m},{n}]", la.Dense(t), wide(t))
    b = sub(r, level)
    return Case(f"(rectangle[{m},{n}] ⊗ {b.name})", la.kron(la.Dense(t), b.A), kron(wide(t), b.D))


WAYS: dict[str, Callable[[Draw, int], Case]] = {
    "product": _product, "sum": _sum, "kron": _kron, "kronsum": _kronsum, "shift": _shift, "scale": _scale,
    "adjoint": _adjoint, "gram": _gram, "conjugated": _conjugated, "direct": _direct, "block": _block,
    "update": _update, "select": _select, "rectangle": _rectangle,
}  # fmt: skip


# Questions: ---------------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Case], None]] = {}


def question(check: Callable[[Case], None]) -> Callable[[Case], None]:
    QUESTIONS[check.__name__] = check
    return check


def singular_values(D: Array) -> Array:
    return np.linalg.svd(D, compute_uv=False)


def condition(D: Array) -> float:
    """The worst of the batch."""
    if 0 in D.shape[-2:]:
        return 1.0
    s = singular_values(D)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where(s[..., -1] > 0, s[..., 0] / s[..., -1], np.inf)
    return float(k.max()) if k.size else 1.0


def slack(case: Case) -> float:
    """Rounding that a computation of this size may have."""
    return 400 * max(case.D.shape[-2:], default=1) * case.eps


def hopeless(case: Case, factor: float = 1e-1) -> bool:
    """Whether no digit of an inverse can be expected."""
    return condition(case.D) * case.eps * max(case.D.shape[-1], 1) > factor


def refused(ask: Callable[[], Any], allowed: bool, what: str) -> Any:
    """The answer; None where it is refused or warned about, which only some cases may."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = ask()
        except el.OperatorError as error:
            if allowed:
                return None
            raise Wrong(f"{what} refused: {str(error)[:200]}") from error
    told = [w for w in caught if w.category is not DeprecationWarning]
    if told and not allowed:
        raise Wrong(f"{what} warned: {str(told[0].message)[:200]}")
    return None if told else found


@question
def matmul(case: Case) -> None:
    x = torch.randn(case.D.shape[-1], 2, dtype=case.A.dtype)
    scale = max(size(np.abs(case.D) @ np.abs(wide(x))), 1e-300) if case.D.size else 1.0
    close(case.A.matmul(x), case.D @ wide(x), slack(case), "A x", scale)
    close(case.A, case.D, slack(case), "A", size(case.D) or 1.0)
    y = torch.randn(case.D.shape[-2], 2, dtype=case.A.dtype)
    close(case.A.H.matmul(y), adjoint(case.D) @ wide(y), slack(case), "Aᴴ y", scale * 10 or 1.0)


@question
def properties(case: Case) -> None:
    known, D = case.A.properties, case.D
    tiny = slack(case) * size(D)
    if "hermitian" in known and size(D - adjoint(D)) > tiny:
        raise Wrong("held to be Hermitian")
    if "psd" in known and D.size and np.linalg.eigvalsh((D + adjoint(D)) / 2).min() < -tiny * len(D):
        raise Wrong("held to be positive semi-definite")
    if "unitary" in known and size(D @ adjoint(D) - np.eye(D.shape[-1])) > slack(case):
        raise Wrong("held to be unitary")
    for name, part in (("lower", np.triu(D, 1)), ("upper", np.tril(D, -1))):
        if name in known and size(part) > tiny:
            raise Wrong(f"held to be {name}")


@question
def solve(case: Case) -> None:
    if not case.square:
        return
    b = torch.randn(case.D.shape[-1], 2, dtype=case.A.dtype)
    found = refused(lambda: la.solve(case.A, b), hopeless(case, 1e-3), "solve")
    if found is not None and not hopeless(case, 1e-3):
        wanted = np.linalg.solve(case.D, np.broadcast_to(wide(b), (*case.D.shape[:-1], 2)))
        close(found, wanted, slack(case) * condition(case.D), "x")


@question
def inverse(case: Case) -> None:
    if not case.square:
        return
    found = refused(lambda: la.inverse(case.A), hopeless(case, 1e-3), "inverse")
    if found is not None and not hopeless(case, 1e-3):
        wanted, near = np.linalg.inv(case.D), slack(case) * condition(case.D)
        close(found, wanted, near, "A⁻¹")
        close(found.H, adjoint(wanted), near, "A⁻ᴴ")
        close(la.slogdet(found).logabsdet, -np.linalg.slogdet(case.D)[1], near, "log |det A⁻¹|", 1.0)
        back = refused(lambda: la.inverse(found), True, "inverse of the inverse")
        if back is not None:
            close(back, case.D, near, "(A⁻¹)⁻¹")


@question
def slogdet(case: Case) -> None:
    if not case.square:
        return
    sign, logarithm = la.slogdet(case.A)
    wanted_sign, wanted = np.linalg.slogdet(case.D)
    s = singular_values(case.D)
    usual = np.log(np.maximum(s, 1e-300)).sum(-1) if s.size else np.zeros(case.D.shape[:-2])
    for one, value, right_sign, right, values, _ in np.broadcast(
        wide(sign), wide(logarithm), wanted_sign, wanted, *[condition(case.D)] * 1, usual
    ):
        if values * case.eps * max(case.D.shape[-1], 1) > 1e-2:
            ceiling = float(np.log(np.maximum(s, case.eps * 1e3 * (s.max() or 1.0) * case.D.shape[-1])).sum(-1).max())
            if not (value == -math.inf or value < max(ceiling, right) + 1):
                raise Wrong(f"log |det| of a singular matrix: {value:.3g}, wanted {right:.3g}")
            if np.isnan(one):
                raise Wrong("sign is NaN")
        else:
            near = slack(case) * max(values, 1.0)
            if abs(value - right) > near * max(1, abs(right)) or abs(one - right_sign) > near:
                raise Wrong(f"{one:.6g}, {value:.8g}; wanted {right_sign:.6g}, {right:.8g}")


@question
def logdet(case: Case) -> None:
    if not case.square or hopeless(case, 1e-3):
        return
    sign, wanted = np.linalg.slogdet(case.D)
    negative = not np.iscomplexobj(case.D) and bool((sign < 0).any())
    found = refused(lambda: la.logdet(case.A), negative, "logdet")
    if found is not None and not negative:
        near = slack(case) * condition(case.D) * max(1, size(wanted))
        close(found.real, wanted, near, "log det", 1.0)
        if (np.abs(wanted) < 80).all():
            close(found.exp(), sign * np.exp(wanted), near, "det")


@question
def trace(case: Case) -> None:
    if case.square:
        wanted = np.trace(case.D, axis1=-2, axis2=-1)
        scale = size(case.D) * max(case.D.shape[-1], 1)
        close(la.trace(case.A), np.asarray(wanted), slack(case), "trace", scale or 1.0)


@question
def diagonal_of(case: Case) -> None:
    close(la.diagonal(case.A), np.diagonal(case.D, 0, -2, -1), slack(case), "diagonal", size(case.D) or 1.0)


def spread(D: Array, eps: float) -> float:
    """How far rounding may move an eigenvalue, relative to the norm: by the condition of the eigenvectors."""
    if not D.shape[-1]:
        return eps
    worst = 0.0
    for one in matrices(D):
        _, v = np.linalg.eig(one)
        k = condition(v)
        worst = max(worst, 1000 * eps * k if k < eps**-0.3 else 30 * eps ** (1 / max(min(len(one), 5), 2)))
    return worst


def same_set(found: Array, wanted: Array, tolerance: float, what: str) -> None:
    if found.shape != wanted.shape:
        raise Wrong(f"{what}: shape {found.shape}, wanted {wanted.shape}")
    if found.size:
        for mine, other in zip(*(x.reshape(-1, x.shape[-1]) for x in (found, wanted)), strict=True):
            cost = np.abs(mine[:, None] - other[None, :])
            rows, columns = scipy.optimize.linear_sum_assignment(cost)
            if not cost[rows, columns].max() <= tolerance:
                raise Wrong(f"{what}: one is off by {cost[rows, columns].max():.2g}, allowed {tolerance:.2g}")


@question
def eigvals(case: Case) -> None:
    if case.square:
        tolerance = spread(case.D, case.eps) * size(case.D) * max(case.D.shape[-1], 1)
        same_set(wide(la.eigvals(case.A)), np.linalg.eigvals(case.D).astype(complex), tolerance, "eigenvalues")


@question
def eig(case: Case) -> None:
    if not case.square or not case.D.shape[-1]:
        return
    n, wanted = case.D.shape[-1], np.linalg.eigvals(case.D)
    tolerance = spread(case.D, case.eps) * size(case.D) * n
    w, v = np.linalg.eig(case.D)  # badly scaled matrices are balanced by LAPACK, at the cost of backward error
    tolerance = max(tolerance, 20 * size(case.D @ v - v * w[..., None, :]) * case.eps / 2e-16)
    for k, which in ((None, "LM"), (1, "LM"), (min(2, n), "SM"), (1, "LR"), (1, "SR")):
        values, vectors = la.eig(case.A, k, which)
        v, w = wide(vectors), wide(values)
        if w.shape != (*case.D.shape[:-2], k or n):
            raise Wrong(f"eig: values of shape {w.shape}")
        close(torch.as_tensor(case.D @ v), v * w[..., None, :], tolerance, "A V", 1.0)
        lengths = np.linalg.norm(v, axis=-2)
        if not ((lengths > 0.3) & (lengths < 3)).all():
            raise Wrong(f"eig: vectors of length {lengths.min():.2g} to {lengths.max():.2g}")
        if k is not None:
            key = {"LM": lambda x: -abs(x), "SM": abs, "LR": lambda x: -x.real, "SR": lambda x: x.real}[which]
            near = np.sort(key(w), -1), np.sort(key(wanted), -1)[..., :k]
            close(torch.as_tensor(near[0]), near[1], tolerance, f"eig {k} {which}", 1.0)


@question
def eigh(case: Case) -> None:
    n = case.D.shape[-1]
    if not case.hermitian:
        far = case.square and n and size(case.D - adjoint(case.D)) > 0.1 * size(case.D)
        if far and refused(lambda: la.eigvalsh(case.A), True, "eigvalsh") is not None:
            raise Wrong("eigenvalues of a Hermitian matrix, of one that is not")
        return
    wanted = np.linalg.eigvalsh(case.D)
    scale = size(case.D) * max(n, 1)
    close(la.eigvalsh(case.A), wanted, slack(case), "eigvalsh", scale)
    for k, which in ((None, "LA"), (min(1, n), "LA"), (min(1, n), "SA"), (min(2, n), "LM"), (min(2, n), "SM")):
        values, vectors = la.eigh(case.A, k, which)
        v, w = wide(vectors), wide(values)
        close(torch.as_tensor(case.D @ v), v * w[..., None, :], slack(case), "A V", scale)
        unit = np.broadcast_to(np.eye(w.shape[-1]), (*v.shape[:-2], w.shape[-1], w.shape[-1]))
        close(torch.as_tensor(adjoint(v) @ v), unit, slack(case), "Vᴴ V", 1.0)
        if n:
            key = {"LM": -np.abs(wanted), "SM": np.abs(wanted), "LA": -wanted, "SA": wanted}[which]
            mine = {"LM": -np.abs(w), "SM": np.abs(w), "LA": -w, "SA": w}[which]
            close(torch.as_tensor(np.sort(mine, -1)), np.sort(key, -1)[..., : w.shape[-1]], slack(case), which, scale)
            if (np.diff(w, axis=-1) < 0).any():
                raise Wrong("eigh: values are not ascending")


@question
def svd(case: Case) -> None:
    s, scale = singular_values(case.D), size(case.D) * max(case.D.shape[-2:], default=1) or 1.0
    close(la.svdvals(case.A), s, slack(case), "svdvals", scale)
    for k in (None, 1):
        if k is not None and not min(case.D.shape[-2:]):
            continue
        u, values, vh = la.svd(case.A, k)
        close(values, s[..., :k], slack(case), "singular values", scale)
        x, y = wide(u), wide(vh)
        count = values.shape[-1]
        unit = np.broadcast_to(np.eye(count), (*x.shape[:-2], count, count))
        close(torch.as_tensor(adjoint(x) @ x), unit, slack(case), "Uᴴ U", 1.0)
        close(torch.as_tensor(y @ adjoint(y)), np.broadcast_to(np.eye(count), (*y.shape[:-2], count, count)),
              slack(case), "V Vᴴ", 1.0)  # fmt: skip
        if k is None:
            close(torch.as_tensor(x @ (wide(values)[..., None] * y)), case.D, slack(case), "U S Vᴴ", scale)


def gap(case: Case) -> bool:
    """Whether the rank is beyond doubt: no singular value within rounding's reach of zero that is not zero."""
    s = singular_values(case.D)
    if not s.size:
        return True
    ratio = s / np.maximum(s[..., :1], 1e-300)
    return not bool(((ratio > 1e-17) & (ratio < 1e4 * case.eps) & ~(ratio < 2e-16)).any())


@question
def pinv(case: Case) -> None:
    if not gap(case):
        return
    s = singular_values(case.D)
    kept = s[s > 1e3 * 2e-16 * s.max(initial=0.0)] if s.size else s
    k = float(kept.max() / kept.min()) if kept.size else 1.0
    rtol = 1e3 * 2e-16
    wanted = np.linalg.pinv(case.D, rcond=rtol) if case.D.size else np.swapaxes(case.D, -1, -2)
    close(la.pinv(case.A), wanted, slack(case) * k**2, "A⁺")
    b = torch.randn(case.D.shape[-2], dtype=case.A.dtype)
    found = la.lstsq(case.A, b)
    close(found, (wanted @ wide(b)[:, None])[..., 0], slack(case) * k**2, "A⁺ b", max(size(wanted), 1e-300))


@question
def cholesky(case: Case) -> None:
    if not case.hermitian:
        return
    values = np.linalg.eigvalsh(case.D)
    definite = not values.size or bool((values > 1e3 * case.eps * np.abs(values).max(-1, keepdims=True)).all())
    doubtful = not definite and bool((values > -1e3 * case.eps * np.abs(values).max(-1, keepdims=True)).all())
    found = refused(lambda: la.cholesky(case.A), not definite, "cholesky")
    if found is not None:
        if not definite and not doubtful:
            raise Wrong("a Cholesky factor of an indefinite matrix")
        L = wide(found)
        if np.isnan(L).any():
            raise Wrong("a Cholesky factor that is NaN")
        close(torch.as_tensor(L @ adjoint(L)), case.D, slack(case), "L Lᴴ", size(case.D) * max(len(L), 1))
        if size(np.triu(L, 1)) > 0 and size(np.triu(L, 1)) > slack(case) * size(L):
            raise Wrong("a Cholesky factor that is not lower triangular")


@question
def lu(case: Case) -> None:
    p, lower, upper = (wide(x) for x in la.lu(case.A))
    scale = size(case.D) * max(case.D.shape[-2:], default=1) or 1.0
    close(torch.as_tensor(p @ lower @ upper), case.D, slack(case), "P L U", scale)
    if size(np.triu(lower, 1)) > 0 or size(np.tril(upper, -1)) > 0:
        raise Wrong("lu: factors are not triangular")


@question
def exp(case: Case) -> None:
    if not case.square or size(case.D) * max(case.D.shape[-1], 1) > (60 if case.eps > 1e-10 else 200):
        return
    wanted = np.stack([scipy.linalg.expm(x) for x in matrices(case.D)]) if case.D.size else case.D
    wanted = wanted.reshape(case.D.shape)
    longest = float(np.linalg.norm(case.D, 2, axis=(-2, -1)).max()) if case.D.size else 0.0
    scale, near = math.sqrt(math.exp(longest) * max(size(wanted), 1.0)), slack(case) * max(1, 20 * size(case.D))
    close(la.exp(case.A), wanted, near, "exp A", scale)
    traces = np.trace(wanted, axis1=-2, axis2=-1)
    close(la.trace(case.A, la.exp), traces, near, "tr exp A", scale * max(case.D.shape[-1], 1))


def _dependent(D: Array) -> bool:
    return any(condition(np.linalg.eig(x)[1]) > 1e4 for x in matrices(D)) if D.shape[-1] else False


def _principal(case: Case, ask: Callable[[Any], Any], f: Callable[[Array], Array], what: str, singular: bool) -> None:
    """A function with a cut, by its eigenvalues; refused where real matrices have complex values, or none at all."""
    n = case.D.shape[-1]
    if not case.square:
        return
    if not n:
        close(ask(case.A), case.D, 0.0, what)
        return
    values = np.linalg.eigvals(case.D)
    top = np.abs(values).max(-1, keepdims=True)
    rounding = spread(case.D, case.eps) * size(case.D) * n
    zeros = bool((np.abs(values) <= rounding).any())
    cut = bool(((values.real < 0) & (np.abs(values.imag) <= rounding)).any())
    bad = hopeless(case, 1e-3)
    real = not np.iscomplexobj(case.D)
    found = refused(lambda: ask(case.A), (cut and real) or zeros or bad, what)
    if found is None:
        return
    F = wide(found)
    if not np.isfinite(F).all():
        raise Wrong(f"{what} is not finite, and nothing said so")
    if not singular and condition(case.D) == math.inf and rounding < 1e-2 * size(case.D):
        raise Wrong(f"{what} of a singular matrix, and nothing said so")
    beside = (values.real < 0) & (np.abs(values.imag) < 1e-6 * top) & (np.abs(values.imag) > 100 * case.eps * top)
    if zeros or bad or beside.any() or _dependent(case.D):  # to be judged by its definition alone, where it has one
        return
    for x, y in zip(matrices(case.D), matrices(F), strict=True):
        w, v = np.linalg.eig(x)
        w = np.where(np.abs(w.imag) <= 100 * case.eps * top.max(), w.real + 0j, w)
        wanted = (v * f(w)) @ np.linalg.inv(v)
        low = np.abs(w).min() / top.max()
        near = slack(case) * condition(v) ** 2 / max(low, case.eps)
        close(torch.as_tensor(y), wanted, min(near, 1e-2), what, max(size(wanted), 1.0 if f is np.log else 1e-300))


@question
def log(case: Case) -> None:
    _principal(case, la.log, np.log, "log", singular=False)


@question
def sqrt(case: Case) -> None:
    _principal(case, la.sqrt, np.sqrt, "sqrt", singular=True)
    values = np.linalg.eigvalsh(case.D) if case.hermitian else np.zeros(0)
    if values.size and bool((values >= -1e-12 * np.abs(values).max()).all()):
        root = wide(refused(lambda: la.sqrt(case.A), False, "root of a semi-definite matrix"))
        close(torch.as_tensor(root @ root), case.D, 1e3 * slack(case), "√A √A", size(case.D) * len(root) or 1.0)


@question
def power(case: Case) -> None:
    if not case.square:
        return
    _principal(case, lambda A: la.pow(A, 0.3), lambda w: w**0.3, "A^0.3", singular=True)
    _principal(case, lambda A: la.pow(A, -0.5), lambda w: w**-0.5, "A^-0.5", singular=False)
    for p in (0, 1, 2, 3):
        wanted = np.linalg.matrix_power(case.D, p)
        scale = (size(case.D) * max(case.D.shape[-1], 1)) ** p or 1.0
        if not 1e-37 < scale < 1e37:  # beyond float32
            continue
        close(la.pow(case.A, p), wanted, slack(case), f"A^{p}", scale)
    bad = hopeless(case, 1e-5)
    found = refused(lambda: la.pow(case.A, -2), bad, "A^-2")
    if found is not None and not bad:
        wanted = np.linalg.matrix_power(np.linalg.inv(case.D), 2) if case.D.size else case.D
        close(found, wanted, slack(case) * condition(case.D) ** 2, "A^-2")


@question
def apply(case: Case) -> None:
    if not case.square or _dependent(case.D) or not case.D.shape[-1] or size(case.D) > 1e3:
        return
    wanted = np.stack([v @ np.diag(np.cos(w)) @ np.linalg.inv(v) for w, v in map(np.linalg.eig, matrices(case.D))])
    wanted = wanted.reshape(case.D.shape)
    near = slack(case) * max(1, size(case.D)) * max(condition(np.linalg.eig(x)[1]) for x in matrices(case.D)) ** 2
    worst = max(float(np.abs(np.cos(np.linalg.eigvals(case.D))).max()), 1.0)
    doubtful = any(condition(np.linalg.eig(x)[1]) > 0.3 * case.eps**-0.35 for x in matrices(case.D))
    w, v = np.linalg.eig(case.D)
    near += 100 * size(case.D @ v - v * w[..., None, :]) * case.eps / 2e-16 * condition(v)
    found = refused(lambda: la.apply(case.A, torch.cos), doubtful, "cos")
    if found is not None:
        close(found, wanted, near, "cos A", worst)


@question
def norm(case: Case) -> None:
    if case.D.size and 0 < size(case.D) < 1e-15:  # squares below float32
        return
    for kind in ("fro", "nuc", 2, -2, 1, -1, math.inf, -math.inf):
        wanted = np.linalg.norm(case.D, kind, axis=(-2, -1)) if case.D.size else np.zeros(case.D.shape[:-2])
        close(la.norm(case.A, kind), np.asarray(wanted), slack(case), f"norm {kind}", size(case.D) or 1.0)


@question
def cond(case: Case) -> None:
    k = condition(case.D)
    found = wide(la.cond(case.A))
    if k * case.eps > 1e-4:
        if not found.max() > min(0.1 / case.eps, k / 2):
            raise Wrong(f"cond is {found.max():.3g}, wanted {k:.3g}")
        return
    if 0 < size(case.D) < 1e-15:
        return
    if case.D.size:
        s = singular_values(case.D)
        close(torch.as_tensor(found), s[..., 0] / s[..., -1], slack(case) * k, "cond")
        if case.square:
            for p in (1, -1, "fro", -2, "nuc", math.inf):
                wanted = np.asarray([np.linalg.cond(x, p) for x in matrices(case.D)]).reshape(case.D.shape[:-2])
                close(la.cond(case.A, p), wanted, slack(case) * k, f"cond {p}")


@question
def gradient(case: Case) -> None:
    """Of a scalar by the leaves, against a central difference in a random direction."""
    A = case.A
    if A.dtype == torch.float32 or not A.tensors or not case.D.size or hopeless(case, 1e-7):
        return
    leaves = [t.detach().clone().requires_grad_() for t in A.tensors]
    direction = [torch.randn_like(t) for t in leaves]
    x = torch.randn(case.D.shape[-1], 1, dtype=A.dtype)

    def value(*tensors: Tensor) -> Tensor:
        B = A.with_tensors(*tensors)
        made = (B @ x).abs().square().sum() + la.norm(B).square().sum()
        if case.square:
            made = made + la.solve(B, x).abs().square().sum() + la.slogdet(B).logabsdet.sum()
        return made

    h = 1e-6
    if not 1e-3 < size(case.D) < 1e4:
        return
    if A.claims or "claim" in repr(A):  # a perturbation would break a claim
        return
    grads = torch.autograd.grad(value(*leaves), leaves, allow_unused=True)
    slope = sum(float((g.conj() * d).real.sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
    with torch.no_grad():
        ends = [value(*(t + s * h * d for t, d in zip(leaves, direction, strict=True))) for s in (1, -1)]
    wanted = float(ends[0] - ends[1]) / (2 * h)
    k = condition(case.D)
    if abs(slope - wanted) > 1e-4 * k**2 * (abs(wanted) + 1) + 1e-9 * float(ends[0].abs()) / h:
        raise Wrong(f"gradient {slope:.8g}, difference {wanted:.8g}")


# Named matrices: ----------------------------------------------------------------------------------------------------


def named(dtype: torch.dtype) -> Iterator[Case]:
    """Matrices of the books, in the form that a user would give them."""

    def case(name: str, D: Any, A: Any = None) -> Case:
        t = torch.as_tensor(np.asarray(D)).to(dtype)
        return Case(name, la.Dense(t) if A is None else A, wide(t))

    n = 12
    i = np.arange(1, n + 1)
    yield case("Hilbert 4", scipy.linalg.hilbert(4))
    yield case("Hilbert 8", scipy.linalg.hilbert(8))
    yield case("inverse Hilbert 4", scipy.linalg.invhilbert(4))
    yield case("Pascal 6", scipy.linalg.pascal(6))
    yield case("lower Pascal 6", scipy.linalg.pascal(6, "lower"))
    yield case("Hadamard 8", scipy.linalg.hadamard(8))
    yield case("Frank 8", [[max(0, 8 - max(a, b)) if b >= a - 1 else 0 for b in range(8)] for a in range(8)])
    off = np.arange(1.0, n)
    yield case("Clement", np.diag(off, 1) + np.diag(off[::-1], -1))
    both = [torch.as_tensor(x).to(dtype) for x in (off[::-1].copy(), np.zeros(n), off)]
    yield case("Clement, tridiagonal", np.diag(off, 1) + np.diag(off[::-1], -1), la.tridiagonal(*both))
    one = np.ones(20)
    w = np.diag(np.abs(np.arange(-10.0, 11))) + np.diag(one, 1) + np.diag(one, -1)
    yield case("Wilkinson 21", w)
    t = [torch.as_tensor(x).to(dtype) for x in (one, np.abs(np.arange(-10.0, 11)), one)]
    yield case("Wilkinson 21, tridiagonal", w, la.tridiagonal(t[0], t[1], t[0]))
    yield case("Lehmer", np.minimum(i[:, None], i) / np.maximum(i[:, None], i))
    yield case("Redheffer", [[float(b == 1 or b % a == 0) for b in i] for a in i])
    yield case("minij", np.minimum(i[:, None], i).astype(float))
    grcar = sum(np.diag(np.ones(n - k), k) for k in range(4)) - np.diag(np.ones(n - 1), -1)
    yield case("Grcar", grcar)
    row = torch.tensor([1.0, 1, 1, 1] + [0.0] * (n - 4)).to(dtype)
    column = torch.tensor([1.0, -1] + [0.0] * (n - 2)).to(dtype)
    yield case("Grcar, Toeplitz", grcar, la.Toeplitz(column, row))
    for lam in (2.0, 0.0, -1.0):
        yield case(f"Jordan {lam:g}", lam * np.eye(4) + np.diag(np.ones(3), 1))
    J = np.eye(3) * 2 + np.diag(np.ones(2), 1)
    T = torch.as_tensor(J).to(dtype)
    yield case("Jordan ⊕ Jordan", np.kron(J, np.eye(3)) + np.kron(np.eye(3), J), la.kronsum(T, T))
    yield case("Jordan ⊗ Jordan", np.kron(J, J), la.kron(T, T))
    p = scipy.linalg.toeplitz([2.0, -1] + [0] * 3)
    P = la.tridiagonal(*(torch.as_tensor(x).to(dtype) for x in (-np.ones(4), 2 * np.ones(5), -np.ones(4))))
    e = np.eye(5)
    yield case("Poisson 1-D", p, P)
    yield case("Poisson 2-D", np.kron(p, e) + np.kron(e, p), la.kronsum(P.claim("psd"), P.claim("psd")))
    yield case("Poisson 2-D, unclaimed", np.kron(p, e) + np.kron(e, p), la.kronsum(P, P))
    cube = np.kron(np.kron(p, e), e) + np.kron(np.kron(e, p), e) + np.kron(e, np.kron(e, p))
    yield case("Poisson 3-D", cube, la.kronsum(*3 * [P.claim("psd")]))
    ring = scipy.linalg.circulant([2.0, -1, 0, 0, 0, -1])
    yield case("ring", ring, la.Circulant(torch.as_tensor(ring[:, 0].copy()).to(dtype)))
    yield case("shift", np.roll(np.eye(6), 1, 0), la.Circulant(torch.eye(6)[1].to(dtype)))
    yield case("companion", scipy.linalg.companion([1.0, -6, 11, -6]))
    yield case("companion of x⁴ + 1", scipy.linalg.companion([1.0, 0, 0, 0, 1]))
    yield case("Vandermonde", np.vander([1.0, 2, 3, 4, 5]))
    yield case("rectangular Vandermonde", np.vander([1.0, 2, 3, 4, 5], 3))
    yield case("Leslie", scipy.linalg.leslie([0.1, 2.0, 1.0, 0.1], [0.2, 0.8, 0.7]))
    yield case("Helmert", scipy.linalg.helmert(6, full=True))
    yield case("Fiedler", scipy.linalg.fiedler([1.0, 4, 12, 45, 77]))
    yield case("Hankel", scipy.linalg.hankel([1.0, 2, 3, 4], [4.0, 3, 2, 1]))
    yield case("tri", np.tri(6))
    yield case("Kahan", np.diag(0.9 ** np.arange(6)) @ (np.eye(6) - 0.43 * np.triu(np.ones((6, 6)), 1)))
    yield case("magic 4", [[16.0, 2, 3, 13], [5, 11, 10, 8], [9, 7, 6, 12], [4, 14, 15, 1]])
    yield case("Rosser", scipy.linalg.block_diag([[611.0, 196], [196, 899]], [[899, -192], [-192, 611]]))
    yield case("rotation", [[0.6, -0.8], [0.8, 0.6]])
    yield case("half turn", [[-1.0, 0], [0, -1]])
    yield case("swap", [[0.0, 1], [1, 0]])
    yield case("one", [[3.0]])
    yield case("minus one", [[-1.0]])
    yield case("none", [[0.0]])
    yield case("empty", np.zeros((0, 0)))
    yield case("empty rows", np.zeros((0, 3)))
    yield case("empty columns", np.zeros((3, 0)))
    if dtype.is_complex:
        F = np.exp(-2j * np.pi * np.outer(range(6), range(6)) / 6)
        yield case("DFT", F / math.sqrt(6), la.Fourier(6, dtype=dtype))
        yield case("DFT without scale", F, la.Fourier(6, unitary=False, dtype=dtype))
        yield case("Pauli y", [[0, -1j], [1j, 0]])
        yield case("i", [[1j]])
        yield case("-i", [[-1j]])


# The run: -----------------------------------------------------------------------------------------------------------


def cases(draws: int, seed: int) -> Iterator[Case]:
    for dtype in DTYPES:
        yield from named(dtype)
        for k in range(draws):
            batch = ((), (), (2,), (2, 1))[k % 4]
            r = Draw(seed * 1_000_003 + k, dtype, batch)
            with np.errstate(all="ignore"):
                found = compose(r, r.choice.choice([0, 1, 1, 2, 2, 3]))
            noise = "small" not in found.name and 0 < size(found.D) < 1e-13  # what is left where terms cancel
            if max(found.D.shape[-2:]) <= 48 and not noise:
                yield found


def judge(case: Case, name: str) -> str | None:
    """What is wrong with a cell, or None."""
    torch.manual_seed(0)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            QUESTIONS[name](case)
    except Wrong as error:
        return str(error)
    except Exception as error:  # every kind counts as a wrong cell
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--ask", default="", help="questions whose name has this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done: Counter[tuple[str, str]] = Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for case in cases(given.draws, given.seed):
        if given.only not in case.name:
            continue
        dtype = str(case.A.dtype).removeprefix("torch.")
        for name in QUESTIONS:
            if given.ask in name:
                done[name, dtype] += 1
                if (error := judge(case, name)) is not None:
                    wrong[name, dtype] += 1
                    print(f"{name} of {case.name} {dtype} {case.D.shape}: {error}", flush=True)
    print(f"{sum(done.values())} cells, {sum(wrong.values())} wrong")
    if given.results is not None:
        here = provenance(torch.device("cpu"), torch.float64)
        with given.results.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "precision", "cells", "wrong", *here])
            writer.writerows([*key, count, wrong[key], *here.values()] for key, count in sorted(done.items()))


if __name__ == "__main__":
    main()
