"""L(N, D) = E + A N^-alpha + B D^-beta, and what follows from it in closed form (Hoffmann et al. 2022, section 3.3)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The loss of N parameters after D tokens, in the unit of the losses it was fitted to."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Floats, tokens: Floats) -> Floats:
        """L at N `[n]` and D `[n]`."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    @property
    def a(self) -> float:
        """N* grows as C^a."""
        return float(np.divide(self.beta, self.alpha + self.beta))

    @property
    def gamma(self) -> float:
        """L* - E falls as C^-gamma."""
        return float(np.divide(self.alpha * self.beta, self.alpha + self.beta))

    @property
    def G(self) -> float:
        """N* = G (C/k)^a."""
        with np.errstate(all="ignore"):  # out of range or undefined where the loss does not fall with N or D
            ratio = np.float64(self.alpha * self.A) / np.float64(self.beta * self.B)
            return float(ratio ** (1 / np.float64(self.alpha + self.beta)))

    def optimum(self, flops: Floats, k: float = 6.0) -> tuple[Floats, Floats, Floats]:
        """Parameters, tokens and loss `[n]` where compute C = k N D `[n]` is spent best."""
        parameters = self.G * (flops / k) ** self.a
        tokens = flops / k / parameters
        return parameters, tokens, self.loss(parameters, tokens)

    def compute(self, loss: Floats, k: float = 6.0) -> Floats:
        """The least C = k N D that reaches a loss `[n]`; NaN at E and below."""
        scale = self.A * self.G**-self.alpha + self.B * self.G**self.beta
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = k * (scale / np.where(loss > self.E, loss - self.E, np.nan)) ** (1 / self.gamma)
        return found
