"""Matrices with known answers, for every solver's laws."""

import torch
from torch import Tensor

CLASSES = {}


def known(*kinds):
    """Register a maker of [..., n, n] matrices under the kinds it is: definite, hermitian, square, easy (for a method
    that need not converge on every matrix)."""

    def register(maker):
        for kind in kinds:
            CLASSES.setdefault(kind, []).append(maker)
        return maker

    return register


def spectrum(values: Tensor, dtype=torch.float64, batch=(), seed=0) -> Tensor:
    """A Hermitian matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn((*batch, n, n), dtype=dtype, generator=generator))
    a = (q * values.to(dtype)) @ q.mH
    return (a + a.mH) / 2


def laplacian(n: int) -> Tensor:
    """Of a path with fixed ends: eigenvalues 2 - 2 cos(pi j / (n + 1))."""
    return (
        2 * torch.eye(n, dtype=torch.float64)
        - torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
        - torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    )


@known("definite", "hermitian", "square", "easy")
def grid():
    """Laplacian of a 9 x 9 grid; half of its eigenvalues come in pairs."""
    one, unit = laplacian(9), torch.eye(9, dtype=torch.float64)
    return torch.kron(one, unit) + torch.kron(unit, one)


@known("definite", "hermitian", "square", "easy")
def stretched():
    return spectrum(torch.logspace(-2, 2, 50, dtype=torch.float64), batch=(2,))


@known("definite", "hermitian", "square", "easy")
def complex_definite():
    return spectrum(torch.linspace(1, 20, 40, dtype=torch.float64), torch.complex128)


@known("definite", "hermitian", "square", "easy")
def tiny_scale():
    return 1e-140 * spectrum(torch.linspace(1, 20, 30, dtype=torch.float64))


@known("hermitian", "square")
def indefinite():
    return spectrum(torch.cat([torch.linspace(-5, -0.5, 20), torch.linspace(0.5, 9, 21)]).double(), batch=(2,))


@known("hermitian", "square", "easy")
def complex_indefinite():
    return spectrum(torch.linspace(-3, 4, 30, dtype=torch.float64), torch.complex128)


@known("square")
def nonnormal():
    """Grcar's matrix: eigenvalues far from its field of values."""
    n = 60
    ones = [torch.ones(n - abs(k), dtype=torch.float64) for k in (-1, 0, 1, 2, 3)]
    return sum(torch.diag(-one if k == -1 else one, k) for k, one in zip((-1, 0, 1, 2, 3), ones, strict=True))


@known("square", "easy")
def defective():
    """One Jordan block of eigenvalue 2."""
    return 2 * torch.eye(40, dtype=torch.float64) + torch.diag(torch.ones(39, dtype=torch.float64), 1)


@known("square", "easy")
def convection():
    """Upwind convection and diffusion, batched."""
    n = 50
    drift = torch.eye(n, dtype=torch.float64) - torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    return torch.stack([laplacian(n) + c * drift for c in (0.5, 5.0)])


@known("square", "easy")
def complex_general():
    generator = torch.Generator().manual_seed(3)
    return 4 * torch.eye(30) + torch.randn(30, 30, dtype=torch.complex128, generator=generator) / 4


@known("definite", "hermitian", "square", "easy")
def one_by_one():
    return torch.tensor([[3.0]], dtype=torch.float64)


def columns(a: Tensor, k: int = 3, seed: int = 1) -> Tensor:
    """Right-hand sides for `a`, the second one zero."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn((*a.shape[:-1], k), dtype=a.dtype, generator=generator)
    b[..., 1] = 0
    return b
