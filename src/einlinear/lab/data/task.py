"""What a task is: data handed out as pure functions of (step, size, seed), with a fingerprint."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

# Part of every fingerprint: change it whenever the same files would give other tokens, splits or examples.
RULES = "1"

RESIDENT = 2**32  # bytes of tokens up to which an accelerator keeps them


@dataclass(frozen=True, eq=False)
class Sequences:
    """Next-token prediction on one long sequence of tokens.

    `train` and `validation` are 1-D integer tensors (possibly memory-mapped) with values below `vocabulary`.
    Windows start anywhere, or, where `record` is given, only at multiples of it: one image is one record.

    Raises ValueError where either part is too short for one window of `context + 1` tokens.
    """

    name: str
    description: str
    fingerprint: str
    vocabulary: int
    context: int
    train: Tensor
    validation: Tensor
    limit: int  # most validation tokens that one evaluation predicts (at least one window)
    record: int | None = None

    def __post_init__(self) -> None:
        shortest = min(len(self.train), len(self.validation))
        if shortest <= self.context:
            shorter = f", or a context of at most {shortest - 1}" if shortest > 1 else ""
            raise ValueError(
                f"The corpus of the task {self.name!r} is too small: {len(self.train)} tokens to train and "
                f"{len(self.validation)} to validate, where a context of {self.context} needs "
                f"{self.context + 1} in each. Give it more data{shorter}."
            )

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, both int64 [size, context]; targets are one token ahead."""
        stride = self.record or 1
        count = (len(self.train) - self.context - 1) // stride + 1
        starts = random_stream("batch", seed, step).integers(0, count, size)
        return self._windows(self.train, sent(torch.from_numpy(starts) * stride, self.train.device))

    def on(self, device: torch.device) -> Self:
        """The same task with its tokens on a device, so that a step sends no more than where its windows start.

        Tokens that are too many (4 GB) stay where they are, and windows are sent as they are asked for.
        """
        if self.train.nbytes > RESIDENT:
            return self
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed validation set in batches as from `batch`, the last one possibly smaller.

        No token is predicted twice. Where there are more than `limit` tokens, the windows are spread evenly
        over the whole validation part, not taken from its beginning.
        """
        stride = self.record or self.context
        available = (len(self.validation) - self.context - 1) // stride + 1
        count = min(available, max(1, self.limit // self.context))
        starts = torch.arange(count, device=self.validation.device) * available // count * stride
        for part in torch.split(starts, size):
            yield self._windows(self.validation, part)

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = tokens[starts[:, None] + torch.arange(self.context + 1, device=starts.device)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Sampler(Protocol):
    """How training examples are drawn."""

    def __call__(self, random: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of so many examples, augmentation included."""

    def on(self, device: torch.device) -> Self:
        """The same examples, made on a device: the numbers are drawn where they always are, and sent."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Vectors in; a class ("cross-entropy") or a vector ("mean squared error") out.

    Inputs are float32 [size, d_in], standardised. Targets are int64 [size] with values below `d_out`, or
    float32 [size, d_out]. `sample(random, size)` draws a training batch.
    """

    name: str
    description: str
    fingerprint: str
    d_in: int
    d_out: int
    loss: Literal["cross-entropy", "mean squared error"]
    sample: Sampler
    validation: tuple[Tensor, Tensor]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step."""
        return self.sample(random_stream("batch", seed, step), size)

    def on(self, device: torch.device) -> Self:
        """The same task with its examples made on a device."""
        inputs, targets = self.validation
        return replace(self, sample=self.sample.on(device), validation=(inputs.to(device), targets.to(device)))

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed validation set, never augmented, in batches; the last one may be smaller."""
        inputs, targets = self.validation
        yield from zip(torch.split(inputs, size), torch.split(targets, size), strict=True)


Task = Sequences | Examples


@lru_cache(maxsize=1)  # the trunks of a sweep share a task
def placed(task: Task, device: torch.device) -> Task:
    """The task with its data on a device, kept there for the next one who asks."""
    return task.on(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it to arrive."""
    if tensor.is_cuda or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def random_stream(*words: str | int) -> np.random.Generator:
    """An independent stream for each sequence of words: nothing depends on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def held_out(identities: Sequence[bytes], sizes: Sequence[int], share: float, data_seed: int) -> Tensor:
    """Which items are for validation, bool [items]: by hash of identity, until `share` of all is reached.

    Items in the order of their hashes rather than each by its own hash, so that a few items are never split
    into all and nothing.
    """
    salt = f"{data_seed}/".encode()
    order = sorted(range(len(sizes)), key=lambda item: hashlib.sha256(salt + identities[item]).digest())
    held = torch.zeros(len(sizes), dtype=torch.bool)
    wanted, taken = share * sum(sizes), 0
    for item in order:
        if taken >= wanted:
            break
        held[item] = True
        taken += sizes[item]
    return held


def fingerprint(name: str, limit: int, *parts: str | Tensor) -> str:
    """16 hexadecimal digits of everything that settles the data, its split and its validation set."""
    digest = hashlib.sha256(f"{RULES}/{name}/{limit}".encode())
    for part in parts:
        content = part.encode() if isinstance(part, str) else part.contiguous().view(torch.uint8).numpy().data
        digest.update(f"/{len(content)}/".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
