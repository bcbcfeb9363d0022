"""The reference contraction: what it computes with and without a gate, and what it refuses."""

from functools import reduce

import pytest
import torch
from torch.testing import assert_close

import einlinear as el

DENSE_EXPERTS = el.Structure.parse("i, e o i -> o", i=6, e=4, o=5)
LOW_RANK_EXPERTS = el.Structure.parse("i, e r i, e o r -> o", i=6, e=4, r=3, o=5)
BTT_EXPERTS = el.BTT(rank=4)(16, 36)
PADDED_EXPERTS = el.BTT(rank=3)(97, 131)


def top_gate(*batch, entries, active, dtype=torch.float64):
    """Weights of `active` entries chosen at random for each vector, zero for the others."""
    logits = torch.randn(*batch, entries, dtype=dtype)
    best = logits.topk(active)
    return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))


def test_applies_as_its_matrix(structure, factors):
    x = torch.randn(2, 3, structure.d_in, dtype=torch.float64)
    assert_close(el.apply(structure, factors, x), x @ el.dense(structure, factors).mT)


def test_transpose_is_adjoint(structure, factors):
    assert_close(el.dense(structure.T, factors[::-1]), el.dense(structure, factors).mT)
    x, y = (torch.randn(width, dtype=torch.float64) for width in (structure.d_in, structure.d_out))
    assert_close(el.apply(structure, factors, x) @ y, x @ el.apply(structure.T, factors[::-1], y))


def test_is_linear_in_the_input_and_in_each_factor(structure, factors):
    x, z = torch.randn(2, 4, structure.d_in, dtype=torch.float64)
    of_x, of_z = (el.apply(structure, factors, vector) for vector in (x, z))
    assert_close(el.apply(structure, factors, 2 * x - z), 2 * of_x - of_z)
    for k in range(len(factors)):
        scaled = [*factors[:k], 3 * factors[k], *factors[k + 1 :]]
        assert_close(el.apply(structure, scaled, x), 3 * of_x)


def test_factors_may_be_stacks_of_matrices(structure, factors):
    matrices = [factor.reshape(shape) for factor, shape in zip(factors, structure.matrix_shapes, strict=True)]
    assert_close(el.dense(structure, matrices), el.dense(structure, factors))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(structure, factors, shape):
    x = torch.randn(*shape, structure.d_in, dtype=torch.float64)
    out = el.apply(structure, factors, x)
    assert out.shape == (*shape, structure.d_out)
    assert_close(out, x @ el.dense(structure, factors).mT)


def test_an_inner_axis_is_a_sum_of_weights(draw):
    (weight,) = draw(DENSE_EXPERTS)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(el.apply(DENSE_EXPERTS, [weight], x), x @ weight.sum(0).mT)


def test_many_axes_are_no_obstacle(draw):
    """More axes than letters: 20 cores have 59."""
    structure = el.TensorTrain(rank=2, cores=20)(2**20, 1)
    x = torch.zeros(2**20, dtype=torch.float64)
    x[0] = 1
    factors = draw(structure)
    first, *middle, last = (factor[0, ..., 0] for factor in factors)  # of the axes o, r', r, i the bonds remain
    entry = last @ reduce(lambda vector, matrix: matrix @ vector, middle, first)
    assert_close(el.apply(structure, factors, x), entry[None])


# Routing: docs/mathematics.md section 4


def test_a_mixture_of_dense_experts(draw):
    structure = DENSE_EXPERTS.route("e", active=2)
    (weight,) = draw(structure)
    x, gate = torch.randn(3, 6, dtype=torch.float64), top_gate(3, entries=4, active=2)
    wanted = torch.stack([sum(gate[b, e] * (weight[e] @ x[b]) for e in range(4)) for b in range(3)])
    assert_close(el.apply(structure, [weight], x, gate), wanted)


def test_a_mixture_of_low_rank_experts(draw):
    structure = LOW_RANK_EXPERTS.route("e", active=2)
    a, b = draw(structure)
    x, gate = torch.randn(2, 3, 6, dtype=torch.float64), top_gate(2, 3, entries=4, active=2)
    wanted = sum(gate[..., e, None] * (x @ (b[e] @ a[e]).mT) for e in range(4))
    assert_close(el.apply(structure, [a, b], x, gate), wanted)


def test_btt_experts_are_a_routed_rank(draw):
    structure = BTT_EXPERTS.route("r", active=2)
    a, b = draw(structure)
    x, gate = torch.randn(3, 16, dtype=torch.float64), top_gate(3, entries=4, active=2)
    g, into = structure.shape(structure.x)
    state = torch.einsum("zga,grfa->zgrf", x.reshape(3, g, into), a) * gate[:, None, :, None]
    wanted = torch.einsum("zgrf,fegr->zfe", state, b).reshape(3, 36)
    assert_close(el.apply(structure, [a, b], x, gate), wanted)
    by_expert = [el.BTT(rank=1)(16, 36)] * 4
    experts = [el.apply(one, [a[:, [e]], b[..., [e]]], x) for e, one in enumerate(by_expert)]
    assert_close(sum(gate[:, [e]] * out for e, out in enumerate(experts)), wanted)


@pytest.mark.parametrize(
    "structure, axis",
    [(DENSE_EXPERTS, "e"), (LOW_RANK_EXPERTS, "e"), (LOW_RANK_EXPERTS, "r"), (BTT_EXPERTS, "r"), (PADDED_EXPERTS, "r")],
    ids=str,
)
def test_all_experts_active_with_equal_gates_is_unrouted(structure, axis, draw):
    entries = structure.sizes[axis]
    routed, factors = structure.route(axis, active=entries), draw(structure)
    x = torch.randn(2, 3, structure.d_in, dtype=torch.float64)
    gate = torch.ones(2, 3, entries, dtype=torch.float64)
    assert_close(el.apply(routed, factors, x, gate), el.apply(structure, factors, x))
    assert_close(el.dense(routed, factors, gate[0, 0]), el.dense(structure, factors))
    assert_close(el.apply(routed, factors, x, gate / entries), el.apply(structure, factors, x) / entries)


@pytest.mark.parametrize(
    "structure, axis", [(DENSE_EXPERTS, "e"), (LOW_RANK_EXPERTS, "e"), (BTT_EXPERTS, "r")], ids=str
)
def test_an_expert_without_a_gate_plays_no_part(structure, axis, draw):
    routed, factors = structure.route(axis, active=1), [f.requires_grad_() for f in draw(structure)]
    gate = torch.zeros(5, structure.sizes[axis], dtype=torch.float64)
    gate[:, 1] = 1
    out = el.apply(routed, factors, torch.randn(5, structure.d_in, dtype=torch.float64), gate)
    for factor, grad, axes in zip(factors, torch.autograd.grad(out.sum(), factors), structure.factors, strict=True):
        others = [e for e in range(structure.sizes[axis]) if e != 1]
        along = axes.index(axis)
        assert grad.shape == factor.shape
        assert (grad.index_select(along, torch.tensor(others)) == 0).all()
        assert (grad.index_select(along, torch.tensor([1])) != 0).any()


def test_the_gate_has_a_gradient(draw):
    structure = BTT_EXPERTS.route("r", active=2)
    factors = draw(structure)
    x = torch.randn(3, 16, dtype=torch.float64)
    gate = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gate: el.apply(structure, factors, x, gate), gate)


# Refusals


def test_a_gate_that_is_missing(draw):
    structure = DENSE_EXPERTS.route("e", active=2)
    with pytest.raises(el.StructureError, match="routes its axis 'e' but no gate was given; pass gate="):
        el.apply(structure, draw(structure), torch.randn(3, 6, dtype=torch.float64))


def test_a_gate_that_nothing_needs(draw):
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(el.StructureError, match=r"pass gate=\[..., entries\] with a structure that was routed"):
        el.apply(DENSE_EXPERTS, draw(DENSE_EXPERTS), x, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (4,), (3, 1, 4)], ids=str)
def test_a_gate_that_does_not_fit(draw, shape):
    structure = DENSE_EXPERTS.route("e", active=2)
    with pytest.raises(el.StructureError, match=r"with a gate of shape .*: it needs \(3, 4\), one weight for each"):
        el.apply(structure, draw(structure), torch.randn(3, 6, dtype=torch.float64), torch.ones(shape))


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (6, 1)], ids=str)
def test_an_input_that_does_not_fit(draw, shape):
    with pytest.raises(el.StructureError, match="its last dimension must be d_in = 6"):
        el.apply(LOW_RANK_EXPERTS, draw(LOW_RANK_EXPERTS), torch.randn(shape, dtype=torch.float64))


def test_factors_that_do_not_fit(draw):
    structure = el.LowRank(rank=2)(6, 5)
    a, b = draw(structure)
    x = torch.randn(6, dtype=torch.float64)
    for wrong in ([a], [a, b, b], [b, a], [a.mT, b], [a.flatten(), b]):
        with pytest.raises(el.StructureError, match=r"it has factors of shapes \(\(2, 6\), \(5, 2\)\), found"):
            el.apply(structure, wrong, x)


def test_matrices_are_for_canonical_structures_alone(draw):
    structure = el.Structure.parse("i, i r, r o -> o", i=6, r=2, o=5)
    a, b = draw(structure)
    with pytest.raises(el.StructureError, match="it has factors of shapes"):
        el.apply(structure, [a.reshape(1, 2, 6), b.reshape(1, 5, 2)], torch.randn(6, dtype=torch.float64))
