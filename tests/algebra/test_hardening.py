"""What a grid of random compositions (benchmarks/linalg_grid) once found wrong, each as a law."""

import copy
import math
import warnings

import pytest
import torch
from algebra.zoo import la, poisson
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import einlinear as el
from einlinear.linalg.normal import normal
from einlinear.linalg.result import NearlySingular

f64, c128 = torch.float64, torch.complex128


def jordan(n, value, dtype=f64):
    return (value * torch.eye(n, dtype=f64) + torch.diag(torch.ones(n - 1, dtype=f64), 1)).to(dtype)


SINGULAR = {
    "dense": lambda: la.Dense(torch.tensor([[1.0, 2], [1, 2]], dtype=f64)),
    "ring": lambda: la.Circulant(torch.tensor([2.0, -1, 0, -1], dtype=f64)),
    "multiple": lambda: 0.0 * la.Permutation(torch.tensor([1, 0]), dtype=f64),
    "blocks": lambda: la.BlockDiagonal(torch.tensor([[[1.0, 1], [1, 1]], [[2, 0], [0, 1]]], dtype=f64)),
}


@pytest.mark.parametrize("kind", SINGULAR)
def test_a_regular_whole_with_a_singular_part_is_answered(kind):
    base = SINGULAR[kind]()
    n = base.shape[-1]
    U = torch.randn(n, 2, dtype=f64, generator=torch.Generator().manual_seed(0))
    b = torch.arange(1.0, n + 3, dtype=f64)
    bordered = la.block([[base, U], [U.mT.contiguous(), torch.zeros(2, 2, dtype=f64)]])
    for A in (la.LowRankUpdate(base, U), bordered):
        if torch.linalg.cond(A.dense()) < 1e8:
            rhs = b[: A.shape[-1]]
            assert_close(la.solve(A, rhs), torch.linalg.solve(A.dense(), rhs))
        assert_close(la.slogdet(A).logabsdet.exp(), torch.linalg.det(A.dense()).abs())
    with warnings.catch_warnings(), pytest.raises((el.OperatorError, NearlySingular), match="singular"):
        warnings.simplefilter("error")
        la.solve(la.LowRankUpdate(base, torch.zeros(n, 1, dtype=f64)), b[:n])


@pytest.mark.parametrize("small", [1e-4, 1e-8, 1e-11])
def test_woodbury_does_not_cancel_where_its_base_is_small(small):
    U = torch.randn(60, 3, dtype=f64)
    A = la.LowRankUpdate(small * la.Identity(60, dtype=f64), U)
    b = A @ torch.randn(60, dtype=f64)
    x = la.solve(A, b)
    assert (A @ x - b).norm() <= 1e-13 * (x.norm() * torch.linalg.norm(A.dense(), 2) + b.norm())


def test_an_update_of_a_nearly_singular_base_is_solved_as_a_whole():
    base = torch.diag(torch.tensor([1.0, 1, 1, 1e-15], dtype=f64)) @ torch.randn(4, 4, dtype=f64)
    A, b = la.LowRankUpdate(la.Dense(base), torch.randn(4, 2, dtype=f64)), torch.ones(4, dtype=f64)
    assert_close(la.solve(A, b), torch.linalg.solve(A.dense(), b), rtol=1e-9, atol=1e-9)


def test_adjoint_inverses_of_updates_of_complex_bands():
    band = la.Banded(torch.randn(3, 20, dtype=c128) + 3, (-1, 0, 1))
    u, b = torch.randn(20, 1, dtype=c128), torch.randn(20, dtype=c128)
    for A in (la.LowRankUpdate(band, u), band @ band.H):
        inverse, wanted = la.inverse(A), torch.linalg.inv(A.dense())
        assert_close(inverse.H @ b, wanted.mH @ b)
        assert_close(inverse.T @ b, wanted.mT @ b)
        assert_close(la.slogdet(A).logabsdet, torch.linalg.slogdet(A.dense())[1])


def skewed(*values):
    """A complex matrix with these eigenvalues, which rounding moves to either side of the real axis."""
    x = torch.randn(len(values), len(values), dtype=c128, generator=torch.Generator().manual_seed(0))
    return x @ torch.diag(torch.tensor(values, dtype=c128)) @ torch.linalg.inv(x)


NEGATIVE = {
    "skewed": lambda: la.Dense(skewed(-1, -3, 2, -0.5, -7, -2)),
    "Hermitian": lambda: la.Dense(torch.tensor([[0, -1j], [1j, 0]], dtype=c128)).claim("hermitian"),
    "reflection": lambda: la.Householder(torch.randn(3, 1, dtype=c128)),
    "number": lambda: la.Diagonal(torch.tensor([complex(-2.0, -0.0)], dtype=c128)),
    "ring": lambda: la.Circulant(torch.tensor([1.0, 3, 0, 1], dtype=f64)),
    "triangle": lambda: la.Triangular(torch.tensor([[-2.0, 0], [1, -1]], dtype=f64)),
    "rotated": lambda: (
        la.Householder(torch.randn(3, 1, dtype=c128))
        @ la.Diagonal(torch.tensor([-1.0, -3, 2], dtype=c128))
        @ la.Householder(torch.randn(3, 1, dtype=c128))
    ),
    "Kronecker sum": lambda: la.kronsum(*(-la.Dense(torch.eye(2, dtype=c128)).claim("psd") for _ in range(2))),
}


@pytest.mark.parametrize("kind", NEGATIVE)
def test_eigenvalues_on_the_cut_have_the_argument_pi(kind):
    torch.manual_seed(1)
    A = NEGATIVE[kind]()
    w, v = torch.linalg.eig(A.dense().to(c128))
    w = torch.complex(w.real, torch.where(w.imag.abs() < 1e-12, 0.0, w.imag))
    for ask, f in ((la.log, torch.log), (la.sqrt, torch.sqrt), (lambda A: la.pow(A, 0.3), lambda w: w**0.3)):
        wanted = v @ torch.diag(f(w)) @ torch.linalg.inv(v)
        assert_close(ask(A).dense().to(c128), wanted, rtol=1e-9, atol=1e-9)


def test_the_logarithm_of_a_negative_determinant_of_a_complex_operator():
    H = la.Householder(torch.randn(4, 1, dtype=c128))
    assert la.slogdet(H).sign.dtype == c128
    assert_close(la.logdet(H), torch.tensor(math.pi * 1j, dtype=c128))


@pytest.mark.parametrize("dtype", [f64, c128])
def test_defective_kronecker_sums(dtype):
    terms = [jordan(4, 2.0, dtype), torch.randn(3, 3, dtype=dtype) + 3, jordan(2, 1.0, dtype)]
    A = la.kronsum(*terms)
    inverse, wanted = la.inverse(A), torch.linalg.inv(A.dense())
    assert "LU" not in repr(inverse)
    assert_close(inverse.dense(), wanted)
    assert_close(inverse.T.dense(), wanted.mT)
    assert_close(inverse.H.dense(), wanted.mH)
    leaves = [jordan(3, 2.0, dtype).requires_grad_(), jordan(2, 1.0, dtype).requires_grad_()]
    b = torch.randn(6, dtype=dtype, requires_grad=True)
    for ask in (lambda J, K, b: la.solve(la.kronsum(J, K), b), lambda J, K, b: la.slogdet(la.kronsum(J, K))[1]):
        assert gradcheck(ask, (*leaves, b), fast_mode=True)
        assert gradgradcheck(ask, (*leaves, b), fast_mode=True)


def test_a_large_defective_kronecker_sum_is_not_written_out(monkeypatch):
    monkeypatch.setattr("einlinear.linalg.direct.MEMORY", 10**4)
    A, b = la.kronsum(jordan(70, 2.0), jordan(90, 1.5)), torch.randn(6300, 2, dtype=f64)
    assert_close(A @ la.solve(A, b), b)
    assert_close(la.slogdet(A).logabsdet, torch.tensor(6300 * math.log(3.5), dtype=f64))


def test_eigenvalues_ascend_after_a_negative_multiple():
    A = la.Identity(3, dtype=f64) - la.Dense(torch.diag(torch.tensor([1.0, 2, 3], dtype=f64))).claim("hermitian")
    P = la.Identity(2, dtype=f64) - la.Permutation(torch.tensor([1, 0]), dtype=f64)
    for B in (A, P):
        values, vectors = la.eigh(B)
        assert bool((values.diff() >= 0).all())
        assert_close(B @ vectors.dense(), vectors.dense() * values)


def test_dependent_eigenvectors_of_a_product_with_zero():
    A = la.kron(la.Triangular(jordan(3, 1.0).mT.contiguous()), torch.zeros(2, 2, dtype=f64))
    assert_close(la.exp(A).dense(), torch.eye(6, dtype=f64))
    assert_close(la.apply(A, torch.cos).dense(), torch.eye(6, dtype=f64))


def test_no_logarithm_and_no_root_of_a_rotated_nilpotent_matrix():
    q = torch.linalg.qr(torch.randn(3, 3, dtype=f64))[0]
    A = la.Dense(q @ jordan(3, 0.0) @ q.mT)
    for ask in (la.log, la.sqrt):
        with pytest.raises(el.OperatorError):
            ask(A)


@pytest.mark.parametrize("rtol", [None, 1e-2, 0.2])
def test_pseudo_inverses_cut_by_the_largest_value_of_the_whole(rtol):
    torch.manual_seed(0)

    def of(*values):
        q, p = (torch.linalg.qr(torch.randn(len(values), len(values), dtype=f64))[0] for _ in range(2))
        return (q * torch.tensor(values, dtype=f64)) @ p

    a, b = of(1, 0.051, 0.31), of(2, 0.11)
    blocks = la.BlockDiagonal(torch.stack([a, 1e-20 * a, 0.23 * a]))
    wide = la.kron(torch.randn(2, 3, dtype=f64), a)
    faint = la.block_diag(1e-20 * la.Identity(2, dtype=f64), a, la.Diagonal(torch.tensor([0.004, 3], dtype=f64)))
    for A in (la.kron(a, b), -0.5 * la.kron(a, b), wide, blocks, la.block_diag(a, b), faint):
        wanted = torch.linalg.pinv(A.dense(), rtol=rtol)
        assert_close(la.pinv(A, rtol).dense(), wanted)
        rhs = torch.randn(A.shape[-2], dtype=f64)
        assert_close(la.lstsq(A, rhs, rtol), wanted @ rhs)
    assert torch.vmap(lambda m: la.pinv(la.kron(m, m)).dense())(torch.randn(5, 3, 2)).shape == (5, 4, 9)
    with pytest.raises(el.OperatorError, match="from 0 on"):
        la.pinv(a, -1.0)


def test_norms():
    A = la.kronsum(torch.randn(3, 3, dtype=c128), torch.randn(2, 2, dtype=c128), torch.randn(2, 2, dtype=c128))
    for B in (A, A + 2j * la.Identity(12, dtype=c128), la.kron(A, A) - 3 * la.Identity(144, dtype=c128)):
        for kind in ("fro", 1, -1, math.inf, -math.inf):
            assert_close(la.norm(B, kind), torch.linalg.matrix_norm(B.dense(), kind))
    zero = torch.zeros(2, 2, requires_grad=True)
    la.norm(zero).backward()
    assert zero.grad is not None and bool((zero.grad == 0).all())


def test_questions_of_a_million_unknowns_that_need_no_matrix():
    A = la.kronsum(*3 * [poisson(100)])
    assert_close(la.norm(A), torch.tensor(math.sqrt(36e6 + 6 * 1e4 * 99), dtype=f64))
    ends = 12 * torch.tensor([math.sin(k * math.pi / 202) ** 2 for k in (100, 1)], dtype=f64)
    assert_close(la.cond(A), ends[0] / ends[1], rtol=1e-9, atol=0)
    assert "written out" not in el.explain(la.norm, A, 2).splitlines()[1]


def test_a_determinant_beside_nothing():
    assert la.slogdet(la.kron(torch.ones(2, 2), torch.zeros(0, 0))) == (1, 0)


def test_operators_on_different_devices_are_refused():
    A, other = la.Dense(torch.eye(2)), torch.eye(2, device="meta")
    for ask in (lambda: A @ other, lambda: A + la.Dense(other), lambda: la.kron(A, other), lambda: la.solve(A, other)):
        with pytest.raises(el.OperatorError, match=r"cpu.*meta"):
            ask()
    assert la.kron(la.Identity(2), other).device.type == "meta"


def test_deep_copies_are_operators_on_tensors_of_their_own():
    A = la.operator(el.Linear(16, 16, el.Monarch(4)))
    la.slogdet(A)
    other = copy.deepcopy(A)
    assert_close(other.dense(), A.dense())
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(A.tensors, other.tensors, strict=True))
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in other.tensors)


def test_what_would_be_refused_is_refused_an_explanation():
    with pytest.raises(el.OperatorError, match="needs a square operator"):
        el.explain(la.solve, torch.ones(3, 2))


def test_normal_forms_are_kept_under_autograd_where_that_is_right():
    U, V, d = (torch.randn(*shape, dtype=f64, requires_grad=True) for shape in ((6, 2), (2, 6), (6,)))
    layer = el.Linear(16, 16, el.Monarch(4)).double()
    for A in (la.Dense(U) @ la.Dense(V) + la.Diagonal(d), la.operator(layer)):
        form = normal(A)
        assert form is not A and normal(A) is form
        grads = [torch.autograd.grad(la.slogdet(A)[1], A.tensors) for _ in range(2)]
        matrix = A.dense()
        wanted = torch.autograd.grad(torch.linalg.slogdet(matrix)[1], A.tensors)
        for found in grads:
            assert_close(found, wanted)
        with torch.no_grad():
            assert not la.slogdet(A)[1].requires_grad
            A.tensors[0].mul_(1.5)
        assert normal(A) is not form
        assert_close(la.slogdet(A)[1], torch.linalg.slogdet(A.dense())[1])
        assert la.slogdet(A)[1].requires_grad
    scaled = 2.0 * la.Dense(torch.eye(3, dtype=f64).requires_grad_())
    for _ in range(2):  # autograd frees the factor of the product: the form is made again
        torch.autograd.grad(la.slogdet(scaled)[1], scaled.tensors[1:])
