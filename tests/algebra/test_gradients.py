"""Derivatives, first and second, with respect to every leaf and to the right-hand side."""

import warnings

import pytest
import torch
from algebra.zoo import Draw, conjugated, la, make, poisson
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

NAMES = [
    "dense", "diagonal", "lower", "Kronecker", "Kronecker sum", "Kronecker and unit",
    "block-diagonal", "direct sum", "block to eliminate", "Toeplitz", "Hermitian Toeplitz", "circulant", "long band",
    "reflections", "diagonal and low rank", "low rank with a core", "square sparse", "BTT", "Monarch", "product",
    "negative multiple", "kernel of one set",
]  # fmt: skip


def definite(A):
    return A @ A.H + la.Identity(A.shape[-1], dtype=A.dtype)


QUESTIONS = {
    "product": lambda A, b: A @ b,
    "solve": la.solve,
    "adjoint of the inverse": lambda A, b: la.inverse(A).H @ b,
    "logdet": lambda A, b: la.slogdet(A)[1],
    "logdet of a definite": lambda A, b: la.logdet(definite(A)).real,
    "root of a definite": lambda A, b: la.sqrt(definite(A)) @ b,
    "trace": lambda A, b: la.trace(A),
    "trace of exp": lambda A, b: la.trace(la.exp(A)),
    "diagonal": lambda A, b: la.diagonal(A),
    "norm": lambda A, b: la.norm(A),
    "eigenvalues": lambda A, b: la.eigvalsh(A) if "hermitian" in A.properties else la.trace(A),
    "pseudo-inverse": lambda A, b: la.pinv(A) @ b,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ask", QUESTIONS)
def test_derivatives(ask, name):
    dtypes = (
        [torch.float64, torch.complex128]
        if name in ("Kronecker", "Hermitian Toeplitz", "long band")
        else [torch.float64]
    )
    if name == "reflections" and ask == "root of a definite":
        pytest.skip("all eigenvalues coincide there, and a second derivative through them is not known")
    for dtype in dtypes:
        A = make(name, dtype)
        b = torch.randn(A.shape[-1], 2, dtype=dtype, requires_grad=True)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in A.tensors]

        def answer(b, *leaves, A=A):
            return QUESTIONS[ask](A.with_tensors(*leaves), b)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if answer(b, *leaves).requires_grad:
                assert gradcheck(answer, (b, *leaves), fast_mode=True, atol=1e-4, rtol=1e-3)
                assert gradgradcheck(answer, (b, *leaves), fast_mode=True, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("ask", QUESTIONS)
def test_derivatives_of_a_hermitian_sum(ask):
    """With its terms made of free leaves: a claim is not to be broken by a perturbation."""
    r = Draw(torch.float64)

    def answer(b, *leaves):
        return QUESTIONS[ask](la.kronsum(*(la.Dense(a @ a.mH).claim("psd") for a in leaves)), b)

    inputs = [tensor.requires_grad_() for tensor in (r(6, 1), r(3, 3), r(2, 2))]
    assert gradcheck(answer, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)
    assert gradgradcheck(answer, inputs, fast_mode=True, atol=1e-3, rtol=1e-2)


def test_equal_eigenvalues_have_finite_gradients():
    """The 2-D Laplacian's eigenvalues come in pairs; a gradient through eigenvectors would be NaN."""
    one = torch.eye(3, dtype=torch.float64).requires_grad_()
    A = la.kronsum(la.Dense(one).claim("psd"), la.Dense(one).claim("psd"))
    for value in (la.solve(A, torch.ones(9, dtype=torch.float64)).sum(), la.logdet(A), la.trace(la.sqrt(A))):
        (gradient,) = torch.autograd.grad(value, one)
        assert bool(gradient.isfinite().all())
    root = torch.autograd.grad(la.trace(la.sqrt(la.Dense(one).claim("psd"))), one)[0]
    assert_close(root, torch.eye(3, dtype=torch.float64) / 2)


def test_a_scale_that_cancels_has_no_gradient():
    """d/dθ c′(θS)⁻¹(θb) = 0, where one library answers 0.47."""
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    r = Draw(torch.float64)
    for S in (la.Dense(r(4, 4)), la.kronsum(poisson(2), poisson(2)), la.Toeplitz(r(4), r(4))):
        value = r(4) @ la.solve(scale * S, scale * r(4))
        assert_close(torch.autograd.grad(value, scale)[0], torch.zeros_like(scale), atol=1e-10, rtol=0)


def test_large_factorisations_are_differentiable(monkeypatch):
    """Levinson's recursion and SuperLU, which small operators do not reach."""
    monkeypatch.setattr("einlinear.linalg.rules.banded.SMALL", 4)
    r = Draw(torch.float64)
    column = 0.1 * r(12) + 3 * torch.eye(12, dtype=torch.float64)[0]
    rows, columns = (torch.cat([torch.arange(12), torch.randint(0, 12, (20,))]) for _ in range(2))
    values = torch.cat([5 + r(12), r(20)])
    for A in (la.Toeplitz(column).claim("psd"), la.Sparse(values, rows, columns, (12, 12))):
        b = r(12, 1).requires_grad_()
        leaves = [tensor.clone().requires_grad_() for tensor in A.tensors]
        for ask in (la.solve, lambda A, b: la.slogdet(A)[1]):

            def answer(b, *leaves, A=A, ask=ask):
                return ask(A.with_tensors(*leaves), b)

            assert gradcheck(answer, (b, *leaves), fast_mode=True)
            assert gradgradcheck(answer, (b, *leaves), fast_mode=True)


def test_vmap_and_forward_mode():
    r = Draw(torch.float64, (3,))
    factors, b = (r(2, 2), r(3, 3)), r(6, 1)

    def solve(b, *factors):
        return la.solve(la.kron(*factors), b)

    wanted = torch.stack([solve(b[k], *(f[k] for f in factors)) for k in range(3)])
    assert_close(torch.func.vmap(solve)(b, *factors), wanted)
    assert_close(solve(b, *factors), wanted)
    slope = torch.func.vmap(torch.func.grad(lambda a, b, c: la.slogdet(la.kronsum(a @ a.mT, b @ b.mT))[1]))(*factors, b)
    assert slope.shape == factors[0].shape
    forward = torch.func.jvp(lambda f: solve(b[0], f, factors[1][0]), (factors[0][0],), (r(2, 2)[0],))[1]
    assert bool(forward.isfinite().all())


def test_a_product_conjugated_by_a_rotation_is_differentiated_as_such():
    r = Draw(torch.float64)
    vectors, values = r(4, 1).requires_grad_(), r(4).abs().requires_grad_()
    A = conjugated(la.Householder(vectors), la.Diagonal(values))
    gradient = torch.autograd.grad(la.logdet(A), (vectors, values), allow_unused=True)
    assert_close(gradient[1], 1 / values.detach())
