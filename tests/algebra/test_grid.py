"""Every function of every operator, in every dtype and batch that it has, against the written-out matrix."""

import math
import warnings

import pytest
import torch
from algebra.zoo import NAMES, la, make
from torch.testing import assert_close

import einlinear as el

CASES = [(torch.float64, ()), (torch.float64, (2,)), (torch.complex128, ()), (torch.complex128, (2, 1))]
QUESTIONS = {}


def question(check):
    QUESTIONS[check.__name__] = check
    return check


def same(found, wanted, tolerance=1e-7):
    found = torch.as_tensor(found)
    assert found.shape == wanted.shape
    dtype = torch.promote_types(found.dtype, wanted.dtype)
    size = max(1.0, float(wanted.abs().nan_to_num(posinf=0).max())) if wanted.numel() else 1.0
    assert_close(found.to(dtype), wanted.to(dtype), atol=tolerance * size, rtol=tolerance)


def same_set(found, wanted, tolerance=1e-5):
    """Equal up to order, along the last dimension."""
    assert found.shape == wanted.shape
    rows = found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    for mine, other in zip(*(row.tolist() for row in rows), strict=True):
        left = list(other)
        for value in mine:
            nearest = min(left, key=lambda one: abs(one - value))
            assert abs(nearest - value) < tolerance * max(1, abs(value))
            left.remove(nearest)


def regular(A, D):
    return A.square and bool((torch.linalg.cond(D) < 1e8).all())


@question
def solve(A, D):
    if regular(A, D):
        for b in (torch.randn(A.shape[-1], dtype=A.dtype), torch.randn(A.shape[-1], 2, dtype=A.dtype)):
            wide = (b if b.ndim > 1 else b[:, None]).expand(*D.shape[:-1], -1)
            found = la.solve(A, b)
            same(found if b.ndim > 1 else found[..., None], torch.linalg.solve(D, wide))


@question
def inverse(A, D):
    if regular(A, D):
        found, wanted = la.inverse(A), torch.linalg.inv(D)
        same(found.dense(), wanted)
        same(found.T.dense(), wanted.mT)
        same(found.H.dense(), wanted.mH)
        sign, logarithm = torch.linalg.slogdet(D)
        same(la.slogdet(found)[1], -logarithm)
        same(la.slogdet(found)[0], sign.conj())
        same(la.inverse(found).dense(), D)


@question
def slogdet(A, D):
    if A.square:
        (sign, logarithm), (wanted_sign, wanted) = la.slogdet(A), torch.linalg.slogdet(D)
        if bool((wanted > -25).all()):
            same(logarithm, wanted)
            same(sign, wanted_sign)
        else:
            assert bool(((logarithm < -25) == (wanted < -25)).all())


@question
def trace(A, D):
    if A.square:
        same(la.trace(A), D.diagonal(0, -2, -1).sum(-1))


@question
def trace_of_exp(A, D):
    if A.square:
        same(la.trace(A, la.exp), torch.linalg.matrix_exp(D).diagonal(0, -2, -1).sum(-1))


@question
def diagonal(A, D):
    same(la.diagonal(A), D.diagonal(0, -2, -1))


@question
def eigvals(A, D):
    if A.square:
        same_set(la.eigvals(A), torch.linalg.eigvals(D))


@question
def eig(A, D):
    if A.square:
        wanted = torch.linalg.eigvals(D)
        for k in (None, 2):
            values, vectors = la.eig(A, k)
            V = vectors.dense().to(values.dtype)
            same(D.to(values.dtype) @ V, V * values[..., None, :], 1e-6)
        same(values.abs(), wanted.abs().sort(-1, descending=True).values[..., :2], 1e-6)


@question
def eigh(A, D):
    if "hermitian" in A.properties:
        wanted = torch.linalg.eigvalsh(D)
        same(la.eigvalsh(A), wanted)
        keys = {"LA": -wanted, "SA": wanted, "LM": -wanted.abs(), "SM": wanted.abs()}
        for k, which in [(None, "LA"), *((2, which) for which in keys)]:
            values, vectors = la.eigh(A, k, which)
            same(D @ vectors.dense(), vectors.dense() * values[..., None, :].to(D.dtype))
            chosen = keys[which].argsort(-1)[..., : k or D.shape[-1]]
            same(values, wanted.gather(-1, chosen).sort(-1).values)


@question
def svd(A, D):
    for k in (None, 2):
        u, s, vh = la.svd(A, k)
        same(s, torch.linalg.svdvals(D)[..., :k])
        if k is None:
            same(u.dense() @ (s[..., None] * vh.dense()), D)
    same(la.svdvals(A), torch.linalg.svdvals(D))


@question
def pinv(A, D):
    same(la.pinv(A).dense(), torch.linalg.pinv(D, rtol=1e-13), 1e-6)
    b = torch.randn(A.shape[-2], 2, dtype=A.dtype)
    same(la.lstsq(A, b), torch.linalg.pinv(D, rtol=1e-13) @ b, 1e-6)


@question
def norm(A, D):
    for kind in ("fro", "nuc", 2, -2, 1, math.inf):
        same(la.norm(A, kind), torch.linalg.matrix_norm(D, kind))


@question
def cond(A, D):
    if regular(A, D):
        for p in (2, 1):
            same(la.cond(A, p), torch.linalg.cond(D, p), 1e-5)


@question
def exp(A, D):
    if A.square:
        same(la.exp(A).dense(), torch.linalg.matrix_exp(D))


@question
def powers(A, D):
    if A.square:
        same(la.pow(A, 3).dense(), torch.linalg.matrix_power(D, 3))
        if regular(A, D):
            same(la.pow(A, -2).dense(), torch.linalg.matrix_power(torch.linalg.inv(D), 2), 1e-5)


@question
def definite(A, D):
    """A Aᴴ + 0.1 I: solve, determinant, Cholesky, root and logarithm."""
    one, b = 0.1 * la.Identity(A.shape[-2], dtype=A.dtype), torch.randn(A.shape[-2], 1, dtype=A.dtype)
    G, matrix = A @ A.H + one, D @ D.mH + one.dense()
    same(la.solve(G, b), torch.linalg.solve(matrix, b.expand(*matrix.shape[:-1], 1)), 1e-6)
    same(la.logdet(G).real, torch.linalg.slogdet(matrix)[1])
    factor = la.cholesky(G).dense()
    same(factor @ factor.mH, matrix)
    root = la.sqrt(G).dense()
    same(root @ root, matrix, 1e-6)
    same(torch.linalg.matrix_exp(la.log(G).dense()), matrix, 1e-6)


@question
def lu(A, D):
    p, lower, upper = (part.dense() for part in la.lu(A))
    same(p @ lower @ upper, D)
    assert_close(lower, lower.tril())
    assert_close(upper, upper.triu())


@question
def explained(A, D):
    for ask in (la.solve, la.slogdet, la.trace, la.eig, la.svd, la.exp, la.norm, la.pinv, la.diagonal):
        if A.square or ask in (la.svd, la.norm, la.pinv, la.diagonal):
            assert "(" in el.explain(ask, A)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ask", QUESTIONS)
def test_cell(ask, name):
    for dtype, batch in CASES:
        if (A := make(name, dtype, batch)) is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch.jit, within torch
                QUESTIONS[ask](A, A.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_answered_in_thirty_two(dtype):
    A = la.kron(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)).to(dtype)
    b = torch.ones(4, dtype=dtype)
    assert la.solve(A, b).dtype == dtype
    assert_close(la.solve(A, b), (b / 3).to(dtype))
    assert_close(la.logdet(A), torch.tensor(2 * math.log(3)))
    for found in (la.eigvalsh(A), la.svdvals(A), la.trace(A), la.norm(A), la.exp(A).dense()):
        assert found.dtype == torch.float32
