"""Expert parallelism: every process holds some of the experts, and tokens travel to those they chose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from einlinear.contract import check
from einlinear.expert_mlp import MixtureMLP
from einlinear.kernels import Routing
from einlinear.kernels.kernel import CPU
from einlinear.kernels.routed import ExpertSorted
from einlinear.kernels.slots import Experts, combine, dispatch
from einlinear.layer import Linear
from einlinear.structure import Structure, StructureError


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Places the experts of every layer of `model` on the devices of a mesh of one dimension, in place.

    The first dimension of a factor counts experts, so that `Shard(0)` gives each process whole ones;
    factors become DTensors, as FSDP2 and distributed checkpoints expect. In a forward pass every
    process routes its own tokens, sends them to the experts they chose, and gets the results back: two
    exchanges by all-to-all, whose sizes the host must know. Routers and layers without experts stay
    whole on every process: average their gradients, as DistributedDataParallel does (which must not be
    given the DTensors: `fully_shard` over another dimension of the mesh, or average them yourself).
    Gradients of experts are already those of the mean loss over all processes.

    Call it before the optimizer is made.

    Returns:
        The model.

    Raises:
        StructureError: where experts cannot be placed evenly, are sharded already, are no maps of their own or share a
            factor, or a layer has a cap.
    """
    if mesh.ndim != 1:
        raise StructureError(
            f"cannot place experts on a mesh of {mesh.ndim} dimensions: pass one of them, mesh['name']"
        )
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear) and m.structure.routed]
    for name, layer in layers:
        _check(name, layer, mesh.size())
    exchange = Exchange(mesh.get_group())
    for _, layer in layers:
        for index, factor in enumerate(layer.factors):
            placed = distribute_tensor(factor.detach(), mesh, [Shard(0)])
            layer.factors[index] = nn.Parameter(placed, requires_grad=factor.requires_grad)
        layer._routed_plan = ParallelPlan(layer.structure, Experts.of(layer.structure.expert), exchange)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, MixtureMLP):
            module.exchange = exchange
    return model


@dataclass(frozen=True)
class Exchange:
    """Sends slots, sorted by expert, to the processes that hold their experts, and what comes of them back."""

    group: ProcessGroup

    def __deepcopy__(self, _: dict[int, Any]) -> "Exchange":
        """Itself: a copy of a model exchanges tokens with the same processes."""
        return self

    def __call__(self, state: Tensor, offsets: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`run(state, offsets)` where the experts are: `state` is `[slots, features]`, `offsets` `[experts + 1]`."""
        processes = self.group.size()
        counts = offsets.diff().view(processes, -1)
        arriving = torch.empty_like(counts)
        torch.distributed.all_to_all_single(arriving, counts.contiguous(), group=self.group)
        sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        state, dropped = state[: sum(sent)], state.shape[0] - sum(sent)
        came = all_to_all_single_autograd(state.contiguous(), received, sent, self.group)
        # What arrives is sorted by sender and only then by expert.
        expert = torch.arange(arriving.shape[1], device=state.device).repeat(processes)
        order = expert.repeat_interleave(arriving.flatten()).argsort(stable=True)
        y = run(came[order], nn.functional.pad(arriving.sum(0).cumsum(0), (1, 0)))
        back = all_to_all_single_autograd(y[order.argsort()].contiguous(), sent, received, self.group)
        return nn.functional.pad(back, (0, 0, 0, dropped))

    def local(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """This process's experts; their gradients, summed over all processes' tokens, are shared out over processes."""
        share = self.group.size()
        return [_Shared.apply(f.to_local(), share) for f in factors if isinstance(f, DTensor)]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ParallelPlan:
    """Takes the place of a layer's `RoutedPlan`."""

    structure: Structure
    experts: Experts
    exchange: Exchange

    def __call__(self, factors: Sequence[Tensor], x: Tensor, routing: Routing, bias: Tensor | None = None) -> Tensor:
        """Applies the experts that `routing` names to `x`, `[..., d_in]`, wherever they are."""
        if x.ndim == 0 or x.shape[-1] != self.structure.d_in:
            check(self.structure, factors, x)
        routing.check(self.structure, self.structure.sizes[self.structure.routed or ""], x[..., 0].numel())
        tokens, slots, local = x.reshape(-1, x.shape[-1]), routing.slots(), self.exchange.local(factors)

        def run(state: Tensor, offsets: Tensor) -> Tensor:
            return self.experts(local, state, offsets)

        y = combine(self.exchange(dispatch(tokens, slots), slots.offsets, run), slots, tokens.shape[0])
        y = y.reshape(*x.shape[:-1], y.shape[-1])  # -1 would be anything where a process has no tokens
        return y if bias is None else y + bias

    def with_router(self, *_: object) -> None:
        """Tokens travel between the choice and the layer."""


class _Shared(torch.autograd.Function):
    """The same forward, the gradient over a number of processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.processes, None


def _check(name: str, layer: Linear, processes: int) -> None:
    structure = layer.structure
    experts = structure.sizes[structure.routed or ""]
    if experts % processes:
        raise StructureError(
            f"cannot place the {experts} experts of '{name}' on {processes} devices: some would hold more than others; "
            f"use a number of devices that divides {experts}, or of experts that is a multiple of {processes}"
        )
    if any(isinstance(factor, DTensor) for factor in layer.factors):
        raise StructureError(
            f"cannot place the experts of '{name}': they are sharded already; call parallelize_experts once, and "
            f"fully_shard after it, over another dimension of the mesh"
        )
    if refusal := ExpertSorted().refuses(structure, CPU):
        raise StructureError(f"cannot place the experts of '{name}': {refusal}")
    if layer.gains is not None:
        raise StructureError(f"cannot place the experts of '{name}': its cap is one number for all of them")
    if any(structure.routed not in factor for factor in structure.factors):
        raise StructureError(f"cannot place the experts of '{name}': they share a factor")
