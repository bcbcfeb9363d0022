"""What a search sets out to do: the space, how its candidates are tried, and how the best of them are confirmed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

import einlinear as el
from einlinear.lab.compare import Plan
from einlinear.lab.compare import default_plan as default_comparison
from einlinear.lab.data import Sequences, Task
from einlinear.lab.laws import Axis
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.train import Trunk
from einlinear.space import SHAPES, Candidate, candidates


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search in two parts, exploration and confirmation.

    Exploration trains candidates of one width with one seed, at the base rate that suits dense, up to `horizons`: most
    of them to the first alone. Only what it chose, dense and controls at random are then compared as
    `confirmation` says, each tuned, with other seeds and in more sizes; its families are those to compare besides.

    `horizons` are in tokens (or examples); `budget` is what exploration may cost, in trainings of dense at `width` to
    the last of them. What candidates there are: see `einlinear.candidates`.

    Raises:
        ValueError: for numbers that make no search, and where confirmation would not be independent of exploration.
    """

    confirmation: Plan
    width: int
    horizons: tuple[int, ...]
    budget: float
    objective: Axis = "flops"
    seed: int = 0
    winners: int = 3
    controls: int = 2
    exponents: tuple[int, ...] = (7, 10)
    experts: tuple[int, ...] = ()
    costliest: float = 0.75
    least_rank: float = 0.5
    most_sharing: float = 0.5
    slowest: float = math.inf

    def __post_init__(self) -> None:
        """Checks the numbers, and puts dense first."""
        families = tuple(dict.fromkeys(("dense", *self.confirmation.families)))
        object.__setattr__(self, "confirmation", replace(self.confirmation, families=families))
        object.__setattr__(self, "horizons", tuple(sorted(set(self.horizons))))
        if self.objective not in ("flops", "seconds"):
            raise ValueError(f"Planning a search by {self.objective!r}: pass flops or seconds.")
        if not self.horizons or self.horizons[0] <= 0 or self.budget <= 0:
            raise ValueError(
                f"Planning a search: horizons={self.horizons!r}, budget={self.budget!r}; give positive numbers."
            )
        if self.winners < 1 or self.controls < 0:
            raise ValueError(
                f"Planning a search: winners={self.winners}, controls={self.controls}; confirm one winner or more."
            )
        if unknown := [count for count in self.exponents if count not in (7, 10)]:
            raise ValueError(f"Planning a search: θ has 7 exponents or 10, and not {unknown[0]}.")
        if few := [count for count in self.experts if count < 2]:
            raise ValueError(f"Planning a search: a mixture of {few[0]} expert(s) is none; ask for two or more.")
        if self.seed in self.confirmation.seeds:
            raise ValueError(
                f"Planning a search: seed {self.seed} would both choose and confirm; confirm by seeds that exploration "
                f"has not seen, such as {max(self.confirmation.seeds) + 1}."
            )
        if self.width not in self.confirmation.widths:
            raise ValueError(
                f"Planning a search at width {self.width}: it is judged by dense's runs, and none of the widths of the "
                f"confirmation, {', '.join(map(str, self.confirmation.widths))}; explore at one of them."
            )

    def pool(
        self, device: str = "cpu", refused: Callable[[str, str], object] = lambda family, reason: None
    ) -> list[Candidate]:
        """The candidates, in an order that is always the same.

        Args:
            device: whose modelled seconds count.
            refused: called with every structure that is left out, and why.
        """
        found = candidates(
            self.width, exponents=self.exponents, experts=self.experts, costliest=self.costliest,
            least_rank=self.least_rank, most_sharing=self.most_sharing, slowest=self.slowest,
            device=device.partition(":")[0], refused=refused,
        )  # fmt: skip
        kept = [c for c in found if c.family not in self.confirmation.families and self._everywhere(c.family, refused)]
        if len(kept) < self.winners + self.controls:
            raise ValueError(
                f"Searching at width {self.width}: {len(kept)} candidate(s) are left, too few to choose "
                f"{self.winners} winners and {self.controls} controls from; allow more FLOPs or less rank."
            )
        return kept

    def rungs(self, task: Task) -> tuple[int, ...]:
        """The horizons in steps."""
        return tuple(sorted({self.confirmation.steps(task, tokens) for tokens in self.horizons}))

    def paid(self, task: Task) -> list[float]:
        """The share of each horizon's training that is left to pay where the horizon before was trained and kept."""
        trunk, rungs = self.trunk(task, "dense", 1.0, 0), self.rungs(task)
        return [1.0, *(1 - trunk.branch(before) / after for before, after in pairwise(rungs))]

    def trunk(self, task: Task, family: str, rate: float, rung: int) -> Trunk:
        """The training that takes a candidate to a horizon, from the one before where that is kept."""
        rungs, plan = self.rungs(task), self.confirmation
        return Trunk(
            family=family, width=self.width, depth=plan.depth, rate=rate, seed=self.seed, horizons=(rungs[rung],),
            recipe=plan.recipe, purpose="search", continued=rung + 1 < len(rungs),
        )  # fmt: skip

    def costs(self, task: Task, pool: Sequence[Candidate], unit: float) -> Floats:
        """What training each candidate to each horizon, from the one before, is expected to cost, `[pool, horizons]`.

        In the units of the objective: FLOPs are counted, seconds modelled, from `unit`, those of dense to the last.
        """
        rungs = self.rungs(task)
        last = [
            self.trunk(task, one.family, 1.0, len(rungs) - 1).run(task, rungs[-1]).flops
            if self.objective == "flops"
            else (one.seconds or one.flops) * unit
            for one in pool
        ]
        parts = [rung / rungs[-1] * paid for rung, paid in zip(rungs, self.paid(task), strict=True)]
        return np.asarray(np.outer(last, parts), dtype=np.float64)

    def finalists(self, *families: str) -> Plan:
        """The confirmation, of these families too."""
        return replace(self.confirmation, families=(*self.confirmation.families, *families))

    def _everywhere(self, family: str, refused: Callable[[str, str], object]) -> bool:
        for width in self.confirmation.widths:
            try:
                for a, b in SHAPES:
                    el.structure(family)(a * width, b * width)
            except el.StructureError:
                refused(family, f"cannot be had at width {width}, where winners are confirmed")
                return False
        return True


def default_search(task: Task, device: str = "cpu") -> SearchPlan:
    """A search that says something within ten minutes of two cores, or of one GPU.

    Text is explored along the last two horizons alone: before them losses rank candidates by hardly more than their
    cost (docs/search.md).
    """
    plan, horizons = default_comparison(task, device), 2 if isinstance(task, Sequences) else 5
    if device == "cpu":
        recipe = replace(plan.recipe, batch=max(1, plan.recipe.batch // 2), base_depth=1)
        confirmation = replace(
            plan, families=("dense",), widths=(32, 64, 128), depth=1, horizons=(80_000, 160_000, 320_000),
            tuning=160_000, seeds=(1, 2), recipe=recipe, extensions=2,
        )  # fmt: skip
        width, last, budget = 64, 320_000, 10
    else:
        confirmation = replace(plan, families=("dense",), seeds=(1, 2), widths=(256, 512, 1024))
        width, last, budget = 256, 2**20, 20
    rungs = tuple(last // 2**k for k in range(horizons))
    return SearchPlan(confirmation=confirmation, width=width, horizons=rungs, budget=budget)
