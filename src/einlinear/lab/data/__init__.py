"""Tasks to train on: the same tokens for every structure, from data that is already on the machine.

A task is `Sequences` (next-token prediction) or `Examples` (vectors in, a class or a number out). Both hand
out `batch(step, size, seed)`, a pure function of its arguments, so that a resumed run and a run of another
structure see exactly the same data, and `validation_batches(size)`, one fixed set for all runs.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

from einlinear.lab.data.images import cifar10, digits, pixels
from einlinear.lab.data.task import Examples as Examples
from einlinear.lab.data.task import Sequences as Sequences
from einlinear.lab.data.task import Task as Task
from einlinear.lab.data.task import placed as placed
from einlinear.lab.data.task import sent as sent
from einlinear.lab.data.teacher import random_teacher
from einlinear.lab.data.text import open_web_text, python_source, user_text

# The first line of a task's docstring is its description, its signature the options it takes.
_TASKS: dict[str, Callable[..., Task]] = {
    "bytes": python_source,
    "text": user_text,
    "pixels": pixels,
    "images": digits,
    "teacher": random_teacher,
    "openwebtext": open_web_text,
    "cifar10": cifar10,
}


def tasks() -> dict[str, str]:
    """The tasks by name, each with one line of description."""
    return {name: (build.__doc__ or "").splitlines()[0] for name, build in _TASKS.items()}


def load(
    name: str,
    *,
    paths: str | Path | Iterable[str | Path] = (),
    context: int | None = None,
    data_seed: int = 0,
    limit: int | None = None,
    download: bool = False,
) -> Task:
    """The task called `name`, one of `tasks()`.

    `paths` are files or directories with the user's data; `context` is the window of a sequence task in
    tokens; `data_seed` settles what is random about the data itself (which files are held out, the teacher's
    weights); `limit` is the most validation tokens or examples of one evaluation; `download` allows fetching
    a public dataset. An option left out takes the task's own default. All of them except `context` are in
    the fingerprint as far as they change the data.

    Raises ValueError for an unknown name, for an option that the task does not have, and for data that is
    missing, unreadable or too small; ModuleNotFoundError, naming the extra to install, for a missing package.
    """
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Loading a task: there is no {name!r}.{guess} There are {', '.join(_TASKS)}.")
    paths = (paths,) if isinstance(paths, str | Path) else tuple(paths)
    asked = {"paths": paths or None, "context": context, "limit": limit, "download": download or None}
    options = {option: value for option, value in asked.items() if value is not None}
    for option, value in options.items():
        takers = [task for task, build in _TASKS.items() if option in inspect.signature(build).parameters]
        if name not in takers:
            raise ValueError(
                f"Loading the task {name!r}: it takes no {option}, but was given {value!r}. "
                f"Leave it out, or use a task that takes it: {', '.join(takers)}."
            )
        if isinstance(value, int) and value < 1:
            raise ValueError(f"Loading the task {name!r}: {option} must be at least 1, but is {value}.")
    return _TASKS[name](data_seed=data_seed, **options)
