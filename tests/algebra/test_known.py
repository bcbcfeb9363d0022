"""Matrices with known answers."""

import math

import pytest
import scipy.linalg
import torch
from algebra.zoo import la, poisson, poisson_values
from torch.testing import assert_close

f64 = torch.float64


def test_poisson_in_one_two_and_three_dimensions():
    sizes = (7, 5, 6)
    for d in (1, 2, 3):
        A = la.kronsum(*map(poisson, sizes[:d]))
        values = poisson_values(sizes[0])
        for n in sizes[1:d]:
            values = (values[:, None] + poisson_values(n)).flatten()
        assert_close(la.eigvalsh(A), values.sort().values)
        assert_close(la.logdet(A), values.log().sum())
        b = torch.randn(A.shape[-1], dtype=f64)
        assert_close(A @ la.solve(A, b), b)
        found, vectors = la.eigh(A, 3, "SA")
        assert_close(A @ vectors.dense(), vectors.dense() * found)
        assert_close(la.trace(la.exp(-A)), (-values).exp().sum())
        assert_close(la.trace(-A, la.exp), (-values).exp().sum())


def test_a_laplacian_written_as_a_sum_of_products_is_known_for_what_it_is():
    one = [la.Identity(n, dtype=f64) for n in (3, 4, 5)]
    terms = [la.kron(*(poisson(len_) if k == at else one[k] for k, len_ in enumerate((3, 4, 5)))) for at in range(3)]
    A = terms[0] + 2 * terms[1] + terms[2] + 0.5 * la.Identity(60, dtype=f64)
    b = torch.randn(60, dtype=f64)
    assert_close(la.solve(A, b), torch.linalg.solve(A.dense(), b))
    assert "⊕" in repr(la.exp(A)) or "⊗" in repr(la.exp(A))
    assert_close(la.logdet(A), torch.logdet(A.dense()))


def test_a_long_tridiagonal_matrix():
    A = poisson(100_000)
    assert_close(la.logdet(A), torch.tensor(math.log(100_001), dtype=f64), atol=1e-6, rtol=0)
    x = la.solve(A, torch.ones(100_000, dtype=f64))
    i = torch.arange(1, 100_001, dtype=f64)
    assert_close(x, i * (100_001 - i) / 2, rtol=1e-6, atol=0)


def test_a_tridiagonal_toeplitz_matrix_with_zero_diagonal():
    """Its leading minors of odd order vanish: elimination without pivoting fails."""
    one = torch.ones(999, dtype=f64)
    A = la.tridiagonal(one, torch.zeros(1000, dtype=f64), one)
    b = torch.randn(1000, dtype=f64)
    assert_close(A @ la.solve(A, b), b)
    assert_close(la.slogdet(A)[0], torch.tensor(1.0, dtype=f64))
    odd = la.tridiagonal(one[1:], torch.zeros(999, dtype=f64), one[1:])
    assert la.slogdet(odd).sign == 0 and la.slogdet(odd).logabsdet == -math.inf


def test_hilbert():
    H = torch.tensor(scipy.linalg.hilbert(8))
    assert_close(la.inverse(H).dense(), torch.tensor(scipy.linalg.invhilbert(8)), rtol=1e-6, atol=0)
    with pytest.warns(UserWarning, match="singular to working precision"):
        la.solve(torch.tensor(scipy.linalg.hilbert(14)), torch.ones(14, dtype=f64))


def test_integers_are_exact_data():
    assert_close(
        la.logdet(torch.tensor(scipy.linalg.pascal(9).astype(int))), torch.tensor(0.0, dtype=f64), atol=1e-6, rtol=0
    )
    hadamard = torch.tensor(scipy.linalg.hadamard(16))
    assert_close(la.cond(hadamard), torch.tensor(1.0, dtype=f64))
    assert_close(la.slogdet(hadamard).logabsdet, torch.tensor(16 * math.log(4), dtype=f64))


def test_frank_wilkinson_companion():
    frank = torch.tensor([[max(0, 12 - max(i, j)) if j >= i - 1 else 0 for j in range(12)] for i in range(12)])
    assert_close(la.slogdet(frank).logabsdet, torch.tensor(0.0, dtype=f64), atol=1e-7, rtol=0)
    one = torch.ones(20, dtype=f64)
    wilkinson = la.tridiagonal(one, torch.arange(-10, 11, dtype=f64).abs(), one)
    assert_close(la.eigh(wilkinson, 1).values, torch.tensor([10.746194182903393], dtype=f64))
    companion = torch.tensor(scipy.linalg.companion([1.0, -6.0, 11.0, -6.0]))
    assert_close(la.eigvals(companion).real.sort().values, torch.tensor([1.0, 2.0, 3.0], dtype=f64))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("unitary", [True, False])
def test_the_determinant_of_a_fourier_transform(n, unitary):
    F = la.Fourier(n, unitary=unitary, dtype=f64)
    for A in (F, F.H):
        assert_close(tuple(la.slogdet(A)), tuple(torch.linalg.slogdet(A.dense())))


def test_permutations():
    swap = la.Permutation(torch.tensor([1, 0, 2]))
    assert la.slogdet(swap) == (-1, 0)
    for _ in range(5):
        P = la.Permutation(torch.randperm(9), dtype=f64)
        assert_close(la.slogdet(P).sign, torch.linalg.det(P.dense()))
        assert_close((la.inverse(P) @ P).dense(), torch.eye(9, dtype=f64))


def test_circulant_matrices_of_graphs():
    """The ring's Laplacian: eigenvalues 2 − 2 cos(2πk/n), singular, with a pseudo-inverse."""
    ring = la.Circulant(torch.tensor([2.0, -1, 0, 0, 0, -1], dtype=f64))
    assert_close(la.eigvals(ring).real, 2 - 2 * torch.cos(2 * math.pi * torch.arange(6, dtype=f64) / 6))
    assert_close(la.pinv(ring).dense(), torch.linalg.pinv(ring.dense()))
    assert la.logdet(ring) < -25


def test_skew_symmetric():
    S = torch.randn(6, 6, dtype=f64)
    S = S - S.mT
    assert la.eigvals(S).real.abs().max() < 1e-12
    assert la.slogdet(S).sign == 1  # the square of the Pfaffian
    Q = la.exp(S).dense()
    assert_close(Q @ Q.mT, torch.eye(6, dtype=f64))


def test_jordan_blocks():
    J = 2 * torch.eye(4, dtype=f64) + torch.diag(torch.ones(3, dtype=f64), 1)
    root = la.sqrt(J).dense()
    assert_close(root @ root, J)
    assert_close(torch.linalg.matrix_exp(la.log(J).dense()), J)
    fourth = la.pow(J, 0.25).dense()
    assert_close(torch.linalg.matrix_power(fourth, 4), J)
    A, b = la.kronsum(J, J), torch.randn(16, dtype=f64)
    assert_close(A @ la.solve(A, b), b)
    assert_close(la.exp(A).dense(), torch.linalg.matrix_exp(A.dense()))
    leaf = J.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda J: la.sqrt(la.Dense(J)).dense(), (leaf,))


def test_negative_and_singular_determinants():
    for A in (-2 * la.Identity(3, dtype=f64), la.Diagonal(torch.tensor([1.0, -8.0], dtype=f64))):
        sign, logarithm = la.slogdet(A)
        assert sign == -1 and abs(float(logarithm) - math.log(8)) < 1e-12
    assert_close(la.logdet(-2 * la.Identity(4, dtype=f64)), torch.tensor(4 * math.log(2), dtype=f64))
    assert la.logdet(torch.ones(3, 3)) == -math.inf
    assert_close(la.exp(torch.zeros(2, 2)).dense(), torch.eye(2))


def test_shuffled_entries_and_duplicates():
    torch.manual_seed(1)
    rows, columns = torch.randint(0, 30, (2, 200))
    values = torch.randn(200, dtype=f64)
    wanted = torch.zeros(30, 30, dtype=f64).index_put((rows, columns), values, accumulate=True)
    for order in (torch.arange(200), torch.randperm(200)):
        A = la.Sparse(values[order], rows[order], columns[order], (30, 30))
        assert_close(A.dense(), wanted)
        assert_close(A @ torch.eye(30, dtype=f64)[:, :3], wanted[:, :3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_woodbury_against_dense(dtype):
    n, r = 300, 5
    D = la.Diagonal(torch.rand(n, dtype=f64).to(dtype) + 1)
    U = torch.randn(n, r, dtype=dtype)
    b = torch.randn(n, 2, dtype=dtype)
    for A in (D + la.Dense(U) @ la.Dense(U).H, la.Dense(U) @ la.Dense(torch.randn(n, r, dtype=dtype)).T + 3 * D):
        assert_close(la.solve(A, b), torch.linalg.solve(A.dense(), b))
        assert_close(tuple(la.slogdet(A)), tuple(torch.linalg.slogdet(A.dense())))
        inverse = la.inverse(A)
        assert_close(la.slogdet(inverse).logabsdet, -la.slogdet(A).logabsdet)


def test_functions_of_kronecker_products_and_sums_of_jordan_blocks():
    """Their eigenvectors are dependent: V Λ V⁻¹ is another operator."""
    block = torch.tensor([[2, 1, 0], [0, 2, 1], [0, 0, 2]], dtype=f64)
    pair = torch.tensor([[1, 1], [0, 1]], dtype=f64)
    for A in (la.kronsum(pair, block), la.kron(pair, block), la.kronsum(block, torch.randn(2, 2, dtype=f64))):
        matrix = A.dense()
        assert_close(la.pow(A, 3).dense(), matrix @ matrix @ matrix)
        assert_close(la.exp(A).dense(), torch.linalg.matrix_exp(matrix))
    A = la.kronsum(pair, block)
    root = la.sqrt(A)
    assert_close((root @ root).dense(), A.dense())
    assert_close(la.exp(la.log(A)).dense(), A.dense())


def test_roots_of_singular_semidefinite_operators():
    """What rounding alone makes negative is zero."""
    free = la.tridiagonal(*(torch.tensor(v, dtype=f64) for v in ([-1, -1, -1], [1, 2, 2, 1], [-1, -1, -1])))
    thin = la.Dense(torch.randn(6, 2, dtype=f64))
    for A in (la.kronsum(free, free), thin @ thin.T, la.Dense(torch.ones(3, 3)).claim("psd")):
        root = la.sqrt(A)
        tolerance = {"atol": 1e-5, "rtol": 0} if A.dtype == torch.float32 else {}
        assert_close((root @ root).dense(), A.dense(), **tolerance)
    assert_close(la.trace(la.Dense(torch.ones(4, 4, dtype=f64)).claim("psd"), la.sqrt), torch.tensor(2.0, dtype=f64))


def test_the_condition_of_singular_operators_is_infinite():
    assert la.cond(la.Zero(2, 2)) == math.inf
    assert la.cond(torch.ones(2, 2)) > 1e6
    batch = torch.stack([torch.ones(2, 2), 2 * torch.eye(2)])
    assert la.cond(batch, 1).tolist() == [math.inf, 1.0]


def test_functions_of_nothing():
    nothing = torch.zeros(0, 0, dtype=f64)
    for answer in (la.sqrt(nothing), la.pow(nothing, 0.3), la.apply(nothing, torch.cos), la.exp(nothing)):
        assert answer.shape == (0, 0)


@pytest.mark.parametrize("which", ["SA", "LA", "LM", "SM"])
def test_the_ends_of_a_long_laplacian(which):
    """Its ends are so crowded that a Krylov space does not tell their eigenvalues apart."""
    n = 3000
    A, values = poisson(n), poisson_values(n)
    wanted = values[-3:] if which in ("LA", "LM") else values[:3]
    found, vectors = la.eigh(A, 3, which)
    assert_close(found, wanted, atol=1e-13, rtol=0)
    assert_close(A @ vectors.dense(), vectors.dense() * found, atol=1e-12, rtol=0)


def test_all_eigenvalues_of_a_complex_band_matrix():
    above = torch.randn(300, dtype=torch.complex128)
    above[-2:] = 0
    bands = torch.stack([above.roll(2).conj(), torch.randn(300, dtype=f64) + 0j, above])
    A = la.Banded(bands, (-2, 0, 2)).claim("hermitian", check=True)
    wanted = torch.linalg.eigvalsh(A.dense())
    assert_close(la.eigvalsh(A), wanted)
    assert_close(la.eigh(A, 4, "LM").values, wanted[wanted.abs().argsort()[-4:]].sort().values)


def test_eigenvalues_that_krylov_spaces_do_not_find_are_found_from_the_matrix(recwarn):
    A = la.Dense(poisson(900).dense())
    assert_close(la.eigh(A, 3, "SA").values, poisson_values(900)[:3], atol=1e-12, rtol=0)
    assert not [w for w in recwarn if "stopped after" in str(w.message)]


def test_the_smallest_magnitudes_of_a_definite_operator_are_looked_for_at_its_lower_end(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("einlinear.linalg.questions.extreme", lambda A, k, which, products: asked.append(which))
    A = la.Dense(torch.diag(torch.linspace(1, 5, 700, dtype=f64))).claim("psd")
    assert_close(la.eigh(A, 1, "SM").values, torch.ones(1, dtype=f64))
    assert_close(la.eigh(A, 1, "LM").values, torch.full((1,), 5.0, dtype=f64))
    assert asked == ["SA", "LA"]
