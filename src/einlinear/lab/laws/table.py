"""Finished runs as columns of numbers, with the story of how they were read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from einlinear.lab.laws.minimise import Floats, Integers

SAME = 0.005  # sizes whose logarithms are nearer are one: they were read off a plot, or padded


class TableError(ValueError):
    """A file of runs that cannot be used, in one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Finished runs as columns `[n]`, with the story of how the file was read."""

    family: NDArray[np.str_]
    parameters: Floats
    tokens: Floats
    flops: Floats
    loss: Floats
    seconds: Floats | None = None
    seed: NDArray[np.str_] | None = None
    trunk: NDArray[np.str_] | None = None  # runs of one family and trunk are dependent
    device: NDArray[np.str_] | None = None
    unit: str = "nats"  # of the loss
    source: str = ""
    rows: int = 0  # of the file
    columns: Mapping[str, str] = field(default_factory=dict)  # role: column of the file, or "= formula"
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason: rows left out
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # of what may make nonsense of a fit

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def families(self) -> list[str]:
        """Names, in the order of first appearance."""
        return list(dict.fromkeys(self.family.tolist()))

    def where(self, chosen: NDArray[np.bool_] | Integers) -> "Table":
        """The rows that are chosen, by a mask or by their numbers."""
        names = ("family", "parameters", "tokens", "flops", "loss", "seconds", "seed", "trunk", "device")
        return replace(self, **{n: v[chosen] for n in names if (v := getattr(self, n)) is not None})

    def of(self, family: str) -> "Table":
        """The runs of one family."""
        return self.where(self.family == family)

    def without_highest(self, count: int) -> "Table":
        """Without the runs of the `count` highest losses, which counts them among the dropped."""
        if not count:
            return self
        kept = self.where(np.sort(np.argsort(self.loss, kind="stable")[: max(0, len(self) - count)]))
        return replace(kept, dropped={**self.dropped, "of the highest losses, as asked": len(self) - len(kept)})


def size_labels(parameters: Floats) -> Integers:
    """A label `[n]` for each size of model; sizes within half a per cent of the smallest of them are one."""
    order = np.argsort(parameters, kind="stable")
    sizes = np.log(parameters[order])
    labels = np.empty(len(parameters), dtype=np.int64)
    first, label = 0, 0
    while first < len(sizes):
        end = int(np.searchsorted(sizes, sizes[first] + SAME, side="right"))
        labels[order[first:end]] = label
        first, label = end, label + 1
    return labels
