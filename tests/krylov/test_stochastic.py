"""Random estimates: unbiased, with errors as they say; factorisations, preconditioners, sums."""

import pytest
import torch
from krylov import matrices
from krylov.matrices import columns, spectrum

from einlinear.linalg.krylov.cg import cg
from einlinear.linalg.preconditioners import Jacobi, low_rank_plus, nystrom, pivoted_cholesky
from einlinear.linalg.result import LinAlgError, NotConverged
from einlinear.linalg.stochastic.factors import randomised_svd
from einlinear.linalg.stochastic.svrg import svrg
from einlinear.linalg.stochastic.traces import diagonal, hutch_plus_plus, hutchinson, xtrace
from einlinear.linalg.stochastic.truncation import Truncation, truncated_cg, truncated_trace

DECAY = torch.logspace(-3, 2, 60, dtype=torch.float64)
TRACES = pytest.mark.parametrize("estimate", [hutchinson, hutch_plus_plus, xtrace], ids=lambda f: f.__name__)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@TRACES
def test_traces_are_unbiased_with_the_error_they_state(estimate):
    a, random = spectrum(DECAY), generator()
    runs = [estimate(lambda x: a @ x, a.shape, 20, dtype=a.dtype, generator=random) for _ in range(150)]
    values = torch.stack([run.value for run in runs])
    claimed = torch.stack([run.standard_error for run in runs]).square().mean().sqrt()
    spread = values.std()
    assert (values.mean() - a.trace()).abs() < 3.5 * spread / 150**0.5
    assert 0.8 < spread / claimed < (1.8 if estimate is xtrace else 1.25)


def test_better_estimators_are_better():
    a, errors = spectrum(torch.logspace(-6, 2, 80, dtype=torch.float64)), []
    for estimate in (hutchinson, hutch_plus_plus, xtrace):
        random = generator(1)
        runs = [estimate(lambda x: a @ x, a.shape, 30, dtype=a.dtype, generator=random).value for _ in range(20)]
        errors.append(float((torch.stack(runs) - a.trace()).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] and errors[1] > 1.5 * errors[2]


@TRACES
def test_traces_of_low_rank_complex_batches(estimate):
    u = torch.randn(2, 50, 4, dtype=torch.complex128, generator=generator())
    v = torch.randn(2, 50, 4, dtype=torch.complex128, generator=generator(1))
    a = u @ v.mH
    found = estimate(lambda x: a @ x, a.shape, 30, dtype=a.dtype, generator=generator(2))
    exact = a.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((found.value - exact).abs() <= 4 * found.standard_error + 1e-10).all()
    if estimate is not hutchinson:
        torch.testing.assert_close(found.value, exact)


def test_diagonals_lie_within_their_errors():
    a = spectrum(DECAY, batch=(2,))
    for deflate in (False, True):
        found = diagonal(lambda x: a @ x, a.shape, 60, deflate=deflate, dtype=a.dtype, generator=generator())
        z = (found.value - a.diagonal(dim1=-2, dim2=-1)) / found.standard_error
        assert z.abs().max() < 5 and 0.7 < z.std() < 1.4


@TRACES
def test_traces_of_what_has_none(estimate):
    with pytest.raises(ValueError, match="square"):
        estimate(lambda x: x, (3, 4))
    with pytest.raises(ValueError, match="or more"):
        estimate(lambda x: x, (4, 4), 0)
    with pytest.raises(LinAlgError, match="NaN"):
        estimate(lambda x: x.clone().fill_(2.0) / 0 - x / 0, (9, 9), 12) if estimate is hutchinson else hutchinson(
            lambda x: x * torch.nan, (9, 9)
        )


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (2, 30, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_truncated_singular_values(shape, dtype):
    *batch, m, n = shape
    u, _ = torch.linalg.qr(torch.randn((*batch, m, 20), dtype=dtype, generator=generator()))
    v, _ = torch.linalg.qr(torch.randn((*batch, n, 20), dtype=dtype, generator=generator(1)))
    s = torch.logspace(1, -3, 20, dtype=torch.float64)
    a = (u * s.to(dtype)) @ v.mH
    found = randomised_svd(lambda x: a @ x, lambda x: a.mH @ x, shape, 5, tolerance=1e-9, dtype=dtype)
    factors = found.value
    torch.testing.assert_close(factors.s, s[:5].expand(factors.s.shape), rtol=1e-9, atol=0)
    best = (u[..., :5] * s[:5].to(dtype)) @ v[..., :5].mH
    torch.testing.assert_close((factors.u * factors.s.unsqueeze(-2)) @ factors.vh, best, rtol=0, atol=1e-6)
    assert found.residual.max() < 1e-9
    with pytest.raises(ValueError, match="from 1 to"):
        randomised_svd(lambda x: a @ x, lambda x: a.mH @ x, shape, 0, dtype=dtype)
    with pytest.warns(NotConverged):
        randomised_svd(
            lambda x: a @ x, lambda x: a.mH @ x, shape, 5, oversample=0, tolerance=1e-15, max_powers=2, dtype=dtype
        )


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("mean", [20, 10])
def test_random_stops_leave_no_bias(mean, single):
    """Each of 4000 draws has its own stop (20000: benchmarks/krylov.py); CG stopped at the mean is biased."""
    a = spectrum(torch.logspace(0, 2, 60, dtype=torch.float64))
    b = columns(a)[:, :1]
    exact = (b * torch.linalg.solve(a, b)).sum()
    draws = b.expand(60, 4_000).contiguous()
    truncation = Truncation(mean, first=5, single=single)
    found = truncated_cg(lambda x: a @ x, draws, truncation, generator=generator(3))
    forms = (draws * found.value).sum(0)
    z = (forms.mean() - exact) / (forms.std() / 4_000**0.5)
    assert z.abs() < 3
    with pytest.warns(NotConverged):
        stopped = cg(lambda x: a @ x, b, max_iterations=mean).value
    assert ((b * stopped).sum() - exact) / exact < (-1e-4 if mean == 20 else -1e-2)
    assert abs(float(truncation.draw((100_000,), torch.device("cpu"), generator()).double().mean()) - mean) < 0.2


@pytest.mark.parametrize("single", [False, True])
def test_random_stops_leave_no_bias_in_log_determinants(single):
    a = spectrum(torch.logspace(0, 2, 40, dtype=torch.float64))
    probe = 2.0 * torch.randint(0, 2, (40, 800), generator=generator()).double() - 1
    truncation = Truncation(8, first=3, single=single)
    found = truncated_trace(lambda x: a @ x, probe, torch.log, truncation, generator=generator(1))
    assert (found.value - torch.logdet(a)).abs() < 3 * found.standard_error
    assert found.standard_error < 0.05 * torch.logdet(a)


def test_truncations_that_make_no_sense():
    with pytest.raises(ValueError, match="first < mean"):
        Truncation(3, first=3)
    a = matrices.indefinite()
    with pytest.raises(LinAlgError, match="not positive definite"):
        truncated_cg(lambda x: a @ x, columns(a), Truncation(50), generator=generator())


def test_sums_are_solved_term_by_term():
    terms = [spectrum(torch.linspace(0.5, 2, 20).double(), seed=seed) for seed in range(6)]
    a = torch.stack(terms).sum(0)
    b = columns(a)
    products = [lambda x, term=term: term @ x for term in terms]
    found = svrg(products, b, generator=generator())
    assert found.converged and found.residual.max() < 1.1e-10
    torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-9)
    with pytest.raises(LinAlgError, match="diverges with step"):
        svrg(products, b, step=10.0, generator=generator())
    with pytest.warns(NotConverged):
        svrg(products, b, max_epochs=1, generator=generator())
    with pytest.raises(ValueError, match="one term"):
        svrg([], b)


def test_nystrom_preconditions_and_adapts():
    a = spectrum(torch.logspace(3, -6, 200, dtype=torch.float64), batch=(2,))
    shift = 1e-2
    system = a + shift * torch.eye(200, dtype=torch.float64)
    inverse = nystrom(lambda x: a @ x, a.shape, shift, max_rank=150, dtype=a.dtype, generator=generator())
    plain, better = (cg(lambda x: system @ x, columns(a), preconditioner=each) for each in (None, inverse))
    assert better.iterations < plain.iterations / 5
    small = nystrom(lambda x: a @ x, a.shape, 100.0, dtype=a.dtype, generator=generator())
    assert small.rank < inverse.rank
    whole = nystrom(lambda x: a @ x, a.shape, shift, rank=200, dtype=a.dtype, generator=generator())
    torch.testing.assert_close(whole.logdet, torch.logdet(system), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(whole(columns(a)), torch.linalg.solve(system, columns(a)), rtol=1e-7, atol=1e-7)
    with pytest.raises(LinAlgError, match="semidefinite"):
        nystrom(lambda x: -a @ x, a.shape, shift, dtype=a.dtype)
    with pytest.raises(ValueError, match="positive shift"):
        nystrom(lambda x: a @ x, a.shape, 0.0, dtype=a.dtype)


def test_pivoted_cholesky_is_exact_at_the_rank_and_preconditions():
    x = torch.linspace(0, 1, 150, dtype=torch.float64)
    kernel = torch.exp(-((x[:, None] - x) ** 2) / 0.02)
    both = torch.stack([kernel, kernel**3])
    asked = []

    def row(i):
        asked.append(i)
        return both[torch.arange(2), i]

    factor = pivoted_cholesky(both.diagonal(dim1=-2, dim2=-1), row, 40, tolerance=1e-10)
    assert factor.shape[-1] == len(asked) <= 40
    torch.testing.assert_close(factor @ factor.mT, both, rtol=0, atol=1e-6)
    system = both + 1e-3 * torch.eye(150, dtype=torch.float64)
    inverse = low_rank_plus(pivoted_cholesky(both.diagonal(dim1=-2, dim2=-1), row, 15), 1e-3)
    plain, better = (cg(lambda v: system @ v, columns(both), preconditioner=each) for each in (None, inverse))
    assert better.iterations < plain.iterations / 2
    u = torch.randn(20, 3, dtype=torch.complex128, generator=generator())
    low = u @ u.mH
    exact = pivoted_cholesky(low.diagonal().real, lambda i: low[i], 10, tolerance=1e-13)
    assert exact.shape[-1] == 3
    torch.testing.assert_close(exact @ exact.mH, low)
    with pytest.raises(LinAlgError, match="semidefinite"):
        pivoted_cholesky(-torch.ones(3), lambda i: torch.ones(3), 2)


def test_jacobi_needs_a_positive_diagonal():
    assert (Jacobi(torch.full((3,), 2.0))(torch.ones(3, 1)) == 0.5).all()
    with pytest.raises(ValueError, match="positive diagonal"):
        Jacobi(torch.tensor([1.0, 0.0]))
