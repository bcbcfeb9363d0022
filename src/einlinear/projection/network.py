"""Sums over products of many tensors, two at a time in a cheap order."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from einlinear.structure import Axes

EXHAUSTIVE = 7
"""Up to so many tensors every order is weighed; beyond, the pair whose product is smallest goes first."""

Path = tuple[tuple[int, int], ...]


def contract(operands: Sequence[Axes], tensors: Sequence[Tensor], result: Axes) -> Tensor:
    """The product of `tensors`, summed over the axes that `result` lacks, with the axes of `result` in order.

    An axis that stands twice in one operand means its diagonal. Intermediate results are at most as
    many entries as the cheapest order of pairs needs.
    """
    work = [_diagonal(axes, tensor) for axes, tensor in zip(operands, tensors, strict=True)]
    sizes = {axis: n for axes, tensor in work for axis, n in zip(axes, tensor.shape, strict=True)}
    for a, b in _path(tuple(axes for axes, _ in work), result, tuple(sorted(sizes.items()))):
        (left, x), (right, y) = work[a], work[b]
        work = [pair for k, pair in enumerate(work) if k not in (a, b)]
        kept = _kept(left, right, [axes for axes, _ in work], result)
        work.append((kept, _einsum([left, right], [x, y], kept)))
    ((axes, tensor),) = work
    return _einsum([axes], [tensor], result)


def _diagonal(axes: Axes, tensor: Tensor) -> tuple[Axes, Tensor]:
    once = tuple(dict.fromkeys(axes))
    return once, tensor if once == axes else _einsum([axes], [tensor], once)


def _einsum(operands: Sequence[Axes], tensors: Sequence[Tensor], result: Axes) -> Tensor:
    number = {axis: k for k, axis in enumerate(dict.fromkeys(axis for axes in operands for axis in axes))}
    spelled: list[object] = []
    for axes, tensor in zip(operands, tensors, strict=True):
        spelled += [tensor, [number[axis] for axis in axes]]
    found: Tensor = torch.einsum(*spelled, [number[axis] for axis in result])
    return found


def _kept(left: Axes, right: Axes, others: Sequence[Axes], result: Axes) -> Axes:
    """The axes of a product of two that something else still needs."""
    needed = {*result, *(axis for axes in others for axis in axes)}
    return tuple(axis for axis in dict.fromkeys(left + right) if axis in needed)


@lru_cache(maxsize=4096)
def _path(operands: tuple[Axes, ...], result: Axes, sizes: tuple[tuple[str, int], ...]) -> Path:
    """Pairs to contract, each by its places in what is then left; products go to the end."""
    size = dict(sizes)
    if len(operands) <= EXHAUSTIVE:
        return _best(operands, result, size, {})[1]
    path, left = [], list(operands)
    while len(left) > 1:
        pairs = [(a, b) for b in range(len(left)) for a in range(b)]
        growth = {pair: _growth(left, pair, result, size) for pair in pairs}
        a, b = min(pairs, key=lambda pair: growth[pair])
        others = [axes for k, axes in enumerate(left) if k not in (a, b)]
        left = [*others, _kept(left[a], left[b], others, result)]
        path.append((a, b))
    return tuple(path)


def _growth(operands: Sequence[Axes], pair: tuple[int, int], result: Axes, size: Mapping[str, int]) -> int:
    """Entries of the product of a pair, less those of the two."""
    left, right = (operands[k] for k in pair)
    others = [axes for k, axes in enumerate(operands) if k not in pair]
    return _size(_kept(left, right, others, result), size) - _size(left, size) - _size(right, size)


def _best(
    operands: tuple[Axes, ...], result: Axes, size: Mapping[str, int], known: dict[tuple[Axes, ...], tuple[int, Path]]
) -> tuple[int, Path]:
    """The fewest operations and the order that needs them."""
    if len(operands) == 1:
        return 0, ()
    if operands not in known:
        found: tuple[int, Path] | None = None
        for b in range(len(operands)):
            for a in range(b):
                left, right = operands[a], operands[b]
                others = tuple(axes for k, axes in enumerate(operands) if k not in (a, b))
                kept = _kept(left, right, others, result)
                # Writing an entry costs about as much as eight multiply-adds.
                here = _size({*left, *right}, size) + 8 * _size(kept, size)
                if found is None or here < found[0]:
                    after, path = _best((*others, kept), result, size, known)
                    if found is None or here + after < found[0]:
                        found = here + after, ((a, b), *path)
        assert found is not None
        known[operands] = found
    return known[operands]


def _size(axes: Axes | set[str], size: Mapping[str, int]) -> int:
    return math.prod(size[axis] for axis in axes)
