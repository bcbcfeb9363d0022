"""The two ways that run every structure: the reference contraction, and the matrix it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from einlinear.contract import equation
from einlinear.kernels.kernel import Kernel
from einlinear.kernels.product import Product, product, product_of
from einlinear.links import TOKENS
from einlinear.structure import Axes, Structure


class Reference(Kernel):
    """One `torch.einsum` for each factor. It copies where the next factor needs another order."""

    name: ClassVar = "reference"

    def prepare(self, structure: Structure) -> "EinsumRunner":
        equations = tuple(
            equation(structure, [step.state, step.factor], step.result, [True, False]) for step in structure.steps
        )
        return EinsumRunner(
            equations, structure.shape(structure.x), structure.factor_shapes, structure.size(structure.y)
        )


@dataclass(frozen=True)
class EinsumRunner:
    """The einsum equations of all steps, with the shapes of the input and of the factors."""

    equations: tuple[str, ...]
    input: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    width: int

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        state = x.reshape(-1, *self.input)
        for step, factor, shape in zip(self.equations, factors, self.factors, strict=True):
            state = torch.einsum(step, state, factor.reshape(shape))
        state = state.reshape(-1, self.width)
        return state if bias is None else state + bias


@dataclass(frozen=True)
class MatmulRunner:
    """Every step as one matmul of torch, copying where it must: what can be transformed, and exported to runtimes."""

    structure: Structure

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        structure = self.structure
        state = x.reshape(-1, *structure.shape(structure.x))
        for step, factor, shape in zip(structure.steps, factors, structure.matrix_shapes, strict=True):
            slices, made, summed = structure.size(step.batch), *shape[1:]
            weight = factor.reshape(structure.size(step.inner), slices, made, summed).sum(0)
            order = (*step.batch, TOKENS, *step.passive, *step.summed)
            state = _ordered(state, (TOKENS, *step.state), order).reshape(slices, -1, summed)
            state = torch.matmul(state, weight.mT) if slices > 1 else torch.matmul(state[0], weight[0].mT)
            made_order = (*step.batch, TOKENS, *step.passive, *step.new)
            state = state.reshape([-1 if axis == TOKENS else structure.sizes[axis] for axis in made_order])
            state = _ordered(state, made_order, (TOKENS, *step.result))
        state = state.reshape(-1, structure.size(structure.y))
        return state if bias is None else state + bias


def _ordered(tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    return tensor.permute([have.index(axis) for axis in want])


class Materialised(Kernel):
    """The whole matrix W, made from the factors and applied by one dense matmul.

    Cheaper only where the structure costs more than dense per token, and there are enough tokens
    to pay for making W.
    """

    name: ClassVar = "materialised"

    def prepare(self, structure: Structure) -> "MaterialisedRunner":
        rows, columns = structure.size(structure.x), structure.size(structure.y)
        made = product_of(structure) if find_spec("triton") else None
        return MaterialisedRunner(
            Reference().prepare(structure), _product(structure), structure.factor_shapes, rows, columns, made
        )


@dataclass(frozen=True)
class MaterialisedRunner:
    """Makes W, then applies it.

    On a GPU by one kernel where W is such a `made` product, else by the equation `product`, or where
    there is none by applying `runner` to the identity.
    """

    runner: EinsumRunner
    product: str | None
    factors: tuple[tuple[int, ...], ...]
    rows: int
    columns: int
    made: Product | None = None

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.product is None:
            weight = self.runner(factors, torch.eye(self.rows, dtype=x.dtype, device=x.device)).mT
        else:
            shaped = [factor.reshape(shape) for factor, shape in zip(factors, self.factors, strict=True)]
            if self.made is not None and x.is_cuda:
                left, right = shaped
                strides = [*self.made.strides[0], *self.made.strides[1]]
                return torch.nn.functional.linear(x, product(left, right, self.made.sizes, strides), bias)
            weight = torch.einsum(self.product, *shaped).reshape(self.columns, self.rows)
        return torch.nn.functional.linear(x, weight, bias)


def _product(structure: Structure) -> str | None:
    """The einsum equation of W as the product of two factors, where that is one: no axis lies on both sides of W."""
    if len(structure.factors) != 2 or {*structure.x} & {*structure.y} or any(step.inner for step in structure.steps):
        return None
    return equation(structure, structure.factors, (*structure.y, *structure.x), [False, False])
