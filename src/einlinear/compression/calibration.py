"""What a model's layers read while it runs on examples: the second moments that activation-aware projection needs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from einlinear.projection.moments import Moments
from einlinear.structure import StructureError

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""What a model is called with: one tensor, keywords (as tokenizers give), or arguments."""


def run(model: nn.Module, batch: Batch) -> object:
    """The model's output for a batch."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    """The first tensor of the model's output for a batch: logits, or the last hidden states."""
    found = run(model, batch)
    return found if isinstance(found, Tensor) else cast(Sequence[Tensor], found)[0]


def kept_tokens(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Which of the leading positions of a tensor of this shape are no padding, or None where all count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim == 2 < len(shape) and mask.shape == shape[:2]:
        return mask.bool()
    return None


@torch.no_grad()
def calibrate(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Runs the model on batches in evaluation mode, and streams the second moments of the inputs of layers.

    Positions that an `attention_mask` leaves out are not counted. Layers that read the same tensor, as
    queries, keys and values do, share one `Moments`. A layer that no batch reaches has none.

    Args:
        model: any module.
        layers: those to watch, by name, each called with one tensor `[..., d_in]`.
        batches: what to call the model with.

    Raises:
        StructureError: if there were no tokens, or an input was not finite.
    """
    found: dict[str, Moments] = {}
    leader: dict[str, str] = {}
    batch: Batch = ()
    seen: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        seen[name] = x
        if name not in leader:
            leader[name] = next(
                (other for other, read in seen.items() if read is x and leader.get(other) == other), name
            )
        if leader[name] == name:
            kept = kept_tokens(batch, x.shape)
            found.setdefault(name, Moments(x.shape[-1], x.device)).update(x if kept is None else x[kept])
        elif seen.get(leader[name]) is not x:
            raise StructureError(
                f"cannot calibrate '{name}': it read the same input as '{leader[name]}' at first, and another one "
                f"later; calibrate it alone"
            )

    with _evaluating(model), _hooked(layers, watch):
        for batch in batches:
            seen.clear()
            run(model, batch)
    if not any(moments.tokens for moments in found.values()):
        raise StructureError(
            "cannot calibrate with zero tokens: no batch reached a layer to compress; pass some text or inputs"
        )
    return {name: found[first] for name, first in leader.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: watch(name, inputs[0]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
