"""A model on its way through a task: how it goes on, is looked at, kept, and gone back to."""

import json
import math
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import einlinear as el
from einlinear.lab import models
from einlinear.lab.checkpoint import State
from einlinear.lab.data import Task, placed, sent
from einlinear.lab.failure import Failure
from einlinear.lab.health import Health
from einlinear.lab.parallel import World, put, shard, whole
from einlinear.lab.reverse import multiplied_out
from einlinear.lab.step import PLAIN, Execution, Step
from einlinear.lab.trunk import Trunk, window
from einlinear.optim import parameter_groups

CHUNK = 10  # steps between two looks at the loss, the clock and whether to stop
MARGIN = 1.0  # how far above its first value (nats) the loss counts as diverged
POINTS = 100  # of the training curve that a run keeps
EVALUATED = 8192  # tokens (or examples) evaluated at once


class Training:
    """A model on its way through a task: where it stands, and how it goes on."""

    def __init__(self, trunk: Trunk, task: Task, execution: Execution = PLAIN) -> None:
        recipe, architecture = trunk.recipe, trunk.architecture
        self.trunk, self.task, self.execution, self.world = trunk, task, execution, World.here()
        self.device = torch.device(execution.device)
        self.data = placed(task, self.device)
        if recipe.batch % (parts := self.world.size * execution.accumulate):
            raise ValueError(
                f"Training with batches of {recipe.batch}: they cannot be cut into {parts} equal parts, for "
                f"{self.world.size} process(es) and accumulate={execution.accumulate}; change one of the three."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trunk.seed)
            self.model = models.build(task, architecture).to(self.device)
        half, sharded = recipe.precision == "bfloat16", execution.shard and self.world.size > 1
        if sharded:
            shard(self.model, half)
        groups = parameter_groups(
            self.model, trunk.rate, recipe.weight_decay, readout="readout", roles=self.model.roles,
            width_mult=architecture.width_mult, depth_mult=architecture.depth_mult,
            structure_aware=recipe.structure_aware,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(
            groups, betas=(recipe.beta1, recipe.beta2), fused=True, capturable=execution.graphed
        )
        self.update = Step(
            self.model, optimizer, partial(models.loss, task), clip=recipe.clip, balance=recipe.balance,
            rebalance=recipe.rebalance,
            half=half and not sharded,  # where it shards, FSDP2 makes the copies
            execution=execution, world=self.world,
        )  # fmt: skip
        self.step, self.seconds, self.curve, self.health = 0, 0.0, list[tuple[int, float]](), Health()
        # What is done once, such as compilation, is not training time.
        first = self.update.prepare(*self._batch(0))
        self.ceiling = self.world.mean(first).item() + MARGIN

    def finish(self) -> "Training":
        """The training of the model that branches train, from where this one stands."""
        other = Training(self.trunk.finish, self.task, self.execution)
        other.load(multiplied_out(self.state(), self.model))
        other.ceiling = self.ceiling
        return other

    def advance(self, until: int, branch: int | None = None) -> Iterator[int]:
        """Trains to the step `until`, cooling down from the step `branch` on; yields numbers of steps done.

        Raises Failure if the loss is not finite or far above its first value.
        """
        while self.step < until:
            end = min(until, self.step + CHUNK)
            started, losses = time.perf_counter(), []
            for step in range(self.step, end):
                factor = schedule(step, self.trunk.recipe.warmup, branch, until)
                losses.append(self.update(*self._batch(step), factor))
            mean = self.world.mean(torch.stack(losses).mean()).item()  # the one wait for the device
            self.seconds += time.perf_counter() - started
            done, self.step = end - self.step, end
            tokens = end * self.trunk.recipe.tokens(self.task)
            self.curve.append((tokens, mean))
            self.health.look(tokens, el.router_statistics(self.update.working))
            if not mean <= self.ceiling:
                raise Failure("diverged", f"training loss {mean:.4g} at step {end} of {until}")
            yield done

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of a step's inputs and targets, on their way to the device."""
        inputs, targets = map(self.world.share, self.data.batch(step, self.trunk.recipe.batch, self.trunk.seed))
        return sent(inputs, self.device), sent(targets, self.device)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the task's validation set, nats per token (per example)."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        # Routers remember training alone: a recorded graph goes on writing to the tensors that it found there.
        self.update.working.eval()
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes would be compiled anew
            for inputs, targets in self.data.validation_batches(max(1, EVALUATED // window(self.task))):
                loss = self.update.loss(sent(inputs, self.device), sent(targets, self.device))
                total += len(inputs) * loss.double().cpu()
                count += len(inputs)
        self.update.working.train()
        mean = (total / count).item()
        if not math.isfinite(mean):
            raise Failure("diverged", f"validation loss {mean} at step {self.step}")
        return mean

    def state(self) -> State:
        """A copy of everything that the next step depends on."""
        copies = {name: whole(tensor) for name, tensor in self._tensors()}
        return State(self.step, self.seconds, list(self.curve), copies, list(self.health.windows))

    def load(self, state: State) -> None:
        """Goes back (or on) to where a state was taken, in place; the state stays as it is."""
        with torch.no_grad():
            for name, tensor in self._tensors():
                put(tensor, state.tensors[name])
        self.update.renew()
        self.step, self.seconds, self.curve = state.step, state.seconds, list(state.curve)
        self.health = Health(list(state.health))

    def measured(self) -> dict[str, object]:
        """What a run keeps of the training so far. Of several processes, the first one's tokens tell of routers."""
        routers = json.dumps(self.health.told())
        return {"seconds": self.seconds, "curve": _thinned(self.curve), "routers": routers}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, the optimizer's state and the biases of routers, by name."""
        for name, buffer in self.update.working.named_buffers():
            if isinstance(self.update.working.get_submodule(name.rpartition(".")[0]), el.Router):
                yield f"buffer.{name}", buffer
        for name, parameter in self.model.named_parameters():
            yield f"model.{name}", parameter
            for slot, value in self.update.optimizer.state[parameter].items():
                yield f"optimizer.{name}.{slot}", value


def schedule(step: int, warmup: int, branch: int | None, horizon: int) -> float:
    """The share of the rate at a step: warm-up, constant, and from `branch` on 1 - sqrt down towards `horizon`.

    Hägele et al. 2024, https://arxiv.org/abs/2405.18392, section 4.
    """
    if branch is not None and step >= branch:
        return 1 - math.sqrt((step - branch) / (horizon - branch))
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _thinned(curve: list[tuple[int, float]]) -> str:
    """At most `POINTS` points, evenly spaced, as JSON; a value that is no number, at the end of a run, is left out."""
    finite = [point for point in curve if math.isfinite(point[1])]
    every = -(-len(finite) // POINTS) or 1
    return json.dumps(finite[::-1][::every][::-1])
