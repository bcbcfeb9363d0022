"""A chain of matmuls over a few tokens at a time, so that the states between them stay in a CPU's cache.

One operator runs the whole chain, for a block of tokens after the other, and its backward makes the
states of a block again instead of reading them from memory. Sums over tokens are added block by
block, in their order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.clock_cpu import block
from einlinear.kernels.chained import (
    TURNED,
    Chained,
    backward_work,
    chained,
    contract,
    differentiable,
    for_state,
    for_weight,
    names_of,
    read,
    rows_of,
    shape_of,
    states_of,
    upstream,
    work,
)
from einlinear.kernels.kernel import Kernel, Runner
from einlinear.kernels.pairwise import fill, operands
from einlinear.kernels.scratch import Scratch
from einlinear.links import Link, chain_of
from einlinear.structure import Structure


class Blocked(Kernel):
    """Blocks of tokens, read where they lie; the result is made slice by slice, and then copied.

    Of short results of long sums the copy is a transposition, which costs less than a product in narrow columns.
    """

    name: ClassVar = "blocked"
    reads: ClassVar = "mbk"

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        specs = [link.spec for link in chain]
        specs[0] = specs[0].replace("mbk", self.reads)
        specs[-1] = specs[-1].replace("mbn", self.writes(chain[-1]))
        return BlockedRunner(chain, ";".join(specs), structure.size(structure.y), block(structure))

    def writes(self, last: Link) -> str:
        """The order in which the last link makes its result."""
        made, summed = last.weight[-2:]
        return "bnm" if summed > made else "bmn"


class Turned(Blocked):
    """Blocks of tokens, whose input and output are transposed in cache: all matmuls then run along the tokens."""

    name: ClassVar = "turned"
    reads: ClassVar = "bkm"

    def writes(self, last: Link) -> str:
        return "bnm"


@dataclass(frozen=True)
class BlockedRunner:
    """`specs` are those of the links, the first input and last output in the order that the operator has them."""

    links: tuple[Link, ...]
    specs: str
    width: int
    block: int

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = [factor.reshape(link.weight) for link, factor in zip(self.links, factors, strict=True)]
        views = [size for link in self.links for size in link.view]
        arguments = x, weights, bias, self.specs, views, self.width, self.block
        leaves = (x, *weights) if bias is None else (x, *weights, bias)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
            y: Tensor = blocked(*arguments)
            return y
        return _blocked(*arguments)  # starting the operator takes as long as some ten tokens


def _blocked(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, specs: str, views: Sequence[int], width: int, block: int
) -> Tensor:
    """Applies a chain (`einlinear.links`) to `x`, `[tokens, d_in]`, and adds `bias`, `[width]`.

    Args:
        x: any strides.
        weights: of the links' shapes.
        bias: or None.
        specs: of the links, parted by semicolons. An input "bkm" is copied from what lies as "mbk", an output
            "bmn" or "bnm" to what lies as "mbn".
        views: of the links, one after the other.
        width: features of the output.
        block: tokens of a block.

    Returns:
        `[tokens, width]`, contiguous.
    """
    chain, y = chained(specs, views), x.new_empty(len(x), width)
    run, prepared = None, 0
    for start in range(0, len(x), block):
        rows, out = x[start : start + block], y[start : start + block]
        if run is None or len(rows) != prepared:
            run, prepared = _forward(rows, weights, chain), len(rows)
        run(rows, out)
        if bias is not None:
            out.add_(bias)
    return y


blocked = torch.library.custom_op("einlinear::blocked", _blocked, mutates_args=())


def _forward(rows: Tensor, weights: Sequence[Tensor], chain: Chained) -> Callable[[Tensor, Tensor], None]:
    """What takes a block of tokens like `rows` through the chain; memory and views within are made once for all."""
    scratch, (view, spec), (_, last) = Scratch.of(rows), chain[0], chain[-1]
    names, products = spec.partition(",")[0], []
    state = own = read(rows, view, names, scratch)
    for k, (weight, (_, each)) in enumerate(zip(weights, chain, strict=True)):
        made = scratch.empty(rows, shape_of(state, weight, each))
        products.append(operands(state, weight, made, each))
        state = made.reshape(chain[k + 1][0]) if k + 1 < len(chain) else made
    (left, right, first), *others = products

    def run(rows: Tensor, out: Tensor) -> None:
        if names in TURNED:
            own.view(rows.mT.shape).copy_(rows.mT)
            torch.bmm(left, right, out=first)
        else:
            torch.bmm(*operands(read(rows, view, names, None), weights[0], made, spec)[:2], out=first)
        for a, b, c in others:
            torch.bmm(a, b, out=c)
        _write(out, made, last)

    return run


@blocked.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, specs: str, views: Sequence[int], width: int, block: int
) -> Tensor:
    return x.new_empty(x.shape[0], width)  # len() would fix the number of tokens


@torch.library.custom_op("einlinear::blocked_backward", mutates_args=())
def blocked_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    specs: str,
    views: Sequence[int],
    needs: Sequence[bool],
    block: int,
) -> list[Tensor]:
    """The gradients of `x` and of each weight, where `needs` says so; empty ones elsewhere."""
    chain, (needs_x, *needs_weights) = chained(specs, views), needs
    dx = x.new_empty(x.shape if needs_x else 0)
    dweights = [w.new_empty(w.shape if needed else 0) for w, needed in zip(weights, needs_weights, strict=True)]
    scratch = Scratch.of(x)
    for start in range(0, max(len(x), 1), block):
        scratch.restart()
        here = slice(start, start + block)
        states = states_of(x[here], weights, chain, scratch)
        for k, dstate in enumerate(upstream(grad[here], weights, chain, scratch)):
            if needs_weights[k]:
                fill(dweights[k], states[k].conj(), dstate, for_weight(chain[k][1]), add=start > 0)
            if needs_x and k == 0:
                spec = for_state(chain[0][1])
                _write(dx[here], contract(dstate, weights[0].conj(), spec, scratch), spec)
    return [dx, *dweights]


@blocked_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    specs: str,
    views: Sequence[int],
    needs: Sequence[bool],
    block: int,
) -> list[Tensor]:
    return [like.new_empty(like.shape if needed else 0) for like, needed in zip((x, *weights), needs, strict=True)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, weights, bias, ctx.specs, ctx.views, _, ctx.block = inputs
    ctx.has_bias, ctx.needs = bias is not None, [tensor.requires_grad for tensor in (x, *weights)]
    ctx.save_for_backward(x, *weights)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], Tensor | None, None, None, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, *weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # the operator has no derivative
        dx, *dweights = differentiable(grad, x, weights, chained(ctx.specs, ctx.views))
    else:
        dx, *dweights = blocked_backward(grad, x, weights, ctx.specs, ctx.views, ctx.needs, ctx.block)
    asked = [g if needed else None for g, needed in zip((dx, *dweights), ctx.needs, strict=True)]
    return asked[0], asked[1:], grad.sum(0) if ctx.has_bias else None, None, None, None, None


blocked.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.blocked)
def _(x: list[int], weights: list[list[int]], *_: object, **__: object) -> int:
    return sum(work(x, weights))


@register_flop_formula(torch.ops.einlinear.blocked_backward)
def _(
    grad: object,
    x: list[int],
    weights: list[list[int]],
    specs: object,
    views: object,
    needs: list[bool],
    *_: object,
    **__: object,
) -> int:
    return backward_work(x, weights, needs)


def _write(out: Tensor, made: Tensor, spec: str) -> None:
    names = names_of(spec)[2]
    if names in TURNED and made.dtype == torch.float32:
        out.copy_(transposed(made.flatten(0, 1)))
        return
    rows = rows_of(made, names)
    out.view(rows.shape).copy_(rows)


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous copy of the transpose of a contiguous float32 matrix, 2 to 3 times as fast as `mT.contiguous()`.

    For a picture of one pixel whose channels lie together, shuffling them in groups is a transposition, and the one
    that torch does with vector instructions.
    """
    rows, columns = matrix.shape
    size = rows * columns
    pixel = matrix.as_strided((1, size, 1, 1), (size, 1, size, size))
    return torch.native_channel_shuffle(pixel, rows).view(columns, rows)
