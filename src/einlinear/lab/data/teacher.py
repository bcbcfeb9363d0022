"""Regression onto a fixed random network."""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from einlinear.lab.data.task import Examples, fingerprint, random_stream

SIZES = (8, 256, 256, 256, 256, 256, 256, 1)


def random_teacher(*, data_seed: int = 0, limit: int = 2**13) -> Examples:
    """regression onto a fixed random network of 8 inputs, with endless fresh examples

    The MLP regression of "Searching for Efficient Linear Layers over a Continuous Space of Structured
    Matrices" (Potapczynski et al. 2024, MLP experiments; in the authors' code six hidden ReLU layers, no
    bias, standardised output). Their teacher is 1024 wide; this one is 256, so that on a CPU drawing a batch
    stays cheaper than training on it.
    """
    random = random_stream("teacher", data_seed)
    weights = [
        torch.from_numpy(random.standard_normal((fan_out, fan_in), dtype=np.float32)) / math.sqrt(fan_in)
        for fan_in, fan_out in itertools.pairwise(SIZES)
    ]
    _, raw = _taught(weights, 0.0, 1.0, random_stream("teacher scale", data_seed), 2**14)
    sample = partial(_taught, weights, float(raw.mean()), float(raw.std()))
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


def _taught(
    weights: Sequence[Tensor], mean: float, std: float, random: np.random.Generator, size: int
) -> tuple[Tensor, Tensor]:
    """Standard normal inputs [size, d_in] and what the teacher makes of them [size, d_out]."""
    inputs = torch.from_numpy(random.standard_normal((size, weights[0].shape[1]), dtype=np.float32))
    hidden = inputs
    for weight in weights[:-1]:
        hidden = torch.relu(hidden @ weight.T) * math.sqrt(2)  # keeps the second moment at 1 through ReLU
    return inputs, (hidden @ weights[-1].T - mean) / std
