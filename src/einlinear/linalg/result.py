"""What an iterative or stochastic algorithm answers: a value, and how far it may be trusted."""

import warnings
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError as LinAlgError  # type: ignore[attr-defined]


class NotConverged(UserWarning):
    """An algorithm stopped before its tolerance; `warnings.simplefilter("error", NotConverged)` makes it an error."""


class NearlySingular(UserWarning):
    """A matrix was inverted that is singular to working precision: no digit of the answer may be right."""


class Eigenpairs(NamedTuple):
    """`values` [..., k] and `vectors` [..., n, k], column by column."""

    values: Tensor
    vectors: Tensor


class Factors(NamedTuple):
    """A truncated singular value decomposition: `u` [..., m, k], `s` [..., k], `vh` [..., k, n]."""

    u: Tensor
    s: Tensor
    vh: Tensor


Value = TypeVar("Value", bound=Tensor | Eigenpairs | Factors)


@dataclass(frozen=True)
class Result(Generic[Value]):
    """The answer of an iterative or stochastic algorithm.

    `residual` is the true relative residual of the value handed out, computed anew from the operator and never taken
    from a recurrence; None where there is none. `standard_error` is that of a random estimate; None where nothing was
    drawn. `iterations` counts products with the operator, a block of columns at once being one.
    """

    value: Value
    iterations: int
    converged: bool
    residual: Tensor | None = None
    standard_error: Tensor | None = None

    def or_warn(self, method: str, tolerance: float, note: str = "") -> "Result[Value]":
        """Itself, after a `NotConverged` warning where it has not converged."""
        if not self.converged:
            worst = f"residual {_worst(self.residual):.1e}, " if self.residual is not None else ""
            found = f"{method} stopped after {self.iterations} iterations short of its tolerance: "
            warnings.warn(NotConverged(f"{found}{worst}wanted {tolerance:.1e}. {note or HINT}"), stacklevel=3)
        return self


HINT = "Allow more iterations, give a preconditioner, or accept a larger tolerance."


def _worst(residual: Tensor) -> float:
    return float(torch.nan_to_num(residual.detach(), nan=torch.inf).max()) if residual.numel() else 0.0
