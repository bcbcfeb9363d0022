"""A few extreme eigenpairs by restarted block Krylov spaces: Lanczos for Hermitian matrices, Arnoldi for the others.

Thick restarts (Wu and Simon 2000; Stewart's Krylov-Schur 2001) with full orthogonalisation. The product with the basis
is kept, so that the projected matrix and every residual are exact, whatever the restart kept.
"""

from typing import Literal

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import complement, random
from einlinear.linalg.krylov.system import (
    TOLERANCE,
    Matmul,
    check_columns,
    divide,
    in_parts,
    norm,
    real,
    widened,
    working,
)
from einlinear.linalg.result import Eigenpairs, LinAlgError, Result

Which = Literal["largest", "smallest", "magnitude"]
"""Which end of the spectrum, the most extreme first: algebraically (by real part where complex) or by magnitude."""


WHOLE = 100
"""Matrices up to this size get a basis of their whole space, and exact answers, where no room is asked for."""


def ranked(values: Tensor, which: Which) -> Tensor:
    """Indices [..., m] of eigenvalues, the most wanted first."""
    keys = {"largest": -values.real, "smallest": values.real, "magnitude": -values.abs()}
    if which not in keys:
        raise ValueError(f"eigenvalues are asked for as {', '.join(keys)}, not {which!r}")
    return keys[which].argsort(stable=True, dim=-1)


def first_block(
    method: str, shape: tuple[int, ...], k: int, block: int, like: Tensor | None, options: dict[str, object]
) -> Tensor:
    *batch, n, m = shape
    if n != m:
        raise ValueError(f"{method} finds eigenpairs of square matrices, not of {list(shape)}")
    if not 0 < k <= n:
        raise ValueError(f"{method} finds from 1 to {n} eigenpairs of a matrix {n} x {n}, not {k}")
    dtype, device, generator = (options[name] for name in ("dtype", "device", "generator"))
    blank = torch.zeros((), dtype=working(dtype), device=device)  # type: ignore[arg-type, call-overload]
    x = random((*batch, n, block), blank, generator)  # type: ignore[arg-type]
    if like is not None:
        check_columns(method, "start", like)
        count = min(block, like.shape[-1])
        x[..., :count] = like[..., :count].to(x.dtype)
    return x


@torch.no_grad()
def eigenpairs(
    matmul: Matmul,
    shape: tuple[int, ...],
    k: int,
    *,
    which: Which = "largest",
    hermitian: bool = True,
    start: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 5_000,
    block: int | None = None,
    room: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Eigenpairs]:
    """k extreme eigenpairs of A, `shape` [..., n, n]: values [..., k], the most extreme first, vectors [..., n, k].

    The residual [..., k] is |A v - λ v| / |A|, with |A| as large as the largest Ritz value seen. `room` vectors are
    kept (by default some 2 k + 30), `block` go through a product at once; `start` [..., n, b] replaces random ones.
    Once converged, a random block is let in and must change nothing, for one Krylov space sees only one vector of an
    eigenvalue that is repeated. `hermitian=False` gives complex pairs.
    """
    n = shape[-2]
    block = min(3, k) if block is None else block
    block = max(1, min(block, n))
    if room is None:
        room = max(2 * k + 30, k + 3 * block) if n > WHOLE else n
    room = min(n, max(room, k + 2 * block))
    options: dict[str, object] = {"dtype": dtype, "device": device, "generator": generator}
    fresh = first_block("eigenpairs", shape, k, block, start, options)
    product, wanted = widened(matmul, dtype), TOLERANCE[real(dtype)] if tolerance is None else tolerance
    if not hermitian and not fresh.is_complex() and fresh.shape[:-2].numel() > 1:
        # A restart must not part a conjugate pair, and in a batch the pairs lie differently. Complex vectors have none.
        fresh, product = fresh.to(fresh.dtype.to_complex()), in_parts(product)
    fresh = complement(fresh, fresh[..., :0], generator)
    basis, image = fresh, product(fresh)
    if image.shape != fresh.shape:
        raise ValueError(
            f"eigenpairs: a product of {list(fresh.shape)} came out as {list(image.shape)}, not as {list(shape)} says"
        )
    spent, seen, scale = 1, None, torch.zeros((), device=basis.device)
    while True:
        while basis.shape[-1] < room and spent < max_iterations:
            fresh = complement(image[..., -block:][..., : room - basis.shape[-1]], basis, generator)
            basis, image = torch.cat([basis, fresh], -1), torch.cat([image, product(fresh)], -1)
            spent += 1
        small = basis.mH @ image
        if not bool(torch.isfinite(small).all()):
            raise LinAlgError("eigenpairs: the product with the operator gave NaN or overflowed")
        values, coordinates = torch.linalg.eigh((small + small.mH) / 2) if hermitian else torch.linalg.eig(small)
        order = ranked(values, which)
        values, coordinates = (
            values.gather(-1, order),
            coordinates.gather(-1, order.unsqueeze(-2).expand(coordinates.shape)),
        )
        scale = torch.maximum(scale, values.abs().amax(-1, keepdim=True))
        few = min(k, values.shape[-1])
        theta, y = values[..., :few], coordinates[..., :few]
        vectors = basis.to(y.dtype) @ y
        rest = image.to(y.dtype) @ y - vectors * theta.unsqueeze(-2)
        residual = divide(norm(rest).squeeze(-2), scale)
        done = few == k and bool((residual <= wanted).all())
        whole = basis.shape[-1] == n
        settled = done and seen is not None and bool(((theta - seen).abs() <= wanted * scale).all())
        if whole or settled or spent >= max_iterations:
            break
        kept = _kept(coordinates, values, min(k + (room - k) // 2, room - block - 1), not basis.is_complex())
        pushed = image[..., -block:]
        if done:
            seen, pushed = theta, random(pushed.shape, pushed, generator)
        elif seen is not None:
            # A random block has parted the basis from its Krylov space: the way on is the residuals themselves.
            worst = residual.topk(min(block, few), -1).indices.unsqueeze(-2)
            pushed = rest.gather(-1, worst.expand(*rest.shape[:-1], worst.shape[-1]))
            pushed = pushed if basis.is_complex() else pushed.real
        fresh = complement(pushed, basis if basis.shape[-1] + block <= n else basis @ kept, generator)
        basis, image = torch.cat([basis @ kept, fresh], -1), torch.cat([image @ kept, product(fresh)], -1)
        spent += 1
    size = norm(vectors)
    pairs = Eigenpairs(theta, divide(vectors, size))
    if working(dtype) != dtype and hermitian:
        pairs = Eigenpairs(theta.to(dtype), pairs.vectors.to(dtype))
    if few < k:
        raise LinAlgError(f"eigenpairs found only {few} of {k} pairs in {spent} products: allow more")
    return Result(pairs, spent, done or (whole and bool((residual <= wanted).all())), residual).or_warn(
        "eigenpairs", wanted
    )


def _kept(coordinates: Tensor, values: Tensor, count: int, real_basis: bool) -> Tensor:
    """An orthonormal basis [..., m, count] of the span of the first Ritz vectors, real where `real_basis`.

    A conjugate pair spans what its real and imaginary parts span, so that `count` grows by one where it would part a
    pair.
    """
    if real_basis and values.is_complex():
        last, after = values.flatten()[count - 1], values.flatten()[count]
        count += int(bool(last.imag != 0) and bool(after == last.conj()) and _halves(values.flatten()[:count]))
        leading = coordinates[..., :count]
        span: Tensor = torch.linalg.svd(torch.cat([leading.real, leading.imag], -1))[0][..., :count]
    else:
        span = torch.linalg.qr(coordinates[..., :count])[0]
    return span


def _halves(values: Tensor) -> bool:
    """Whether the last of these, complex in pairs, lacks its partner."""
    return int((values.imag != 0).sum()) % 2 == 1
