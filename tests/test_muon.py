import pytest
import torch
from torch import nn

import einlinear as el


@pytest.mark.parametrize("shape", [(6, 6), (3, 12), (12, 3), (5, 8, 4), (2, 3, 4, 4)])
def test_orthogonalize_makes_all_singular_values_nearly_one(shape: tuple[int, ...]) -> None:
    update = torch.randn(shape)
    values = torch.linalg.svdvals(el.orthogonalize(update))
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    left, right = torch.linalg.svd(update, full_matrices=False)[0::2]
    cosine = torch.nn.functional.cosine_similarity(el.orthogonalize(update).flatten(), (left @ right).flatten(), dim=0)
    assert cosine > 0.95


def test_orthogonalize_treats_every_slice_alone_and_ignores_scale() -> None:
    update = torch.randn(5, 8, 4) * torch.tensor([1e-12, 1e-3, 1.0, 1e6, 0.0])[:, None, None]
    found = el.orthogonalize(update)
    for slice_, one in zip(update, found, strict=True):
        torch.testing.assert_close(one, el.orthogonalize(slice_))
    torch.testing.assert_close(el.orthogonalize(update.mT), found.mT)
    torch.testing.assert_close(el.orthogonalize(update[2] * 1e-9), found[2])
    assert not found[4].any()
    assert el.orthogonalize(update.bfloat16()).dtype == torch.bfloat16


def test_muon_steps_hidden_weights_by_orthogonal_momentum_and_the_rest_by_adamw() -> None:
    factor, vector = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(7))
    twin, start = nn.Parameter(vector.detach().clone()), factor.detach().clone()
    groups = [
        {"params": [factor], "lr": 0.1, "weight_decay": 0.5, "role": "hidden"},
        {"params": [vector], "lr": 0.01, "weight_decay": 0.5, "role": "vector"},
    ]
    muon = el.Muon(groups, momentum=0.9, nesterov=False)
    adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.5, betas=(0.9, 0.95))
    momentum = torch.zeros_like(factor)
    for _ in range(3):
        factor.grad, vector.grad = torch.randn_like(factor), torch.randn_like(vector)
        twin.grad = vector.grad.clone()
        momentum = 0.9 * momentum + 0.1 * factor.grad
        start = start * (1 - 0.1 * 0.5) - 0.1 * el.orthogonalize(momentum)
        muon.step()
        adamw.step()
    torch.testing.assert_close(factor.detach(), start)
    torch.testing.assert_close(vector, twin, rtol=0, atol=0)


def test_muon_agrees_with_torch_on_a_matrix() -> None:
    ours, theirs = (nn.Parameter(torch.eye(8, 16)) for _ in range(2))
    mine = el.Muon([ours], lr=0.1)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)  # its factor max(1, out/in)**.5 is 1 here
    for _ in range(3):
        ours.grad = torch.randn(8, 16)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)  # theirs iterates in bfloat16


def test_muon_skips_what_has_no_gradient_and_returns_the_closure_s_loss() -> None:
    factor, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = el.Muon([{"params": [factor]}, {"params": [vector], "role": "vector"}])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert bool((factor == 1).all()) and bool((vector == 1).all())


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\): Muon takes \[out, in\]"):
        el.Muon([nn.Parameter(torch.zeros(3))])


def test_muon_trains_a_model_in_two_lines() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), el.Linear(16, 16, "btt"), nn.LayerNorm(16), nn.Linear(16, 8))
    groups = el.parameter_groups(model, lr=0.02, adamw_lr=3e-2, optimizer="muon", readout="3")
    optimizer = el.Muon(groups)
    assert {group["lr"] / group["lr_mult"] for group in groups if group["role"] != "hidden"} == {3e-2}
    tokens = torch.arange(8)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens.flip(0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_layers_of_one_shape_are_orthogonalised_together_and_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(3, 4, 5), (2, 4, 5), (4, 5), (1, 5, 4)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    together = [nn.Parameter(value.clone()) for value in start]
    alone = [nn.Parameter(value.clone()) for value in start]
    calls: list[torch.Size] = []
    orthogonalize = el.orthogonalize
    monkeypatch.setattr("einlinear.muon.orthogonalize", lambda u: (calls.append(u.shape), orthogonalize(u))[1])
    for parameters in ([together], [[parameter] for parameter in alone]):
        for group in parameters:
            for parameter in group:
                parameter.grad = gradients[next(n for n, p in enumerate((*together, *alone)) if p is parameter) % 4]
            el.Muon(group, lr=0.1, weight_decay=0.1).step()
    assert calls[:2] == [torch.Size([6, 4, 5]), torch.Size([1, 5, 4])] and len(calls) == 6
    for mine, their in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, their)
