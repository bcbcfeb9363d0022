"""One contraction of two tensors whose result is written where the next one can read it.

`torch.einsum` computes the same, but leaves its result in the order of the matmul it chose: the
step after it must then copy. Here the result's memory order is part of the request, and is reached
by strides, so that a chain of block-diagonal maps runs without a transposition (docs/kernels.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LONG, ALIGNED, CUTS = 256, 16, ("cuda",)
"""Axes longer than the first are cut where they are no multiple of the second, on devices of these kinds."""


@torch.library.custom_op("einlinear::pairwise", mutates_args=())
def pairwise(a: Tensor, b: Tensor, spec: str) -> Tensor:
    """`torch.einsum(spec, a, b)` as one contiguous tensor, by one strided batched matmul where there is one.

    Args:
        a: tensor of the axes named first in `spec`, any strides.
        b: tensor of the axes named second.
        spec: such as `"mgk,gnk->gnm"`: one letter an axis. No letter may stand in one operand alone.

    The derivatives of a contraction are contractions: the op is its own backward, to any order.
    """
    return fill(_empty(a, b, spec), a, b, spec)


def plain(a: Tensor, b: Tensor, spec: str) -> Tensor:
    """The same by torch's own matmuls alone, which start sooner; the result may lie in another order in memory."""
    product = _product(spec)
    if product is None:
        return torch.einsum(spec, a, b)
    left, right = _view(a, *product.left), _view(b, *product.right)
    if product.turned:
        left, right = right, left
    # matmul repeats an operand without a batch, and looks longer for what to do
    whole = left.ndim == 3 and left.shape[0] == right.shape[0]
    return (torch.bmm(left, right) if whole else left @ right).permute(product.back)


def fill(out: Tensor, a: Tensor, b: Tensor, spec: str, add: bool = False) -> Tensor:
    """Writes the contraction into `out`, whose strides are its own affair, or adds it to what is there."""
    if _product(spec) is None:
        made = torch.einsum(spec, a, b)
        return out.add_(made) if add else out.copy_(made)
    letter = _odd(a, spec, _sizes(spec, a.shape, b.shape)) if a.device.type in CUTS else None
    if letter is None:
        _multiply(a, b, out, spec, add)
        return out
    # In two parts, the first of an aligned length: benchmarks/NOTES.md.
    names, count = _names(spec), _sizes(spec, a.shape, b.shape)[letter]
    for start, length in ((0, count - count % ALIGNED), (count - count % ALIGNED, count % ALIGNED)):
        parts = [
            tensor.narrow(axes.index(letter), start, length) if letter in axes else tensor
            for tensor, axes in zip((a, b, out), names, strict=True)
        ]
        _multiply(parts[0], parts[1], parts[2], spec, add or (letter not in names[2] and start > 0))
    return out


@pairwise.register_fake
def _(a: Tensor, b: Tensor, spec: str) -> Tensor:
    return _empty(a, b, spec)


def _setup_context(ctx: object, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    a, b, ctx.spec = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(a, b)  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors  # type: ignore[attr-defined]
    names_a, names_b, names_out = _names(ctx.spec)  # type: ignore[attr-defined]
    needs_a, needs_b, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_a = pairwise(grad, b.conj(), f"{names_out},{names_b}->{names_a}") if needs_a else None
    grad_b = pairwise(a.conj(), grad, f"{names_a},{names_out}->{names_b}") if needs_b else None
    return grad_a, grad_b, None


pairwise.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.pairwise)
def _(a: list[int], b: list[int], spec: str, **_: object) -> int:
    return 2 * math.prod(_sizes(spec, a, b).values())


def _multiply(a: Tensor, b: Tensor, out: Tensor, spec: str, add: bool = False) -> None:
    """Fills `out`, or adds to it."""
    left, right, result = operands(a, b, out, spec)
    if add:
        (torch.baddbmm if left.ndim == 3 else torch.addmm)(result, left, right, out=result)
    else:
        (torch.bmm if left.ndim == 3 else torch.mm)(left, right, out=result)


def operands(a: Tensor, b: Tensor, out: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the three tensors, of which the one matmul that `spec` is makes the third of the first two."""
    product = _product(spec)
    assert product is not None, f"{spec} is no matmul"
    left, right = _view(a, *product.left), _view(b, *product.right)
    if product.turned:
        left, right = right, left
    if left.ndim == 3 and len(left) != len(right):
        count = len(left) if len(right) == 1 else len(right)
        left, right = left.expand(count, -1, -1), right.expand(count, -1, -1)
    return left, right, _view(out, *product.made)


def _odd(like: Tensor, spec: str, size: dict[str, int]) -> str | None:
    """The letter of a long axis, innermost in some tensor, whose length would put rows at odd addresses."""
    if like.device.type not in CUTS:
        return None
    innermost = {names[-1] for names in _names(spec)}
    return next((name for name in size if name in innermost and size[name] > LONG and size[name] % ALIGNED), None)


def _empty(a: Tensor, b: Tensor, spec: str) -> Tensor:
    """Memory for the result; the rows of an odd axis begin at aligned addresses."""
    size, (_, _, names) = _sizes(spec, a.shape, b.shape), _names(spec)
    shape = [size[name] for name in names]
    if _odd(a, spec, size) == names[-1]:
        return a.new_empty([*shape[:-1], -(-shape[-1] // ALIGNED) * ALIGNED])[..., : shape[-1]]
    return a.new_empty(shape)


@lru_cache
def _names(spec: str) -> tuple[str, str, str]:
    operands, result = spec.split("->")
    first, second = operands.split(",")
    return first, second, result


def _sizes(spec: str, a: Sequence[int], b: Sequence[int]) -> dict[str, int]:
    names_a, names_b, _ = _names(spec)
    return {**dict(zip(names_a, a, strict=True)), **dict(zip(names_b, b, strict=True))}


@lru_cache
def _as_matmul(a: str, b: str, out: str) -> tuple[str, str, str, str] | None:
    """The letters (batch, rows, summed, columns) of the one matmul that `spec` is, or None.

    Where an operand has two letters to itself, the first one is a batch that the other operand is
    repeated over, by a stride of zero.
    """
    batch = [name for name in a if name in b and name in out]
    summed = [name for name in a if name in b and name not in out]
    rows = [name for name in a if name not in b]
    columns = [name for name in b if name not in a]
    if not batch and len(rows) == 2:
        batch, rows = rows[:1], rows[1:]
    elif not batch and len(columns) == 2:
        batch, columns = columns[:1], columns[1:]
    if max(map(len, (batch, summed, rows, columns))) > 1 or not (summed and rows and columns):
        return None
    # Of three dimensions, one of the matmul's two must have stride one, in every tensor.
    if batch and any(batch[0] == names[-1] for names in (a, b, out)):
        return None
    return "".join(batch), rows[0], summed[0], columns[0]


@dataclass(frozen=True)
class Product:
    """A matmul of two tensors: the names of each tensor's axes, and their order in it.

    Where `turned`, `right` is multiplied by `left`, so that the result is contiguous as it stands.
    """

    left: tuple[str, str]
    right: tuple[str, str]
    made: tuple[str, str]
    turned: bool
    back: tuple[int, ...]
    """The order of the result's axes that `spec` asks for."""


@lru_cache
def _product(spec: str) -> Product | None:
    """The one matmul that `spec` is."""
    (names_a, names_b, names), matmul = _names(spec), _as_matmul(*_names(spec))
    if matmul is None:
        return None
    batch, rows, summed, columns = matmul
    if turned := names.index(rows) > names.index(columns):
        left, right, made = batch + summed + rows, batch + columns + summed, batch + columns + rows
    else:
        left, right, made = batch + rows + summed, batch + summed + columns, batch + rows + columns
    back = tuple(made.index(name) for name in names)
    return Product((names_a, left), (names_b, right), (names, made), turned, back)


def _view(tensor: Tensor, names: str, order: str) -> Tensor:
    """`tensor` with its axes in `order`; an axis it does not have is one of size 1."""
    missing, places = _places(names, order)
    return tensor[(None,) * missing].permute(places) if missing else tensor.permute(places)


@lru_cache
def _places(names: str, order: str) -> tuple[int, tuple[int, ...]]:
    """How many axes are missing, and where each one of `order` is after them."""
    missing = [name for name in order if name not in names]
    names = "".join(missing) + names
    return len(missing), tuple(names.index(name) for name in order)
