"""Layers of two factors that read the same input: their first factors in one launch, a few tokens in one altogether."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from einlinear.clock import AGAIN
from einlinear.kernels.chain import follow, through
from einlinear.kernels.pair import pair
from einlinear.links import INTO, OUT_OF, Link, links
from einlinear.structure import Structure


@dataclass(frozen=True)
class Shared:
    """Layers whose first links, and then second links, are these."""

    firsts: tuple[Link, ...]
    seconds: tuple[Link, ...]

    def __call__(self, factors: Sequence[Sequence[Tensor]], x: Tensor, biases: Sequence[Tensor] = ()) -> list[Tensor]:
        """Applies every layer, given by its factors, to `x`, `[..., d_in]`; `biases` are none or one a layer."""
        rows = x.reshape(-1, x.shape[-1])
        first = [each[0].reshape(link.weight) for each, link in zip(factors, self.firsts, strict=True)]
        second = [each[1].reshape(link.weight) for each, link in zip(factors, self.seconds, strict=True)]
        if rows.numel() <= AGAIN:
            ys = pair(rows, first, second, list(biases))
        else:
            states = through(self.firsts, rows, first)
            added: Sequence[Tensor | None] = biases or [None] * len(first)
            ends = zip(self.seconds, states, second, added, strict=True)
            ys = [follow(link, state, factor, len(rows), bias, True) for link, state, factor, bias in ends]
        widths = [math.prod(link.weight[:2]) for link in self.seconds]
        return [y.reshape(*x.shape[:-1], width) for y, width in zip(ys, widths, strict=True)]


def share(structures: Sequence[Structure]) -> Shared | str:
    """How canonical structures share an input, or why they cannot."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    pairs: list[tuple[Link, Link]] = []
    for structure in structures:
        chain = links(structure)
        if isinstance(chain, str):
            return f"{structure}: {chain}"
        if structure.pad_in or structure.pad_out:
            return f"{structure} is padded"
        if [(link.spec, link.tiled) for link in chain] != [(INTO, True), (OUT_OF, True)]:
            return f"{structure} is not made of two block-diagonal factors of small blocks"
        pairs.append((chain[0], chain[1]))
    firsts, seconds = zip(*pairs, strict=True)
    if len({link.view for link in firsts}) > 1:
        return "they cut the input into different blocks"
    return Shared(tuple(firsts), tuple(seconds))
