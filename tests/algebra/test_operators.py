"""An operator is its matrix: products, transposes, leaves, properties, torch.compile and torch.func."""

import pytest
import torch
from algebra.zoo import NAMES, Draw, gaussian, la, make, poisson
from torch.testing import assert_close

import einlinear as el
from einlinear.operator import refute

CASES = [(torch.float64, ()), (torch.complex128, (2,)), (torch.float32, (2, 1)), (torch.complex128, ())]


@pytest.mark.parametrize("name", NAMES)
def test_is_its_matrix(name):
    for dtype, batch in CASES:
        if (A := make(name, dtype, batch)) is None:
            continue
        matrix = A.dense()
        assert matrix.shape == A.shape == A.matmul(torch.eye(A.shape[-1], dtype=dtype)).expand(A.shape).shape
        m, n = A.shape[-2:]
        x, y = torch.randn(*batch, n, 3, dtype=dtype), torch.randn(m, 3, dtype=dtype)
        close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-10, "rtol": 1e-10}
        assert_close(A @ x, matrix @ x, **close)
        assert_close(A @ x.flatten()[:n], matrix @ x.flatten()[:n], **close)
        assert_close(y.mT @ A, y.mT @ matrix, **close)
        assert_close(A.T.dense(), matrix.mT, **close)
        assert_close(A.H.dense(), matrix.mH, **close)
        assert_close(A.rmatmul(y), matrix.mT @ y, **close)
        assert_close(A.H.matmul(y), matrix.mH @ y, **close)
        assert torch.equal(A.with_tensors(*A.tensors).dense(), matrix)
        assert repr(A)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_holds(name):
    for dtype, batch in CASES[:2]:
        if (A := make(name, dtype, batch)) is not None:
            for known in A.properties:
                refute(A, known)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("Jacobian", "Hessian", "Gauss-Newton", "Fisher")]
)
def test_products_compile_whole(name):
    A = make(name, torch.float64)
    if A is not None:
        torch._dynamo.reset()
        x = torch.randn(A.shape[-1], 3, dtype=A.dtype)
        assert_close(torch.compile(A.matmul, fullgraph=True, backend="eager")(x), A.dense() @ x)


def test_the_operator_sign_compiles_where_shapes_tell():
    A, x = la.kron(torch.randn(3, 3), torch.randn(2, 2)), torch.randn(6, 4)
    assert_close(torch.compile(lambda x: A @ x, fullgraph=True, backend="eager")(x), A @ x)
    assert_close(torch.compile(lambda x: x.mT @ A, fullgraph=True, backend="eager")(x), x.mT @ A)


@pytest.mark.parametrize("name", ["Kronecker", "diagonal", "Toeplitz", "banded", "sparse, shuffled, with duplicates"])
def test_vmap_over_leaves(name):
    A = make(name, torch.float64)
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in A.tensors]
    x = torch.randn(2, A.shape[-1], 1, dtype=torch.float64)
    found = torch.func.vmap(lambda x, *tensors: A.with_tensors(*tensors) @ x)(x, *stacked)
    wanted = [A.with_tensors(*(tensor[k] for tensor in stacked)) @ x[k] for k in range(2)]
    assert_close(found, torch.stack(wanted))


def test_arithmetic_is_that_of_matrices():
    r = Draw(torch.float64)
    a, b = r(4, 4), r(4, 4)
    A, B, c = la.Dense(a), la.Diagonal(b.diagonal()), torch.tensor(2.0, dtype=torch.float64)
    d = torch.diag(b.diagonal())
    pairs = [(A + B, a + d), (A - B, a - d), (b + A, b + a), (b - A, b - a), (-A, -a), (A + b, a + b)]
    pairs += [(2 * A, 2 * a), (A * c, 2 * a), (c * A, 2 * a), (A / 4, a / 4), (A @ B, a @ d), (1j * A, 1j * a)]
    for found, wanted in pairs:
        assert_close(found.dense(), wanted)


def test_real_and_complex_mix():
    A, x = la.kron(torch.randn(2, 2), torch.randn(2, 2)), torch.randn(4, 1, dtype=torch.complex64)
    assert_close(A @ x, A.dense().to(x.dtype) @ x)
    assert_close((la.Fourier(4) @ A).dense(), la.Fourier(4).dense() @ A.dense().to(torch.complex64))
    assert A.to(torch.float64).dtype == torch.float64
    assert (la.Fourier(4) @ A).to(torch.float64).dtype == torch.complex128


@pytest.mark.parametrize("name", [name for name in NAMES if "sparse" not in name])
def test_everything_within_moves(name):
    """To another dtype, units and permutations too; to another device, indices too."""
    if (A := make(name, torch.float64)) is not None:
        assert A.to(torch.float32).dtype == torch.float32
        x = torch.randn(A.shape[-1], 2, dtype=A.dtype)
        assert_close(A.to(torch.float32).matmul(x.float()), (A.dense() @ x).float(), atol=1e-4, rtol=1e-4)
        assert A.to("meta").matmul(x.to("meta")).device.type == "meta"


def test_compositions_are_flat_and_read_as_written():
    A, B = la.Dense(torch.eye(2)), la.Diagonal(torch.ones(2))
    assert repr(A @ B @ A) == "Dense(2×2) @ Diagonal(2×2) @ Dense(2×2)"
    assert repr(2 * (A @ (3 * B))) == "6·(Dense(2×2) @ Diagonal(2×2))"
    assert repr((A + B) @ A) == "(Dense(2×2) + Diagonal(2×2)) @ Dense(2×2)"
    assert repr(la.kron(A, la.kron(A, B))) == "Dense(2×2) ⊗ Dense(2×2) ⊗ Diagonal(2×2)"
    assert repr(la.kronsum(A, B)) == "Dense(2×2) ⊕ Diagonal(2×2)"
    assert repr(A.claim("psd")) == "Dense(2×2).claim('psd')"


def test_properties_by_construction():
    a, real = torch.randn(5, 3, dtype=torch.complex128), torch.randn(4, 4)
    assert {"psd", "hermitian"} <= (la.Dense(a) @ la.Dense(a).H).properties
    assert "hermitian" not in (la.Dense(a[:3]) @ la.Dense(a[:3]).T).properties
    assert "psd" in la.kron(poisson(3), la.Identity(2, dtype=torch.float64)).properties
    assert "unitary" in (la.Householder(torch.randn(4, 2)) @ la.Permutation(torch.tensor([1, 0, 2, 3]))).properties
    assert "lower" in (la.Triangular(real) @ la.Triangular(real)).properties
    assert "upper" in la.Triangular(real).T.properties
    assert "upper" in la.Dense(real.tril()).claim("lower").T.properties
    assert "psd" not in la.Diagonal(torch.tensor([1.0, -1.0])).properties


@pytest.mark.parametrize("name", ["hermitian", "psd", "unitary", "lower", "upper", "diagonal"])
def test_a_wrong_claim_is_found_out(name):
    A = la.Dense(torch.randn(6, 6, dtype=torch.float64))
    with pytest.raises(el.OperatorError, match=f"cannot claim '{name}'"):
        A.claim(name, check=True)


def test_a_kernel_in_chunks_is_the_kernel(monkeypatch):
    K = la.Kernel(gaussian, torch.randn(50, 2), torch.randn(30, 2), (torch.tensor(0.7),))
    v, w = torch.randn(30, 2), torch.randn(50, 2)
    wanted = K.dense() @ v, K.dense().mT @ w
    monkeypatch.setattr("einlinear.operators.kernel.ENTRIES", 300)
    assert len(K._chunks()) > 3
    leaves = [tensor.clone().requires_grad_() for tensor in K.tensors]
    chunked = K.with_tensors(*leaves)
    assert_close((chunked @ v, chunked.T @ w), wanted)
    (chunked @ v).sum().backward()
    whole = [tensor.clone().requires_grad_() for tensor in K.tensors]
    (K.with_tensors(*whole).dense() @ v).sum().backward()
    assert_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in whole])


def test_layers_are_operators():
    layer = el.Linear(12, 20, el.BTT(rank=2))
    assert_close(la.operator(layer).dense(), layer.to_dense().weight)
    x = torch.randn(12, 2)
    assert_close(la.operator(layer) @ x, layer.to_dense().weight @ x)
    (la.operator(layer) @ x).sum().backward()
    assert all(factor.grad is not None for factor in layer.factors)
    for family in el.families():
        assert la.operator(el.Linear(24, 24, family)).shape == (24, 24), family  # one slice is no batch of one
    assert la.operator(torch.nn.Linear(3, 4)).shape == (4, 3)


def test_a_hessian_of_a_network():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    loss, at = la.raveled(
        lambda p: (torch.func.functional_call(net, p, (x,)) - y).square().mean(), dict(net.named_parameters())
    )
    assert_close(la.Hessian(loss, at.detach()).dense(), torch.autograd.functional.hessian(loss, at.detach()))


def test_sparse_of_torch_and_of_rows():
    dense = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 1.0]])
    assert_close(la.operator(dense.to_sparse()).dense(), dense)
    csr = dense.to_sparse_csr()
    found = la.Sparse.csr(csr.crow_indices(), csr.col_indices(), csr.values(), (2, 3))
    assert_close(found.dense(), dense)
    assert_close(
        la.masked(la.Dense(dense), torch.tensor([False, True]), torch.tensor([True, False, True])).dense(),
        dense[1:, ::2],
    )


@pytest.mark.parametrize("kind", ["dense", "kronecker, batched", "transform", "sparse"])
def test_an_index_finds_what_it_finds_in_the_matrix(kind):
    A = {
        "dense": la.Dense(torch.randn(5, 6)),
        "kronecker, batched": la.kron(torch.randn(2, 2, 3), torch.randn(3, 2)),
        "transform": la.Fourier(6, dtype=torch.complex64),
        "sparse": la.Sparse(torch.ones(3), torch.tensor([0, 4, 4]), torch.tensor([1, 1, 2]), (5, 6)),
    }[kind]
    matrix, every = A.dense(), slice(None)
    mask = torch.arange(A.shape[-2]) % 2 == 0
    for rows, columns in [(1, 2), (-1, -2), (0, slice(1, 4)), (every, 3), (slice(1, 4), slice(0, 5, 2)), (mask, 1),
                          (every, torch.tensor([2, 0])), ([0, 2], every), ([0, 1, 4], [2, 2, 0]),
                          (torch.tensor(2), slice(1, 3)), ([1, 2], 0), (mask, every)]:  # fmt: skip
        found = A[rows, columns]
        found = found.dense() if isinstance(found, la.Operator) else found
        assert_close(found, matrix[..., rows, columns])
    assert_close(A[2], matrix[..., 2, :])
    assert_close(A[..., 2:, 1:3].dense(), matrix[..., 2:, 1:3])


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, "cannot index"),
        ((1, 2, 3), "cannot index"),
        (7, "out of bounds"),
        ("a", "cannot select"),
        (slice(None, None, -1), "greater than zero"),
        (([0, 1], [0, 1, 2]), "in pairs"),
    ],
)
def test_an_index_that_finds_nothing_is_refused_in_a_sentence(index, sentence):
    with pytest.raises(el.OperatorError, match=sentence):
        la.Dense(torch.ones(5, 6))[index]


def test_an_operator_is_no_sequence():
    with pytest.raises(TypeError, match="not iterable"):
        list(la.Identity(3))
