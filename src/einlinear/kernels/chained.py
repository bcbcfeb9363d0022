"""A chain of contractions as operators take it, in strings and integers: its states, their gradients, and its work."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from einlinear.kernels.pairwise import fill, pairwise
from einlinear.kernels.scratch import Scratch

TURNED, SLICED = ("bkm", "bnm"), ("bmk", "bmn")
"""Orders of the axes of an input or an output, which lies as "mbk" or "mbn": tokens last, or slices first."""

Chained = list[tuple[tuple[int, ...], str]]
"""The view and the spec of each link."""


def differentiable(grad: Tensor, x: Tensor, weights: Sequence[Tensor], chain: Chained) -> list[Tensor]:
    """All gradients by operators that have derivatives, over all tokens at once."""
    states, dstates = states_of(x, weights, chain), upstream(grad, weights, chain)
    dx = rows_of(pairwise(dstates[0], weights[0].conj(), for_state(chain[0][1])), for_state(chain[0][1]))
    pieces = zip(states, dstates, chain, strict=True)
    return [
        dx.reshape(x.shape),
        *(pairwise(state.conj(), dstate, for_weight(spec)) for state, dstate, (_, spec) in pieces),
    ]


def work(x: Sequence[int], weights: Sequence[Sequence[int]]) -> list[int]:
    """FLOPs of each link."""
    found, (tokens, features) = [], x
    for *_, made, summed in weights:
        found.append(2 * tokens * features * made)
        features = features // summed * made
    return found


def backward_work(x: Sequence[int], weights: Sequence[Sequence[int]], needs: Sequence[bool]) -> int:
    """The states again, the gradient of each, and those of the input and weights that are asked for."""
    parts = work(x, weights)
    asked = sum(part for part, needed in zip((parts[0], *parts), needs, strict=True) if needed)
    return sum(parts[:-1]) + sum(parts[1:]) + asked


def chained(specs: str, views: Sequence[int]) -> Chained:
    """The links again, of what the operator was given."""
    chain, position = [], 0
    for spec in specs.split(";"):
        length = spec.index(",")
        chain.append((tuple(views[position : position + length]), spec))
        position += length
    return chain


def states_of(x: Tensor, weights: Sequence[Tensor], chain: Chained, scratch: Scratch | None = None) -> list[Tensor]:
    """What each link reads."""
    states = [read(x, chain[0][0], chain[0][1].partition(",")[0], scratch)]
    for weight, (_, spec), (view, _) in zip(weights[:-1], chain[:-1], chain[1:], strict=True):
        states.append(contract(states[-1], weight, spec, scratch).reshape(view))
    return states


def upstream(grad: Tensor, weights: Sequence[Tensor], chain: Chained, scratch: Scratch | None = None) -> list[Tensor]:
    """The gradient of what each link makes."""
    found: list[Tensor] = []
    for k in reversed(range(len(chain))):
        view, spec = chain[k]
        _, names_weight, names = names_of(spec)
        size = {"m": -1, "b": -1, "q": view[-1], **dict(zip(names_weight, weights[k].shape, strict=True))}
        if not found:
            lies = "mbn" if names in (*TURNED, *SLICED) else names
            found = [read(grad, tuple(size[name] for name in lies), names, scratch)]
        else:
            made = contract(found[0], weights[k + 1].conj(), for_state(chain[k + 1][1]), scratch)
            found = [made.reshape([size[name] for name in names]), *found]
    return found


def contract(a: Tensor, b: Tensor, spec: str, scratch: Scratch | None) -> Tensor:
    """In `scratch`, or where there is none differentiably."""
    if scratch is None:
        made: Tensor = pairwise(a, b, spec)
        return made
    return fill(scratch.empty(a, shape_of(a, b, spec)), a, b, spec)


def shape_of(a: Tensor, b: Tensor, spec: str) -> list[int]:
    """Of what `spec` makes."""
    return [(a, b)[operand].shape[axis] for operand, axis in _sources(spec)]


def read(tokens: Tensor, view: tuple[int, ...], names: str, scratch: Scratch | None) -> Tensor:
    """`tokens`, `[tokens, features]`, with axes as `names` says; `view` is how they lie, tokens first."""
    if names in TURNED:
        turned = tokens.mT.contiguous() if scratch is None else scratch.empty(tokens, tokens.mT.shape).copy_(tokens.mT)
        return turned.view(*view[1:], len(tokens))
    return tokens.reshape(view).transpose(0, 1) if names in SLICED else tokens.reshape(view)


def rows_of(made: Tensor, names: str) -> Tensor:
    """The inverse of `read`, tokens first."""
    if names in TURNED:
        return made.flatten(0, 1).mT
    return made.transpose(0, 1) if names in SLICED else made


@lru_cache
def _sources(spec: str) -> list[tuple[int, int]]:
    """For each axis of the result, an operand that has it and where."""
    state, weight, result = names_of(spec)
    return [(0, state.index(name)) if name in state else (1, weight.index(name)) for name in result]


@lru_cache
def for_state(spec: str) -> str:
    """The contraction that makes the gradient of the state; of one that lies as "mbk", slice by slice."""
    state, weight, result = names_of(spec)
    return f"{result},{weight}->{'bmk' if state == 'mbk' else state}"


@lru_cache
def for_weight(spec: str) -> str:
    """The contraction that makes the gradient of the weight."""
    state, weight, result = names_of(spec)
    return f"{state},{result}->{weight}"


@lru_cache
def names_of(spec: str) -> tuple[str, str, str]:
    operands, result = spec.split("->")
    state, weight = operands.split(",")
    return state, weight, result
