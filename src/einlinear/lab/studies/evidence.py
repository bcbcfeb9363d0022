"""What runs say about a claim: inequalities with intervals, and the verdict that follows from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["holds", "fails", "open"]
Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One inequality that a claim says, and what was measured: a value with its 95 % interval.

    It is claimed that the value lies above or below `bound`, or within it on both sides of zero. A `ratio` counts by
    its logarithm.
    """

    what: str
    value: float
    low: float
    high: float
    claimed: Literal["above", "below", "within"]
    bound: float
    ratio: bool = False

    @property
    def asked(self) -> str:
        """What is claimed of the value, in words."""
        return f"within ±{self.bound:.3g}" if self.claimed == "within" else f"{self.claimed} {self.bound:.3g}"

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"{self.what} was not measured, claimed {self.asked}"
        return f"{self.what} is {self.value:.3g} ({self.low:.3g} to {self.high:.3g}), claimed {self.asked}"

    @property
    def outcome(self) -> Outcome:
        """Only an interval that lies on one side decides; one that does not exist (NaN) leaves all open."""
        low, high, bound = self.low, self.high, self.bound
        match self.claimed:
            case "above":
                holds, fails = low > bound, high < bound
            case "below":
                holds, fails = high < bound, low > bound
            case "within":
                holds, fails = -bound < low <= high < bound, low > bound or high < -bound
        return "holds" if holds else "fails" if fails else "open"

    @property
    def runs_to_decide(self) -> float:
        """How many times as many runs would decide, if the value stays: intervals narrow by the root of their number.

        1 where it is decided, infinite where the value is what is claimed to the digit, NaN where it was not measured.
        """
        if self.outcome != "open":
            return 1.0
        bound = math.copysign(self.bound, self.value) if self.claimed == "within" else self.bound
        ends = (self.value, bound, self.low, self.high)
        value, bound, low, high = (math.log(max(end, 1e-300)) for end in ends) if self.ratio else ends
        towards = high - value if bound > value else value - low
        away = value - low if bound > value else high - value
        narrow = towards / abs(bound - value) if bound != value else math.inf
        if self.claimed == "within" and abs(value) < abs(bound):  # the other bound is farther off, but counts too
            narrow = max(narrow, away / (abs(value) + abs(bound)))
        return max(1.0, narrow**2)


def verdict(parts: Sequence[Part]) -> Verdict:
    """A claim holds where all it says holds, and does not where anything it says fails."""
    outcomes = {part.outcome for part in parts}
    if "fails" in outcomes:
        return "does not hold"
    return "holds" if outcomes == {"holds"} else "undecided"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers for readers, already in words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a study found: the parts of its claim, tables, a figure (Vega-Lite), and what a reader should know."""

    parts: tuple[Part, ...]
    tables: tuple[Table, ...]
    figure: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """What the parts say together."""
        return verdict(self.parts)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with the numbers that decide it."""
        outcomes = [part.outcome for part in self.parts]
        count = f"{outcomes.count('holds')} of {len(outcomes)} parts hold"
        match self.verdict:
            case "holds":
                head, shown = "Holds at this scale", "holds"
            case "does not hold":
                head, shown = f"Does not hold at this scale ({count})", "fails"
            case _:
                head, shown = f"Undecided ({count})", "open"
        return f"{head}: {'; '.join(str(part) for part in self.parts if part.outcome == shown)}."
