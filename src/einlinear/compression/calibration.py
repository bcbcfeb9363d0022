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


def sensitivities(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, float]:
    """How much the model's output moves with the output of each layer: E‖∂y/∂z · δ‖² for δ of mean square 1 per token.

    To second order, and where errors of layers are independent of each other and of what follows, that times what a
    layer loses of its output is what the model loses of its own (the trace of a Kronecker-factored Gauss-Newton
    matrix; Martens and Grosse 2015). Estimated by one backward pass a batch, of a random projection of the output.
    Padding, and layers that no batch reaches, count zero.

    Args:
        model, layers, batches: as for `calibrate`; a few batches do.
    """
    total = dict.fromkeys(layers, 0.0)
    tokens = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(11)
    seen: list[tuple[str, Tensor]] = []

    def watched(name: str, out: object) -> object:
        if not isinstance(out, Tensor):
            return out
        if not out.requires_grad:  # all is frozen up to here
            out = out.detach().requires_grad_()
        seen.append((name, out))
        return out.clone()  # what follows may write into it

    handles = [
        module.register_forward_hook(lambda module, inputs, out, name=name: watched(name, out))
        for name, module in layers.items()
    ]
    try:
        with _evaluating(model), torch.enable_grad():
            for batch in batches:
                seen.clear()
                y = output_of(model, batch)
                kept = kept_tokens(batch, y.shape)
                probe = torch.randn(y.shape, generator=generator).to(y)
                projection = (y * probe if kept is None else (y * probe)[kept]).sum()
                gradients = torch.autograd.grad(projection, [out for _, out in seen], allow_unused=True)
                for (name, out), gradient in zip(seen, gradients, strict=True):
                    kept = kept_tokens(batch, out.shape)
                    tokens[name] += out[..., 0].numel() if kept is None else int(kept.sum())
                    if gradient is not None:
                        total[name] += float(gradient.double().square().sum()) / out.shape[-1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: total[name] / max(tokens[name], 1) for name in layers}


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
