"""What a search looked at, read from the runs of its store alone: for the report, which knows no plan."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import einlinear as el
from einlinear.lab.laws import Axis
from einlinear.lab.run import Run
from einlinear.lab.search.worth import Reference

PURPOSE = "search"


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One candidate as exploration saw it, and whether it was confirmed."""

    family: str
    exponents: tuple[float, float, float] | None  # ψ, ν, ω; None for what has no place in the taxonomy
    runs: tuple[Run, ...] = field(repr=False)  # of the exploration, one for each horizon it was trained to
    worths: tuple[float | None, ...]  # ln multiplier by those; None where it diverged, or where dense holds no law
    confirmed: bool

    @property
    def last(self) -> float | None:
        """The ln multiplier at the longest horizon it was trained to."""
        return self.worths[-1]


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """The last exploration that a store holds: its candidates, those that went furthest first, then by worth.

    Its numbers chose; they are too good for the best, and the report says so.
    """

    width: int
    seed: int
    rate: float
    horizons: tuple[int, ...]  # tokens
    looked: tuple[Looked, ...]
    others: int  # explorations of the store that are not this one
    reason: str  # why nothing can be said in multipliers; empty where it can

    @property
    def runs(self) -> list[Run]:
        """All of its runs."""
        return [run for one in self.looked for run in one.runs]

    @property
    def counts(self) -> list[int]:
        """How many candidates were trained to each horizon."""
        trained = Counter(run.tokens for run in self.runs)
        return [trained[tokens] for tokens in self.horizons]

    @property
    def spent(self) -> dict[Axis, float]:
        """What it took in FLOPs and in seconds: each horizon goes on from where the one before began to cool down."""
        cooldown = float(json.loads(self.runs[0].setup).get("cooldown", 0.0))
        axes: tuple[Axis, Axis] = ("flops", "seconds")
        return {
            axis: sum(
                getattr(run, axis) * (1 - (1 - cooldown) * (before.tokens / run.tokens if before else 0))
                for one in self.looked
                for before, run in zip((None, *one.runs), one.runs, strict=False)
            )
            for axis in axes
        }


def exploration(runs: Sequence[Run]) -> Exploration | None:
    """The exploration that was begun last among all runs of a store; None where there is none."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        if run.purpose == PURPOSE:
            same = (run.task, run.fingerprint, run.width, run.depth, run.seed, run.rate, run.setup)
            groups.setdefault(same, []).append(run)
    if not groups:
        return None
    own = list(groups.values())[-1]
    first = own[0]
    measured = [
        run
        for run in runs
        if (run.purpose, run.task, run.fingerprint, run.depth, run.setup)
        == ("measure", first.task, first.fingerprint, first.depth, first.setup)
    ]
    plain = [run for run in measured if run.family == "dense" and run.status == "done"]
    reference, reason = None, ""
    try:
        reference = Reference(plain)
    except ValueError as error:
        reason = str(error)
    families: dict[str, list[Run]] = {}
    for run in sorted(own, key=lambda run: run.tokens):
        families.setdefault(run.family, []).append(run)
    confirmed = {run.family for run in measured}
    looked = [
        Looked(
            family=family,
            exponents=exponents(family),
            runs=tuple(trained),
            worths=tuple(reference.worth(run).value if reference and run.loss is not None else None for run in trained),
            confirmed=family in confirmed,
        )
        for family, trained in families.items()
    ]
    looked.sort(key=lambda one: (-len(one.runs), one.last is None, -(one.last or 0.0)))
    return Exploration(
        width=first.width, seed=first.seed, rate=first.rate, horizons=tuple(sorted({run.tokens for run in own})),
        looked=tuple(looked), others=len(groups) - 1, reason=reason,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def exponents(family: str) -> tuple[float, float, float] | None:
    """ψ, ν, ω of a family by its text; None where it has none."""
    try:
        psi, nu, omega = el.taxonomy(el.structure(family))
    except el.StructureError:
        return None
    return float(psi), float(nu), float(omega)
