"""Matrices of the books, whose answers are known."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from case import Case, wide

import einlinear as el

la = el.linalg


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
