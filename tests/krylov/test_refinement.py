"""Sixteen bits for the matrix, thirty-two for the vectors, sixty-four for the residual."""

import warnings

import pytest
import torch
from krylov.matrices import columns, spectrum

from einlinear.linalg.krylov.gmres import gmres
from einlinear.linalg.refinement import refine, widening
from einlinear.linalg.result import LinAlgError, NotConverged


def stored(kappa, dtype, n=200):
    """A matrix whose entries are numbers of `dtype`, positive definite as stored, with about this condition number."""
    a = spectrum(torch.logspace(0, -torch.tensor(kappa).log10(), n, dtype=torch.float64)).to(dtype).double()
    lift = 1 / kappa - float(torch.linalg.eigvalsh(a)[0])
    return (a + max(lift, 0) * torch.eye(n, dtype=torch.float64)).to(dtype)


def test_a_matrix_of_sixteen_bits_is_solved_to_sixty_four():
    a = stored(1e4, torch.float16)
    wide = a.double()
    assert 3e3 < float(torch.linalg.cond(wide)) < 3e4
    b = columns(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = refine(widening(a, torch.float64), b, low=widening(a, torch.float32))
    true = ((b - wide @ found.value).norm(dim=0) / b.norm(dim=0))[[0, 2]]
    assert found.converged and true.max() <= 1e-10 and found.value.dtype == torch.float64
    alone = torch.linalg.solve(wide.float(), b.float()).double()
    assert ((b - wide @ alone).norm(dim=0) / b.norm(dim=0))[0] > 1e-7  # what 32 bits reach without refinement


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kappa", [1e1, 1e3, 1e6, 1e9])
def test_never_nan_and_hopeless_cases_are_flagged(kappa, dtype):
    a = stored(kappa, dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = refine(widening(a, torch.float64), columns(a.double()), low=widening(a, torch.float32))
        except LinAlgError as refused:
            assert "curvature" in str(refused)
            return
    assert torch.isfinite(found.value).all()
    assert found.converged or any(issubclass(w.category, NotConverged) for w in said)


def test_where_roundoff_times_condition_is_one_it_says_so():
    a = spectrum(torch.logspace(0, -9, 100, dtype=torch.float64))
    with pytest.warns(NotConverged, match="unit roundoff times condition number is about one"):
        refine(
            lambda x: a @ x.double(),
            columns(a),
            low=lambda x: a.float() @ x,
            inner=lambda r: (gmres(lambda x: a.half().float() @ x, r, tolerance=1e-2, max_iterations=100).value, 100),
        )


def test_any_inner_solver_serves():
    generator = torch.Generator().manual_seed(0)
    a = torch.eye(80, dtype=torch.complex128) * 9 + torch.randn(80, 80, dtype=torch.complex128, generator=generator) / 2
    b = columns(a)
    low = a.to(torch.complex64)
    factors = torch.linalg.lu_factor(low)
    for inner in (
        lambda r: (torch.linalg.lu_solve(*factors, r), 1),
        lambda r: (gmres(lambda x: low @ x, r, tolerance=1e-3).value, 10),
    ):
        found = refine(lambda x: a @ x, b, inner=inner, tolerance=1e-13)
        torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-11, atol=1e-12)


def test_products_of_stored_matrices_are_widened_by_rows():
    a = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)).half()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(widening(a, torch.float32)(x), a.float() @ x)
