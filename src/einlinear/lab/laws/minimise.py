"""BFGS for many small problems at once: every start of a fit, or every draw of its bootstrap, is one row.

No library at hand minimises thousands of independent problems of five unknowns as one batch, and one by one a
bootstrap takes minutes instead of seconds.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Objective = Callable[[Floats, Integers], tuple[Floats, Floats]]
"""Points `[m, p]` and the numbers `[m]` of their problems to values `[m]` and gradients `[m, p]`."""

STEPS = 400
GRADIENT = 1e-7  # largest entry at which a problem counts as solved
ARMIJO = 1e-4  # share of the linear decrease that a step has to reach
CACHED = 2**16  # numbers in an array of the problems solved together: it then stays in a core's cache


def minimise(objective: Objective, starts: Floats, inverse: Floats, *, data: int) -> tuple[Floats, Floats]:
    """Minimises one problem per row.

    Args:
        objective: values and gradients; called with those rows that still move.
        starts: `[m, p]`.
        inverse: `[m, p, p]`, positive definite first guesses of the inverse Hessians.
        data: numbers that one problem is about, to choose how many problems to solve together.

    Returns:
        The points found `[m, p]` and their values `[m]`.
    """
    size = max(1, min(256, CACHED // data))
    chunks = [slice(first, first + size) for first in range(0, len(starts), size)]
    numbers = np.arange(len(starts))
    with ThreadPoolExecutor(max(1, min(len(chunks), cpu_count() or 1))) as pool:  # numpy lets go of the lock
        found = list(pool.map(lambda s: _chunk(objective, starts[s].copy(), inverse[s].copy(), numbers[s]), chunks))
    return np.concatenate([points for points, _ in found]), np.concatenate([values for _, values in found])


def _chunk(objective: Objective, points: Floats, inverse: Floats, rows: Integers) -> tuple[Floats, Floats]:
    all_points, (value, gradient) = points.copy(), objective(points, rows)
    all_values, first = value.copy(), rows[0]
    initial = inverse.copy()
    idle = np.zeros(len(rows), dtype=int)  # steps since the last decrease worth the name
    for _ in range(STEPS):
        step = -np.einsum("mpq,mq->mp", inverse, gradient)
        slope = (step * gradient).sum(axis=1)
        uphill = slope >= 0
        if uphill.any():
            inverse[uphill] = initial[uphill]
            step[uphill] = -np.einsum("mpq,mq->mp", inverse[uphill], gradient[uphill])
            slope = (step * gradient).sum(axis=1)
        step *= np.minimum(1.0, 4.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        slope = (step * gradient).sum(axis=1)

        length = np.ones(len(rows))
        new_value, new_gradient = value.copy(), gradient.copy()
        pending = np.arange(len(rows))
        for _ in range(30):
            tried = points[pending] + length[pending, None] * step[pending]
            got, got_gradient = objective(tried, rows[pending])
            fine = got <= value[pending] + ARMIJO * length[pending] * slope[pending]
            new_value[pending[fine]], new_gradient[pending[fine]] = got[fine], got_gradient[fine]
            curved = 2 * (got - value[pending] - length[pending] * slope[pending])
            with np.errstate(all="ignore"):  # where the parabola makes no sense the step is halved
                vertex = -slope[pending] * length[pending] / curved
            vertex = np.where(np.isfinite(vertex), vertex.clip(0.1, 0.5), 0.5)
            length[pending] = np.where(fine, length[pending], length[pending] * vertex)
            pending = pending[~fine]
            if not len(pending):
                break
        length[pending] = 0.0  # nothing lower in this direction

        moved, change = length[:, None] * step, new_gradient - gradient
        gain = value - new_value
        points, value, gradient = points + moved, new_value, new_gradient
        bend = (moved * change).sum(axis=1)
        usable = bend > 1e-12 * np.linalg.norm(moved, axis=1) * np.linalg.norm(change, axis=1)
        image = np.einsum("mpq,mq->mp", inverse, change)
        with np.errstate(all="ignore"):
            scale = (1 + (change * image).sum(axis=1) / bend) / bend
            update = scale[:, None, None] * moved[:, :, None] * moved[:, None, :]
            update -= (image[:, :, None] * moved[:, None, :] + moved[:, :, None] * image[:, None, :]) / bend[
                :, None, None
            ]
        inverse = np.where(usable[:, None, None], inverse + update, inverse)
        stuck = (length == 0) & (idle == 0)
        inverse[stuck] = initial[stuck]
        idle = np.where(gain > 1e-13 * np.abs(value), 0, idle + 1)
        all_points[rows - first], all_values[rows - first] = points, value
        left = (np.abs(gradient).max(axis=1) > GRADIENT) & (idle < 3)
        if not left.any():
            break
        rows, points, value, gradient, idle = rows[left], points[left], value[left], gradient[left], idle[left]
        inverse, initial = inverse[left], initial[left]
    return all_points, all_values
