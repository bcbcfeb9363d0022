"""Input that has no answer: one clear sentence each, and never a wrong number."""

import math

import pytest
import torch
from algebra.zoo import la, poisson

import einlinear as el

ones, eye = torch.ones, torch.eye
CASES = {
    "not square": (lambda: la.solve(ones(3, 2), ones(3)), "cannot solve with Dense.3×2.: it is 3×2"),
    "no determinant": (lambda: la.logdet(ones(3, 2)), "cannot take the determinant of .* needs a square"),
    "no trace": (lambda: la.trace(ones(3, 2)), "cannot take the trace"),
    "singular": (lambda: la.solve(ones(3, 3), ones(3)), "singular .pivot 2"),
    "singular diagonal": (lambda: la.solve(la.Diagonal(torch.tensor([1.0, 0])), ones(2)), "singular .*1 of 2 is zero"),
    "singular triangle": (lambda: la.inverse(la.Triangular(torch.zeros(2, 2))), "singular"),
    "singular factor": (lambda: la.solve(la.kron(ones(2, 2), eye(2)), ones(4)), "singular"),
    "singular band": (lambda: la.inverse(la.Banded(torch.zeros(1, 30), (1,))), "singular"),
    "singular ring": (lambda: la.inverse(la.Circulant(torch.tensor([2.0, -1, 0, -1]))), "singular"),
    "zero scale": (lambda: la.inverse(0.0 * la.Dense(eye(2))), "singular"),
    "not a number": (lambda: la.solve(torch.full((2, 2), math.nan), ones(2)), "NaN or infinite"),
    "NaN on the right": (lambda: la.solve(eye(2), torch.tensor([1.0, math.nan])), "NaN or infinite"),
    "infinite": (lambda: la.eigvalsh(torch.full((2, 2), math.inf)), "NaN or infinite"),
    "mismatch": (lambda: la.solve(eye(3), ones(4)), r"right-hand side is \(4,\)"),
    "mismatched lstsq": (lambda: la.lstsq(ones(3, 2), ones(4)), r"right-hand side is \(4,\)"),
    "mismatched product": (lambda: la.Dense(eye(3)) @ la.Dense(eye(4)), "the first has 3 columns, the second 4 rows"),
    "mismatched vector": (lambda: la.Dense(eye(3)) @ ones(4), "must be 3"),
    "mismatched sum": (lambda: la.Dense(eye(3)) + eye(4), "cannot add"),
    "mismatched batch": (lambda: la.Dense(ones(3, 2, 2)) @ la.Dense(ones(4, 2, 2)), "do not broadcast"),
    "mismatched block": (lambda: la.block([[eye(2)], [eye(3)]]), "column 0 has parts of widths"),
    "negative determinant": (lambda: la.logdet(torch.diag(torch.tensor([1.0, -2]))), "negative determinant: slogdet"),
    "indefinite": (lambda: la.cholesky(torch.diag(torch.tensor([1.0, -2]))), "not positive definite"),
    "claimed, not so": (
        lambda: la.solve(la.Dense(torch.diag(torch.tensor([1.0, -2]))).claim("psd"), ones(2)),
        "not positive definite",
    ),
    "not Hermitian": (lambda: la.eigh(torch.tensor([[1.0, 2], [3, 4]])), "not Hermitian; use eig"),
    "negative root": (lambda: la.sqrt(la.Diagonal(torch.tensor([1.0, -1]))), "the value is complex"),
    "logarithm of zero": (lambda: la.log(torch.diag(torch.ones(3), 1)), "singular"),
    "no root at all": (lambda: la.sqrt(torch.diag(torch.ones(3, dtype=torch.float64), 1)), "it has none"),
    "unknown property": (lambda: la.Dense(eye(2)).claim("nice"), "the properties are hermitian, psd"),
    "unknown norm": (lambda: la.norm(eye(2), 3), "the norms are"),
    "unknown order": (lambda: la.eigh(eye(2), 1, "XX"), "pass one of LA"),
    "too many": (lambda: la.eigh(eye(2), 3), "cannot find 3 eigenvalues"),
    "no operator": (lambda: la.solve("matrix", ones(2)), "cannot make an operator of a str"),
    "no right-hand side": (lambda: la.solve(eye(2), "b"), "right-hand side is str"),
    "a routed structure": (
        lambda: la.operator(el.Structure.parse("i, e o i -> o", i=2, e=3, o=2).route("e", active=1), [ones(3, 2, 2)]),
        "another matrix for each gate",
    ),
    "wrong factors": (lambda: la.operator(el.BTT()(4, 4), [ones(2, 2)]), "factors"),
    "lstsq of NaN": (lambda: la.lstsq(ones(3, 2), torch.full((3,), math.nan)), "NaN or infinite"),
    "lstsq of no tensor": (lambda: la.lstsq(eye(2), [1.0, 2.0]), "right-hand side is list"),
    "nothing to multiply": (lambda: la.kron(), "pass at least one"),
    "nothing to join": (lambda: la.block_diag(), "pass at least one"),
    "too many singular values": (lambda: la.svd(eye(2), 3), "cannot find 3 singular values"),
    "fewer than none": (lambda: la.svd(eye(2), -1), "cannot find -1 singular values"),
    "half an eigenvalue": (lambda: la.eigh(eye(2), 1.5), "pass a whole number"),
    "complex exponent": (lambda: la.pow(eye(2), 1j), "finite real number"),
    "no function": (lambda: la.apply(eye(2), "cos"), "cannot apply 'cos'"),
    "negative power of zero": (lambda: la.pow(la.Diagonal(torch.tensor([0.0, 1])), -2), "power -2 of a singular"),
    "logarithm of a singular product": (lambda: la.log(la.kron(ones(2, 2), 2 + eye(2))), "log of a singular|-0: "),
    "semi-definite, singular": (lambda: la.solve(la.Zero(3, 3), ones(3)), "cannot invert Zero.3×3.: it is singular"),
    "a number for a diagonal": (lambda: la.Diagonal(torch.tensor(1.0)), "at least 1 dimension"),
    "a vector for a triangle": (lambda: la.Triangular(ones(3)), "at least 2 dimensions"),
    "no permutation": (lambda: la.Permutation(torch.tensor([0, 0, 1])), "must occur once"),
    "out of range": (lambda: la.Sparse(ones(1), torch.tensor([2]), torch.tensor([0]), (2, 2)), "numbered 0 to 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_sentence(case):
    ask, sentence = CASES[case]
    with pytest.raises(el.OperatorError, match=sentence):
        ask()


def test_vectors_and_lists_are_no_matrices():
    with pytest.raises(TypeError):
        la.Dense(eye(2)) @ "x"


def test_too_large_to_write_out(monkeypatch):
    monkeypatch.setattr("einlinear.linalg.direct.MEMORY", 50)
    A = la.Toeplitz(torch.randn(10), torch.randn(10))
    with pytest.raises(el.OperatorError, match=r"too large to write out.*claim 'psd'"):
        la.logdet(A)
    with pytest.raises(el.OperatorError, match="cannot write out"):
        la.lu(A)


def test_nothing_has_the_answers_of_nothing():
    nothing = torch.zeros(0, 0)
    kinds = [
        nothing,
        la.Diagonal(torch.zeros(0)),
        la.Identity(0),
        la.Toeplitz(torch.zeros(0)),
        la.kron(nothing, nothing),
    ]
    for A in [*kinds, la.Circulant(torch.zeros(0)), la.Triangular(nothing), la.kronsum(nothing, nothing)]:
        assert la.logdet(A) == 0 and la.trace(A) == 0 and la.norm(A) == 0
        assert la.solve(A, torch.zeros(0, 2)).shape == (0, 2)
        assert la.eigvals(A).shape == la.svdvals(A).shape == (0,)


def test_nearly_singular_is_said():
    almost = torch.eye(3, dtype=torch.float64)
    almost[2, 2] = 1e-17
    for A in (
        almost,
        la.Diagonal(almost.diagonal()),
        la.kronsum(la.Dense(almost - 1e-17).claim("psd"), torch.zeros(1, 1)),
    ):
        with pytest.warns(UserWarning, match="singular to working precision"):
            la.solve(A, torch.ones(3, dtype=torch.float64))


def test_iterations_say_so(monkeypatch):
    """Past the limit of memory the dispatch goes to products alone: right to a tolerance, and `explain` says it."""
    monkeypatch.setattr("einlinear.linalg.direct.MEMORY", 100)
    X = torch.randn(60, 2, dtype=torch.float64)
    K = la.Kernel(lambda x, z: (-torch.cdist(x, z)).exp(), X).claim("psd") + la.Identity(60, dtype=torch.float64)
    D, b = K.dense(), torch.randn(60, 2, dtype=torch.float64)
    assert "to a tolerance" in el.explain(la.solve, K) and "stochastic" in el.explain(la.logdet, K)
    torch.testing.assert_close(la.solve(K, b), torch.linalg.solve(D, b), atol=1e-6, rtol=1e-6)
    with pytest.warns(UserWarning, match=r"standard error"):
        found = la.logdet(K)
    assert abs(found - torch.logdet(D)) < 0.5 * torch.logdet(D).abs()
    T = la.Toeplitz(torch.randn(60) + 30 * torch.eye(60)[0], torch.randn(60)).to(torch.float64)
    torch.testing.assert_close(T @ la.solve(T, b), b, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(la.inverse(T).H @ b, torch.linalg.solve(T.dense().mH, b), atol=1e-6, rtol=1e-6)
    F = la.exp(K - la.Identity(60, dtype=torch.float64))
    torch.testing.assert_close(F @ b, torch.linalg.matrix_exp(D - torch.eye(60, dtype=torch.float64)) @ b)


def test_explain_reads_as_the_rules():
    text = el.explain(la.solve, la.kron(poisson(3), la.Diagonal(torch.ones(2, dtype=torch.float64))))
    assert "(A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹" in text and "diag(d)⁻¹ = diag(1/d)" in text and "exact" in text
    assert "Woodbury" in el.explain(la.inverse, la.LowRankUpdate(la.Identity(9), torch.ones(9, 1)))
    assert "exp A ⊗ exp B" in el.explain(la.exp, la.kronsum(poisson(3), poisson(4)))
    with pytest.raises(TypeError, match=r"pass a function of einlinear\.linalg"):
        el.explain(test_explain_reads_as_the_rules, eye(2))
