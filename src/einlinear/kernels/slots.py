"""Expert-sorted slots: each expert is applied to the tokens that chose it, and to no others.

A slot is one token at one of its experts. Sorted by expert, the slots of an expert are a range, and a
step of all experts is one grouped contraction: no padding, nothing dropped, no work for idle experts.
The layout is that of ScatterMoE (Tan et al. 2024, https://arxiv.org/abs/2403.08245) for any einsum.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.contract import equation, pad_last
from einlinear.kernels.pairwise import fill
from einlinear.links import Link, links
from einlinear.structure import Structure

MOST_GROUPS = 1023
"""Matmuls of one `torch._grouped_mm`."""


class Slots(NamedTuple):
    """Where tokens go and come from: `token[slot]`, `weight[slot]`, the first slot of each expert, and back.

    `inverse`, `[tokens, active]`, holds the slots of each token; None where tokens have any number of them.
    """

    token: Tensor
    weight: Tensor
    offsets: Tensor
    inverse: Tensor | None


def by_token(index: Tensor, weight: Tensor, experts: int) -> Slots:
    """The slots of tokens that each chose experts: `index` and `weight` are `[tokens, active]`.

    An index of `experts` is a choice that was dropped: its slot lies behind the last expert.
    """
    chosen = index.flatten()
    in_order, order = chosen.sort(stable=True)
    slots = torch.arange(chosen.numel(), device=index.device)
    inverse = torch.empty_like(order).scatter_(0, order, slots).view_as(index)
    offsets = torch.searchsorted(in_order, torch.arange(experts + 1, device=index.device))
    return Slots(order // index.shape[1], weight.flatten()[order], offsets, inverse)


def by_expert(index: Tensor, weight: Tensor) -> Slots:
    """The slots of experts that each chose tokens: `index` and `weight` are `[experts, capacity]`."""
    experts, capacity = index.shape
    offsets = torch.arange(experts + 1, device=index.device) * capacity
    return Slots(index.flatten(), weight.flatten(), offsets, None)


def dispatch(x: Tensor, slots: Slots) -> Tensor:
    """`[tokens, features]` to `[slots, features]`."""
    spreaded: Tensor = spread(x, slots.token, slots.inverse)
    return spreaded


def combine(y: Tensor, slots: Slots, tokens: int) -> Tensor:
    """`[slots, features]` to `[tokens, features]`: the weighted sum of each token's slots."""
    collected: Tensor = collect(y * slots.weight[:, None].to(y.dtype), slots.token, slots.inverse, tokens)
    return collected


@dataclass(frozen=True)
class Experts:
    """The experts of one layer on their slots: a chain of grouped contractions, between padded widths."""

    links: tuple[Link, ...]
    pad_in: int
    width: int
    d_out: int

    @classmethod
    def of(cls, expert: Structure) -> "Experts":
        """Of experts with this structure."""
        return cls(expert_links(expert), expert.pad_in, expert.size(expert.y), expert.d_out)

    def __call__(self, factors: Sequence[Tensor], state: Tensor, offsets: Tensor) -> Tensor:
        """Applies each expert to its slots, `[slots, d_in]`; returns `[slots, d_out]`.

        Factors are `[experts * slices, out, in]`, or `[slices, out, in]` where all experts share one.
        """
        slots, experts = state.shape[0], offsets.numel() - 1
        state = pad_last(state, self.pad_in)
        for link, factor in zip(self.links, factors, strict=True):
            shared = factor.numel() == math.prod(link.weight)
            weight = factor.reshape(1 if shared else experts, *link.weight).expand(experts, *link.weight)
            state = grouped(state.reshape(link.view), weight, offsets, link.spec, slots)
        return state.reshape(slots, self.width)[:, : self.d_out]


def expert_links(expert: Structure) -> tuple[Link, ...]:
    """The steps of one expert: as matmuls without copies where there is such a chain, else as einsums."""
    found = links(expert)
    if not isinstance(found, str):
        return found
    chain: list[Link] = []
    for step in expert.steps:
        text = equation(expert, [step.state, step.factor], step.result, [False, False]).replace("m", "M")
        first, second, result = text.replace("->", ",").split(",")
        view = (-1, *expert.shape(step.state))
        chain.append(Link(view, expert.shape(step.factor), f"m{first},{second}->m{result}"))
    return tuple(chain)


@torch.library.custom_op("einlinear::grouped", mutates_args=())
def grouped(a: Tensor, b: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    """`einsum(spec, a, b[e])` for the slots of each expert e; slots of no expert are zero, or anything on a GPU.

    Args:
        a: the state, as in `einlinear.kernels.pairwise`, with `slots` or a multiple of them along its tokens.
        b: `[experts, ...]`, the factor of each expert.
        offsets: `[experts + 1]`, the first slot of each expert.
        spec: one letter an axis.
        slots: in all.
    """
    if a.is_cuda:
        return _grouped_on_cuda(a, b, offsets, spec, slots)
    out = a.new_zeros(_result(a.shape, b.shape, spec))
    names, _, made = _names(spec)
    for e, (first, last) in enumerate(_ranges(a, spec, offsets, slots)):
        if first < last:
            part = (names.index(_rows(spec)), first, last - first)
            fill(out.narrow(made.index(_rows(spec)), *part[1:]), a.narrow(*part), b[e], spec)
    return out


@grouped.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    return a.new_empty(_result(a.shape, b.shape, spec))


@torch.library.custom_op("einlinear::grouped_weight", mutates_args=())
def grouped_weight(a: Tensor, grad: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    """The gradient of `b` in `grouped`: for each expert the contraction over its slots."""
    names, factor, made = _names(spec)
    if a.is_cuda:
        return _grouped_weight_on_cuda(a, grad, offsets, spec, slots)
    size = dict(zip(names + made, (*a.shape, *grad.shape), strict=False)) | dict(zip(made, grad.shape, strict=True))
    out = a.new_zeros([offsets.numel() - 1, *(size[name] for name in factor)])
    for e, (first, last) in enumerate(_ranges(a, spec, offsets, slots)):
        if first < last:
            part = (first, last - first)
            mine = a.narrow(names.index(_rows(spec)), *part), grad.narrow(made.index(_rows(spec)), *part)
            fill(out[e], *mine, f"{names},{made}->{factor}")
    return out


@grouped_weight.register_fake
def _(a: Tensor, grad: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    names, factor, made = _names(spec)
    size = dict(zip(names, a.shape, strict=True)) | dict(zip(made, grad.shape, strict=True))
    return a.new_empty([offsets.numel() - 1, *(size[name] for name in factor)])


def _setup_grouped(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    a, b, offsets, ctx.spec, ctx.slots = inputs
    ctx.save_for_backward(a, b, offsets)


def _grouped_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    a, b, offsets = ctx.saved_tensors
    names, factor, made = _names(ctx.spec)
    da = grouped(grad, b, offsets, f"{made},{factor}->{names}", ctx.slots) if ctx.needs_input_grad[0] else None
    db = grouped_weight(a, grad, offsets, ctx.spec, ctx.slots) if ctx.needs_input_grad[1] else None
    return da, db, None, None, None


def _grouped_weight_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    a, other, offsets = ctx.saved_tensors
    names, factor, made = _names(ctx.spec)
    da = grouped(other, grad, offsets, f"{made},{factor}->{names}", ctx.slots)
    return da, grouped(a, grad, offsets, ctx.spec, ctx.slots), None, None, None


grouped.register_autograd(_grouped_backward, setup_context=_setup_grouped)
grouped_weight.register_autograd(_grouped_weight_backward, setup_context=_setup_grouped)


@register_flop_formula(torch.ops.einlinear.grouped)
def _(a: list[int], b: list[int], offsets: list[int], spec: str, slots: int, **_: object) -> int:
    names, factor, _made = _names(spec)
    size = dict(zip(names, a, strict=True)) | dict(zip(factor, b[1:], strict=True))
    return 2 * math.prod(size.values())


@register_flop_formula(torch.ops.einlinear.grouped_weight)
def _(a: list[int], grad: list[int], offsets: list[int], spec: str, slots: int, **_: object) -> int:
    names, _factor, made = _names(spec)
    size = dict(zip(names, a, strict=True)) | dict(zip(made, grad, strict=True))
    return 2 * math.prod(size.values())


@torch.library.custom_op("einlinear::spread", mutates_args=())
def spread(x: Tensor, token: Tensor, inverse: Tensor | None) -> Tensor:
    """`x[token]`. Its transpose, `collect`, reads by `inverse` where there is one: no atomics, the same every run."""
    return x.index_select(0, token)


@spread.register_fake
def _(x: Tensor, token: Tensor, inverse: Tensor | None) -> Tensor:
    return x.new_empty(token.shape[0], *x.shape[1:])


@torch.library.custom_op("einlinear::collect", mutates_args=())
def collect(y: Tensor, token: Tensor, inverse: Tensor | None, tokens: int) -> Tensor:
    """The sum of each token's rows of `y`."""
    if inverse is None:
        return y.new_zeros(tokens, *y.shape[1:]).index_add_(0, token, y)
    total = y.index_select(0, inverse[:, 0])
    for slots in inverse.unbind(1)[1:]:
        total += y.index_select(0, slots)
    return total


@collect.register_fake
def _(y: Tensor, token: Tensor, inverse: Tensor | None, tokens: int) -> Tensor:
    return y.new_empty(tokens, *y.shape[1:])


def _setup_spread(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, token, inverse, *_ = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(token, inverse)


spread.register_autograd(
    lambda ctx, grad: (collect(grad, *ctx.saved_tensors, ctx.tokens), None, None), setup_context=_setup_spread
)
collect.register_autograd(
    lambda ctx, grad: (spread(grad, *ctx.saved_tensors), None, None, None), setup_context=_setup_spread
)


def _grouped_on_cuda(a: Tensor, b: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    names, factor, made = _names(spec)
    rows, ends, (batch, own, summed, new) = _sorted_rows(a, spec, offsets, slots)
    size = dict(zip(names, a.shape, strict=True)) | dict(zip(factor, b.shape[1:], strict=True))
    weight = b.permute([1 + factor.index(name) for name in batch] + [0] + [1 + factor.index(n) for n in summed + new])
    weight = weight.reshape(len(rows), len(ends), rows.shape[2], -1)
    made_all = [
        torch._grouped_mm(rows[part].flatten(0, 1), _aligned(weight[part].flatten(0, 1)), offs=of_part)
        for part, of_part in _parts(rows, ends)
    ]
    y, order = torch.cat(made_all), batch + own + new
    return y.reshape([size[name] for name in order]).permute([order.index(name) for name in made]).contiguous()


def _grouped_weight_on_cuda(a: Tensor, grad: Tensor, offsets: Tensor, spec: str, slots: int) -> Tensor:
    names, factor, made = _names(spec)
    rows, ends, (batch, _, summed, new) = _sorted_rows(a, spec, offsets, slots)
    other, _, _ = _sorted_rows(grad, f"{made},{factor}->{names}", offsets, slots)
    size = dict(zip(names, a.shape, strict=True)) | dict(zip(made, grad.shape, strict=True))
    made_all = [
        torch._grouped_mm(other[part].flatten(0, 1).mT, rows[part].flatten(0, 1), offs=of_part)
        for part, of_part in _parts(rows, ends)
    ]
    order = batch + "E" + new + summed
    size["E"] = offsets.numel() - 1
    shaped = torch.cat(made_all).reshape([size[name] for name in order])
    return shaped.permute([order.index(name) for name in "E" + factor]).contiguous()


def _sorted_rows(a: Tensor, spec: str, offsets: Tensor, slots: int) -> tuple[Tensor, Tensor, tuple[str, str, str, str]]:
    """`a` as `[batch, rows, summed]`, where each expert's rows end, and what part each letter plays.

    Contiguous: experts have any number of rows, and a grouped matmul takes only matrices that start at a multiple of
    16 bytes.
    """
    names, factor, made = _names(spec)
    batch = "".join(n for n in names if n in factor and n in made)
    own = "".join(sorted((n for n in names if n not in factor), key=lambda n: n != _rows(spec)))
    summed = "".join(n for n in names if n in factor and n not in made)
    new = "".join(n for n in factor if n not in names)
    size = dict(zip(names, a.shape, strict=True))
    each, count = math.prod(size[n] for n in own), math.prod(size[n] for n in batch)
    rows = a.permute([names.index(n) for n in batch + own + summed]).reshape(count, each, -1).contiguous()
    # Rows of no expert are computed by the last one, and nobody reads them.
    ends = torch.nn.functional.pad(offsets[1:-1] * (each // slots), (0, 1), value=each)
    return rows, ends, (batch, own, summed, new)


def _parts(rows: Tensor, ends: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a batch that one grouped matmul takes, and where the rows of each expert in each of them end."""
    count, each = rows.shape[:2]
    most = MOST_GROUPS // len(ends)
    for first in range(0, count, most):
        part = slice(first, min(first + most, count))
        starts = torch.arange(part.stop - first, device=rows.device) * each
        yield part, (starts[:, None] + ends).flatten().int()


def _aligned(weight: Tensor) -> Tensor:
    """A stack of matrices as the grouped matmul takes it: one stride one, the other a multiple of 16 bytes."""
    return weight if weight.stride(-1) == 1 or weight.stride(-2) == 1 else weight.contiguous()


def _names(spec: str) -> tuple[str, str, str]:
    operands, made = spec.split("->")
    first, second = operands.split(",")
    return first, second, made


def _rows(spec: str) -> str:
    """The letter that the slots run along: tokens, alone or with the axes before the step's own."""
    return "m" if "m" in spec else "b"


def _ranges(a: Tensor, spec: str, offsets: Tensor, slots: int) -> list[tuple[int, int]]:
    each = a.shape[spec.index(_rows(spec))] // slots if slots else 0
    bounds = [each * at for at in offsets.tolist()]
    return list(pairwise(bounds))


def _result(a: Sequence[int], b: Sequence[int], spec: str) -> list[int]:
    names, factor, made = _names(spec)
    size = dict(zip(names, a, strict=True)) | dict(zip(factor, b[1:], strict=True))
    return [size[name] for name in made]
