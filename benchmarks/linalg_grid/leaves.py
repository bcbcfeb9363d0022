"""Operators without parts, drawn at random with every peculiarity that one may have."""

import random

import numpy as np
import torch
from case import Array, Case, adjoint, wide
from torch import Tensor

import einlinear as el

la = el.linalg


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
