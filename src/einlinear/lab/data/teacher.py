"""Regression onto a fixed random network."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from einlinear.lab.data.task import Examples, fingerprint, random_stream, sent

SIZES = (8, 256, 256, 256, 256, 256, 256, 1)


def random_teacher(*, data_seed: int = 0, limit: int = 2**13) -> Examples:
    """regression onto a fixed random network of 8 inputs, with endless fresh examples

    The MLP regression of "Searching for Efficient Linear Layers over a Continuous Space of Structured
    Matrices" (Potapczynski et al. 2024, MLP experiments; in the authors' code six hidden ReLU layers, no
    bias, standardised output). Their teacher is 1024 wide; this one is 256, so that on a CPU drawing a batch
    stays cheaper than training on it.
    """
    random = random_stream("teacher", data_seed)
    weights = tuple(
        torch.from_numpy(random.standard_normal((fan_out, fan_in), dtype=np.float32)) / math.sqrt(fan_in)
        for fan_in, fan_out in itertools.pairwise(SIZES)
    )
    _, raw = Teacher(weights, 0.0, 1.0)(random_stream("teacher scale", data_seed), 2**14)
    sample = Teacher(weights, float(raw.mean()), float(raw.std()))
    return Examples(
        name="teacher",
        description=f"regression onto a random ReLU network of sizes {SIZES}, standardised output",
        # Of the recipe, not of its float32 results, whose last bits differ between machines.
        fingerprint=fingerprint("teacher", limit, str(SIZES), str(data_seed)),
        d_in=SIZES[0],
        d_out=SIZES[-1],
        loss="mean squared error",
        sample=sample,
        validation=sample(random_stream("teacher validation", data_seed), limit),
    )


@dataclass(frozen=True)
class Teacher:
    """Standard normal inputs [size, d_in] and what a network makes of them, less `mean`, over `std`: [size, d_out]."""

    weights: tuple[Tensor, ...]
    mean: float
    std: float

    def __call__(self, random: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        first, *_, last = self.weights
        drawn = random.standard_normal((size, first.shape[1]), dtype=np.float32)
        inputs = hidden = sent(torch.from_numpy(drawn), first.device)
        for weight in self.weights[:-1]:
            hidden = torch.relu(hidden @ weight.T) * math.sqrt(2)  # keeps the second moment at 1 through ReLU
        return inputs, (hidden @ last.T - self.mean) / self.std

    def on(self, device: torch.device) -> Self:
        """With the network on a device."""
        return replace(self, weights=tuple(weight.to(device) for weight in self.weights))
