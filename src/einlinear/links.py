"""How a structure becomes a chain of matmuls, each reading its input where the last one left it; no tensor needed."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise as neighbours

from einlinear.structure import Axes, Step, Structure

TOKENS = "tokens"

INTO, OUT_OF = "mbk,bnk->bnm", "kbm,bnk->mbn"
"""The two stages of a two-factor layer, as contractions of tokens m, slices b, summed features k and new ones n."""

STAGES = (INTO, OUT_OF, "kbm,bnk->bnm", "mbk,bnk->mbn")
"""The contractions that are block-diagonal stages."""

LARGEST = 128
"""The side of the largest block that one tile holds: its gradient is summed in the registers of one program."""


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
        """Whether it is a stage with blocks that one tile holds. Below 8 a tile would be mostly padding."""
        sides = self.weight[1:]
        return self.spec in STAGES and min(sides) >= 8 and max(sides) <= LARGEST


@lru_cache(maxsize=4096)
def links(structure: Structure) -> tuple[Link, ...] | str:
    """The chain of a canonical structure, or why there is none without a copy."""
    if structure.routed:
        return "its routed axis takes a gate"
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
