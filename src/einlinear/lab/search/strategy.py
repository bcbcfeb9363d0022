"""In which order candidates are trained: halving along the horizons, sized to the budget, judged by a surrogate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.lab.laws.minimise import Floats, Integers
from einlinear.lab.search.surrogate import Surrogate

HALVING = 3.0  # one of so many goes on to the next horizon, where the budget does not reach for more


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
    costs: Floats,
    measure: Measure,
    budget: float,
    *,
    seed: int = 0,
    told: Callable[[float], object] = lambda spent: None,
) -> Found:
    """Searches until the budget is spent.

    Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
    optimization", https://arxiv.org/abs/1502.07943): as many candidates, drawn at random, are begun as the budget
    allows if one of `HALVING` goes on at each horizon; where there are not so many, more of them go on. Who goes on is
    who has the highest mean of the surrogate at the last horizon. (Beginning what the surrogate hopes for was measured
    to gain nothing: what features tell of the first horizon does not hold at the last.)

    What to train is asked for in few large batches, which do not depend on how many are trained at a time. The same
    seed and outcomes give the same trials.

    Args:
        features: of the candidates, `[n, f]`.
        costs: expected of a training from the horizon before to each, `[n, horizons]`.
        measure: trains.
        budget: in the cost that outcomes have.
        seed: of the draw.
        told: called before each batch with the share of the budget that is spent.
    """
    count, rungs = costs.shape
    surrogate, trials = Surrogate(features, rungs), list[Trial]()
    drawn = np.random.default_rng(seed).permutation(count).tolist()
    at = np.full(count, -1)
    weights = shares(costs, budget)

    def left() -> float:
        return budget - sum(trial.outcome.cost for trial in trials)

    def train(ranked: Sequence[int], rung: int, allowed: float) -> bool:
        """The first of these until what is allowed has been spent, one of them at least."""
        expected = np.cumsum(costs[ranked, rung]) if len(ranked) else np.zeros(0)
        chosen = list(ranked[: 1 + int((expected < allowed).sum())])
        if not chosen or left() <= 0:
            return False
        told(1 - left() / budget)
        asked = [(candidate, rung) for candidate in chosen]
        trials.extend(Trial(*pair, outcome) for pair, outcome in zip(asked, measure(asked), strict=True))
        at[chosen] = rung
        surrogate.fit(*_columns(trials))
        return True

    went_on = True
    while went_on and left() > 0:  # once, and again where rounding left some of the budget
        went_on = False
        for rung in range(rungs):
            waiting = _ordered(np.flatnonzero(at == rung - 1), surrogate) if rung else [n for n in drawn if at[n] < 0]
            went_on |= train(waiting, rung, left() * weights[rung] / weights[rung:].sum())
    told(1.0)
    ranking = _ordered(np.flatnonzero(at == at.max()), surrogate)
    return Found(tuple(trials), tuple(ranking), surrogate.predict(np.array(ranking))[0], surrogate)


def random_search(count: int, rungs: int, measure: Measure, budget: float, *, seed: int = 0) -> Found:
    """The control: candidates at random, each trained to the last horizon, the best as measured."""
    trials: list[Trial] = []
    for candidate in np.random.default_rng(seed).permutation(count).tolist():
        if sum(trial.outcome.cost for trial in trials) >= budget:
            break
        trials.append(Trial(candidate, rungs - 1, measure([(candidate, rungs - 1)])[0]))
    order = sorted(trials, key=lambda trial: -trial.outcome.value)
    return Found(tuple(trials), tuple(t.candidate for t in order), np.array([t.outcome.value for t in order]))


def shares(costs: Floats, budget: float) -> Floats:
    """Of each horizon in the budget: what it costs on average, times the share of candidates that get there."""
    each, rungs = costs.mean(axis=0), np.arange(costs.shape[1])
    for halving in np.linspace(HALVING, 1.0, 41):
        weights = np.asarray(each / halving**rungs)
        if len(costs) * weights.sum() >= budget:
            break
    return np.asarray(weights / weights.sum())


def _ordered(which: Integers, surrogate: Surrogate) -> list[int]:
    """Candidates, the most promising at the last horizon first."""
    if not len(which):
        return []
    mean, _ = surrogate.predict(which)
    return [int(candidate) for candidate in which[np.argsort(-mean, kind="stable")]]


def _columns(trials: Sequence[Trial]) -> tuple[list[int], list[int], list[float], list[float]]:
    return (
        [trial.candidate for trial in trials], [trial.rung for trial in trials],
        [trial.outcome.value for trial in trials], [trial.outcome.variance for trial in trials],
    )  # fmt: skip
