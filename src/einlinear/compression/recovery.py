"""How near a compressed model comes to the dense one, and the training that brings it nearer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from einlinear.compression.calibration import Batch, kept_tokens, output_of


@dataclass(frozen=True)
class Fidelity:
    """A compressed model's outputs against the dense one's, on the same inputs, averaged over positions.

    `error` is ‖y − ŷ‖ / ‖y‖; `cosine` that of the outputs at each position. `loss` is the mean next-token
    cross-entropy (nats) where the model has logits and is given tokens in order.
    """

    error: float
    cosine: float

    def __str__(self) -> str:
        return f"outputs: cosine {self.cosine:.4f}, relative error {self.error:.4f}"


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """The model's output for each batch, in evaluation mode."""
    training = model.training
    model.eval()
    found = [output_of(model, batch) for batch in batches]
    model.train(training)
    return found


def fidelity(expected: Sequence[Tensor], found: Sequence[Tensor], batches: Sequence[Batch]) -> Fidelity:
    """Compares `outputs` of two models for the same batches; padding plays no part."""
    error = total = cosine = 0.0
    count = 0
    for want, have, batch in zip(expected, found, batches, strict=True):
        kept = kept_tokens(batch, want.shape)
        want, have = (y.float() if kept is None else y[kept].float() for y in (want, have))
        want, have = want.flatten(0, -2), have.flatten(0, -2)
        error += float((want - have).square().sum())
        total += float(want.square().sum())
        cosine += float(functional.cosine_similarity(want, have).sum())
        count += len(want)
    return Fidelity((error / total) ** 0.5, cosine / count)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    steps: int,
    lr: float = 1e-3,
    progress: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> list[float]:
    """Trains a compressed model to give the dense one's outputs again; returns the loss of each step.

    The loss is the squared error of the outputs relative to the teacher's, and that of their means over
    the sequence, which sentence embeddings are. Embedding tables stay as they are; everything else is
    trained by AdamW, whose rate rises for a tenth of the steps and falls to zero along a cosine.
    """
    tables = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = [p for p in model.parameters() if p not in tables and p.is_floating_point()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / steps)))),
    )
    frozen = [parameter for parameter in tables if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    training = model.training
    teacher.eval()
    model.eval()  # dropout would teach the difference of two draws
    losses = []
    for step in range(steps):
        progress("recovering", step, steps)
        batch = batches[step % len(batches)]
        with torch.no_grad():
            want = output_of(teacher, batch)
        loss = _loss(want, output_of(model, batch), kept_tokens(batch, want.shape))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.train(training)
    progress("recovering", steps, steps)
    return losses


def _loss(want: Tensor, have: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return relative(want, have)
    weight = kept[..., None] / kept.sum(1, keepdim=True)[..., None]
    means = [(y * weight).sum(1) for y in (want, have)]
    return relative(want[kept], have[kept]) + relative(*means)


def relative(want: Tensor, have: Tensor) -> Tensor:
    """‖y − ŷ‖² / ‖y‖²."""
    return (want - have).square().sum() / want.square().sum()
