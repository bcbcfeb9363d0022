"""Solving with a sum of many terms by stochastic gradients of reduced variance (Johnson and Zhang 2013)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear.linalg.krylov.system import Matmul, System, norm
from einlinear.linalg.result import LinAlgError, Result


@torch.no_grad()
def svrg(
    terms: Sequence[Matmul],
    rhs: Tensor,
    *,
    guess: Tensor | None = None,
    step: float | None = None,
    tolerance: float | None = None,
    max_epochs: int = 1000,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """Solve (A₁ + … + A_m) x = b, every term Hermitian positive semidefinite, one term at a time.

    An epoch is one product with every term, at an anchor, and 2 m products with single ones, each a step along m (A_i
    x - A_i anchor) + (A anchor - b): unbiased, and without variance at the solution. `step` is by default a fourth of
    1 / (m max |A_i|), norms estimated by power iteration. `iterations` counts epochs. Linear convergence, slower with
    the condition number: for sums whose terms are cheap and need not be held at once; else `cg`.
    """
    if not terms:
        raise ValueError("svrg needs one term or more")
    count = len(terms)

    def product(x: Tensor) -> Tensor:
        total = terms[0](x)
        for term in terms[1:]:
            total = total + term(x)
        return total

    limit = max_epochs
    system = System.of("svrg", product, rhs, guess, tolerance, limit)
    if step is None:
        largest = max(_size(term, system.rhs, generator) for term in terms)
        step = 0.25 / (count * largest) if largest else 1.0
    anchor, spent = system.start, 0
    r = system.residual(anchor)
    start = norm(r)
    while spent < limit and bool(system.unsolved(r).any()):
        x = anchor
        for i in torch.randint(count, (2 * count,), generator=generator).tolist():
            x = x - step * (count * terms[i](x - anchor) - r)
        anchor, spent = x, spent + 1
        r = system.residual(anchor)
        if bool((norm(r) > 1e3 * (start + 1)).any()):
            raise LinAlgError(
                f"svrg diverges with step {step:.2g}: take a smaller one; every term must be semidefinite"
            )
    return system.finish(anchor, spent, "Allow more epochs, or use cg.")


def _size(term: Matmul, like: Tensor, generator: torch.Generator | None) -> float:
    """The norm of a term by ten power iterations, from below."""
    home = like.device if generator is None else generator.device
    v = torch.randn(like.shape, dtype=like.dtype, device=home, generator=generator).to(like.device)
    size = 0.0
    for _ in range(10):
        v = term(v / norm(v).clamp_min(torch.finfo(norm(v).dtype).tiny))
        size = float(norm(v).max())
    return size
