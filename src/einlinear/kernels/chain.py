"""A structure as a chain of strided matmuls, each reading its input where the last one left it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from einlinear.kernels.kernel import InTriton, Kernel, Runner
from einlinear.kernels.pairwise import pairwise, plain
from einlinear.kernels.stage import narrow, shares, stage
from einlinear.links import Link, chain_of
from einlinear.structure import Structure


def follow(
    link: Link, state: Tensor, factor: Tensor, tokens: int, bias: Tensor | None = None, tiled: bool = False
) -> Tensor:
    """The next state; `bias`, one number for each feature, is added where this is the last link."""
    state, weight = state.reshape(link.view), factor.reshape(link.weight)
    if tiled:
        made: Tensor = stage(state, [weight], bias, link.spec, tokens)[0]
        return made
    state = narrow(state, link.spec.partition(",")[0], tokens)
    if link.spec != "mk,nk->mn":
        state = pairwise(state, weight, link.spec)
    elif bias is None or len(bias) == link.weight[0]:
        return torch.nn.functional.linear(state, weight, bias)
    else:  # the link is repeated over axes that are not its own
        state = torch.nn.functional.linear(state, weight)
    return state if bias is None else state.reshape(-1, len(bias)) + bias


def through(chained: Sequence[Link], x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The first links of several chains that read the same `x`, `[tokens, d_in]`: in one launch where blocks fit."""
    weights = [factor.reshape(link.weight) for link, factor in zip(chained, factors, strict=True)]
    alike = len({(link.view, link.spec) for link in chained}) == 1
    if alike and all(link.tiled for link in chained) and shares(weights):
        made: list[Tensor] = stage(x.reshape(chained[0].view), weights, None, chained[0].spec, len(x))
        return made
    return [follow(link, x, weight, len(x), tiled=link.tiled) for link, weight in zip(chained, weights, strict=True)]


class Chain(Kernel):
    """Every factor one (batched) matmul, without a copy in between (docs/kernels.md).

    The state between two factors is kept with tokens innermost wherever the next factor is
    block-diagonal: the axes that it sums over and those it repeats over then each are one stride.
    """

    name: ClassVar = "chain"

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        return ChainRunner(chain, structure.size(structure.y), extra=_extra(chain))


class Tiles(InTriton, Chain):
    """A chain whose block-diagonal links of small blocks are Triton kernels (`einlinear.kernels.stage`).

    The forward moves the same bytes as `Chain`; the backward reads each of them once, and not
    once for each gradient.
    """

    name: ClassVar = "tiles"

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        tiled = tuple(position for position, link in enumerate(chain) if link.tiled)
        return ChainRunner(chain, structure.size(structure.y), tiled, _extra(chain))


class Columns(Chain):
    """The chain by torch's own matmuls, whose columns are tokens wherever the next link reads them so.

    The state between factors is not copied; the result is, and gradients are.
    """

    name: ClassVar = "columns"

    def prepare(self, structure: Structure) -> Runner:
        return ColumnsRunner(chain_of(structure), structure.size(structure.y))


@dataclass(frozen=True)
class ColumnsRunner:
    """A chain of `links` that ends in `[tokens, width]`."""

    links: tuple[Link, ...]
    width: int

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        state = x
        for link, factor in zip(self.links, factors, strict=True):
            state, weight = state.reshape(link.view), factor.reshape(link.weight)
            linear = link.spec == "mk,nk->mn"
            state = torch.nn.functional.linear(state, weight) if linear else plain(state, weight, link.spec)
        state = state.reshape(-1, self.width)
        return state if bias is None else state + bias


@dataclass(frozen=True)
class ChainRunner:
    """A chain of `links` that ends in `[tokens, width]`; those at the positions `tiled` as Triton kernels.

    `extra` features of zeros follow what each link makes, on a GPU in 16 bits: there, rows at odd
    addresses are read four times as slowly (benchmarks/NOTES.md).
    """

    links: tuple[Link, ...]
    width: int
    tiled: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        if any(self.extra) and x.is_cuda and x.element_size() == 2:
            return self._widened(factors, x, bias)
        state, last = x, len(self.links) - 1
        for position, (link, factor) in enumerate(zip(self.links, factors, strict=True)):
            added = bias if position == last else None
            state = follow(link, state, factor, len(x), added, position in self.tiled)
        return state.reshape(-1, self.width)

    def _widened(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """Links that are plain matrices, with zeros around them."""
        state, before = x, 0
        for position, (link, factor, after) in enumerate(zip(self.links, factors, self.extra, strict=True)):
            weight = torch.nn.functional.pad(factor.reshape(link.weight), (0, before, 0, after))
            state = torch.nn.functional.linear(state, weight, bias if position == len(self.links) - 1 else None)
            before = after
        return state


def _extra(chain: Sequence[Link]) -> tuple[int, ...]:
    """How many features to add to what each link makes; only where all are plain matrices, as in a low rank."""
    if any(link.spec != "mk,nk->mn" or link.view[1:] != link.weight[1:] for link in chain):
        return ()
    return (*(-link.weight[0] % 8 for link in chain[:-1]), 0)
