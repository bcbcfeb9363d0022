"""The table of rules: which law answers a question about an operator."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from einlinear.linalg.normal import normal
from einlinear.linalg.result import NearlySingular
from einlinear.operator import Operator, OperatorError

Parts = tuple[Operator, ...]


def no_parts(_: Operator) -> Parts:
    """Of a rule that needs no answer about anything smaller."""
    return ()


def free(_: Operator) -> float:
    """The cost of a rule that only rearranges."""
    return 0.0


@dataclass(frozen=True)
class Rule:
    """One law, for operators of `kind` (a class, or a union of classes) of which `when` holds.

    `run(A, *answers, *arguments)` gets the answers to the same question about `parts(A)`, asked with the same
    arguments or with those that `passing(A, part, *arguments)` makes of them. `cost` is
    the modelled number of floating-point operations of the rule itself, without its parts. `answer` is "exact",
    "to a tolerance" or "stochastic". A `tentative` rule is one whose parts may have no answer (or none to working
    precision) where the whole has one: then the next rule that fits is tried.
    """

    kind: Any
    law: str
    run: Callable[..., Any]
    parts: Callable[[Any], Parts] = no_parts
    when: Callable[..., bool] | None = None
    cost: Callable[[Any], float] = free
    answer: str = "exact"
    tentative: bool = False
    passing: Callable[..., tuple[Any, ...]] | None = None


class Table:
    """The rules for one question, in order: the first that fits is the one that runs."""

    def __init__(self, question: str, *rules: Rule) -> None:
        self.question, self.rules = question, rules
        self._by_type: dict[type[Operator], tuple[Rule, ...]] = {}

    def __call__(self, operator: Operator, *arguments: Any) -> Any:
        """The answer about an operator, which is first brought into its normal form."""
        operator = normal(operator)
        for rule in self.fitting(operator, *arguments):
            if not rule.tentative:
                return self._follow(rule, operator, *arguments)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", NearlySingular)
                    return self._follow(rule, operator, *arguments)
            except (OperatorError, NearlySingular):
                continue
        raise LookupError(f"no rule for {self.question} of {operator!r}")

    def _follow(self, rule: Rule, operator: Operator, *arguments: Any) -> Any:
        answers: dict[int, Any] = {}
        parts = rule.parts(operator)
        for part in parts:  # the same second difference on every side of a cube is asked about once
            if id(part) not in answers:
                passed = arguments if rule.passing is None else rule.passing(operator, part, *arguments)
                answers[id(part)] = self(part, *passed)
        return rule.run(operator, *[answers[id(part)] for part in parts], *arguments)

    def rule(self, operator: Operator, *arguments: Any) -> Rule:
        """The first rule for an operator in normal form."""
        for rule in self.fitting(operator, *arguments):
            return rule
        raise LookupError(f"no rule for {self.question} of {operator!r}")

    def fitting(self, operator: Operator, *arguments: Any) -> Iterator[Rule]:
        """The rules for an operator in normal form, best first."""
        kind = type(operator)
        if kind not in self._by_type:
            self._by_type[kind] = tuple(rule for rule in self.rules if issubclass(kind, rule.kind))
        for rule in self._by_type[kind]:
            if rule.when is None or rule.when(operator, *arguments):
                yield rule

    def plan(self, operator: Operator, *arguments: Any, depth: int = 0) -> Iterator[tuple[int, Operator, Rule, float]]:
        """Depth, operator, rule and cost of everything that would be done, from the top."""
        operator = normal(operator)
        rule = self.rule(operator, *arguments)
        below = [step for part in rule.parts(operator) for step in self.plan(part, *arguments, depth=depth + 1)]
        yield depth, operator, rule, rule.cost(operator) + sum(cost for d, _, _, cost in below if d == depth + 1)
        yield from below
