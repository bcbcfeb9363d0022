"""How a routed structure is run: all experts on all tokens, or each expert on its own tokens."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from einlinear.clock_experts import cost as cost_on_cpu
from einlinear.contract import check, equation, pad_last
from einlinear.cost import flops
from einlinear.kernels import set_pair, set_result, sets
from einlinear.kernels.kernel import CPU, CUDA, CUDA_HALF, Target
from einlinear.kernels.set_cluster import set_cut
from einlinear.kernels.slots import MOST_GROUPS, Experts, Slots, by_expert, by_token, combine, dispatch, expert_links
from einlinear.kernels.transforms import exported, transformed
from einlinear.links import INTO, OUT_OF
from einlinear.structure import Structure, StructureError


class Routing(NamedTuple):
    """Which experts run on which tokens, and with what weight.

    Tokens that choose experts: `chosen` and `weight` are `[tokens, active]`; a number of `experts` is a
    choice that was dropped. Experts that choose tokens (`chosen_by_experts`): both are `[experts, capacity]`.
    `partial` says that choices may have been dropped.
    """

    chosen: Tensor
    weight: Tensor
    experts: int
    chosen_by_experts: bool = False
    partial: bool = False

    def check(self, structure: Structure, experts: int, tokens: int) -> None:
        """Refuses a layer of another number of experts, or other tokens, in a sentence."""
        if self.experts != experts or not (self.chosen_by_experts or self.chosen.shape[0] == tokens):
            raise StructureError(
                f"cannot apply {structure!r} to {tokens} tokens: it has {experts} experts, and the routing is "
                f"that of {tuple(self.chosen.shape)} choices among {self.experts}; route the same tokens"
            )

    def gate(self, tokens: int) -> Tensor:
        """The weight of every expert for every token, `[tokens, experts]`, zero where it does not run."""
        if self.chosen_by_experts:
            gate = self.weight.new_zeros(self.experts, tokens)
            return gate.scatter(1, self.chosen, self.weight).mT
        gate = self.weight.new_zeros(tokens, self.experts + 1)
        return gate.scatter(1, self.chosen, self.weight)[:, : self.experts]

    def slots(self) -> Slots:
        """The same, sorted by expert."""
        if self.chosen_by_experts:
            return by_expert(self.chosen, self.weight)
        return by_token(self.chosen, self.weight, self.experts)


class RoutedRunner(ABC):
    """Applies one routed structure to tokens `[tokens, padded d_in]`; returns `[tokens, padded d_out]`."""

    @abstractmethod
    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor: ...


class RoutedKernel(ABC):
    """One way to run routed structures. A refusal is a sentence, never an exception."""

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, structure: Structure, target: Target) -> str | None:
        """Why it cannot run the structure there, or None."""

    @abstractmethod
    def cost(self, structure: Structure, tokens: int, target: Target) -> float:
        """Modelled time, as the FLOPs of a large matmul that takes as long."""

    @abstractmethod
    def prepare(self, structure: Structure) -> RoutedRunner:
        """All that can be decided from the spec."""

    def remark(self, structure: Structure) -> str:
        """What to add to an explanation, after its first words."""
        return ""


class Everyone(RoutedKernel):
    """All experts on all tokens, weighed by gates that are mostly zero: the reference, and the published way."""

    name: ClassVar = "all experts"

    def refuses(self, structure: Structure, target: Target) -> str | None:
        return None

    def cost(self, structure: Structure, tokens: int, target: Target) -> float:
        if target.device == "cpu":
            return cost_on_cpu(self.name, structure, tokens)
        whole = structure.sizes[structure.routed or ""]
        widths = _widths(structure.expert)[1:]
        state = whole * max(widths[:-1] or widths)
        moved = 6 * (2 if target.half else 4) * state * target.ridge  # passes over the states of all experts
        work = 2.0 * flops(structure) * whole / structure.active
        return 4 * target.launch + tokens * max(work, moved)

    def prepare(self, structure: Structure) -> "EveryoneRunner":
        return everyone(structure)


@dataclass(frozen=True)
class EveryoneRunner(RoutedRunner):
    """The reference contraction as einsum equations: at one of its steps the state is weighed, before or after."""

    equations: tuple[tuple[str, ...], ...]
    input: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    width: int

    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor:
        gate, state = routing.gate(x.shape[0]).to(x.dtype), x.reshape(-1, *self.input)
        for (before, step, after), factor, shape in zip(self.equations, factors, self.factors, strict=True):
            state = torch.einsum(before, state, gate) if before else state
            state = torch.einsum(step, state, factor.reshape(shape))
            state = torch.einsum(after, state, gate) if after else state
        y = state.reshape(-1, self.width)
        return y if bias is None else y + bias


def everyone(structure: Structure) -> EveryoneRunner:
    """As `einlinear.apply` does: the gate is applied at the last factor that carries the routed axis."""
    axis = structure.routed or ""
    last = max((k for k, axes in enumerate(structure.factors) if axis in axes), default=-1)
    equations: list[tuple[str, str, str]] = []
    for k, step in enumerate(structure.steps):
        before = after = ""
        result = step.result
        if k == last and axis in step.state:
            before = equation(structure, [step.state, (axis,)], step.state, [True, True])
        elif k == last:
            result = (*step.result, *(a for a in (axis,) if a not in step.result))
            after = equation(structure, [result, (axis,)], step.result, [True, True])
        equations.append((before, equation(structure, [step.state, step.factor], result, [True, False]), after))
    return EveryoneRunner(
        tuple(equations), structure.shape(structure.x), structure.factor_shapes, structure.size(structure.y)
    )


class ExpertSorted(RoutedKernel):
    """Each expert on its own tokens, sorted by expert (`einlinear.kernels.slots`)."""

    name: ClassVar = "expert-sorted"

    def refuses(self, structure: Structure, target: Target) -> str | None:
        axis = structure.routed
        if axis in structure.x or axis in structure.y:
            return f"the routed axis '{axis}' is one of the input or output: an expert is no map of its own"
        expert = structure.expert
        if any(step.inner for step in expert.steps) or not all(expert.factors):
            return "a factor has an axis, or nothing, to itself"
        if target.device != "cuda":
            return None
        if not target.half:
            return "grouped matmuls take numbers of 16 bits on a CUDA device"
        if structure.sizes[axis or ""] > MOST_GROUPS:
            return f"a grouped matmul takes up to {MOST_GROUPS} experts"
        odd = [
            step
            for step, (_, out, width) in zip(expert.steps, expert.matrix_shapes, strict=True)
            if out % 8 or width % 8
        ]
        return f"factor {expert.steps.index(odd[0])} maps by no multiple of 8 features" if odd else None

    def cost(self, structure: Structure, tokens: int, target: Target) -> float:
        if target.device == "cpu":
            return cost_on_cpu(self.name, structure, tokens)
        expert = structure.expert
        width = 2 if target.half else 4
        # A row is read, written and read once more on its way to a slot and back; so is every state between.
        moved = 3.0 * width * sum(_widths(expert)) * target.ridge
        launches = 8 + 6 * len(expert.factors)
        return launches * target.launch + tokens * structure.active * max(flops(expert), moved)

    def prepare(self, structure: Structure) -> "SlotsRunner":
        return SlotsRunner(Experts.of(replace(structure.expert, pad_in=0, pad_out=0)))


@dataclass(frozen=True)
class SlotsRunner(RoutedRunner):
    """Sort, apply, sum."""

    experts: Experts

    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor:
        slots = routing.slots()
        y = combine(self.experts(factors, dispatch(x, slots), slots.offsets), slots, x.shape[0])
        return y if bias is None else y + bias


class SetSorted(RoutedKernel):
    """BTT experts on tokens sorted by their sets of experts, as Triton kernels (`einlinear.kernels.sets`)."""

    name: ClassVar = "set-sorted"

    def refuses(self, structure: Structure, target: Target) -> str | None:
        if not target.half or target.device != "cuda":
            return "it takes numbers of 16 bits on a CUDA device"
        if find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if refusal := ExpertSorted().refuses(structure, target):
            return refusal
        experts, active = structure.sizes[structure.routed or ""], structure.active
        shapes = structure.expert.matrix_shapes
        if [link.spec for link in expert_links(structure.expert)] != [INTO, OUT_OF]:
            return "it takes experts of two block-diagonal factors with a transposition between"
        if any(structure.routed not in factor for factor in structure.factors):
            return "its experts share a factor"
        if not sets.fits(shapes[0], shapes[1], experts, active):
            most = sets.MOST_SETS
            return f"{active} of {experts} experts are more than {most} sets, or blocks are beyond 8 to 128 features"
        return None

    def cost(self, structure: Structure, tokens: int, target: Target) -> float:
        sizes = sets.Sizes(tokens, structure.sizes[structure.routed or ""], structure.active)
        first, state, last = _widths(structure.expert)
        moved = 2 * (first + 2 * structure.active * state + last) * target.ridge
        # A block that is not full computes as much as one that is, and moves less.
        work = flops(structure) * (1 + 64 * sizes.filled / max(1, tokens))
        return 6 * target.launch + tokens * max(work, moved)

    def prepare(self, structure: Structure) -> "SetsRunner":
        experts = structure.sizes[structure.routed or ""]
        first, second = ((experts, *shape) for shape in structure.expert.matrix_shapes)
        return SetsRunner(first, second, ExpertSorted().prepare(structure))

    def remark(self, structure: Structure) -> str:
        first, second = structure.expert.matrix_shapes
        found = set_cut(first, second, structure.active)
        if isinstance(found, str):
            return f"; in two launches: {found}"
        return f"; many tokens in one launch, on a GPU with clusters of {found.size} multiprocessors"


@dataclass(frozen=True)
class SetsRunner(RoutedRunner):
    """`set_pair` with factors of these shapes; where tokens have not all `active` experts, `otherwise`."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    otherwise: SlotsRunner

    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor:
        if routing.chosen_by_experts or routing.partial:
            return self.otherwise(factors, x, routing, bias)
        first, second = factors[0].reshape(self.first), factors[1].reshape(self.second)
        if not _differentiated(x, first, second, bias, routing.weight):
            made: Tensor = set_result.set_result(x, first, second, bias, routing.chosen, routing.weight)
            return made
        layout = sets.set_layout(routing.chosen, routing.weight.detach(), routing.experts)
        y: Tensor = set_pair.set_pair(x, first, second, bias, routing.chosen, routing.weight, *layout)[0]
        return y

    def routed(
        self, factors: Sequence[Tensor], x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None,
        bias: Tensor | None, active: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The result, logits and choices, of a router whose every token has `active` experts (`route`)."""
        first, second = factors[0].reshape(self.first), factors[1].reshape(self.second)
        if not _differentiated(x, router, first, second, bias):
            made: tuple[Tensor, Tensor, Tensor] = set_result.routed_result(
                x, router, scale, router_bias, first, second, bias, active
            )
            return made
        y, logits, chosen, *_ = set_pair.routed_pair(x, router, scale, router_bias, first, second, bias, active)
        return y, logits, chosen


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


ROUTED_KERNELS: tuple[RoutedKernel, ...] = (SetSorted(), ExpertSorted(), Everyone())


@dataclass(frozen=True)
class RoutedPlan:
    """How one routed, canonical structure is run on each kind of machine: by which runner up to how many tokens."""

    structure: Structure
    experts: int
    d_in: int
    d_out: int
    pad_in: int
    pad_out: int
    cpu: tuple[tuple[float, RoutedRunner], ...]
    cuda: tuple[tuple[float, RoutedRunner], ...]
    cuda_half: tuple[tuple[float, RoutedRunner], ...]
    plain: RoutedRunner

    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
        """Applies the experts that `routing` names to `x`, `[..., d_in]`; returns `[..., d_out]`.

        Raises:
            StructureError: if the last dimension of `x` is not `d_in`, or the routing is for other experts or tokens.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            check(self.structure, factors, x)
        tokens = pad_last(x, self.pad_in).reshape(-1, self.d_in + self.pad_in)
        count = tokens.shape[0]
        routing.check(self.structure, self.experts, count)
        run = self._runner(factors, x, count)
        y = run(factors, tokens, routing, None if bias is None else pad_last(bias, self.pad_out))
        return y[:, : self.d_out].reshape(*x.shape[:-1], self.d_out)

    def with_router(
        self, factors: Sequence[Tensor], x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """Result, logits `[tokens, experts]` and choices in one operator, where there is one for `x`; else None.

        Args:
            router, scale, router_bias: as `einlinear.kernels.select.route` takes them.
        """
        if self.pad_in or x.ndim == 0 or x.shape[-1] != self.d_in:
            return None
        tokens = x.reshape(-1, self.d_in)
        run = self._runner([*factors, router], x, tokens.shape[0])
        if not isinstance(run, SetsRunner):
            return None
        padded = None if bias is None else pad_last(bias, self.pad_out)
        y, logits, chosen = run.routed(factors, tokens, router, scale, router_bias, padded, self.structure.active)
        return y[:, : self.d_out].reshape(*x.shape[:-1], self.d_out), logits, chosen

    def _runner(self, factors: Sequence[Tensor], x: Tensor, tokens: int) -> RoutedRunner:
        if exported() or transformed(x, *factors):
            return self.plain
        choices = (self.cuda_half if x.element_size() == 2 else self.cuda) if x.is_cuda else self.cpu
        at = 0
        while tokens > choices[at][0]:
            at += 1
        return choices[at][1]


@lru_cache(maxsize=4096)
def routed_plan(structure: Structure) -> RoutedPlan:
    """The plan of a routed, canonical structure."""
    cpu, cuda, cuda_half = (_choices(structure, target) for target in (CPU, CUDA, CUDA_HALF))
    return RoutedPlan(
        structure,
        experts=structure.sizes[structure.routed or ""],
        d_in=structure.d_in,
        d_out=structure.d_out,
        pad_in=structure.pad_in,
        pad_out=structure.pad_out,
        cpu=cpu,
        cuda=cuda,
        cuda_half=cuda_half,
        plain=everyone(structure),
    )


LIMITS = tuple(2**power for power in range(25))
"""Numbers of tokens between which the choice may change; it is made for the larger one."""


def _choices(structure: Structure, target: Target) -> tuple[tuple[float, RoutedRunner], ...]:
    """A runner for each range of token counts, up to powers of two."""
    best = [(float(limit), choose(structure, target, limit)) for limit in LIMITS]
    ends = [(limit, kernel) for (limit, kernel), (_, larger) in pairwise(best) if kernel is not larger]
    runners = {kernel: kernel.prepare(structure) for _, kernel in best}
    return tuple((limit, runners[kernel]) for limit, kernel in [*ends, (math.inf, best[-1][1])])


def choose(structure: Structure, target: Target, tokens: int) -> RoutedKernel:
    """The kernel of least modelled cost."""
    fitting = [kernel for kernel in ROUTED_KERNELS if kernel.refuses(structure, target) is None]
    return min(fitting, key=lambda kernel: kernel.cost(structure, tokens, target))


def explain_routed(structure: Structure, tokens: int, device: torch.device | str, dtype: torch.dtype) -> str:
    """Each kernel's modelled cost or refusal, as text."""
    canonical, target = structure.canonical, Target.of(device, dtype)
    judged = next((limit for limit in LIMITS if tokens <= limit), LIMITS[-1])
    chosen, dense = choose(canonical, target, judged), 2 * structure.d_in * structure.d_out
    bound = "" if judged == tokens else f", as up to {judged}"
    lines = [f"{structure!r}", f"runs {tokens} tokens{bound} by '{chosen.name}' on {device} in {dtype}"]
    for kernel in ROUTED_KERNELS:
        verdict = kernel.refuses(canonical, target)
        if verdict is None:
            verdict = f"fits, modelled cost {kernel.cost(canonical, judged, target) / (judged * dense):.4g} of dense"
            verdict += kernel.remark(canonical)
        lines.append(f"  {kernel.name:13} {verdict}")
    return "\n".join(lines)


def _widths(expert: Structure) -> list[int]:
    """Features of the input, of every state and of the output of one expert."""
    return [expert.size(expert.x), *(expert.size(step.result) for step in expert.steps)]
