"""Memory that a thread keeps from one call to the next: to ask the system for new pages takes as long as all else."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


class Scratch:
    """Memory for what is made of a block: the next block is made in the same, which then is in cache.

    A thread keeps it for the next call, a few states of one block.
    """

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.used = 0

    @classmethod
    def of(cls, like: Tensor) -> "Scratch":
        """This thread's, for numbers like these, all of it free."""
        if type(like) is not Tensor and type(like) is not Parameter:
            return cls()
        kept: Scratch = vars(_KEPT).setdefault(f"{like.device} {like.dtype}", cls())
        kept.restart()
        return kept

    def restart(self) -> None:
        """Gives all of it free."""
        self.used = 0

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if self.used == len(self.pieces):
            self.pieces.append(_memory(like, size))
        elif self.pieces[self.used].numel() < size:
            self.pieces[self.used] = _memory(like, size)
        self.used += 1
        return self.pieces[self.used - 1][:size].view(shape)


_KEPT = threading.local()


def _memory(like: Tensor, size: int) -> Tensor:
    with torch.inference_mode(False):  # or it could not be written to outside of the inference_mode() it was made in
        return torch.empty(size, dtype=like.dtype, device=like.device)
