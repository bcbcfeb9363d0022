"""Reverse sparsification: a structured model in training becomes the dense one that computes the same.

Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
https://arxiv.org/abs/2204.00595: structured for most of the training, dense to finish.
"""

from dataclasses import replace

import torch
from torch import nn

from einlinear.contract import dense
from einlinear.lab.checkpoint import State
from einlinear.layer import Linear


def multiplied_out(state: State, model: nn.Module) -> State:
    """The state of the dense model that computes what `model` computes in `state`.

    The weights of its structured layers are the products of their factors. What the optimizer knew of factors says
    nothing of their product, so it starts anew there; everything else is kept.

    Raises:
        ValueError: for a model with experts, whose layers are no linear maps.
    """
    tensors = dict(state.tensors)
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear):
            continue
        if layer.structure.routed:
            raise ValueError(
                f"Finishing dense from {layer.structure!r}: with experts it is another map for each token; "
                f"leave finish_dense out, or train a structure without experts."
            )
        count = len(layer.factors)
        factors = [tensors.pop(f"model.{name}.factors.{k}") for k in range(count)]
        weight = dense(layer.structure, factors)[None].contiguous()
        tensors[f"model.{name}.factors.0"] = weight
        for k in range(count):
            slots = f"optimizer.{name}.factors.{k}."
            for key in [key for key in tensors if key.startswith(slots)]:
                old = tensors.pop(key)
                new = torch.zeros_like(weight if old.ndim else old)
                tensors[f"optimizer.{name}.factors.0.{key.removeprefix(slots)}"] = new
    return replace(state, tensors=tensors)
