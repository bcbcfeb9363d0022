"""What is trained: a trunk at a constant rate, from which every horizon branches off to cool down.

Runs of several lengths then cost little more than the longest one (Hägele et al. 2024,
https://arxiv.org/abs/2405.18392), and all of them are finished runs, whose losses compare.
"""

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Literal

import einlinear as el
from einlinear.lab.data import Sequences, Task
from einlinear.lab.models import Architecture, counted
from einlinear.lab.run import Run

LATER = ("finish_dense", "structure_aware", "balance", "rebalance")
"""Settings of a recipe that runs stored before them were trained without, or with the value that is now the default."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of a study have in common.

    `batch` counts sequences (or examples), `warmup` steps; `cooldown` is a share of the horizon. Rates are those
    of a model of `base_width`, and branches weigh one in a model of `base_depth`. Batches of a few sequences want
    a larger `beta2` (Porian et al. 2024, https://arxiv.org/abs/2406.19146).

    `finish_dense` is the last share of a horizon, for which a structured model goes on as the dense one that computes
    the same: reverse sparsification (Dao et al. 2022, "Monarch", https://arxiv.org/abs/2204.00595). It is no shorter
    than the cooldown. Without `structure_aware` factors are trained at the rate of the dense layer they replace.

    A model with experts is trained by its loss plus `balance` times `einlinear.balance_loss`, and at every step the
    biases of its routers move by `rebalance` times the schedule (`einlinear.rebalance`).

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
    balance: float = 0.1
    rebalance: float = 0.01

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
            name: value for name, value in asdict(self).items() if name not in LATER or value != getattr(Recipe, name)
        }

    def tokens(self, task: Task) -> int:
        """Tokens (or examples) of one step."""
        return self.batch * window(task)


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


def _from_end(horizon: int, share: float) -> int:
    """The step at which the last share of a horizon starts, at least one step of it."""
    return horizon - max(1, round(share * horizon))


def window(task: Task) -> int:
    """Tokens of one sequence; an example counts as one."""
    return task.context if isinstance(task, Sequences) else 1
