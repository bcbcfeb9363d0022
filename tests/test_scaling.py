"""Initialisation and learning rates: the published tables, and the norm that they are there to keep."""

import math

import pytest
import torch

import einlinear as el
from einlinear.scaling import RULES, rule

D, Q = 1024, 32  # a square layer and the root of its width


def fans(structure, optimizer="adamw"):
    return [(s.slices, s.fan_in, s.fan_out, s.shared) for s in el.spectral(structure, optimizer)]


def rates(structure, optimizer="adamw"):
    return [scale.lr for scale in el.spectral(structure, optimizer)]


def stds(structure):
    return [scale.std for scale in el.spectral(structure)]


# Source: Compute Better Spent (2024) section 4 and Searching for Efficient Linear Layers (2024), for a layer D -> D.
# Each row: slices, fan in, fan out and sharing of every factor; its std; its Adam-like rate relative to dense.
TABLE = [
    (el.Dense(), [(1, D, D, 1)], [D**-0.5], [1]),
    (el.LowRank(rank=16), [(1, D, 16, 1), (1, 16, D, 1)], [4 / D, 1 / 4], [1 / 2, D / 32]),
    (el.BlockDiagonal(blocks=4), [(4, D / 4, D / 4, 1)], [(D / 4) ** -0.5], [4]),
    (el.Kronecker(), [(1, Q, Q, Q)] * 2, [Q**-0.5] * 2, [Q / 2] * 2),
    (el.BTT(rank=1), [(Q, Q, Q, 1)] * 2, [Q**-0.5] * 2, [Q / 2, Q / 2]),
    (el.BTT(rank=4), [(Q, Q, 4 * Q, 1), (Q, 4 * Q, Q, 1)], [Q**-0.5, Q**0.5 / (4 * Q)], [Q / 2, Q / 8]),
    (el.Monarch(blocks=8), [(8, D / 8, D / 8, 1)] * 2, [(D / 8) ** -0.5] * 2, [8 / 2] * 2),
    (el.TensorTrain(rank=4), [(1, Q, 4 * Q, Q), (1, 4 * Q, Q, Q)], [Q**-0.5, Q**0.5 / (4 * Q)], [Q / 2, Q / 8]),
    (
        el.BLAST(blocks=4, rank=16),
        [(4, D / 4, 16, 1), (16, 4, 4, 1), (4, 16, D / 4, 1)],
        [4 / (D / 4), 1 / 2, 1 / 4],
        [4 / 3, D / 12, D / 48],
    ),
    (el.Butterfly(), [(D / 2, 2, 2, 1)] * 10, [2**-0.5] * 10, [D / 20] * 10),
]


@pytest.mark.parametrize("family, wanted, std, lr", TABLE, ids=[str(row[0]) for row in TABLE])
def test_the_published_table(family, wanted, std, lr):
    structure = family(D, D)
    assert fans(structure) == wanted
    assert stds(structure) == pytest.approx(std)
    assert rates(structure) == pytest.approx(lr)


def test_three_cores():
    structure = el.BTT(cores=3)(512, 512)
    assert fans(structure) == [(64, 8, 8, 1)] * 3
    assert stds(structure) == pytest.approx([8**-0.5] * 3)
    assert rates(structure) == pytest.approx([64 / 3] * 3)


def test_any_two_factors_by_the_kinds_of_their_axes():
    sizes = {"a": 3, "b": 5, "g": 7, "d": 11, "e": 13, "f": 17, "r": 19}
    structure = el.Structure.parse("g b a, g r f d a, f e g r b -> f e d", **sizes)
    first, second = el.spectral(structure)
    assert (first.slices, first.fan_in, first.fan_out, first.shared) == (7, 3, 19 * 17 * 11, 5)
    assert (second.slices, second.fan_in, second.fan_out, second.shared) == (17, 7 * 19 * 5, 13, 11)
    assert first.lr == pytest.approx(structure.d_in / 3 / 2)
    assert second.lr == pytest.approx(structure.d_in / (7 * 19 * 5) / 2)


def test_standard_deviation_by_fans():
    wide, tall = el.spectral(el.LowRank(rank=4)(256, 64))
    assert wide.std == pytest.approx(math.sqrt(4) / 256)  # fan out is the smaller: sqrt(min) / fan in
    assert tall.std == pytest.approx(math.sqrt(4) / 4)


@pytest.mark.parametrize("d_in, d_out", [(D, D), (256, 4096), (4096, 256)])
def test_sgd_takes_the_slices_and_the_shape(d_in, d_out):
    structure = el.BTT(rank=2)(d_in, d_out)
    for scale, lr in zip(el.spectral(structure), rates(structure, "sgd"), strict=True):
        assert lr == pytest.approx(scale.slices * (scale.fan_out / scale.fan_in) / (d_out / d_in) / 2)
    assert rates(el.BTT(rank=1)(D, D), "sgd") == pytest.approx([Q / 2, Q / 2])
    assert rates(el.Kronecker()(D, D), "sgd") == pytest.approx([1 / 2, 1 / 2])


@pytest.mark.parametrize("d_in, d_out", [(D, D), (256, 4096), (4096, 256)])
def test_muon_takes_the_root_of_the_shape(d_in, d_out):
    structure = el.BTT(rank=2)(d_in, d_out)
    for scale, lr in zip(el.spectral(structure), rates(structure, "muon"), strict=True):
        assert lr == pytest.approx(math.sqrt(scale.fan_out / scale.fan_in) / math.sqrt(d_out / d_in) / 2)
    assert rates(el.BTT(rank=4)(D, D), "muon") == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("d_in, d_out", [(16, 16), (97, 131), (1024, 64)])
def test_a_dense_layer_is_its_own_yardstick(optimizer, d_in, d_out):
    (scale,) = el.spectral(el.Dense()(d_in, d_out), optimizer)
    assert scale.lr == pytest.approx(1)
    assert scale.std == pytest.approx(math.sqrt(min(d_in, d_out)) / d_in)


@pytest.mark.parametrize("optimizer", RULES)
def test_the_optimizer_changes_the_rate_alone(structure, optimizer):
    assert fans(structure, optimizer) == fans(structure)
    assert [s.std for s in el.spectral(structure, optimizer)] == stds(structure)


def test_only_the_adam_like_rate_falls_with_the_fan_in_alone():
    """Raw updates are Θ(1) in every entry for adamw, one part in `slices` for sgd, orthogonal for muon."""
    assert RULES["adamw"].of_matrix(64, 16, 8) == pytest.approx(1 / 64)
    assert RULES["sgd"].of_matrix(64, 16, 8) == pytest.approx(8 * 16 / 64)
    assert RULES["muon"].of_matrix(64, 16, 8) == pytest.approx(1 / 2)
    assert [RULES[name].of_vector(4.0) for name in ("adamw", "sgd", "muon")] == [1, 4, 1]


def test_an_optimizer_without_a_rule():
    with pytest.raises(ValueError, match="for the optimizer 'lion': known are adamw, sgd, muon; use 'adamw' for any"):
        el.spectral(el.Dense()(4, 4), "lion")
    assert rule("adamw") is RULES["adamw"]


def test_experts_have_the_fans_of_one():
    """Routing the rank of a BTT makes it BTT-MoE: every expert is one of rank 1."""
    routed, one = el.BTT(rank=8)(D, D).route("r", active=2), el.BTT(rank=1)(D, D)
    assert el.spectral(routed) == el.spectral(one)
    experts = el.Structure.parse("i, e o i -> o", i=64, e=8, o=32)
    assert el.spectral(experts.route("e", active=2)) == el.spectral(el.Dense()(64, 32))
    low_rank = el.Structure.parse("i, e r i, e o r -> o", i=64, e=8, r=4, o=32)
    assert el.spectral(low_rank.route("e", active=2)) == el.spectral(el.LowRank(rank=4)(64, 32))


def test_the_order_in_which_axes_are_written_is_irrelevant():
    written = el.Structure.parse("g a, a f r g, g e f r -> f e", g=2, a=4, r=3, f=5, e=2)
    assert el.spectral(written) == el.spectral(written.canonical)


# The condition that the rules come from (Yang, Simon and Bernstein 2023).


def norm(structure, draw):
    """The spectral norm over sqrt(d_out / d_in) at initialisation."""
    weight = el.dense(structure, draw(structure, torch.float32))
    return torch.linalg.matrix_norm(weight, 2).item() / math.sqrt(structure.d_out / structure.d_in)


@pytest.mark.parametrize("d_in, d_out", [(128, 128), (1024, 1024), (256, 1024), (1024, 256)])
def test_the_norm_at_initialisation_is_that_of_the_shape(family, d_in, d_out, draw):
    structure = family(d_in, d_out)
    assert 0.4 < norm(structure, draw) < 2.1 ** len(structure.factors)  # a square Gaussian factor has norm 2


@pytest.mark.parametrize("family", [f for f in el.families() if not isinstance(f, el.Butterfly)], ids=str)
def test_the_norm_at_initialisation_is_the_same_at_all_widths(family, draw):
    """Not for a butterfly, whose number of factors grows with the width."""
    small, large = (norm(family(width, width), draw) for width in (128, 1024))
    assert 1 / 2 < large / small < 2


def own_update_slopes(family, rates_of, draw):
    """How rms(Δy) grows with the width when one factor alone takes its own sign-like step, for each factor."""
    moved = []
    for width in (64, 1024):
        structure = family(width, width)
        factors = [factor.requires_grad_() for factor in draw(structure, torch.float32)]
        x = torch.randn(8, width)
        y = el.apply(structure, factors, x)
        grads = torch.autograd.grad((y * torch.randn(8, width)).mean(), factors)
        changes = []
        for k, (grad, lr) in enumerate(zip(grads, rates_of(structure), strict=True)):
            stepped = [*factors[:k], factors[k] - 0.01 * lr / width * grad.sign(), *factors[k + 1 :]]
            changes.append((el.apply(structure, stepped, x) - y).square().mean().sqrt().log2())
        moved.append(torch.stack(changes))
    return (moved[1] - moved[0]) / math.log2(1024 / 64)


# Without weight sharing and without a bottleneck of fixed rank, which damps what comes after it at the start.
ALIGNED = [el.Dense(), el.BTT(rank=1), el.BTT(rank=4), el.Monarch(blocks=4), el.BlockDiagonal(blocks=4)]


@pytest.mark.parametrize("family", ALIGNED, ids=str)
def test_every_factors_own_update_moves_the_output_alike_at_all_widths(family, draw):
    assert (own_update_slopes(family, rates, draw).abs() < 0.25).all()


@pytest.mark.parametrize("wrong", [lambda lr: 1.0, lambda lr: 1 / lr], ids=["dense multiplier", "inverted"])
def test_wrong_rates_do_not_pass_that_check(wrong, draw):
    slopes = own_update_slopes(el.BTT(rank=1), lambda structure: [wrong(lr) for lr in rates(structure)], draw)
    assert (slopes.abs() > 0.25).all()


def test_residual_branches_of_deeper_models():
    assert el.residual_scale(4) == pytest.approx(1 / 4)
    assert el.residual_scale(4, alpha=0.5) == pytest.approx(1 / 2)
    assert el.residual_scale(1) == 1
    with pytest.raises(ValueError, match="pass a positive number"):
        el.residual_scale(0)
