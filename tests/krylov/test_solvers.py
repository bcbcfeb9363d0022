"""Every iterative solver against dense answers on matrices that are known, and what it says where there is none."""

import warnings

import pytest
import torch
from krylov import matrices
from krylov.matrices import CLASSES, columns, laplacian, spectrum

from einlinear.linalg.krylov.bicgstab import bicgstab
from einlinear.linalg.krylov.cg import cg, cg_shifted
from einlinear.linalg.krylov.gmres import gmres
from einlinear.linalg.krylov.lsmr import lsmr
from einlinear.linalg.krylov.minres import minres
from einlinear.linalg.result import LinAlgError, NotConverged

SOLVERS = {cg: "definite", minres: "hermitian", gmres: "square", bicgstab: "easy"}
CASES = [
    pytest.param(solver, maker, id=f"{solver.__name__}-{maker.__name__}")
    for solver, kind in SOLVERS.items()
    for maker in CLASSES[kind]
]
ALL = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)


def residual(a, x, b):
    return ((b - a @ x).norm(dim=-2) / b.norm(dim=-2).clamp_min(torch.finfo(b.dtype).tiny)).max()


@pytest.fixture(autouse=True)
def _no_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConverged)
        yield


@pytest.mark.parametrize(("solver", "maker"), CASES)
def test_solves_what_it_is_for(solver, maker):
    a = maker()
    b = columns(a)
    found = solver(lambda x: a @ x, b)
    assert found.converged
    assert residual(a, found.value, b) < 2e-10
    assert (found.value[..., 1] == 0).all()
    # The residual reported is that of the value, column by column.
    true = (b - a @ found.value).norm(dim=-2) / b.norm(dim=-2)
    torch.testing.assert_close(found.residual, torch.nan_to_num(true), atol=2e-12, rtol=1e-3)


@pytest.mark.parametrize(("solver", "maker"), CASES)
def test_an_exact_guess_ends_at_once(solver, maker):
    a = maker()
    b = 1e3 * columns(a)
    x = torch.linalg.solve(a, b)
    found = solver(lambda v: a @ v, b, guess=x)
    assert found.iterations == 0
    torch.testing.assert_close(found.value, x)


@ALL
def test_each_column_is_solved_at_its_own_scale(solver):
    a = spectrum(torch.linspace(1, 9, 30))
    b = columns(a) * torch.tensor([1e-150, 1.0, 1e150], dtype=torch.float64)
    assert residual(a, solver(lambda x: a @ x, b).value, b) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4])
@ALL
def test_no_precision_gives_nan_or_silence(solver, kappa, dtype):
    exact = spectrum(torch.logspace(0, torch.tensor(kappa).log10(), 60, dtype=torch.float64))
    a, b = exact.to(dtype), columns(exact).to(dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = solver(lambda x: a @ x, b)
        except LinAlgError as refused:
            assert dtype in (torch.float16, torch.bfloat16) and "curvature" in str(refused)
            return
    assert found.value.dtype == dtype
    assert torch.isfinite(found.value).all()
    assert found.converged != any(issubclass(w.category, NotConverged) for w in said)
    wide = torch.promote_types(dtype, torch.float64)
    true = residual(a.to(wide), found.value.to(wide), b.to(wide))
    assert true < 3 * found.residual.max() + 4 * torch.finfo(dtype).eps * kappa**0.5
    if kappa <= 1e2:
        assert true < {torch.float16: 0.05, torch.bfloat16: 0.3}.get(dtype, 1e-3)


@ALL
def test_a_preconditioner_is_used_and_changes_no_answer(solver):
    scale = torch.logspace(0, 3, 80, dtype=torch.float64)
    a = laplacian(80) + torch.diag(scale)
    b = columns(a)
    plain = solver(lambda x: a @ x, b)
    calls = []

    def jacobi(x):
        calls.append(x.shape)
        return x / a.diagonal()[:, None]

    better = solver(lambda x: a @ x, b, preconditioner=jacobi)
    assert calls and better.iterations < plain.iterations / 2
    torch.testing.assert_close(better.value, plain.value, rtol=1e-7, atol=1e-9)


@ALL
def test_what_is_wrong_is_one_sentence(solver):
    a = spectrum(torch.linspace(1, 9, 10))
    with pytest.raises(LinAlgError, match="NaN or infinite"):
        solver(lambda x: a @ x, torch.full((10, 1), torch.nan))
    with pytest.raises(LinAlgError, match="gave NaN"):
        solver(lambda x: a @ x * torch.nan, columns(a))
    with pytest.raises(ValueError, match="unsqueeze a vector"):
        solver(lambda x: a @ x, torch.ones(10))
    with pytest.raises(ValueError, match="square"):
        solver(lambda x: a[:5] @ x, columns(a))
    with pytest.raises(ValueError, match="broadcast"):
        solver(lambda x: a.expand(2, 10, 10) @ x, columns(a))
    with pytest.raises(ValueError, match="floating"):
        solver(lambda x: a @ x, torch.ones(10, 1, dtype=torch.int64))


@ALL
def test_too_few_iterations_are_a_warning(solver):
    a = spectrum(torch.logspace(0, 4, 100, dtype=torch.float64))
    with pytest.warns(NotConverged, match=r"stopped after 5 iterations.*wanted 1\.0e-10"):
        found = solver(lambda x: a @ x, columns(a), max_iterations=5)
    assert not found.converged and found.iterations == 5
    assert found.residual[0] > 1e-10


@ALL
def test_empty_systems_are_solved(solver):
    for shape in [(0, 3), (4, 0)]:
        a = torch.eye(shape[0], dtype=torch.float64)
        assert solver(lambda x: a @ x, torch.ones(shape, dtype=torch.float64)).value.shape == shape  # noqa: B023


@pytest.mark.parametrize("solver", [minres, gmres], ids=lambda solver: solver.__name__)
def test_singular_systems_with_a_solution(solver):
    a = spectrum(torch.cat([torch.zeros(3), torch.linspace(-4, -1, 15), torch.linspace(1, 5, 15)]).double())
    b = a @ columns(a)
    assert residual(a, solver(lambda x: a @ x, b).value, b) < 2e-10


@ALL
def test_singular_systems_without_a_solution_say_so(solver):
    a = spectrum(torch.cat([torch.zeros(3), torch.linspace(1, 5, 15)]).double())
    with pytest.warns(NotConverged):
        found = solver(lambda x: a @ x, columns(a))
    assert torch.isfinite(found.value).all()


def test_minres_minimises_where_there_is_no_solution():
    a = spectrum(torch.cat([torch.zeros(3), torch.linspace(-4, -1, 15), torch.linspace(1, 5, 15)]).double())
    b = columns(a)
    with pytest.warns(NotConverged, match="least-squares solution"):
        found = minres(lambda x: a @ x, b)
    assert (a @ (b - a @ found.value)).norm() < 1e-6 * b.norm()


def test_cg_refuses_an_indefinite_matrix():
    a = matrices.indefinite()
    with pytest.raises(LinAlgError, match="use minres"):
        cg(lambda x: a @ x, columns(a))
    negative = -matrices.grid()
    with pytest.raises(LinAlgError, match="negative curvature"):
        cg(lambda x: negative @ x, columns(negative))


def test_an_indefinite_preconditioner_is_refused():
    a = matrices.grid()
    for solver in (cg, minres):
        with pytest.raises(LinAlgError, match="preconditioner is not positive definite"):
            solver(lambda x: a @ x, columns(a), preconditioner=lambda x: -x)


def test_reorthogonalisation_saves_iterations():
    a = spectrum(torch.logspace(0, 4, 120, dtype=torch.float64)).float()
    plain, kept = (
        cg(lambda x: a @ x, columns(a), tolerance=1e-3, reorthogonalise=flag, max_iterations=2000)
        for flag in (False, True)
    )
    assert kept.iterations < 0.7 * plain.iterations


@pytest.mark.parametrize("restart", [5, 10])
def test_gmres_restarts(restart):
    a = matrices.convection()
    b = columns(a)
    widths = []

    def product(x):
        widths.append(x.shape)
        return a @ x

    found = gmres(product, b, restart=restart, max_iterations=5000)
    assert found.iterations > restart
    assert residual(a, found.value, b) < 2e-10


def test_gmres_ends_with_the_krylov_space():
    """Three distinct eigenvalues: three steps, then a happy breakdown."""
    a = spectrum(torch.tensor([1.0, 2.0, -3.0]).repeat(10).double())
    found = gmres(lambda x: a @ x, columns(a))
    assert found.iterations == 3 and found.converged


def test_many_shifts_share_one_krylov_space():
    a, shifts = matrices.stretched(), torch.tensor([1e4, 0.0, 0.3, 10.0], dtype=torch.float64)
    b = columns(a)
    calls = []

    def product(x):
        calls.append(1)
        return a @ x

    found = cg_shifted(product, b, shifts)
    alone = cg(lambda x: a @ x, b)
    assert found.value.shape == (4, *b.shape) and found.iterations <= alone.iterations + 1
    assert len(calls) <= found.iterations + 2
    for shift, x in zip(shifts, found.value, strict=True):
        shifted = a + shift * torch.eye(50, dtype=torch.float64)
        torch.testing.assert_close(x, torch.linalg.solve(shifted, b), rtol=1e-7, atol=1e-8)
    with pytest.raises(LinAlgError, match="negative curvature"):
        cg_shifted(lambda x: a @ x, b, torch.tensor([-5.0, 1.0]).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 20, 20), (20, 40, 20), (30, 30, 30), (30, 25, 7), (5, 1, 1)])
@pytest.mark.parametrize("damping", [0.0, 0.8])
def test_lsmr_is_the_pseudo_inverse(m, n, rank, damping, dtype):
    generator = torch.Generator().manual_seed(m)
    u, v = (torch.randn(2, size, rank, dtype=dtype, generator=generator) for size in (m, n))
    a, b = u @ v.mH, torch.randn(2, m, 3, dtype=dtype, generator=generator)
    b[..., 1] = 0
    found = lsmr(lambda x: a @ x, lambda x: a.mH @ x, b, damping=damping, tolerance=1e-13)
    normal = a.mH @ a + damping**2 * torch.eye(n, dtype=dtype)
    exact = torch.linalg.solve(normal, a.mH @ b) if damping else torch.linalg.pinv(a, rtol=1e-10) @ b
    torch.testing.assert_close(found.value, exact, rtol=1e-8, atol=1e-8)


def test_lsmr_says_when_it_has_not_converged():
    a = spectrum(torch.logspace(0, 6, 100, dtype=torch.float64))
    with pytest.warns(NotConverged, match="lsmr stopped after 5"):
        lsmr(lambda x: a @ x, lambda x: a @ x, columns(a), max_iterations=5)
    with pytest.raises(ValueError, match="zero or more"):
        lsmr(lambda x: a @ x, lambda x: a @ x, columns(a), damping=-1.0)
    zero = lsmr(lambda x: 0 * x, lambda x: 0 * x, columns(a))
    assert zero.converged and not zero.value.any()
