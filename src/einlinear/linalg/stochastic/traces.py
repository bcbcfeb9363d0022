"""Traces and diagonals from products alone: Hutchinson, Hutch++, XTrace; square matrices, Hermitian or not."""

from collections.abc import Callable

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, divide
from einlinear.linalg.result import LinAlgError, Result
from einlinear.linalg.stochastic.probes import Kind, probes, spread


def _square(method: str, shape: tuple[int, ...], products: int, least: int) -> tuple[list[int], int]:
    *batch, n, m = shape
    if n != m:
        raise ValueError(f"{method} works on square matrices, not on {list(shape)}")
    if products < least:
        raise ValueError(f"{method} needs {least} products or more, not {products}")
    return batch, n


def _told(method: str, value: Tensor, products: int, error: Tensor) -> Result[Tensor]:
    if not bool(torch.isfinite(value).all()):
        raise LinAlgError(f"{method}: the product with the operator gave NaN or overflowed")
    return Result(value, products, True, None, error)


@torch.no_grad()
def hutchinson(
    matmul: Matmul,
    shape: tuple[int, ...],
    products: int = 64,
    *,
    kind: Kind = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """tr A, unbiased, by `products` probes; the error falls as their root. Hutchinson 1989."""
    batch, n = _square("hutchinson", shape, products, 1)
    z = probes((*batch, n, products), kind=kind, dtype=dtype, device=device, generator=generator)
    value, error = spread((z.conj() * matmul(z)).sum(-2))
    return _told("hutchinson", value, products, error)


@torch.no_grad()
def hutch_plus_plus(
    matmul: Matmul,
    shape: tuple[int, ...],
    products: int = 66,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """tr A, unbiased, with two thirds of the products spent on the directions that matter: Meyer et al. 2021,
    algorithm 1.

    The error falls as 1 / `products` where eigenvalues decay; exact once a third of them reaches the rank of A.
    """
    batch, n = _square("hutch_plus_plus", shape, products, 3)
    third = min(products // 3, n)
    options = {"dtype": dtype, "device": device, "generator": generator}
    q = torch.linalg.qr(matmul(probes((*batch, n, third), **options)))[0]  # type: ignore[arg-type]
    known = (q.conj() * matmul(q)).sum((-2, -1))
    g = probes((*batch, n, max(1, products - 2 * third)), **options)  # type: ignore[arg-type]
    g = g - q @ (q.mH @ g)
    value, error = spread((g.conj() * matmul(g)).sum(-2))
    return _told("hutch_plus_plus", known + value, products, error)


@torch.no_grad()
def xtrace(
    matmul: Matmul,
    shape: tuple[int, ...],
    products: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """tr A, unbiased: every probe estimates what all the others leave over. Epperly, Tropp and Webber 2024, section 2.

    The most accurate of the three for the same products where eigenvalues decay; exact beyond the rank of A. Its
    standard error is the spread of estimates that share all probes but one, and by that too small, by up to a half.
    """
    batch, n = _square("xtrace", shape, products, 4)
    m = min(products // 2, n)
    omega = probes((*batch, n, m), kind="sphere", dtype=dtype, device=device, generator=generator)
    q, r = torch.linalg.qr(matmul(omega))
    z = matmul(q)
    h, w, t = q.mH @ z, q.mH @ omega, z.mH @ omega
    pivots = r.diagonal(dim1=-2, dim2=-1).abs()
    deficient = (pivots.amin(-1) <= 100 * torch.finfo(pivots.dtype).eps * pivots.amax(-1))[..., None, None]
    unit = torch.eye(m, dtype=r.dtype, device=r.device)
    # Without probe i the basis loses the direction q s_i, s_i the i-th column of R^-H, of norm one.
    s = torch.linalg.solve_triangular(torch.where(deficient, unit, r), unit, upper=True).mH
    s = s / torch.linalg.vector_norm(s, dim=-2, keepdim=True)
    x = w - s * (s.conj() * w).sum(-2, keepdim=True)
    trace = h.diagonal(dim1=-2, dim2=-1).sum(-1)
    known = trace.unsqueeze(-1) - (s.conj() * (h @ s)).sum(-2)
    rest = (w.conj() * r).sum(-2) - (t.conj() * x).sum(-2) - (x.conj() * r).sum(-2) + (x.conj() * (h @ x)).sum(-2)
    left = n - x.abs().square().sum(-2)
    value, error = spread(known + divide((n - m + 1) * rest, left.clamp_min(0)))
    whole = deficient[..., 0, 0] | torch.full_like(deficient[..., 0, 0], m == n)  # the basis holds all of A's range
    return _told("xtrace", torch.where(whole, trace, value), products, torch.where(whole, 0, error))


@torch.no_grad()
def diagonal(
    matmul: Matmul,
    shape: tuple[int, ...],
    products: int = 64,
    *,
    deflate: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """The diagonal [..., n] of A with a standard error for each entry: Bekas, Kokiopoulou and Saad 2007.

    `deflate` spends two thirds of the products on a range whose diagonal is then exact (Baston and Nakatsukasa 2022).
    """
    batch, n = _square("diagonal", shape, products, 3)
    options = {"dtype": dtype, "device": device, "generator": generator}
    third = min(products // 3, n) if deflate else 0
    known: Tensor | float = 0.0
    rest: Callable[[Tensor], Tensor] = matmul
    if deflate:
        q = torch.linalg.qr(matmul(probes((*batch, n, third), **options)))[0]  # type: ignore[arg-type]
        # A = A Q Qᴴ + A (1 - Q Qᴴ): the first part's diagonal needs the products A Q alone.
        known = (matmul(q) * q.conj()).sum(-1)

        def rest(x: Tensor) -> Tensor:
            return matmul(x - q @ (q.mH @ x))

    z = probes((*batch, n, max(1, products - 2 * third)), **options)  # type: ignore[arg-type]
    value, error = spread(rest(z) * z.conj())
    return _told("diagonal", known + value, products, error)
