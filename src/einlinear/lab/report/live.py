"""The report of a study that is still running: written again whenever the store has new runs."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from einlinear.lab.report.page import write_report
from einlinear.lab.run import Run


def watch(
    read: Callable[[], Sequence[Run]],
    path: Path,
    *,
    every: int = 10,
    allow_mixed_data: bool = False,
    told: Callable[[Sequence[Run]], object] = lambda runs: None,
) -> None:
    """Looks every so many seconds until it is interrupted; the page reloads itself meanwhile, and no more after that.

    Args:
        read: gives the runs there are; none yet is fine.
        path: where the page is.
        every: seconds between looks.
        allow_mixed_data: as `write_report`.
        told: called with the runs after each writing.
    """
    shown: Sequence[Run] = ()
    try:
        while True:
            runs = read()
            if len(runs) != len(shown):
                write_report(runs, path, allow_mixed_data=allow_mixed_data, refresh=every)
                shown = runs
                told(runs)
            time.sleep(every)
    finally:
        if shown:
            write_report(shown, path, allow_mixed_data=allow_mixed_data)
