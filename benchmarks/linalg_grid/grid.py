"""The cells of the grid: every case, every question, and what is wrong with the answer."""

import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import solving
import spectra
import torch
from case import Case, Wrong, size
from compositions import compose
from leaves import Draw
from named import named

DTYPES = (torch.float32, torch.float64, torch.complex128)
QUESTIONS = {ask.__name__: ask for ask in (*solving.QUESTIONS, *spectra.QUESTIONS)}


def cases(draws: int, seed: int) -> Iterator[Case]:
    for dtype in DTYPES:
        yield from named(dtype)
        for k in range(draws):
            batch = ((), (), (2,), (2, 1))[k % 4]
            r = Draw(seed * 1_000_003 + k, dtype, batch)
            with np.errstate(all="ignore"):
                found = compose(r, r.choice.choice([0, 1, 1, 2, 2, 3]))
            noise = "small" not in found.name and 0 < size(found.D) < 1e-13  # what is left where terms cancel
            if max(found.D.shape[-2:]) <= 48 and not noise:
                yield found


def judge(case: Case, name: str) -> str | None:
    """What is wrong with a cell, or None."""
    torch.manual_seed(0)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            QUESTIONS[name](case)
    except Wrong as error:
        return str(error)
    except Exception as error:  # every kind counts as a wrong cell
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return None
