"""Extreme eigenpairs against known spectra: repeated, clustered, complex, nonnormal, defective."""

import pytest
import torch
from krylov import matrices
from krylov.matrices import spectrum

from einlinear.linalg.krylov.eigen import eigenpairs, ranked
from einlinear.linalg.krylov.lobpcg import lobpcg
from einlinear.linalg.result import LinAlgError, NotConverged

REPEATED = torch.cat([torch.full((4,), -2.0), torch.linspace(-1, 3, 150), torch.full((6,), 3.5)]).double()
BOTH = pytest.mark.parametrize("find", [eigenpairs, lobpcg], ids=lambda find: find.__name__)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@BOTH
def test_repeated_eigenvalues_are_all_found(find, dtype, k, which):
    a = spectrum(REPEATED, dtype, batch=(2,))
    found = find(lambda x: a @ x, a.shape, k, which=which, dtype=dtype, generator=generator())
    values, vectors = found.value
    assert found.converged
    torch.testing.assert_close(values, REPEATED[ranked(REPEATED, which)][:k].expand(2, k), rtol=0, atol=1e-9)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(k, dtype=dtype).expand(2, k, k), rtol=0, atol=1e-8)
    true = (a @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    assert (true <= 3.6 * found.residual + 1e-13).all() and (true < 1e-9).all()


def test_one_krylov_space_finds_every_copy_of_an_eigenvalue():
    a = spectrum(REPEATED)
    found = eigenpairs(lambda x: a @ x, a.shape, 6, block=1, dtype=a.dtype, generator=generator())
    torch.testing.assert_close(found.value.values, torch.full((6,), 3.5).double(), rtol=0, atol=1e-9)


@BOTH
def test_small_matrices_are_solved_whole(find):
    for values in ([3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 2.0, -1.0]):
        exact = torch.tensor(values).double()
        a = spectrum(exact)
        found = find(lambda x: a @ x, a.shape, len(values), dtype=a.dtype)  # noqa: B023
        torch.testing.assert_close(found.value.values, exact.sort(descending=True).values, atol=1e-12, rtol=0)
    zero = find(lambda x: 0 * x, (50, 50), 3, dtype=torch.float64)
    assert zero.converged and not zero.value.values.any()


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_pairs_of_matrices_that_are_not_hermitian(batch, k, which):
    a = torch.randn((*batch, 90, 90), dtype=torch.float64, generator=generator())
    found = eigenpairs(lambda x: a @ x, a.shape, k, which=which, hermitian=False, dtype=a.dtype, generator=generator())
    exact = torch.linalg.eigvals(a)
    exact = exact.gather(-1, ranked(exact, which))[..., :k]
    key = torch.abs if which == "magnitude" else torch.real
    torch.testing.assert_close(key(found.value.values), key(exact), rtol=1e-7, atol=1e-8)
    values, vectors = found.value
    true = (a.to(vectors.dtype) @ vectors - vectors * values.unsqueeze(-2)).norm(dim=-2)
    assert (true < 1e-8).all()


def test_a_defective_matrix_ends():
    a = matrices.defective()
    found = eigenpairs(lambda x: a @ x, a.shape, 2, hermitian=False, dtype=a.dtype)
    # A perturbation of 1e-16 moves these eigenvalues by 1e-16 ** (1 / 40): the residual is what is small.
    assert found.residual.max() < 1e-10
    assert (found.value.values - 2).abs().max() < 1


def test_a_start_saves_products():
    a = spectrum(REPEATED)
    first = eigenpairs(lambda x: a @ x, a.shape, 3, which="smallest", dtype=a.dtype, generator=generator())
    again = lobpcg(lambda x: a @ x, a.shape, 3, which="smallest", start=first.value.vectors, dtype=a.dtype)
    assert again.iterations == 1


def test_lobpcg_uses_its_preconditioner():
    a = matrices.laplacian(200) + torch.diag(torch.logspace(0, 4, 200, dtype=torch.float64))
    options = {"which": "smallest", "dtype": a.dtype}
    plain = lobpcg(lambda x: a @ x, a.shape, 2, generator=generator(), tolerance=1e-8, **options)
    better = lobpcg(
        lambda x: a @ x,
        a.shape,
        2,
        preconditioner=lambda x: x / a.diagonal()[:, None],
        generator=generator(),
        tolerance=1e-8,
        **options,
    )
    assert better.iterations < plain.iterations / 2
    torch.testing.assert_close(better.value.values, torch.linalg.eigvalsh(a)[:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@BOTH
def test_low_precision(find, dtype):
    exact = torch.linspace(1, 4, 100).double()
    exact[-1] = 6
    a = spectrum(exact).to(dtype)
    found = find(lambda x: a @ x, a.shape, 1, dtype=dtype, generator=generator())
    assert found.value.values.dtype == (torch.float32 if dtype == torch.complex64 else dtype)
    assert abs(float(found.value.values[0]) - 6) < 0.05


@BOTH
def test_what_is_wrong_is_one_sentence(find):
    a = spectrum(torch.logspace(-8, 0, 300, dtype=torch.float64))
    for k in (0, 301):
        with pytest.raises(ValueError, match="from 1 to 300"):
            find(lambda x: a @ x, a.shape, k, dtype=a.dtype)
    with pytest.raises(ValueError, match="largest, smallest, magnitude"):
        find(lambda x: a @ x, a.shape, 1, which="best", dtype=a.dtype)
    with pytest.raises(ValueError, match="square"):
        find(lambda x: a @ x, (300, 20), 1, dtype=a.dtype)
    with pytest.raises(LinAlgError, match="NaN"):
        find(lambda x: a @ x * torch.nan, a.shape, 1, dtype=a.dtype)
    with pytest.warns(NotConverged):
        find(lambda x: a @ x, a.shape, 2, which="smallest", dtype=a.dtype, max_iterations=30)
