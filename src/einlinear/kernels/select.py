"""Logits, choice and weights of a router in one pass over its input.

A router reads as many bytes as half the layer behind it. Here each row is read once, in the type it has;
the product is that of float32 all the same, and nothing waits for the device.
"""

import math
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.sets import CHUNK
from einlinear.kernels.stage import tile

TIE = 1e-6
"""What parts equal logits: at the start all are zero, and not all tokens should choose the first experts."""


TRITON = find_spec("triton") is not None


def routes(tokens: Tensor, experts: int) -> bool:
    """Whether `route` takes these tokens."""
    return tokens.is_cuda and tokens.element_size() == 2 and experts <= 64 and TRITON


@torch.library.custom_op("einlinear::route", mutates_args=())
def route(
    tokens: Tensor, weight: Tensor, scale: float, bias: Tensor | None, active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[tokens, experts]`, the `active` largest of each token, and their softmax; of `bias` only choices know.

    Args:
        tokens: `[tokens, width]`.
        weight: `[experts, width]`.
        scale: of the logits.
        bias: `[experts]`, float32.
        active: how many are chosen.
    """
    return choose(tokens, weight, scale, bias, active, None)


def choose(
    tokens: Tensor, weight: Tensor, scale: float, bias: Tensor | None, active: int, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `route` returns; fills `counts`, where given, with how many tokens have each set of experts (`sets.py`)."""
    from einlinear.kernels import tiles_route

    (count, width), experts, tokens = tokens.shape, len(weight), tokens.contiguous()
    logits, index, chosen = _empty(tokens, weight, active)
    half, sets = tokens.element_size() == 2, 0 if counts is None else experts**active
    with torch.cuda.device_of(tokens):
        tiles_route.route_forward[(max(1, -(-count // CHUNK)),)](
            tokens, weight.contiguous(), scale, bias, logits, index, chosen, counts, count, width, width,
            EXPERTS=experts, ACTIVE=active, TIE=TIE, BLOCK_EXPERTS=tile(experts), BLOCK_TOKENS=CHUNK, BLOCK_WIDTH=128,
            SPLIT=half, HAS_BIAS=bias is not None,
            SETS=sets, BLOCK_SETS=tile(sets), COUNTED=counts is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
    return logits, index, chosen


@route.register_fake
def _(tokens: Tensor, weight: Tensor, scale: float, bias: Tensor | None, active: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(tokens, weight, active)


@torch.library.custom_op("einlinear::route_backward", mutates_args=())
def route_backward(
    dlogits: Tensor | None, dchosen: Tensor | None, tokens: Tensor, weight: Tensor, scale: float, index: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of `tokens` and `weight`."""
    total = _logits_gradient(dlogits, dchosen, tokens, len(weight), index, chosen)
    return total @ (weight * scale).to(tokens.dtype), (total.mT @ tokens).to(weight.dtype) * scale


@route_backward.register_fake
def _(
    dlogits: Tensor | None, dchosen: Tensor | None, tokens: Tensor, weight: Tensor, scale: float, index: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)


def _logits_gradient(
    dlogits: Tensor | None, dchosen: Tensor | None, tokens: Tensor, experts: int, index: Tensor, chosen: Tensor
) -> Tensor:
    """The gradient of the logits, `[tokens, experts]`, in the type of the tokens."""
    from einlinear.kernels import tiles_route

    count = len(tokens)
    dlogits = dlogits.contiguous() if dlogits is not None else chosen.new_zeros(count, experts)
    dchosen = dchosen.contiguous() if dchosen is not None else torch.zeros_like(chosen)
    total = tokens.new_empty(count, experts)
    with torch.cuda.device_of(tokens):
        tiles_route.route_backward[(-(-count // 64),)](
            dlogits, dchosen, index, chosen, total, count,
            EXPERTS=experts, ACTIVE=index.shape[1], BLOCK_EXPERTS=tile(experts), BLOCK_TOKENS=64,
        )  # fmt: skip
    return total


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    tokens, weight, ctx.scale, _, _ = inputs
    ctx.save_for_backward(tokens, weight, *output[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(  # type: ignore[no-untyped-def]
    ctx,  # noqa: ANN001
    dlogits: Tensor | None,
    _: None,
    dchosen: Tensor | None,
) -> tuple[Tensor, Tensor, None, None, None]:
    tokens, weight, *chosen = ctx.saved_tensors
    dtokens, dweight = route_backward(dlogits, dchosen, tokens, weight, ctx.scale, *chosen)
    return dtokens, dweight, None, None, None


route.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.route)
def _(tokens: list[int], weight: list[int], *_: object, **__: object) -> int:
    return 2 * tokens[0] * math.prod(weight)


@register_flop_formula(torch.ops.einlinear.route_backward)
def _(dlogits: object, dchosen: object, tokens: list[int], weight: list[int], *_: object, **__: object) -> int:
    return 4 * tokens[0] * math.prod(weight)


def _empty(tokens: Tensor, weight: Tensor, active: int) -> tuple[Tensor, Tensor, Tensor]:
    count, experts = tokens.shape[0], weight.shape[0]
    return (
        tokens.new_empty(count, experts, dtype=torch.float32),
        tokens.new_empty(count, active, dtype=torch.int64),
        tokens.new_empty(count, active, dtype=torch.float32),
    )
