"""Extreme eigenpairs of Hermitian matrices with a preconditioner: LOBPCG (Knyazev 2001)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.basis import complement
from einlinear.linalg.krylov.eigen import Which, first_block, ranked
from einlinear.linalg.krylov.system import TOLERANCE, Matmul, divide, norm, real, widened, working
from einlinear.linalg.result import Eigenpairs, LinAlgError, Result


@torch.no_grad()
def lobpcg(
    matmul: Matmul,
    shape: tuple[int, ...],
    k: int,
    *,
    which: Which = "largest",
    preconditioner: Matmul | None = None,
    start: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 1000,
    guards: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Eigenpairs]:
    """k extreme eigenpairs of Hermitian A, `shape` [..., n, n]: values [..., k], vectors [..., n, k].

    Memory: nine blocks of k + `guards` columns. `preconditioner` applies an approximate inverse of A (for the
    smallest). The three blocks (iterate, residual, direction) are kept orthonormal as Hetmaniuk and Lehoucq 2006 do.
    Small matrices, n < 4 (k + guards), are solved as dense ones. The residual is |A v - λ v| / |A|.
    """
    n = shape[-2]
    width = max(1, min(k + guards, n))
    options: dict[str, object] = {"dtype": dtype, "device": device, "generator": generator}
    dense = n < 4 * width
    x = first_block("lobpcg", shape, k, n if dense else width, start, options)
    product, wanted = widened(matmul, dtype), TOLERANCE[real(dtype)] if tolerance is None else tolerance
    x = complement(x, x[..., :0], generator)
    ax = product(x)
    if ax.shape != x.shape:
        raise ValueError(
            f"lobpcg: a product of {list(x.shape)} came out as {list(ax.shape)}, not as {list(shape)} says"
        )
    if not bool(torch.isfinite(ax).all()):
        raise LinAlgError("lobpcg: the product with the operator gave NaN or overflowed")
    theta, y = _rayleigh_ritz(x, ax, which)
    x, ax, p, ap = x @ y, ax @ y, x[..., :0], ax[..., :0]
    spent, scale = 1, theta.abs().amax(-1, keepdim=True)
    while True:
        r = ax - x * theta.unsqueeze(-2)
        residual = divide(norm(r).squeeze(-2)[..., :k], scale)
        if bool(residual.isnan().any()):
            raise LinAlgError("lobpcg: the product with the operator gave NaN or overflowed")
        if bool((residual <= wanted).all()) or spent >= max_iterations or dense:
            break
        known = torch.cat([x, p], -1)
        w = complement(r if preconditioner is None else preconditioner(r), known, generator)
        s, image = torch.cat([known, w], -1), torch.cat([ax, ap, product(w)], -1)
        spent += 1
        theta, y = _rayleigh_ritz(s, image, which)
        scale = torch.maximum(scale, theta.abs().amax(-1, keepdim=True))
        theta, y = theta[..., :width], y[..., :width]
        # The part of the new iterate outside the old one, orthonormal to the new one: the next direction.
        outside = torch.cat([torch.zeros_like(y[..., :width, :]), y[..., width:, :]], -2)
        z = complement(outside, y, generator)
        x, ax, p, ap = s @ y, image @ y, s @ z, image @ z
    theta, x = theta[..., :k], x[..., :k]
    x = divide(x, norm(x))
    residual = divide(norm(product(x) - x * theta.unsqueeze(-2)).squeeze(-2), scale)
    if working(dtype) != dtype:
        theta, x = theta.to(dtype), x.to(dtype)
    done = Result(Eigenpairs(theta, x), spent, bool((residual <= 1.01 * wanted).all()), residual)
    done.or_warn("lobpcg", wanted)
    return done


def _rayleigh_ritz(basis: Tensor, image: Tensor, which: Which) -> tuple[Tensor, Tensor]:
    small = basis.mH @ image
    values, vectors = torch.linalg.eigh((small + small.mH) / 2)
    order = ranked(values, which)
    return values.gather(-1, order), vectors.gather(-1, order.unsqueeze(-2).expand(vectors.shape))
