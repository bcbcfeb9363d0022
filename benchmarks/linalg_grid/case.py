"""An operator beside its matrix, and what it takes for the two to agree."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import einlinear as el

Array = NDArray[Any]


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
