"""How evenly the routers of a model spread their tokens while it trains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from einlinear.routing import RouterStatistics

WINDOWS = 20  # of a run, once it has so many looks; up to twice as many
LATEST = 10  # looks, at least, that the loads at the end of a run are the mean of; and at least a tenth of all

Window = tuple[int, int, dict[str, list[float]]]
"""A part of training as plain data: tokens seen at its end, looks in it, and for each layer the sums over them of
every expert's load, of entropy and of what was dropped."""


@dataclass
class Health:
    """What was seen of the routers so far, in windows of equally many looks (steps looked at).

    A batch leaves experts idle that the next one uses: whether one is dead shows over a window.
    """

    windows: list[Window] = field(default_factory=list)

    def look(self, tokens: int, found: Mapping[str, RouterStatistics]) -> None:
        """Adds what `einlinear.router_statistics` says after so many tokens. Where a window more than twice WINDOWS
        would begin, neighbours become one.
        """
        if not found:
            return
        sums = {name.removesuffix(".router"): [*one.load, one.entropy, one.dropped] for name, one in found.items()}
        seen, windows = (tokens, 1, sums), self.windows
        if windows and windows[-1][1] < windows[0][1]:
            windows[-1] = _joined(windows[-1], seen)
            return
        if len(windows) == 2 * WINDOWS:
            windows[:] = map(_joined, windows[::2], windows[1::2])
        windows.append(seen)

    def told(self) -> dict[str, dict[str, Any]]:
        """What a run keeps, for each routed layer: `load`, `entropy` and `dropped` over the last tenth of training
        (ten looks at least), and their `history`: lists with a number for each window, of tokens at its end, the
        entropy, the loads of the busiest and the idlest expert, dead experts and the share that was dropped.
        """
        if not self.windows:
            return {}
        wanted = max(LATEST, sum(looks for _, looks, _ in self.windows) / 10)
        latest = self.windows[-1]
        for window in self.windows[-2::-1]:
            if latest[1] >= wanted:
                break
            latest = _joined(window, latest)
        told = {}
        for layer in latest[2]:
            *load, entropy, dropped = _means(latest, layer)
            *loads, entropies, drops = zip(*(_means(window, layer) for window in self.windows), strict=True)
            shares = list(zip(*loads, strict=True))
            told[layer] = {
                "load": load,
                "entropy": entropy,
                "dropped": dropped,
                "history": {
                    "tokens": [window[0] for window in self.windows],
                    "entropy": list(entropies),
                    "busiest": [max(share) for share in shares],
                    "idlest": [min(share) for share in shares],
                    "dead": [share.count(0.0) for share in shares],
                    "dropped": list(drops),
                },
            }
        return told


def _joined(first: Window, second: Window) -> Window:
    """Two windows, one after the other, as one."""
    sums = {name: list(map(math.fsum, zip(first[2][name], sums, strict=True))) for name, sums in second[2].items()}
    return second[0], first[1] + second[1], sums


def _means(window: Window, layer: str) -> list[float]:
    """To four digits: it keeps runs small, and makes no load zero."""
    return [float(f"{total / window[1]:.4g}") for total in window[2][layer]]
