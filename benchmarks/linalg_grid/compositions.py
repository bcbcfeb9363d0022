"""Operators made of others, one or two levels deep."""

from collections.abc import Callable

import numpy as np
from case import Array, Case, adjoint, wide
from leaves import LEAVES, Draw, layout, permutation, reflections

import einlinear as el

la = el.linalg


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
