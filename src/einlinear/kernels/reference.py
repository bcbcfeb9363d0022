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


class Rows(Kernel):
    """Every step as one matmul of torch's own, whose rows are tokens; copies where the next step needs another order.

    It has no operator to start, forward or backward, which counts where tokens are few, and can be transformed by
    `torch.func` and exported to other runtimes.
    """

    name: ClassVar = "rows"

    def prepare(self, structure: Structure) -> "RowsRunner":
        lies: Axes = (TOKENS, *structure.x)
        steps = []
        for step, shape in zip(structure.steps, structure.matrix_shapes, strict=True):
            wanted = (*step.batch, TOKENS, *step.passive, *step.summed)
            inner = structure.size(step.inner)
            slices, summed = shape[0] // inner, shape[2]
            steps.append(Step((_view(structure, lies), _order(lies, wanted)), inner, slices, summed))
            lies = (*step.batch, TOKENS, *step.passive, *step.new)
        last = _view(structure, lies), _order(lies, (TOKENS, *structure.y))
        return RowsRunner(tuple(steps), last, structure.size(structure.y))


Reordered = tuple[tuple[int, ...], tuple[int, ...]]
"""The sizes of the axes of a state as it lies, -1 for the tokens, and the order to bring them in."""


@dataclass(frozen=True)
class Step:
    """The state, reordered, is `[slices, rows, summed]`; the factor `[inner * slices, made, summed]`."""

    state: Reordered
    inner: int
    slices: int
    summed: int


@dataclass(frozen=True)
class RowsRunner:
    """The steps, and how the last state becomes `[tokens, width]`."""

    steps: tuple[Step, ...]
    last: Reordered
    width: int

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        state = x
        for step, factor in zip(self.steps, factors, strict=True):
            view, order = step.state
            state = state.reshape(view).permute(order)
            if step.inner > 1:
                factor = factor.reshape(step.inner, step.slices, -1, step.summed).sum(0)
            weight = factor.reshape(step.slices, -1, step.summed)
            if step.slices > 1:
                state = torch.bmm(state.reshape(step.slices, -1, step.summed), weight.mT)
            else:
                state = torch.nn.functional.linear(state.reshape(-1, step.summed), weight[0])
        view, order = self.last
        state = state.reshape(view).permute(order).reshape(-1, self.width)
        return state if bias is None else state + bias


def _view(structure: Structure, axes: Axes) -> tuple[int, ...]:
    return tuple(-1 if axis == TOKENS else structure.sizes[axis] for axis in axes)


def _order(have: Axes, want: Axes) -> tuple[int, ...]:
    return tuple(have.index(axis) for axis in want)


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
