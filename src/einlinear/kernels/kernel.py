"""What a kernel is: one way to apply a structure, which says what it cannot do and what it would cost."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from einlinear.structure import Structure


class Runner(Protocol):
    """Applies one structure; torch.compile traces it, so it holds plain integers and strings."""

    def __call__(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Applies the map to `x`, `[tokens, padded d_in]`; returns `[tokens, padded d_out]`, contiguous."""


class Kernel(ABC):
    """Applies an unrouted structure to tokens, faster than the reference or not at all.

    A refusal is a sentence, never an exception; an exception is a fault and propagates.
    """

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, structure: Structure) -> str | None:
        """Why this kernel cannot run the structure, or None where it can."""

    @abstractmethod
    def cost(self, structure: Structure, tokens: int) -> float:
        """Modelled cost for `tokens` vectors, in FLOPs at the speed of a large matmul."""

    @abstractmethod
    def prepare(self, structure: Structure) -> Runner:
        """All that can be decided from the spec, done once: what is left works on tensors and integers."""
