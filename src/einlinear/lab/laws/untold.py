"""Columns that nobody named and that tell losses apart: families, data sets or trials that were fitted as one."""

import numpy as np

from einlinear.lab.extras import extra
from einlinear.lab.laws.minimise import Floats
from einlinear.lab.laws.table import Table, size_labels

with extra("lab"):
    import pandas as pd  # type: ignore[import-untyped]
    from scipy import stats  # type: ignore[import-untyped]

MOST = 24  # different values of such a column
RUNS = 3  # at least so many per value, on average
SHARE = 0.3  # of what a smooth surface leaves of ln loss, that the column has to explain
CHANCE = 1e-4  # and hardly by chance


def untold(columns: "pd.DataFrame", table: Table) -> list[str]:
    """Sentences on the unused columns `[n rows of the table]` that go with the loss at equal params and tokens.

    Each is judged by an F-test of its values against a quadratic surface in ln N and ln D, one for each family.
    Columns that follow from params or from tokens, as widths and numbers of steps do, are the surface's business.
    """
    if len(table) < 4 * RUNS:
        return []
    loss, surface = np.log(table.loss), _surface(table)
    left, freedom = _left(surface, loss)
    found = []
    sizes, lengths = size_labels(table.parameters), size_labels(table.tokens)
    for name in columns.columns:
        labels, values = pd.factorize(columns[name].astype(str))
        if not 1 < len(values) <= min(MOST, len(table) // RUNS) or _follows(labels, sizes) or _follows(labels, lengths):
            continue
        after, rest = _left(np.column_stack([surface, np.eye(len(values))[labels]]), loss)
        if rest < 1 or rest == freedom or left <= 0:
            continue
        share = 1 - after / rest / (left / freedom)
        fraction = max(left - after, 0.0) / (freedom - rest) / max(after / rest, 1e-300)
        if share >= SHARE and stats.f.sf(fraction, freedom - rest, rest) < CHANCE:
            found.append((share, str(name), len(values)))
    return [
        f"Losses at equal params and tokens go with '{name}' ({count} values, {share:.0%} of the scatter), which is "
        f"not used: if it names families or data sets, fit them apart (--column family={_quoted(name)}); if it is a "
        f"setting that was tried, keep the best of each (--best-over {_quoted(name)})."
        for share, name, count in sorted(found, reverse=True)
    ]


def best_over(columns: "pd.DataFrame", table: Table) -> np.ndarray:
    """A mask of the runs `[n]` with the lowest loss among those that differ only in these columns `[n rows]`, or in
    none: one for each family, size, length and seed.
    """  # fmt: skip
    keys = [table.family, size_labels(table.parameters).astype(str), size_labels(table.tokens).astype(str)]
    if table.seed is not None and not any(table.columns.get("seed") == name for name in columns.columns):
        keys.append(table.seed)
    groups = pd.factorize(pd.Series(list(zip(*keys, strict=True))))[0]
    order = np.lexsort((table.loss, groups))
    first = np.ones(len(order), dtype=bool)
    first[1:] = groups[order][1:] != groups[order][:-1]
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[first]] = True
    return chosen


def _surface(table: Table) -> Floats:
    x, y = np.log(table.parameters), np.log(table.tokens)
    x, y = x - x.mean(), y - y.mean()
    one = np.stack([np.ones_like(x), x, y, x**2, x * y, y**2], axis=1)
    return np.concatenate([one * (table.family == family)[:, None] for family in table.families], axis=1)


def _left(design: Floats, loss: Floats) -> tuple[float, int]:
    """Sum of squares that a design leaves, and its degrees of freedom."""
    solution, _, rank, _ = np.linalg.lstsq(design, loss)
    return float(((loss - design @ solution) ** 2).sum()), len(loss) - int(rank)


def _follows(labels: np.ndarray, from_: np.ndarray) -> bool:
    """Whether one label is known from another."""
    return len(np.unique(np.stack([labels, from_]), axis=1).T) == len(np.unique(from_))


def _quoted(name: str) -> str:
    return f'"{name}"' if " " in name else name
