"""Gradients by A and b, first and second, through every iterative path: against differences and dense autograd."""

import pytest
import torch
from krylov.matrices import spectrum
from torch.autograd import gradcheck, gradgradcheck

from einlinear import linalg as la
from einlinear.linalg import implicit, spectral
from einlinear.linalg.krylov.bicgstab import bicgstab
from einlinear.linalg.krylov.cg import cg
from einlinear.linalg.krylov.eigen import eigenpairs
from einlinear.linalg.krylov.functions import apply_function
from einlinear.linalg.krylov.gmres import gmres
from einlinear.linalg.krylov.lobpcg import lobpcg
from einlinear.linalg.krylov.lsmr import lsmr
from einlinear.linalg.krylov.minres import minres
from einlinear.linalg.result import LinAlgError
from einlinear.linalg.stochastic.slq import slq

EXACT = {"tolerance": 1e-14}
pytestmark = pytest.mark.filterwarnings(
    "ignore::einlinear.linalg.result.NotConverged"
)  # 1e-14 is asked, rounding allows


class Matrix:
    """A dense operator: the least that a gradient needs."""

    def __init__(self, entries):
        self.tensors, self.shape = (entries,), entries.shape

    @property
    def H(self):
        return Matrix(self.tensors[0].mH)

    def matmul(self, x):
        return self.tensors[0] @ x

    def with_tensors(self, *tensors):
        return Matrix(*tensors)


class Scattered(Matrix):
    """A sparse matrix 4 x 4 with an entry on the diagonal and one beside it, differentiable by its values."""

    def __init__(self, values, transposed=False):
        self.tensors, self.transposed, self.shape = (values,), transposed, torch.Size((4, 4))

    @property
    def H(self):
        return Scattered(self.tensors[0].conj(), not self.transposed)

    def matmul(self, x):
        row = torch.tensor([3, 0, 1, 2, 0, 1, 2, 3])
        column = torch.tensor([3, 0, 1, 2, 2, 3, 1, 0])
        if self.transposed:
            row, column = column, row
        return torch.zeros_like(x).index_add(-2, row, self.tensors[0].unsqueeze(-1) * x.index_select(-2, column))

    def with_tensors(self, *tensors):
        return Scattered(*tensors, transposed=self.transposed)


def solver(method, **options):
    return lambda operator, b: method(operator.matmul, b, **EXACT, **options).value


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def definite(a):
    return a @ a.mH / 3 + torch.eye(a.shape[-1], dtype=a.dtype)


def run(operator, b, function):
    return apply_function(operator.matmul, b, function, tolerance=1e-13).value


def unit(n, dtype=torch.float64):
    """Probes that reach every direction: estimates by them are exact."""
    return torch.eye(n, dtype=dtype) * n**0.5


def lsmr_solver(operator, b):
    return lsmr(operator.matmul, operator.H.matmul, b, tolerance=1e-15).value


def logdet_of(a, hermitian=True):
    operator, n = Matrix(a), a.shape[-1]
    found = slq(operator.matmul, a.shape, torch.log, probe=unit(n, a.dtype), hermitian=hermitian, max_iterations=n)
    return implicit.logdet(found.value.real, operator, unit(n, a.dtype), solver(cg if hermitian else gmres))


def pairs_of(a, find):
    a = (a + a.mH) / 2
    values, vectors = find(Matrix(a).matmul, a.shape, 2, dtype=a.dtype, tolerance=1e-12).value
    values, vectors = spectral.eigenpairs(Matrix(a), values, vectors, solver(minres))
    return values, vectors.abs().square()


def trace_of(a, function):
    operator, n = Matrix(a), a.shape[-1]
    found = slq(operator.matmul, a.shape, function, probe=unit(n, a.dtype), max_iterations=n)
    return spectral.trace_function(found.value, operator, unit(n, a.dtype), function, run)


def likelihood(a, b):
    probe = unit(a.shape[-1], a.dtype)
    value = torch.linalg.slogdet(a)[1].detach()
    return sum(part.sum() for part in implicit.quadratic_and_logdet(value, Matrix(a), b, probe, solver(cg)))


def dense_function(a, function):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * function(values).unsqueeze(-2)) @ vectors.mH


# name: what this module computes, what dense autograd computes, its arguments.
A, B, COMPLEX = draw(4, 4), draw(4, 2, seed=1), draw(3, 3, dtype=torch.complex128)
GENERAL = (draw(4, 4) + 4 * torch.eye(4)).detach().requires_grad_()
BATCH, TALL, WIDE = draw(2, 3, 3), draw(5, 3), draw(3, 5)
VALUES = (draw(8) / 4 + torch.tensor([3.0] * 4 + [0.0] * 4)).detach().requires_grad_()
COMPLEX_B = draw(3, 2, dtype=torch.complex128)
CASES = {
    "cg": (
        lambda a, b: implicit.solve(Matrix(definite(a)), b, solver(cg)),
        lambda a, b: torch.linalg.solve(definite(a), b),
        (A, B),
    ),
    "cg-batched": (
        lambda a, b: implicit.solve(Matrix(definite(a)), b, solver(cg)),
        lambda a, b: torch.linalg.solve(definite(a), b),
        (BATCH, draw(3, 2)),
    ),
    "cg-complex": (
        lambda a, b: implicit.solve(Matrix(definite(a)), b, solver(cg)),
        lambda a, b: torch.linalg.solve(definite(a), b),
        (COMPLEX, COMPLEX_B),
    ),
    "minres": (
        lambda a, b: implicit.solve(Matrix(a + a.mH), b, solver(minres)),
        lambda a, b: torch.linalg.solve(a + a.mH, b),
        (A, B),
    ),
    "gmres": (lambda a, b: implicit.solve(Matrix(a), b, solver(gmres)), torch.linalg.solve, (GENERAL, B)),
    "gmres-complex": (
        lambda a, b: implicit.solve(Matrix(a), b, solver(gmres)),
        torch.linalg.solve,
        (COMPLEX, COMPLEX_B),
    ),
    "bicgstab": (lambda a, b: implicit.solve(Matrix(a), b, solver(bicgstab)), torch.linalg.solve, (GENERAL, B)),
    "sparse": (
        lambda v, b: implicit.solve(Scattered(v), b, solver(gmres)),
        lambda v, b: torch.linalg.solve(Scattered(v).matmul(torch.eye(4, dtype=v.dtype)), b),
        (VALUES, B),
    ),
    "lsmr-tall": (
        lambda a, b: implicit.least_squares(Matrix(a), b, lsmr_solver),
        lambda a, b: torch.linalg.pinv(a) @ b,
        (TALL, draw(5, 2)),
    ),
    "lsmr-wide": (
        lambda a, b: implicit.least_squares(Matrix(a), b, lsmr_solver),
        lambda a, b: torch.linalg.pinv(a) @ b,
        (WIDE, draw(3, 2)),
    ),
    "logdet-lanczos": (lambda a: logdet_of(definite(a)), lambda a: torch.linalg.slogdet(definite(a))[1], (A,)),
    "logdet-complex": (lambda a: logdet_of(definite(a)), lambda a: torch.linalg.slogdet(definite(a))[1], (COMPLEX,)),
    "logdet-arnoldi": (lambda a: logdet_of(a, False), lambda a: torch.linalg.slogdet(a)[1], (GENERAL,)),
    "trace-exp": (
        lambda a: trace_of(definite(a), torch.exp),
        lambda a: torch.linalg.matrix_exp(definite(a)).trace(),
        (A,),
    ),
    "trace-sqrt": (
        lambda a: trace_of(definite(a), torch.sqrt),
        lambda a: torch.linalg.eigvalsh(definite(a)).sqrt().sum(-1),
        (BATCH,),
    ),
    "function": (
        lambda a, b: spectral.apply_function(Matrix(definite(a)), b, torch.log, run),
        lambda a, b: dense_function(definite(a), torch.log) @ b,
        (A, B),
    ),
    "function-complex": (
        lambda a, b: spectral.apply_function(Matrix(definite(a)), b, torch.exp, run),
        lambda a, b: torch.linalg.matrix_exp(definite(a)) @ b,
        (COMPLEX, COMPLEX_B),
    ),
    "eigenvalues-lanczos": (
        lambda a: pairs_of(a, eigenpairs)[0],
        lambda a: torch.linalg.eigvalsh((a + a.mH) / 2).flip(-1)[..., :2],
        (A,),
    ),
    "eigenvectors-lanczos": (
        lambda a: pairs_of(a, eigenpairs)[1],
        lambda a: torch.linalg.eigh((a + a.mH) / 2)[1].flip(-1)[..., :2].abs().square(),
        (COMPLEX,),
    ),
    "eigenvalues-lobpcg": (
        lambda a: pairs_of(a, lobpcg)[0],
        lambda a: torch.linalg.eigvalsh((a + a.mH) / 2).flip(-1)[..., :2],
        (BATCH,),
    ),
    "quadratic": (
        lambda a, b: implicit.quadratic(Matrix(definite(a)), b, solver(cg)),
        lambda a, b: (b.conj() * torch.linalg.solve(definite(a), b)).sum(-2).real,
        (COMPLEX, COMPLEX_B),
    ),
    "likelihood": (
        lambda a, b: likelihood(definite(a), b),
        lambda a, b: (b * torch.linalg.solve(definite(a), b)).sum() + torch.linalg.slogdet(definite(a))[1].sum(),
        (A, B),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_dense_autograd(name):
    ours, dense, arguments = CASES[name]
    value, exact = ours(*arguments), dense(*arguments)
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-10)
    weight = draw(*value.shape, dtype=value.dtype, seed=7).detach()
    found = torch.autograd.grad((value * weight).sum().real, arguments)
    wanted = torch.autograd.grad((exact * weight).sum().real, arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_are_those_of_differences(name):
    ours, _, arguments = CASES[name]
    assert gradcheck(ours, arguments, fast_mode=True)
    assert gradgradcheck(ours, arguments, fast_mode=True)


def test_scaling_matrix_and_right_hand_side_alike_changes_nothing():
    """d/dt c' (t S)^-1 (t b) = 0, which a gradient that forgets b does not see."""
    s, b, t = definite(A.detach()), B.detach(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x = implicit.solve(Matrix(t * s), t * b, solver(cg))
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize("name", ["cg", "gmres", "lsmr-tall", "logdet-lanczos", "likelihood"])
def test_under_vmap_and_grad(name):
    """The batch is drawn anew; value and gradient of each element are those of a loop."""
    if name in ("logdet-lanczos", "likelihood"):  # their values come from outside; the gradient is what is mapped
        batch = definite(draw(3, 4, 4).detach())
        probe = unit(4)

        def ours(a):
            return implicit.logdet(torch.zeros((), dtype=a.dtype), Matrix(a), probe, solver(cg))

        found = torch.vmap(torch.func.grad(ours))(batch)
        torch.testing.assert_close(found, torch.linalg.inv(batch).mT, rtol=1e-9, atol=1e-10)
        return
    ours, dense, (a, b) = CASES[name]
    batch = a.detach() + 0.1 * draw(3, *a.shape).detach()
    for arguments, dims in [((batch, b.detach()), (0, None)), ((a.detach(), b.detach() + batch.sum()), (None, None))]:
        if dims == (None, None):
            arguments, dims = (a.detach(), draw(3, *b.shape).detach()), (None, 0)
        found = torch.vmap(ours, dims)(*arguments)
        torch.testing.assert_close(found, torch.vmap(dense, dims)(*arguments), rtol=1e-8, atol=1e-9)
        slopes = [torch.func.grad(lambda a, b, f=f: f(a, b).square().sum(), (0, 1)) for f in (ours, dense)]
        found, wanted = (torch.vmap(slope, dims)(*arguments) for slope in slopes)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_eigenvalues_that_are_not_hermitian_have_first_derivatives():
    a = draw(6, 6)

    def pairs(matrix):
        found = eigenpairs(lambda x: matrix @ x, (6, 6), 1, hermitian=False, dtype=matrix.dtype)
        return found.value

    right = pairs(a.detach())
    left = pairs(a.detach().mT)
    y = left.vectors.conj() if (left.values - right.values).abs() < 1e-9 else left.vectors
    values = spectral.eigenvalues(Matrix(a.to(torch.complex128)), right.values, right.vectors, y)
    exact = torch.linalg.eigvals(a)
    exact = exact[(exact - right.values).abs().argmin()]
    (found,) = torch.autograd.grad(values.abs().sum(), a, create_graph=True)
    (wanted,) = torch.autograd.grad(exact.abs(), a)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    with pytest.raises(LinAlgError, match="second derivatives"):
        torch.autograd.grad(found.sum(), a)


def test_repeated_eigenvalues_give_finite_gradients():
    a = torch.diag(torch.tensor([3.0, 3.0, 3.0, 1.0, 0.0])).double().requires_grad_()
    values, vectors = torch.linalg.eigh(a.detach())
    values, vectors = spectral.eigenpairs(Matrix(a), values[2:], vectors[:, 2:], solver(minres))
    projector = vectors @ vectors.mT
    weighted = (projector * draw(5, 5).detach()).sum()
    (outer,) = torch.autograd.grad(weighted, a, retain_graph=True)
    (found,) = torch.autograd.grad(values.sum() + weighted, a)
    assert torch.isfinite(found).all()
    # The trace of the projected A: what does not depend on the choice of vectors has its true gradient.
    torch.testing.assert_close(found - outer, projector.detach(), rtol=1e-9, atol=1e-9)


def saved_bytes(compute):
    """What autograd keeps for the backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        value = compute()
    return sum(kept), value


@pytest.mark.parametrize("what", ["solve", "logdet"])
def test_memory_does_not_grow_with_the_iterations(what):
    kept, steps = [], []
    for kappa in (2.0, 1e4):
        a = spectrum(torch.logspace(0, torch.tensor(kappa).log10(), 200, dtype=torch.float64)).requires_grad_()
        counted = []

        def count(operator, b, counted=counted):
            found = cg(operator.matmul, b, tolerance=1e-8)
            counted.append(found.iterations)
            return found.value

        b = draw(200, 1)
        if what == "solve":
            size, value = saved_bytes(lambda: implicit.solve(Matrix(a), b, count).sum())  # noqa: B023
        else:
            size, value = saved_bytes(
                lambda: implicit.logdet(torch.zeros((), dtype=a.dtype), Matrix(a), b.detach(), count)  # noqa: B023
            )
        value.backward()
        kept.append(size)
        steps.append(counted[0])
    assert steps[1] > 5 * steps[0]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_inverse_of_a_low_rank_update_knows_its_determinant(dtype):
    u = draw(2, 12, 3, dtype=dtype)
    d = (torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5).requires_grad_()
    a = la.LowRankUpdate(la.Diagonal(d.to(dtype)).claim("psd"), u)
    inverse = la.inverse(a)
    written = torch.linalg.inv(u @ u.mH + d.to(dtype).diag())
    torch.testing.assert_close(inverse.dense(), written)
    determinant = la.slogdet(inverse)
    exact = torch.linalg.slogdet(written)
    torch.testing.assert_close(determinant.logabsdet if hasattr(determinant, "logabsdet") else determinant[1], exact[1])
    torch.testing.assert_close(determinant[0], exact[0])
    found = torch.autograd.grad(determinant[1].sum(), (u, d), retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(exact[1].sum(), (u, d)), strict=True):
        torch.testing.assert_close(one, other)
