import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import einlinear as el

WIDTHS = (64, 256, 1024)
STRUCTURES = ["btt", "btt(rank=4)", "monarch(blocks=4)", "block_diagonal(blocks=4)"]

Groups = list[dict]
Change = Callable[[float, el.Scale, int], float]


def with_rates(optimizer: str, change: Change) -> Callable[[nn.Module, float], Groups]:
    """Groups in which `change(rate, scale, factors)` replaces the rate of each factor."""

    def groups(model: nn.Module, width_mult: float) -> Groups:
        right = el.parameter_groups(model, 1e-3, optimizer=optimizer, width_mult=width_mult, readout="readout")
        owner = {
            id(factor): (scale, len(layer.factors))
            for layer in model.modules()
            if isinstance(layer, el.Linear)
            for factor, scale in zip(layer.factors, el.spectral(layer.structure, optimizer), strict=True)
        }
        return [
            {"params": [p], "lr": change(group["lr"], *owner[id(p)]) if id(p) in owner else group["lr"]}
            for group in right
            for p in group["params"]
        ]

    return groups


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_and_their_routers_move_alike_at_every_width(optimizer: str) -> None:
    report = el.check(el.default_model("mixture(of='btt', experts=4, active=2)"), WIDTHS, optimizer=optimizer, seeds=1)
    assert report.ok, str(report)
    assert sum(slope.parameter.endswith("router.weight") for slope in report.slopes) == 4


def factor_slopes(report: el.CheckReport) -> list[float]:
    return [slope.update for slope in report.slopes if ".factors." in slope.parameter]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_rules_keep_updates_the_same_size_at_all_widths(structure: str, optimizer: str) -> None:
    report = el.check(el.default_model(structure), WIDTHS[: 2 if "4" in structure else 3], optimizer=optimizer)
    assert report.ok, str(report)
    assert not report.unmeasured


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_low_rank_layers_pass_where_the_rank_grows_with_the_width(optimizer: str) -> None:
    report = el.check(
        lambda width: el.default_model(el.LowRank(rank=width // 2))(width), (128, 512), optimizer=optimizer
    )
    assert report.ok, str(report)


def test_a_bottleneck_narrower_than_the_width_is_called_one() -> None:
    report = el.check(el.default_model("low_rank(rank=4)"), (64, 256))
    assert not report.ok and "and so do outputs: a bottleneck" in str(report)


@pytest.mark.parametrize(
    ("optimizer", "change", "expected"),
    [
        pytest.param("adamw", lambda lr, scale, n: lr / scale.lr, -1 / 2, id="the dense multiplier"),
        pytest.param("adamw", lambda lr, scale, n: 1e-3, 1 / 2, id="no multiplier"),
        pytest.param("adamw", lambda lr, scale, n: 1e-6 / lr, 1.0, id="inverted multipliers"),
        pytest.param("sgd", lambda lr, scale, n: lr / scale.slices, -1 / 2, id="SGD without slices"),
    ],
)
def test_wrong_rates_fail_with_the_exponent_that_theory_says(optimizer: str, change: Change, expected: float) -> None:
    """For BTT of rank 4 the fans and the number of slices are Θ(sqrt(width)), and the right rate is ∝ width^-1/2.

    Its parts are 8, 16 and 32 for 64, 256 and 1024, hence all exponents are exact at these widths.
    """
    report = el.check(
        el.default_model("btt(rank=4)"), WIDTHS, optimizer=optimizer, groups_fn=with_rates(optimizer, change)
    )
    assert not report.ok
    assert all(math.isclose(slope, expected, abs_tol=0.2) for slope in factor_slopes(report)), str(report)
    assert "with the width" in str(report) and "FAILED" in str(report)


def test_the_customary_coordinate_check_alone_would_pass_rates_that_are_too_small() -> None:
    groups = with_rates("adamw", lambda lr, scale, n: lr / scale.lr)
    report = el.check(el.default_model("btt(rank=4)"), WIDTHS, groups_fn=groups)
    assert all(slope.output < report.tolerance for slope in report.slopes)
    assert not report.ok


def test_outputs_that_grow_fail_even_where_updates_do_not() -> None:
    def model(width: int) -> nn.Module:
        layers = nn.Sequential(nn.Embedding(64, width), nn.Linear(width, 64))
        nn.init.normal_(layers[1].weight)  # Θ(1), without the division of its input by the width
        return layers

    def groups(model: nn.Module, width_mult: float) -> Groups:
        return [
            {"params": [model[0].weight, model[1].bias], "lr": 1e-3},
            {"params": [model[1].weight], "lr": 1e-3 / width_mult},
        ]

    report = el.check(model, (64, 1024), groups_fn=groups)
    faults = {slope.parameter: report.fault(slope) for slope in report.slopes}
    assert faults == {
        "0.weight": None,
        "1.weight": "outputs grow with the width",
        "1.bias": "outputs grow with the width",
    }


def test_a_parameter_is_measured_alone() -> None:
    """Doubling the rate of one factor changes its own size by log 2 and nobody else's."""
    groups = with_rates("sgd", lambda lr, scale, n: lr)
    single = el.check(el.default_model("dense"), (16, 64), optimizer="sgd", steps=1, groups_fn=groups)

    def louder(model: nn.Module, width_mult: float) -> Groups:
        found = groups(model, width_mult)
        for group in found:
            if group["params"][0] is model.up[0].factors[0]:
                group["lr"] *= width_mult  # 1 at the first width, 4 at the second
        return found

    other = el.check(el.default_model("dense"), (16, 64), optimizer="sgd", steps=1, groups_fn=louder)
    changes = {a.parameter: b.update - a.update for a, b in zip(single.slopes, other.slopes, strict=True)}
    loud = changes.pop("up.0.factors.0")
    assert loud == pytest.approx(1, abs=1e-3)
    assert changes == pytest.approx(dict.fromkeys(changes, 0), abs=1e-3)


def test_own_data_and_any_module_can_be_checked() -> None:
    def model(width: int) -> nn.Module:
        layers = nn.Sequential(nn.Linear(5, width), nn.Tanh(), el.Linear(width, width, "btt"), nn.LayerNorm(width))
        return layers.append(Mean(width))

    class Mean(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head, self.unused = nn.Linear(width, 1), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x / x.shape[-1])

    def groups(model: nn.Module, width_mult: float) -> Groups:
        return el.parameter_groups(
            model, 1e-4, width_mult=width_mult, readout="4.head", roles={"0.weight": "embedding"}
        )

    report = el.check(model, (64, 256), groups_fn=groups, batch_fn=lambda width: (torch.randn(8, 5), torch.randn(8, 1)))
    assert {slope.parameter for slope in report.slopes} >= {"0.weight", "2.factors.1", "3.bias", "4.head.weight"}
    assert set(report.unmeasured) == {"4.unused.weight", "4.unused.bias"}
    assert "not measured" in str(report)


def test_the_random_state_is_left_as_it_was() -> None:
    before = torch.random.get_rng_state()
    first, second = (el.check(el.default_model("btt"), (16, 64), steps=1) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64,)}, "two or more different widths"),
        ({"widths": (16, 64), "steps": 0}, "steps=0"),
        ({"widths": (16, 64), "optimizer": "lion"}, "known are adamw, sgd, muon"),
        ({"widths": (16, 64), "readout": "lm_head"}, "near are"),
    ],
)
def test_what_cannot_be_checked_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        el.check(el.default_model("btt"), **options)


def test_models_of_different_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="only some of the models have the parameter"):
        el.check(el.default_model("butterfly"), (16, 64))
