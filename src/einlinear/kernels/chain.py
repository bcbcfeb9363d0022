"""A structure as a chain of strided matmuls, each reading its input where the last one left it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise as neighbours
from typing import ClassVar

import torch
from torch import Tensor

from einlinear.kernels.kernel import CPU, Kernel, Runner, Target
from einlinear.kernels.pairwise import pairwise
from einlinear.kernels.stage import LARGEST, SPECS, fits, narrow, shares, stage
from einlinear.structure import Axes, Step, Structure

TOKENS = "tokens"


@dataclass(frozen=True)
class Link:
    """One matmul of a chain: the state is viewed as `view` (-1 for the tokens) and contracted by `spec`.

    `weight` is the factor's shape in `spec`.
    """

    view: tuple[int, ...]
    weight: tuple[int, ...]
    spec: str

    @property
    def tiled(self) -> bool:
        """Whether it is a stage with blocks that one tile holds."""
        return self.spec in SPECS and fits(*self.weight[1:])

    def __call__(
        self, state: Tensor, factor: Tensor, tokens: int, bias: Tensor | None = None, tiled: bool = False
    ) -> Tensor:
        """The next state; `bias`, one number for each feature, is added where this is the last link."""
        state, weight = state.reshape(self.view), factor.reshape(self.weight)
        if tiled:
            made: Tensor = stage(state, [weight], bias, self.spec, tokens)[0]
            return made
        state = narrow(state, self.spec.partition(",")[0], tokens)
        if self.spec != "mk,nk->mn":
            state = pairwise(state, weight, self.spec)
        elif bias is None or len(bias) == self.weight[0]:
            return torch.nn.functional.linear(state, weight, bias)
        else:  # the link is repeated over axes that are not its own
            state = torch.nn.functional.linear(state, weight)
        return state if bias is None else state.reshape(-1, len(bias)) + bias


def through(chained: Sequence[Link], x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The first links of several chains that read the same `x`, `[tokens, d_in]`: in one launch where blocks fit."""
    weights = [factor.reshape(link.weight) for link, factor in zip(chained, factors, strict=True)]
    if len({(link.view, link.spec) for link in chained}) == 1 and all(link.tiled for link in chained):
        if shares(weights):
            made: list[Tensor] = stage(x.reshape(chained[0].view), weights, None, chained[0].spec, len(x))
            return made
    return [link(x, weight, len(x), tiled=link.tiled) for link, weight in zip(chained, weights, strict=True)]


class Chain(Kernel):
    """Every factor one (batched) matmul, without a copy in between (docs/kernels.md).

    The state between two factors is kept with tokens innermost wherever the next factor is
    block-diagonal: the axes that it sums over and those it repeats over then each are one stride.
    """

    name: ClassVar = "chain"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        found = links(structure)
        return found if isinstance(found, str) else None

    def cost(self, structure: Structure, tokens: int, target: Target = CPU) -> float:
        width = 2 if target.half else 4
        total = 0.0
        for step, (slices, made, summed) in zip(structure.steps, structure.matrix_shapes, strict=True):
            weights = slices * made * summed
            work = 2 * weights * structure.size(step.passive)
            moved = width * (structure.size(step.state) + structure.size(step.result))
            each = max(work, moved * target.ridge)
            if step.passive and step.passive[-1] == step.state[-1]:  # one small matmul for each token
                each = max(each, target.tiny)
            total += target.launch + weights * width * target.ridge + tokens * each
        return total

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        return ChainRunner(chain, structure.size(structure.y), extra=_extra(chain))


class Tiles(Chain):
    """A chain whose block-diagonal links of small blocks are Triton kernels (`einlinear.kernels.stage`).

    The forward moves the same bytes as `Chain`; the backward reads each of them once, and not
    once for each gradient.
    """

    name: ClassVar = "tiles"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        if not target.half or target.device != "cuda":
            return "it takes numbers of 16 bits on a CUDA device"
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if refusal := super().refuses(structure, target):
            return refusal
        if not any(link.tiled for link in chain_of(structure)):
            return f"none of its factors has blocks of {LARGEST} x {LARGEST} or smaller"
        return None

    def cost(self, structure: Structure, tokens: int, target: Target = CPU) -> float:
        # Measured on an H200 against Chain, forward and backward together: 15 to 35 % faster.
        return 0.8 * super().cost(structure, tokens, target)

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        tiled = tuple(position for position, link in enumerate(chain) if link.tiled)
        return ChainRunner(chain, structure.size(structure.y), tiled, _extra(chain))


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
            state = link(state, factor, len(x), bias if position == last else None, position in self.tiled)
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


@lru_cache(maxsize=4096)
def links(structure: Structure) -> tuple[Link, ...] | str:
    """The chain of a canonical structure, or why there is none without a copy."""
    if structure.canonical.factors != structure.factors:
        return "its factors are not written in the order batch, new, summed; use structure.canonical"
    if any(step.inner for step in structure.steps):
        return "a factor has an axis to itself, which only a router gives a use"
    steps = structure.steps
    memory: Axes = (TOKENS, *structure.x)
    chain: list[Link] = []
    for step, following in [*neighbours(steps), (steps[-1], None)]:
        found = _link(structure, step, following, memory)
        if isinstance(found, str):
            return f"factor {len(chain)} ({' '.join(step.factor)}): {found}"
        link, memory = found
        chain.append(link)
    if memory != (TOKENS, *structure.y):
        return f"the result would lie in the order {' '.join(memory)}, not {' '.join(structure.y)}"
    return tuple(chain)


def chain_of(structure: Structure) -> tuple[Link, ...]:
    """The chain of a structure that `Chain` does not refuse."""
    chain = links(structure)
    assert not isinstance(chain, str), chain
    return chain


def _link(structure: Structure, step: Step, following: Step | None, memory: Axes) -> tuple[Link, Axes] | str:
    """The matmul of one step on a state whose axes lie in the order `memory`, and the order it leaves."""
    if not step.summed or not step.new:
        return "it sums over nothing or makes nothing, so it is no matmul"
    slices, made, summed = (structure.size(axes) for axes in (step.batch, step.new, step.summed))
    if step.passive:
        if step.batch:
            return "it is repeated over some axes and shared by others; only one of the two is a matmul"
        around = _cut(memory, step.summed)
        if around is None or memory[0] != TOKENS:
            return f"the axes it sums over do not lie together in {' '.join(memory)}"
        before, after = around
        left = (*before, *step.new, *after)
        if not after:
            return Link((-1, summed), (made, summed), "mk,nk->mn"), left
        return Link((-1, summed, structure.size(after)), (made, summed), "bkq,nk->bnq"), left

    order = [axes for axes in ((TOKENS,), step.batch, step.summed) if axes]
    letters = {(TOKENS,): "m", step.batch: "b", step.summed: "k"}
    layouts = {sum(perm, ()): perm for perm in _orders(order)}
    if memory not in layouts:
        return f"the axes it sums over and repeats over do not lie together in {' '.join(memory)}"
    read = layouts[memory]
    view = tuple(-1 if axes == (TOKENS,) else structure.size(axes) for axes in read)
    source = "".join(letters[axes] for axes in read)
    if not step.batch and (following is None or not following.batch):
        weight, target, left = (made, summed), "mn", (TOKENS, *step.new)
        return Link(view, weight, f"{source},nk->{target}"), left
    if not step.batch:
        return Link(view, (made, summed), f"{source},nk->nm"), (*step.new, TOKENS)
    if source[-1] == "b":
        return f"the state ends with the axes it is repeated over, {' '.join(step.batch)}"
    tokens_last = following is not None
    left = (*step.batch, *step.new, TOKENS) if tokens_last else (TOKENS, *step.batch, *step.new)
    return Link(view, (slices, made, summed), f"{source},bnk->{'bnm' if tokens_last else 'mbn'}"), left


def _orders(groups: list[Axes]) -> list[tuple[Axes, ...]]:
    """The ways in which groups of axes may follow each other, with tokens outermost or innermost."""
    tokens, *rest = groups
    ways = [tuple(rest), tuple(rest[::-1])]
    return [(tokens, *way) for way in ways] + [(*way, tokens) for way in ways]


def _cut(axes: Axes, part: Axes) -> tuple[Axes, Axes] | None:
    """What comes before and after the run `part` of `axes`, or None where it is not one run."""
    for start in range(len(axes) - len(part) + 1):
        if axes[start : start + len(part)] == part:
            return axes[:start], axes[start + len(part) :]
    return None
