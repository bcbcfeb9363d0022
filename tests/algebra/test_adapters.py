"""To and from other libraries. Optional ones are tested where they are installed."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from algebra.zoo import NAMES, la, make, poisson
from torch.testing import assert_close

import einlinear as el


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_through_scipy(name):
    for dtype in (torch.float64, torch.complex128):
        if (A := make(name, dtype)) is None:
            continue
        there = la.to_scipy(A)
        x = np.random.default_rng(0).standard_normal((A.shape[-1], 2))
        matrix = A.dense().resolve_conj()
        assert_close(torch.as_tensor(there @ x), matrix @ torch.as_tensor(x).to(dtype))
        back = la.from_scipy(there)
        b = torch.randn(A.shape[-1], 3, dtype=dtype)
        assert_close(back @ b, matrix @ b)
        assert_close(back.T.dense(), matrix.mT)
        assert_close(back.H.dense(), matrix.mH)
        assert_close(back.conj().dense(), matrix.conj())


def test_scipy_solves_with_our_operators():
    A = la.kronsum(poisson(8), poisson(9))
    b = np.ones(72)
    x, failed = scipy.sparse.linalg.cg(la.to_scipy(A), b, rtol=1e-12)
    assert not failed
    assert_close(torch.as_tensor(x), la.solve(A, torch.ones(72, dtype=torch.float64)))
    largest = scipy.sparse.linalg.eigsh(la.to_scipy(A), 2, return_eigenvectors=False)
    assert_close(torch.as_tensor(largest), la.eigh(A, 2).values)


def test_matrices_of_numpy_and_scipy_are_operators():
    dense = np.array([[1.0, 2.0], [3.0, 4.0]])
    for value in (dense, scipy.sparse.csr_matrix(dense), scipy.sparse.coo_array(dense)):
        assert_close(la.operator(value).dense(), torch.as_tensor(dense))
        assert_close(la.logdet(la.operator(value) @ la.operator(value)), torch.tensor(4.0, dtype=torch.float64).log())


def test_scipy_has_no_batch():
    with pytest.raises(el.OperatorError, match="it has a batch"):
        la.to_scipy(la.Dense(torch.ones(2, 3, 3)))


def test_linear_operator():
    pytest.importorskip("linear_operator")
    a = torch.randn(3, 3, dtype=torch.float64)
    block = la.Dense(a @ a.mT + torch.eye(3, dtype=torch.float64)).claim("psd")
    for A in (
        block,
        la.kron(block, block),
        la.Diagonal(torch.rand(4)),
        block + block,
        la.BlockDiagonal(torch.stack([block.matrix] * 2)).claim("psd"),
    ):
        assert_close(la.to_linear_operator(A).to_dense(), A.dense())
    with pytest.raises(el.OperatorError, match="claim 'psd'"):
        la.to_linear_operator(la.Dense(a))


def test_cola():
    cola = pytest.importorskip("cola")
    a, b = torch.randn(3, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    A, B = la.Dense(a), la.Diagonal(b.diagonal())
    cases = [
        A,
        B,
        la.kron(A, B),
        la.kronsum(A, B),
        A @ A,
        A + A,
        2 * A,
        la.block_diag(A, B),
        la.Identity(3, dtype=a.dtype),
    ]
    cases += [
        la.Permutation(torch.tensor([2, 0, 1]), dtype=a.dtype),
        la.Toeplitz(a[0]),
        la.Sparse(a[0], *torch.randint(0, 3, (2, 3)), (3, 3)),
    ]
    for case in cases:
        there = la.to_cola(case)
        assert type(there) is not cola.ops.Sparse
        x = torch.randn(case.shape[-1], 2, dtype=a.dtype)
        assert_close(there @ x, case @ x)


def test_from_cola():
    cola = pytest.importorskip("cola")
    ops, kind = cola.ops, torch.float64
    a, b = torch.randn(3, 3, dtype=kind), torch.randn(2, 2, dtype=kind)
    A, B = ops.Dense(a), ops.Dense(b)
    cases = [
        (A, "Dense"),
        (ops.Diagonal(a[0]), "Diagonal"),
        (ops.Triangular(a.tril(), lower=True), "Triangular"),
        (ops.Kronecker(A, B), "⊗"),
        (ops.KronSum(A, B), "⊕"),
        (ops.BlockDiag(A, B, multiplicities=[2, 1]), "DirectSum"),
        (ops.Product(A, A), "@"),
        (ops.Sum(A, A), "+"),
        (ops.ScalarMul(2.5, (3, 3), dtype=kind), "2.5·Identity"),
        (ops.Permutation(torch.tensor([2, 0, 1]), dtype=kind), "Permutation"),
        (ops.Tridiagonal(a[0, :2], a[1], a[2, :2]), "Dense"),
        (A.T, "Dense"),
    ]
    for there, text in cases:
        here = la.operator(there)
        assert text in repr(here)
        assert_close(here.dense(), there.to_dense().to(kind))
    assert "psd" in la.from_cola(cola.PSD(ops.Dense(a @ a.mT))).properties


def test_lineax():
    pytest.importorskip("lineax")
    A = la.Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).claim("psd")
    for case in (A, la.Diagonal(torch.ones(2)), la.kron(A, A)):
        assert_close(torch.as_tensor(np.array(la.to_lineax(case).as_matrix())), case.dense())
