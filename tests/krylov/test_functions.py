"""f(A) b and traces of f(A) from products alone, against dense functions of known matrices."""

import warnings

import pytest
import torch
from krylov import matrices
from krylov.matrices import columns, spectrum

from einlinear.linalg.krylov.functions import apply_function, expm_multiply
from einlinear.linalg.krylov.lanczos import Lanczos
from einlinear.linalg.result import LinAlgError, NotConverged
from einlinear.linalg.stochastic.slq import slq, slq_logdet


def dense(a, function):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * function(values).unsqueeze(-2)) @ vectors.mH


@pytest.mark.parametrize("options", [{}, {"two_pass": True}, {"hermitian": False}], ids=str)
@pytest.mark.parametrize("function", [torch.exp, torch.log, torch.sqrt, lambda v: 1 / (v + 1)])
@pytest.mark.parametrize("maker", [matrices.grid, matrices.complex_definite, matrices.one_by_one])
def test_functions_of_hermitian_matrices(maker, function, options):
    a = maker()
    b = columns(a)
    found = apply_function(lambda x: a @ x, b, function, **options)
    assert found.converged and found.value.dtype == b.dtype
    exact = torch.einsum("...ij,...jk->...ik", dense(a, function), b)
    torch.testing.assert_close(found.value, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "maker", [matrices.nonnormal, matrices.defective, matrices.convection, matrices.complex_general]
)
def test_exponentials_of_any_matrix(maker):
    a = maker()
    b = columns(a)
    exact = torch.linalg.matrix_exp(a) @ b
    for found in (
        apply_function(lambda x: a @ x, b, torch.exp, hermitian=False),
        expm_multiply(lambda x: a @ x, b),
        expm_multiply(lambda x: a @ x, b, room=10),
    ):
        assert found.converged
        torch.testing.assert_close(found.value, exact, rtol=1e-7, atol=1e-8 * float(exact.abs().max()))


@pytest.mark.parametrize("time", [-30.0, 2.5, 3j, 0.0])
def test_exponentials_over_time(time):
    a = matrices.grid()
    b = columns(a)
    wide = a.to(torch.complex128) if isinstance(time, complex) else a
    for hermitian in (True, False):
        found = expm_multiply(lambda x: a @ x, b, time, hermitian=hermitian, room=20)
        exact = torch.linalg.matrix_exp(wide * time) @ b.to(wide.dtype)
        assert found.value.dtype == wide.dtype
        torch.testing.assert_close(found.value, exact, rtol=1e-7, atol=1e-8 * float(exact.abs().max()))


def test_a_root_of_a_defective_matrix():
    a = matrices.defective()
    b = columns(a)
    root = apply_function(lambda x: a @ x, b, torch.sqrt, hermitian=False).value
    twice = apply_function(lambda x: a @ x, root, torch.sqrt, hermitian=False).value
    torch.testing.assert_close(twice, a @ b, rtol=1e-6, atol=1e-6)
    with pytest.raises(LinAlgError, match="defective"):
        apply_function(lambda x: a @ x, b, torch.sin, hermitian=False)


def test_a_function_that_is_not_finite_on_the_spectrum_is_refused():
    a = matrices.indefinite()
    with pytest.raises(LinAlgError, match=r"not finite on the spectrum found, between -5 and 9"):
        apply_function(lambda x: a @ x, columns(a), torch.log)


def test_two_passes_keep_no_basis():
    a = spectrum(torch.logspace(-3, 1, 300, dtype=torch.float64))
    b = columns(a)
    kept = []
    saved = Lanczos(lambda x: a @ x, b, reorthogonalise=False, visit=lambda j, v: kept.append(j))
    saved.advance(50)
    assert saved.basis is None and kept == list(range(50))
    with pytest.raises(ValueError, match="two passes"):
        apply_function(lambda x: a @ x, b, torch.exp, two_pass=True, hermitian=False)


def test_lanczos_keeps_its_basis_orthonormal():
    a = spectrum(torch.logspace(-8, 4, 100, dtype=torch.float64))
    process = Lanczos(lambda x: a @ x, columns(a))
    t = process.advance(60).matrix()
    rows = process.basis.rows[..., :60, :]
    torch.testing.assert_close(rows @ rows.mH, torch.eye(60, dtype=torch.float64).expand(3, 60, 60), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows @ a @ rows.mH, t, atol=1e-9, rtol=0)


def test_few_steps_are_a_warning():
    a = spectrum(torch.logspace(-6, 2, 200, dtype=torch.float64))
    with pytest.warns(NotConverged, match="apply_function stopped after 10"):
        apply_function(lambda x: a @ x, columns(a), torch.log, max_iterations=10)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("options", [{}, {"reorthogonalise": False}, {"hermitian": False}], ids=str)
@pytest.mark.parametrize("maker", [matrices.stretched, matrices.complex_definite])
def test_log_determinants_lie_within_their_errors(maker, options, kind):
    a = maker()
    generator = torch.Generator().manual_seed(0)
    found = slq(
        lambda x: a @ x, a.shape, torch.log, kind=kind, samples=200, dtype=a.dtype, generator=generator, **options
    )
    exact = torch.linalg.slogdet(a)[1]
    assert found.converged and found.standard_error.shape == exact.shape
    z = (found.value.real - exact).abs() / found.standard_error
    assert (z < 4).all()
    assert (found.standard_error < 0.15 * a.shape[-1]).all()


def test_the_standard_error_is_the_spread_of_estimates():
    a = matrices.grid()
    generator = torch.Generator().manual_seed(1)
    many = [slq_logdet(lambda x: a @ x, a.shape, samples=8, dtype=a.dtype, generator=generator) for _ in range(120)]
    values = torch.stack([found.value for found in many])
    claimed = torch.stack([found.standard_error for found in many]).square().mean().sqrt()
    assert 0.85 < values.std() / claimed < 1.15
    assert (values.mean() - torch.logdet(a)).abs() < 4 * claimed / 120**0.5


def test_traces_of_multiples_of_the_unit_are_exact():
    found = slq_logdet(lambda x: 3 * x, (50, 50), samples=2, dtype=torch.float64)
    torch.testing.assert_close(found.value, torch.tensor(50.0).double() * torch.tensor(3.0).double().log())
    assert found.iterations == 1 and found.standard_error < 1e-12


def test_probes_may_be_given_and_reach_every_direction():
    a = matrices.grid()
    n = a.shape[-1]
    unit = torch.eye(n, dtype=torch.float64)
    found = slq(lambda x: a @ x, a.shape, torch.log, probe=unit * n**0.5, max_iterations=n)
    torch.testing.assert_close(found.value, torch.logdet(a))


def test_what_has_no_log_determinant_says_so():
    for a, words in [(matrices.indefinite(), "not positive definite"), (spectrum(torch.arange(20.0)), "singular")]:
        with pytest.raises(LinAlgError, match=words):
            slq_logdet(lambda x: a @ x, a.shape, dtype=a.dtype, max_iterations=60)  # noqa: B023
    with pytest.raises(ValueError, match="square"):
        slq_logdet(lambda x: x, (3, 4))
    assert slq_logdet(lambda x: x, (0, 0)).value == 0


def test_one_probe_knows_no_error():
    a = matrices.grid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert slq_logdet(lambda x: a @ x, a.shape, samples=1, dtype=a.dtype).standard_error == torch.inf
