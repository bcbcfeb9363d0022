"""`Linear` in `nn.Linear`'s place: every family survives everything that users do to a layer."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import einlinear as el


def reference(layer, x):
    y = el.apply(layer.structure, layer.effective_factors(), x)
    return y if layer.bias is None else y + layer.bias


# In nn.Linear's place


def test_takes_the_arguments_of_nn_linear_in_their_order():
    layer = el.Linear(6, 4, "low_rank(rank=2)", False, "cpu", torch.float64)
    assert (layer.in_features, layer.out_features, layer.bias) == (6, 4, None)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert el.Linear(6, 4, "dense").bias.shape == (4,)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_any_leading_dimensions(layer, shape):
    x = torch.randn(*shape, layer.in_features)
    y = layer(x)
    assert y.shape == (*shape, layer.out_features)
    assert_close(y, reference(layer, x), rtol=1e-4, atol=1e-5)


def test_is_its_structure_with_every_gradient(family, widths, options, trained, named_gradients, assert_same):
    layer = trained(el.Linear(*widths, family, **options).double())
    x = torch.randn(3, 5, widths[0], dtype=torch.float64)
    found = named_gradients(layer, x)
    slow = copy.deepcopy(layer)
    slow.forward = lambda x: reference(slow, x)
    assert_same(found, named_gradients(slow, x))
    assert all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_contiguous(family, widths, bias):
    layer = el.Linear(*widths, family, bias=bias)
    for shape in [(4,), (2, 3), (), (2, 0)]:
        y = layer(torch.randn(*shape, widths[0]))
        assert y.is_contiguous()
        y.view(-1)


def test_inputs_of_any_strides(layer):
    wide = torch.randn(layer.in_features, 6, 2)
    for x in (wide[..., 0].mT, wide.permute(2, 1, 0), wide[:, :1, 0].mT.expand(3, -1), wide.flatten(1).mT[::2]):
        assert not x.is_contiguous()
        assert_close(layer(x), reference(layer, x), rtol=1e-4, atol=1e-5)


def test_no_tokens_have_zero_gradients(family, trained, named_gradients):
    layer = trained(el.Linear(97, 131, family, cap=True))
    found = named_gradients(layer, torch.randn(0, 97))
    assert found["x"].shape == (0, 97)
    assert all((found[name] == 0).all() for name, _ in layer.named_parameters())


def test_activation_checkpointing(layer, named_gradients, assert_same):
    x = torch.randn(3, layer.in_features)
    wanted = named_gradients(layer, x)
    again = copy.deepcopy(layer)
    again.forward = lambda x: checkpoint(layer.__class__.forward, again, x, use_reentrant=False)
    assert_same(named_gradients(again, x), wanted)


def test_the_input_is_left_as_it_was(layer):
    x = torch.randn(3, layer.in_features)
    before = x.clone()
    layer(x)
    assert_close(x, before, rtol=0, atol=0)


def test_parameters_are_plain_contiguous_stacks_of_matrices(layer):
    assert [tuple(factor.shape) for factor in layer.factors] == [*layer.structure.matrix_shapes]
    for parameter in layer.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_contiguous()
        assert not vars(parameter)
    assert sum(factor.numel() for factor in layer.factors) == el.parameters(layer.structure)


def test_there_is_no_weight_to_take_for_a_matrix(layer):
    assert not hasattr(layer, "weight")


def test_says_what_it_is(layer):
    assert repr(layer.structure) in repr(layer)
    assert "bias=True, cap=False, zero=False" in repr(layer)


def test_starts_at_the_spectral_initialisation(family):
    layer = el.Linear(1024, 1024, family)
    for factor, scale in zip(layer.factors, el.spectral(layer.structure), strict=True):
        spread = 6 / (2 * factor.numel()) ** 0.5
        assert factor.std().item() == pytest.approx(scale.std, rel=max(spread, 0.01))
        assert abs(factor.mean().item()) < 6 * scale.std / factor.numel() ** 0.5
    assert (layer.bias == 0).all()


def test_two_layers_start_differently_and_one_seed_alike(family):
    torch.manual_seed(3)
    first, second = el.Linear(36, 64, family), el.Linear(36, 64, family)
    torch.manual_seed(3)
    again = el.Linear(36, 64, family)
    for a, b, c in zip(first.factors, second.factors, again.factors, strict=True):
        assert not torch.equal(a, b)
        assert_close(a, c, rtol=0, atol=0)


def test_learns(family, options):
    layer = el.Linear(36, 64, family, **options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, wanted = torch.randn(8, 36), torch.randn(8, 64)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append((layer(x) - wanted).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


# Options


def test_the_cap_changes_nothing_at_the_start_but_for_what_lies_above_it(family):
    layer = el.Linear(36, 64, family, cap=True)
    for factor, effective, scale in zip(
        layer.factors, layer.effective_factors(), el.spectral(layer.structure), strict=True
    ):
        assert effective.square().mean().sqrt() <= scale.std * (1 + 1e-5)
        with torch.no_grad():
            factor.mul_(0.1)
    for factor, effective in zip(layer.factors, layer.effective_factors(), strict=True):
        assert_close(effective, factor)  # below the ceiling the cap does nothing


def test_the_cap_is_a_ceiling_and_the_gain_scales(family):
    layer = el.Linear(36, 64, family, cap=True)
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(100)
        layer.gains.fill_(3)
    for effective, scale in zip(layer.effective_factors(), el.spectral(layer.structure), strict=True):
        assert_close(effective.square().mean().sqrt().item(), 3 * scale.std, rtol=1e-4, atol=0)


def test_a_zero_start_has_finite_gradients_under_the_cap(family):
    layer = el.Linear(36, 64, family, cap=True, zero=True)
    assert (layer.factors[0] == 0).all()
    assert all((factor != 0).any() for factor in [*layer.factors][1:])
    y = layer(torch.randn(3, 36))
    assert (y == 0).all()
    (y - 1).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.factors[0].grad.abs().max() > 0


def test_the_cap_of_complex_factors_is_on_their_absolute_values():
    layer = el.Linear(36, 64, "btt(rank=2)", cap=True, dtype=torch.complex64)
    factors = [factor.detach().clone() for factor in layer.factors]
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(100j)
    for effective, factor, scale in zip(layer.effective_factors(), factors, el.spectral(layer.structure), strict=True):
        assert_close(effective.abs().square().mean().sqrt().item(), scale.std, rtol=1e-4, atol=0)
        assert_close(effective / effective.abs(), 1j * factor / factor.abs())


# To and from dense layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cap", [True, False])
def test_to_dense_computes_the_same(family, widths, bias, cap, trained):
    layer = trained(el.Linear(*widths, family, bias=bias, cap=cap, dtype=torch.float64))
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    x = torch.randn(3, widths[0], dtype=torch.float64)
    assert_close(dense(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_of_its_own_kind_computes_the_same(bias):
    for family in (el.Dense(), el.LowRank(rank=3), el.Kronecker(), el.BTT(rank=2), el.Monarch(blocks=4)):
        dense = el.Linear(36, 64, family, bias=bias, dtype=torch.float64).to_dense()
        layer = el.Linear.from_dense(dense, family)
        x = torch.randn(3, 36, dtype=torch.float64)
        assert_close(layer(x), dense(x))
        assert (layer.bias is None) == (not bias)


def test_from_dense_keeps_bias_dtype_and_is_no_worse_than_nothing(family, widths):
    dense = nn.Linear(*widths, dtype=torch.float64)
    layer = el.Linear.from_dense(dense, str(family))
    assert_close(layer.bias, dense.bias)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert (layer.to_dense().weight - dense.weight).norm() <= dense.weight.norm()


# What it accepts as a family


def test_a_family_its_text_or_a_structure():
    family = el.BTT(rank=2)
    wanted = family(97, 131)
    for given in (family, "btt(rank=2)", "BTT(rank=2)", wanted):
        assert el.Linear(97, 131, given).structure == wanted


def test_a_structure_is_stored_as_matrices():
    written = el.Structure.parse("g a, a f r g, g e f r -> f e", g=2, a=4, r=3, f=5, e=2)
    layer = el.Linear(8, 10, written)
    assert layer.structure == written.canonical
    x = torch.randn(3, 8)
    assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize(
    "family, error, says",
    [
        (el.BTT()(16, 25), el.StructureError, "cannot make a layer from 16 to 36 features: .* maps 16 to 25"),
        ("btx", el.StructureError, "did you mean 'btt'"),
        (el.BTT(blocks=(15, 2)), el.StructureError, "choose sizes"),
        (el.BTT, el.StructureError, "it is no family; pass one with its settings"),
        (None, el.StructureError, "cannot make a layer of None: it is no family"),
    ],
    ids=str,
)
def test_what_cannot_be_a_layer(family, error, says):
    with pytest.raises(error, match=says):
        el.Linear(16, 36, family)


@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (-1, 8)], ids=str)
def test_widths_below_one(family, widths):
    with pytest.raises(el.StructureError, match="at least 1"):
        el.Linear(*widths, family)


@pytest.mark.parametrize("shape", [(), (3, 15), (16, 1)], ids=str)
def test_an_input_of_the_wrong_width(shape):
    with pytest.raises(el.StructureError, match="its last dimension must be d_in = 16"):
        el.Linear(16, 36, "btt")(torch.randn(shape))


@pytest.mark.parametrize("widths", [(769, 1009), (48, 50257), (64, 11008)], ids=str)
def test_awkward_widths(family, widths):
    layer = el.Linear(*widths, family)
    x = torch.randn(2, widths[0])
    assert_close(layer(x), reference(layer, x), rtol=1e-3, atol=1e-4)
