"""A structure with its factors as an operator, and what it is made of: blocks, permutations, Kronecker products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from einlinear.contract import equation, pad_last
from einlinear.cost import flops
from einlinear.kernels import Plan, plan
from einlinear.operator import Batch, Dense, Identity, Operator, OperatorError, common, product, remembered
from einlinear.operators.composite import BlockDiagonal, kron
from einlinear.operators.selection import Permutation, parity
from einlinear.structure import Axes, Structure


@dataclass(eq=False, repr=False)
class Structured(Operator):
    """The weight matrix of a `Structure`, `[d_out, d_in]`, given by its factors.

    Factors have the shapes `structure.factor_shapes` (or `matrix_shapes`, where the structure is
    canonical) after any batch dimensions.
    """

    structure: Structure
    factors: tuple[Tensor, ...]
    _runner: "Plan | Einsums | None" = field(default=None)

    def __post_init__(self) -> None:
        spec = self.structure
        if spec.routed:
            raise OperatorError(
                f"cannot make an operator of {spec!r}: a routed structure is another matrix for each gate"
            )
        shapes = list(zip(spec.factor_shapes, spec.matrix_shapes, strict=True))
        if len(self.factors) != len(shapes):
            raise OperatorError(
                f"cannot make an operator of {spec!r}: it has {len(shapes)} factors, not {len(self.factors)}"
            )
        canonical = spec == spec.canonical
        if canonical and all(factor.shape == stack for factor, (_, stack) in zip(self.factors, shapes, strict=True)):
            # A layer's factors, as they are stored: one slice is no batch of one.
            self.factors = tuple(factor.reshape(shape) for factor, (shape, _) in zip(self.factors, shapes, strict=True))
        self.factors = tuple(
            _fitted(factor, *wanted, spec, canonical) for factor, wanted in zip(self.factors, shapes, strict=True)
        )
        batched = any(factor.ndim > len(axes) for factor, axes in zip(self.factors, spec.factors, strict=True))
        self._runner = plan(spec) if canonical and not batched else Einsums.of(spec)

    @remembered
    def shape(self) -> torch.Size:
        ranks = [len(axes) for axes in self.structure.factors]
        batches = [factor.shape[: factor.ndim - rank] for factor, rank in zip(self.factors, ranks, strict=True)]
        return torch.Size((*common(*batches), self._runner.d_out, self._runner.d_in))  # type: ignore[union-attr]

    def _matmul(self, x: Tensor) -> Tensor:
        return self._runner(self.factors, x.mT).mT  # type: ignore[misc]

    def _transpose(self) -> "Structured":
        return Structured(self.structure.T, self.factors[::-1])

    @property
    def flops(self) -> float:
        return float(flops(self.structure))

    def expanded(self) -> Operator | None:
        """The same matrix as a composition: a Kronecker product, or a product of permutations and block-diagonals.

        None where padding, or a sum over weights alone, stands in the way.
        """
        recipe = _recipe(self.structure, self.device)
        if recipe is None:
            return None
        if recipe.kronecker is not None:
            return kron(*(Dense(recipe.stages[k].stack(self.factors[k])[..., 0, :, :]) for k in recipe.kronecker))
        factors: list[Operator] = []
        for stage, factor in zip(recipe.stages, self.factors, strict=True):
            stack = stage.stack(factor)
            blocks: Operator = BlockDiagonal(Dense(stack)) if stack.shape[-3] > 1 else Dense(stack[..., 0, :, :])
            unit = Identity(stage.passive, dtype=self.dtype, device=self.device)
            moved = [kron(blocks, unit) if stage.passive > 1 else blocks]
            factors += [self._permutation(stage.before), *moved] if stage.before else moved
            factors += [self._permutation(stage.after)] if stage.after else []
        return product(*reversed(factors))

    def _permutation(self, move: "Move") -> Permutation:
        return Permutation(move.index, move.inverse, move.sign, dtype=self.dtype, device=self.device)

    def _text(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.structure.sizes.items())
        batch = "".join(f"{size}, " for size in self.batch_shape)
        return f"Structured({batch}'{self.structure}', {sizes})"


@dataclass(frozen=True)
class Einsums:
    """One `torch.einsum` for each factor, which may have batch dimensions: what the spec decides, in plain values."""

    equations: tuple[str, ...]
    ranks: tuple[int, ...]
    state: tuple[int, ...]
    d_in: int
    d_out: int
    pad_in: int

    @classmethod
    def of(cls, spec: Structure) -> "Einsums":
        """All that can be decided from the spec."""
        both = [True, True]
        equations = tuple(equation(spec, [step.state, step.factor], step.result, both) for step in spec.steps)
        ranks = (*(len(axes) for axes in spec.factors), len(spec.y))
        return cls(equations, ranks, spec.shape(spec.x), spec.d_in, spec.d_out, spec.pad_in)

    def __call__(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Applies the map to `x`, `[..., k, d_in]`; returns `[..., k, d_out]`."""
        state = pad_last(x, self.pad_in)
        state = state.reshape(*state.shape[:-1], *self.state)
        for text, factor, rank in zip(self.equations, factors, self.ranks[:-1], strict=True):
            lead = factor.ndim - rank
            state = torch.einsum(text, state, factor.unsqueeze(lead) if lead else factor)  # the same for all k
        return state.reshape(*state.shape[: state.ndim - self.ranks[-1]], -1)[..., : self.d_out]


def _fitted(factor: Tensor, shape: Batch, stack: Batch, spec: Structure, canonical: bool) -> Tensor:
    for known in (shape, stack) if canonical else (shape,):
        lead = factor.ndim - len(known)
        if lead >= 0 and tuple(factor.shape[lead:]) == tuple(known):
            return factor.reshape(*factor.shape[:lead], *shape)
    raise OperatorError(
        f"cannot make an operator of {spec!r}: its factors have the shapes {spec.factor_shapes}, "
        f"found one of {tuple(factor.shape)}"
    )


def _kronecker_order(spec: Structure) -> Sequence[int] | None:
    """The factors in the order of a Kronecker product, where the structure is one."""
    steps = spec.steps
    if any(step.batch or not step.new or not step.summed for step in steps):
        return None
    try:
        order = sorted(range(len(steps)), key=lambda k: spec.x.index(steps[k].summed[0]))
    except ValueError:
        return None  # sums over an axis that another factor made
    x, y = (tuple(axis for k in order for axis in getattr(steps[k], side)) for side in ("summed", "new"))
    return order if (x, y) == (spec.x, spec.y) else None


@dataclass(frozen=True)
class Move:
    """A permutation: its index, that of its inverse, and its sign."""

    index: Tensor
    inverse: Tensor
    sign: int


@dataclass(frozen=True)
class Stage:
    """How one factor acts: moved `before` to the order batch, summed, passive; `after` from batch, new, passive."""

    order: tuple[int, ...]
    sides: tuple[int, int, int]
    passive: int
    before: Move | None
    after: Move | None

    def stack(self, factor: Tensor) -> Tensor:
        """The factor as `[..., slices, out, in]`."""
        rank = len(self.order)
        lead = factor.ndim - rank
        if self.order != tuple(range(rank)):
            factor = factor.permute(*range(lead), *(lead + at for at in self.order))
        return factor.reshape(*factor.shape[:lead], *self.sides)


@dataclass(frozen=True)
class Recipe:
    """What a structure is composed of; `kronecker` is the order of its factors where they are a Kronecker product."""

    stages: tuple[Stage, ...]
    kronecker: tuple[int, ...] | None


@lru_cache(maxsize=256)
def _recipe(spec: Structure, device: torch.device) -> Recipe | None:
    if spec.pad_in or spec.pad_out or any(step.inner for step in spec.steps):
        return None
    order = _kronecker_order(spec)
    stages = []
    for step in spec.steps:
        parts = (step.batch, step.new, step.summed)
        before, after = (*step.batch, *step.summed, *step.passive), (*step.batch, *step.new, *step.passive)
        stages.append(
            Stage(
                order=tuple(step.factor.index(axis) for axes in parts for axis in axes),
                sides=(spec.size(parts[0]), spec.size(parts[1]), spec.size(parts[2])),
                passive=spec.size(step.passive),
                before=None if order else _move(spec, step.state, before, device),
                after=None if order else _move(spec, after, step.result, device),
            )
        )
    return Recipe(tuple(stages), None if order is None else tuple(order))


def _move(spec: Structure, start: Axes, end: Axes, device: torch.device) -> Move | None:
    kept = [axis for axis in start if spec.sizes[axis] > 1]
    if kept == [axis for axis in end if spec.sizes[axis] > 1]:
        return None
    count = math.prod(spec.shape(start))
    index = torch.arange(count, device=device).reshape(spec.shape(start))
    index = index.permute([start.index(axis) for axis in end]).reshape(-1)
    return Move(index, torch.argsort(index), parity(index))
