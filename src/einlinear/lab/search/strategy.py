"""In which order candidates are trained: halving along the horizons, new ones where the surrogate hopes for most."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.lab.laws.minimise import Floats
from einlinear.lab.search.surrogate import Surrogate

FIRST = 4  # candidates at random before the surrogate has a say
HALVING = 2  # one of so many goes on to the next horizon
HOPE = 1.0  # deviations above its mean that a new candidate is judged by


@dataclass(frozen=True)
class Outcome:
    """What training a candidate to one horizon gave."""

    value: float  # ln of the multiplier
    variance: float
    cost: float  # of this training alone: a trunk goes on from its last horizon


@dataclass(frozen=True)
class Trial:
    """One training of a search."""

    candidate: int
    rung: int
    outcome: Outcome


Measure = Callable[[Sequence[tuple[int, int]]], Sequence[Outcome]]
"""Trains (candidate, rung) pairs, and says what came out."""


@dataclass(frozen=True)
class Found:
    """What a search found: its trials, and the candidates that went furthest, best first."""

    trials: tuple[Trial, ...]
    ranking: tuple[int, ...]
    means: Floats  # [ranking] of ln multiplier at the last horizon
    surrogate: Surrogate | None = None

    @property
    def cost(self) -> float:
        """Of all trials."""
        return sum(trial.outcome.cost for trial in self.trials)


def guided_search(
    features: Floats,
    rungs: int,
    measure: Measure,
    budget: float,
    *,
    seed: int = 0,
    together: int = 1,
    told: Callable[[float], object] = lambda spent: None,
) -> Found:
    """Searches until the budget is spent.

    Of the candidates trained to one horizon half go on to the next, each time the one with the highest mean of the
    surrogate at the last; when none may, a new candidate is begun: that of the highest mean plus one deviation.
    Asynchronous halving (Li et al. 2020, "A system for massively parallel hyperparameter tuning",
    https://arxiv.org/abs/1810.05934) with the surrogate as judge. The same seed and outcomes give the same trials.

    Args:
        features: of the candidates, `[n, f]`.
        rungs: horizons.
        measure: trains.
        budget: in the cost that outcomes have.
        seed: of the first choices.
        together: trainings at a time.
        told: called after each batch with the share of the budget that is spent.
    """
    surrogate = Surrogate(features, rungs)
    trials: list[Trial] = []
    fresh = np.random.default_rng(seed).permutation(len(features)).tolist()
    while (spent := sum(trial.outcome.cost for trial in trials)) < budget:
        told(spent / budget)
        known = len(trials) >= min(FIRST, len(features))
        if known:
            surrogate.fit(*_columns(trials))
        batch: list[tuple[int, int]] = []
        for _ in range(together):
            choice = _promoted(trials, batch, rungs, surrogate) if known else None
            if choice is None and fresh:
                place = 0
                if known:
                    mean, deviation = surrogate.predict(np.array(fresh))
                    place = int((mean + HOPE * deviation).argmax())
                choice = fresh.pop(place), 0
            if choice is not None:
                batch.append(choice)
        if not batch:
            break
        trials += [Trial(*pair, outcome) for pair, outcome in zip(batch, measure(batch), strict=True)]
    told(1.0)
    furthest = max(trial.rung for trial in trials)
    there = np.array(sorted({trial.candidate for trial in trials if trial.rung == furthest}))
    surrogate.fit(*_columns(trials))
    mean, _ = surrogate.predict(there)
    order = np.argsort(-mean)
    return Found(tuple(trials), tuple(there[order].tolist()), mean[order], surrogate)


def random_search(count: int, rungs: int, measure: Measure, budget: float, *, seed: int = 0) -> Found:
    """The control: candidates at random, each trained to the last horizon, the best as measured."""
    trials: list[Trial] = []
    for candidate in np.random.default_rng(seed).permutation(count).tolist():
        if sum(trial.outcome.cost for trial in trials) >= budget:
            break
        trials.append(Trial(candidate, rungs - 1, measure([(candidate, rungs - 1)])[0]))
    order = sorted(trials, key=lambda trial: -trial.outcome.value)
    return Found(tuple(trials), tuple(t.candidate for t in order), np.array([t.outcome.value for t in order]))


def _promoted(
    trials: Sequence[Trial], batch: Sequence[tuple[int, int]], rungs: int, surrogate: Surrogate
) -> tuple[int, int] | None:
    """The candidate that may go on, from the furthest rung first."""
    asked = [(trial.candidate, trial.rung) for trial in trials] + list(batch)
    for rung in reversed(range(rungs - 1)):
        here = [trial.candidate for trial in trials if trial.rung == rung]
        gone = {candidate for candidate, at in asked if at == rung + 1}
        waiting = np.array([candidate for candidate in here if candidate not in gone], dtype=int)
        if len(waiting) and len(gone) < len(here) // HALVING:
            mean, _ = surrogate.predict(waiting)
            return int(waiting[mean.argmax()]), rung + 1
    return None


def _columns(trials: Sequence[Trial]) -> tuple[list[int], list[int], list[float], list[float]]:
    return (
        [trial.candidate for trial in trials], [trial.rung for trial in trials],
        [trial.outcome.value for trial in trials], [trial.outcome.variance for trial in trials],
    )  # fmt: skip
