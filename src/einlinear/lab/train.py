"""Training: one trunk at a constant rate, from which every horizon branches off to cool down.

Runs of several lengths then cost little more than the longest one (Hägele et al. 2024,
https://arxiv.org/abs/2405.18392), and all of them are finished runs, whose losses compare.
"""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import einlinear as el
from einlinear.lab import checkpoint, models
from einlinear.lab.checkpoint import State
from einlinear.lab.data import Sequences, Task, placed, sent
from einlinear.lab.health import Health
from einlinear.lab.models import Architecture, counted
from einlinear.lab.parallel import World, put, shard, whole
from einlinear.lab.reverse import multiplied_out
from einlinear.lab.run import Run
from einlinear.lab.step import PLAIN, Execution, Step
from einlinear.optim import parameter_groups

CHUNK = 10  # steps between two looks at the loss, the clock and whether to stop
MARGIN = 1.0  # how far above its first value (nats) the loss counts as diverged
POINTS = 100  # of the training curve that a run keeps
EVALUATED = 8192  # tokens (or examples) evaluated at once


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a study have in common.

    `batch` counts sequences (or examples), `warmup` steps; `cooldown` is a share of the horizon. Rates are those
    of a model of `base_width`, and branches weigh one in a model of `base_depth`. Batches of a few sequences want
    a larger `beta2` (Porian et al. 2024, https://arxiv.org/abs/2406.19146).

    `finish_dense` is the last share of a horizon, for which a structured model goes on as the dense one that computes
    the same: reverse sparsification (Dao et al. 2022, "Monarch", https://arxiv.org/abs/2204.00595). It is no shorter
    than the cooldown. Without `structure_aware` factors are trained at the rate of the dense layer they replace.

    Raises:
        ValueError: for a dense finish that is shorter than the cooldown.
    """

    batch: int
    base_width: int
    base_depth: int
    head: int = 16
    warmup: int = 20
    cooldown: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"  # of all but parameters and their updates
    finish_dense: float = 0.0
    structure_aware: bool = True

    def __post_init__(self) -> None:
        if self.finish_dense and not self.cooldown <= self.finish_dense <= 1:
            raise ValueError(
                f"Training with finish_dense={self.finish_dense}: a dense finish takes the cooldown (the last "
                f"{self.cooldown:g} of a run) or more, up to 1; or 0 for none."
            )

    @property
    def setup(self) -> dict[str, object]:
        """Every setting by name. What runs stored before could not know is left out where it is as it was then."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("finish_dense", "structure_aware") or value != getattr(Recipe, name)
        }

    def tokens(self, task: Task) -> int:
        """Tokens (or examples) of one step."""
        return self.batch * _window(task)


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """One training run at a constant rate; `horizons` are the steps at which its branches end.

    With `continued`, its state is kept when it is done: the same trunk with a longer horizon goes on from there.
    """

    family: str
    width: int
    depth: int
    rate: float
    seed: int
    horizons: tuple[int, ...]
    recipe: Recipe
    purpose: str = "measure"
    continued: bool = False

    @property
    def steps(self) -> int:
        """Steps trained in all, cooldowns included."""
        return self.branch(max(self.horizons)) + sum(horizon - self.branch(horizon) for horizon in self.horizons)

    @property
    def architecture(self) -> Architecture:
        """The shape of its model."""
        recipe = self.recipe
        bases = {"base_width": recipe.base_width, "base_depth": recipe.base_depth, "head": recipe.head}
        return Architecture(family=self.family, width=self.width, depth=self.depth, **bases)

    @property
    def finish(self) -> "Trunk":
        """The trunk whose model its branches train."""
        return replace(self, family="dense") if self.recipe.finish_dense else self

    def branch(self, horizon: int) -> int:
        """The step at which a horizon leaves the trunk: to cool down, or before that to go on dense."""
        return _from_end(horizon, max(self.recipe.cooldown, self.recipe.finish_dense))

    def cooldown(self, horizon: int) -> int:
        """The step at which the cooldown towards a horizon starts."""
        return _from_end(horizon, self.recipe.cooldown)

    def run(self, task: Task, horizon: int) -> Run:
        """The run that a horizon will be: its key, its trunk and its exact costs, with nothing measured yet.

        A backward pass costs two forward passes.
        """
        setup = self.recipe.setup | ({"context": task.context} if isinstance(task, Sequences) else {})
        run = Run(
            task=task.name, fingerprint=task.fingerprint, family=self.family, width=self.width, depth=self.depth,
            tokens=0, rate=self.rate, seed=self.seed, purpose=self.purpose, setup=json.dumps(setup, sort_keys=True),
        )  # fmt: skip
        trunk = sha256(json.dumps(run.key).encode()).hexdigest()[:16]
        first, of_step = max(0, self.branch(horizon)), self.recipe.tokens(task)
        (_, forward), (parameters, ending) = (counted(task, part.architecture) for part in (self, self.finish))
        flops, linear_flops = (
            3 * of_step * (first * before + (horizon - first) * after)
            for before, after in ((forward.total, ending.total), (forward.linear, ending.linear))
        )
        return replace(
            run, tokens=horizon * of_step, trunk=trunk, spec=repr(el.structure(self.family)(self.width, self.width)),
            parameters=parameters, flops=flops, linear_flops=linear_flops,
        )  # fmt: skip


class Failure(Exception):
    """A training run that cannot go on: a result, not an error. `status` and the message go into its `Run`."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def train(
    trunk: Trunk,
    task: Task,
    *,
    execution: Execution = PLAIN,
    file: Path | None = None,
    tell: Callable[[int | Run], object] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Trains a trunk and, from it, a branch for each horizon that cools down and is evaluated.

    The result is a function of trunk and task: on a CPU the same numbers bit by bit, whether it was interrupted
    or not, and whichever other horizons branch off before. Under torchrun all processes call this alike, and
    only the first one's `file`, `tell` and `stop` are used.

    Args:
        trunk: what to train.
        task: on what.
        execution: how.
        file: where the state is kept in between and when stopped, and resumed from; the caller removes it.
        tell: called with each run as soon as it is finished, diverged ones included, and in between with the
            number of steps trained since last told.
        stop: asked every ten steps; once it answers True the state is kept and KeyboardInterrupt raised.

    Returns:
        A run for each horizon.

    Raises:
        KeyboardInterrupt: if told to stop.
        OSError, ValueError: if the state cannot be kept, the file is damaged, or a batch cannot be cut as asked.
    """
    runs: list[Run] = []
    waiting = sorted(trunk.horizons)
    world = World.here()
    first = world.rank == 0
    training: Training | None = None
    kept = world.agreed(checkpoint.load(file) if file and first else {})
    saved = time.monotonic()

    def advance(training: Training, name: str, until: int, cooldown: int | None = None) -> None:
        nonlocal saved
        for steps in training.advance(until, cooldown):
            if first:
                tell(steps)
            told, due = world.agreed((stop(), file is not None and time.monotonic() - saved > execution.patience))
            if told or due:
                states = kept | {name: training.state()}
                if file and first:
                    checkpoint.save(file, states)
                saved = time.monotonic()
            if told:
                raise KeyboardInterrupt

    def record(training: Training | None, horizon: int, **results: object) -> None:
        measured = {} if training is None else training.measured()
        facts = provenance(execution.device, world.size) | measured | results
        runs.append(replace(trunk.run(task, horizon), **facts))  # type: ignore[arg-type]
        if first:
            tell(runs[-1])

    try:
        training = Training(trunk, task, execution)
        if "trunk" in kept and kept["trunk"].step <= trunk.branch(waiting[0]):
            training.load(kept["trunk"])
        else:
            kept = {}
        while waiting:
            horizon, branch = waiting[0], trunk.branch(waiting[0])
            advance(training, "trunk", branch)
            kept["trunk"] = training.state()
            finish = training
            try:
                finish = training.finish() if trunk.recipe.finish_dense else training
                name = f"horizon {horizon}"
                if name in kept:
                    finish.load(kept[name])
                advance(finish, name, horizon, trunk.cooldown(horizon))
                results: dict[str, object] = {"loss": finish.evaluate()}
            except (Failure, RuntimeError) as error:
                results = _failed(error)
            record(finish, waiting.pop(0), **results)
            kept = {"trunk": kept["trunk"]}
            training.load(kept["trunk"])
        if trunk.continued and file and first:
            checkpoint.save(file, kept)
    except (Failure, RuntimeError) as error:
        for horizon in waiting:
            record(training, horizon, **_failed(error))
    return runs


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
            self.model, optimizer, partial(models.loss, task), clip=recipe.clip,
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
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes would be compiled anew
            for inputs, targets in self.data.validation_batches(max(1, EVALUATED // _window(self.task))):
                loss = self.update.loss(sent(inputs, self.device), sent(targets, self.device))
                total += len(inputs) * loss.double().cpu()
                count += len(inputs)
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


def _from_end(horizon: int, share: float) -> int:
    """The step at which the last share of a horizon starts, at least one step of it."""
    return horizon - max(1, round(share * horizon))


def _window(task: Task) -> int:
    """Tokens of one sequence; an example counts as one."""
    return task.context if isinstance(task, Sequences) else 1


def _failed(error: Failure | RuntimeError) -> dict[str, object]:
    """Status and reason of a run that ended so; errors that are not results are raised again."""
    if isinstance(error, Failure):
        return {"status": error.status, "reason": str(error)}
    # torch has a type of its own for this on accelerators only.
    if isinstance(error, torch.OutOfMemoryError) or ("memory" in str(error) and "alloc" in str(error)):
        return {"status": "out of memory", "reason": str(error).splitlines()[0]}
    raise error


def provenance(device: str, processes: int) -> dict[str, str]:
    """Where, when and with what a run was measured."""
    kind = torch.device(device).type
    name = f"{kind} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    name = torch.cuda.get_device_name(device) if kind == "cuda" else name
    return {
        "device": name if processes == 1 else f"{processes} x {name}",
        "versions": json.dumps(
            {"einlinear": el.__version__, "torch": torch.__version__, "python": platform.python_version()}
        ),
        "commit": checked_out(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def checked_out() -> str:
    """The commit of this package where it runs from its repository, marked where files differ from it."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


def _thinned(curve: list[tuple[int, float]]) -> str:
    """At most `POINTS` points, evenly spaced, as JSON; a value that is no number, at the end of a run, is left out."""
    finite = [point for point in curve if math.isfinite(point[1])]
    every = -(-len(finite) // POINTS) or 1
    return json.dumps(finite[::-1][::every][::-1])
