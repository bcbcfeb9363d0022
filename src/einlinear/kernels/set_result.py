"""Routed layers by sets for those who take no gradients: nothing is kept."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.select import choose
from einlinear.kernels.set_pair import forward
from einlinear.kernels.sets import Sizes, empty_counts, lay_out, set_layout


@torch.library.custom_op("einlinear::set_result", mutates_args=())
def set_result(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor) -> Tensor:
    """The result of `set_pair`, without gradients."""
    layout, gates = set_layout(index, weight, len(first))
    sizes = Sizes(len(x), len(first), index.shape[1])
    return forward(x, first, second, bias, layout, gates, sizes, kept=False)[0]


@set_result.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], second.shape[1] * second.shape[2])


@torch.library.custom_op("einlinear::routed_result", mutates_args=())
def routed_result(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, logits and choices of `routed_pair`, without gradients."""
    sizes = Sizes(len(x), len(first), active)
    counts = empty_counts(x, sizes)
    logits, index, weight = choose(x, router, scale, router_bias, active, counts)
    layout, gates = lay_out(index, weight, counts, sizes)
    return forward(x, first, second, bias, layout, gates, sizes, kept=False)[0], logits, index


@routed_result.register_fake
def _(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], second.shape[1] * second.shape[2])
    logits = x.new_empty(x.shape[0], first.shape[0], dtype=torch.float32)
    return y, logits, x.new_empty(x.shape[0], active, dtype=torch.int64)


@register_flop_formula(torch.ops.einlinear.set_result)
def _(
    x: list[int], first: list[int], second: list[int], bias: object, index: list[int], *_: object, **__: object
) -> int:
    return 2 * x[0] * index[1] * (math.prod(first) + math.prod(second)) // first[0]


@register_flop_formula(torch.ops.einlinear.routed_result)
def _(
    x: list[int], router: list[int], scale: float, _: object, first: list[int], second: list[int], bias: object,
    active: int, **__: object,
) -> int:  # fmt: skip
    return 2 * x[0] * (active * (math.prod(first) + math.prod(second)) // first[0] + math.prod(router))
