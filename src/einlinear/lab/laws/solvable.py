"""A scaling law that is known exactly, to try fitters on: linear regression on random features of power-law data.

Its loss for d features after r steps is deterministic and costs microseconds (the skeleton of Paquette et al. 2024,
"4+3 phases of compute-optimal neural scaling laws"); for p = 2 a + 2 b - 1 > 0 the optimum at compute C = d r has
d* ~ C^(1/(2a+1)) and a loss ~ C^(-p/(2a+1)).
"""

import numpy as np

from einlinear.lab.laws.minimise import Floats

TERMS = 2_000_000  # beyond them the sum is continued by its integral


def solvable_loss(features: Floats, steps: Floats, a: float = 0.75, b: float = 0.5) -> Floats:
    """Loss `[n]` of d features `[n]` (whole numbers) after r steps `[n]`:

    the sum over j > d of j^-(2a+2b), and over j <= d of j^-(2a+2b) exp(-2 r j^-2a).
    """
    power = 2 * a + 2 * b
    most = int(np.max(features))
    if most > TERMS:
        raise ValueError(f"Evaluating the solvable law: at most {TERMS:,} features, not {most:,}.")
    j = np.arange(1, most + 1, dtype=np.float64)
    weight, rate = j**-power, 2 * j ** (-2 * a)
    from scipy import special  # type: ignore[import-untyped]

    losses = []
    for d, r in zip(np.asarray(features, dtype=np.int64), np.asarray(steps, dtype=np.float64), strict=True):
        losses.append(special.zeta(power, d + 1.0) + (weight[:d] * np.exp(-r * rate[:d])).sum())
    return np.array(losses)
