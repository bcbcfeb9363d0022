"""Compositions that nobody wrote down: drawn at random, and asked every question of the grid."""

import random
import warnings

import pytest
import torch
from algebra.test_grid import QUESTIONS
from algebra.zoo import Draw, la
from torch.testing import assert_close

from einlinear.operator import refute

LEAVES = [
    lambda r, n: la.Dense(r(n, n)),
    lambda r, n: la.Diagonal(r(n)),
    lambda r, n: la.Identity(n, dtype=r.dtype),
    lambda r, n: la.Toeplitz(r(n), r(n)),
    lambda r, n: la.Circulant(r(n)),
    lambda r, n: la.Triangular(r(n, n)),
    lambda r, n: la.Triangular(r(n, n), upper=True),
    lambda r, n: la.Permutation(torch.randperm(n, generator=r.generator), dtype=r.dtype),
    lambda r, n: la.Householder(r(n, 1)),
    lambda r, n: la.Dense(r(n, 1)) @ la.Dense(r(n, 1)).H + la.Diagonal(r(n)),
    lambda r, n: (lambda a: la.Dense(a + a.mH).claim("hermitian"))(r(n, n)),
    lambda r, n: la.Banded(r(2, n), (-1, 0)),
]
NODES = [
    lambda grow, n, r: grow(n) @ grow(n),
    lambda grow, n, r: grow(n) + grow(n),
    lambda grow, n, r: -0.5 * grow(n),
    lambda grow, n, r: la.kron(grow(2), grow(n // 2)) if n % 2 == 0 else grow(n),
    lambda grow, n, r: la.kronsum(grow(2), grow(n // 2)) if n % 2 == 0 else grow(n),
    lambda grow, n, r: la.block_diag(grow(n // 2), grow(n - n // 2)),
    lambda grow, n, r: la.block([[grow(n // 2), r(n // 2, n - n // 2)], [r(n - n // 2, n // 2), grow(n - n // 2)]]),
    lambda grow, n, r: grow(n).T,
    lambda grow, n, r: grow(n).H,
    lambda grow, n, r: grow(n) + 0.5 * la.Identity(n, dtype=r.dtype),
]


def tree(n, depth, chance, draw):
    if depth == 0 or n < 2:
        return chance.choice(LEAVES)(draw, n)
    return chance.choice(NODES)(lambda size: tree(size, depth - 1, chance, draw), n, draw)


@pytest.mark.parametrize("seed", range(60))
def test_any_composition(seed):
    chance = random.Random(seed)
    draw = Draw(chance.choice([torch.float64, torch.complex128]), chance.choice([(), (), (2,)]))
    draw.generator.manual_seed(seed)
    A = tree(chance.choice([2, 4, 6, 12]), chance.choice([1, 2, 3]), chance, draw)
    D, x = A.dense(), draw(A.shape[-1], 2)
    assert_close(A @ x, D @ x)
    assert_close(A.H.dense(), D.mH)
    for known in A.properties:
        refute(A, known)
    reliable = bool((torch.linalg.cond(torch.linalg.eig(D)[1]) < 1e5).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, ask in QUESTIONS.items():
            if reliable or name not in ("eig", "eigvals", "powers", "cond"):
                ask(A, D)
