"""Calibration: which inputs are counted, and what is shared."""

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.calibration import calibrate, sensitivities


class Attention(nn.Module):
    """Two layers that read one tensor, one that reads another, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = nn.functional.one_hot(input_ids, 4).float()
        return self.out(self.query(x) * self.key(x))


LAYERS = ("query", "key", "out", "unused")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in LAYERS}


def test_moments_are_those_of_what_each_layer_reads():
    model = Attention().train()
    ids = torch.tensor([[0, 1, 1], [2, 2, 2]])
    found = calibrate(model, layers(model), [{"input_ids": ids}, {"input_ids": ids[:1]}])
    counts = torch.tensor([2.0, 4.0, 3.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found["query"].matrix, torch.diag(counts / 9))
    assert found["query"] is found["key"] and found["query"].tokens == 9
    assert found["out"] is not found["query"] and "unused" not in found
    assert model.training and not model.query._forward_pre_hooks


def test_padding_is_not_counted():
    model = Attention()
    batch = {"input_ids": torch.tensor([[0, 1, 3], [2, 3, 3]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    found = calibrate(model, layers(model), [batch])
    assert found["query"].tokens == 3
    torch.testing.assert_close(found["query"].matrix.diagonal() * 3, torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))


def test_no_tokens_is_an_error():
    model = Attention()
    with pytest.raises(el.StructureError, match="zero tokens"):
        calibrate(model, layers(model), [])


def test_hooks_are_gone_after_a_failure():
    model = Attention()
    with pytest.raises(RuntimeError):
        calibrate(model, layers(model), [{"input_ids": torch.full((1, 2), 9)}])
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


def test_calibrated_compression_loses_less_of_the_outputs():
    torch.manual_seed(0)
    weight, mix = torch.randn(32, 32), torch.randn(32, 32) * torch.linspace(0.02, 2, 32)
    batches = [torch.randn(50, 32) @ mix.mT for _ in range(4)]

    def loss(calibration: list[Tensor] | None) -> float:
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        model[0].weight = nn.Parameter(weight.clone())
        allocation, report = el.compress(model, "low_rank(rank=8)", 0.5, calibration=calibration)
        assert allocation.share == 0.5 and len(report.rows) == 1
        x = torch.cat(batches)
        return float((model(x) - x @ weight.mT).norm().detach())

    assert loss(batches) < 0.7 * loss(None)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_sensitivity_of_a_layer_is_what_the_rest_makes_of_its_output(frozen: bool):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Hardtanh(-1e6, 1e6, inplace=True), nn.Linear(4, 300))
    model.requires_grad_(not frozen)
    layers = {"0": model[0], "1": model[1], "3": model[3], "never": nn.Linear(2, 2)}
    found = sensitivities(model, layers, [torch.randn(4, 16, 8)] * 4)
    last, middle = model[3].weight.detach(), model[1].weight.detach()
    assert found["3"] == pytest.approx(1, rel=0.02)
    assert found["1"] == pytest.approx(float(last.square().sum()) / 4, rel=0.1)
    assert found["0"] == pytest.approx(float((last @ middle).square().sum()) / 6, rel=0.2)
    assert found["never"] == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_does_not_count_as_sensitivity():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 200)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    model = Masked()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).expand(8, 8)
    found = sensitivities(model, {"layer": model.layer}, [{"x": torch.randn(8, 8, 4), "attention_mask": mask}])
    assert found["layer"] == pytest.approx(1, rel=0.1)
