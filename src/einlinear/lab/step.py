"""One step of training: loss, gradients, clipping, update; as it stands, compiled, or as one CUDA graph.

Nothing in a step waits for the device: its rate, its loss and the norm that gradients are clipped to are
numbers on the device.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from einlinear.lab.parallel import World, replicated
from einlinear.routing import Router, balance_loss, rebalance

WARMING = 3  # steps before a graph is recorded, as torch.cuda.graph asks for


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is trained, as far as only rounding and time depend on it.

    `compiled` compiles each kind of block once with torch.compile: for long runs of wide models. `graphed` records
    a whole step as a CUDA graph and replays it: wherever a step is many small launches. `accumulate` cuts a batch
    into so many parts, one after the other, to save memory. Under `torchrun` every process takes its share of each
    batch; with `shard` it also keeps only its share of parameters and optimizer state (FSDP2). `patience` is how many
    seconds of training a killed process may lose: so often states are kept.

    Raises:
        ValueError: for what does not go together.
    """

    device: str = "cpu"
    compiled: bool = False
    graphed: bool = False
    accumulate: int = 1
    shard: bool = False
    patience: float = 20.0

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"Training with accumulate={self.accumulate}: a batch has at least one part.")
        if self.graphed and torch.device(self.device).type != "cuda":
            raise ValueError(f"Training by CUDA graphs on {self.device}: they need device='cuda'; leave graphed out.")
        if self.shard and (self.compiled or self.graphed):
            raise ValueError("Training a sharded model compiled or by CUDA graphs is not supported; leave one out.")


PLAIN = Execution()
"""On the CPU, as it stands."""


class Step:
    """Trains a model by one batch at a time; returns the batch's loss before the update, without waiting for it.

    Args:
        model: float32 parameters on the execution's device, with `blocks` and a `readout`.
        optimizer: AdamW(fused=True) over them, whose groups have the rates that a factor of 1 stands for.
        loss: the mean loss of outputs, given targets.
        clip: the largest norm of all gradients together.
        balance: weight of `balance_loss` in what a model with experts is trained by.
        rebalance: by how much the bias of a router moves at a step at the full rate.
        half: whether losses and gradients are those of a copy of the parameters in bfloat16, renewed after
            every step; gradients are added up, clipped and applied in float32.
        execution: how to run.
        world: the processes that train together.

    `working` is what computes losses: the model itself, or its copy.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        clip: float,
        balance: float,
        rebalance: float,
        half: bool,
        execution: Execution,
        world: World,
    ) -> None:
        if world.size > 1 and execution.graphed:
            raise ValueError("Training by several processes by CUDA graphs is not supported; leave graphed out.")
        self.optimizer, self._loss, self._clip, self._execution = optimizer, loss, clip, execution
        self._balance, self._rebalance = balance, rebalance
        self._parameters: list[Tensor] = list(model.parameters())
        self.working = _halved(model) if half else model
        self._copies: list[Tensor] = list(self.working.parameters()) if half else []
        self._forward = self.working
        if world.size > 1 and not execution.shard:
            self._forward = replicated(self.working)
        if execution.compiled:
            torch.compiler.reset()  # what other models left would count towards its limit of versions
            for module in (*self.working.get_submodule("blocks").children(), self.working.get_submodule("readout")):
                module.compile(fullgraph=True, dynamic=False)
            self._loss = torch.compile(loss, fullgraph=True, dynamic=False)
        device = self._parameters[0].device
        self._routed = any(isinstance(module, Router) for module in model.modules())
        self._factor = torch.zeros((), device=device)
        self._rates = torch.tensor([group["lr"] for group in optimizer.param_groups], device=device)
        self._now = torch.zeros_like(self._rates)
        for group, rate in zip(optimizer.param_groups, self._now, strict=True):
            group["lr"] = rate
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor] = []

    def prepare(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Does what is done once, by steps at rate zero; returns the loss.

        The optimizer's state is there from now on, all zero, and every tensor stays where it is in memory.
        """
        if not self._execution.graphed:
            loss = self._whole(inputs, targets)
        else:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMING):
                    self._whole(inputs, targets)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph, self._static = torch.cuda.CUDAGraph(), [inputs, targets]
            with torch.cuda.graph(self._graph):
                self._static.append(self._whole(inputs, targets))
            loss = self(inputs, targets, 0.0)
        torch._foreach_zero_([slot for slots in self.optimizer.state.values() for slot in slots.values()])
        return loss

    def __call__(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        """One step at `factor` times each group's own rate."""
        self._factor.fill_(factor)
        if self._graph is None:
            return self._whole(inputs, targets)
        static_inputs, static_targets, loss = self._static
        static_inputs.copy_(inputs, non_blocking=True)
        static_targets.copy_(targets, non_blocking=True)
        self._graph.replay()
        return loss.clone()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        if self._copies and inputs.is_floating_point():
            inputs = inputs.bfloat16()
        return self._loss(self._forward(inputs), targets)

    def renew(self) -> None:
        """Takes the parameters over into the copy, in one pass over all of them."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._parameters)

    def _whole(self, inputs: Tensor, targets: Tensor) -> Tensor:
        torch.mul(self._rates, self._factor, out=self._now)
        self.optimizer.zero_grad()
        parts, total = self._execution.accumulate, torch.zeros((), device=inputs.device)
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            loss = self.loss(x, y) / parts
            (loss + self._balance / parts * balance_loss(self.working) if self._routed else loss).backward()
            total = total + loss.detach()
            self._gather()
        clip_grad_norm_(self._parameters, self._clip)
        self.optimizer.step()
        if self._routed:
            rebalance(self.working, self._rebalance * self._factor)
        self.renew()
        return total

    def _gather(self) -> None:
        """Adds the copy's gradients to the parameters' own, in their type."""
        if not self._copies:
            return
        if self._parameters[0].grad is None:
            for parameter in self._parameters:
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_(_gradients(self._parameters), _gradients(self._copies))
        else:
            torch._foreach_add_(_gradients(self._parameters), _gradients(self._copies))
        for copied in self._copies:
            copied.grad = None


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _halved(model: nn.Module) -> nn.Module:
    """A copy with parameters in bfloat16; buffers and routers stay as they are."""
    copied = copy.deepcopy(model)
    exact = {
        parameter for module in copied.modules() if isinstance(module, Router) for parameter in module.parameters()
    }
    for parameter in copied.parameters():
        if parameter not in exact:
            parameter.data = parameter.data.bfloat16()
    return copied
