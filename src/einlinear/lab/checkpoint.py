"""The state of a training run as a value: in memory to branch from, in one file to resume from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from einlinear.lab.health import Window


@dataclass(frozen=True)
class State:
    """All that a training run needs to go on exactly as if it had never stopped.

    The data's cursor is `step`, since batches are functions of it. `curve` holds [tokens, training loss] pairs,
    `seconds` the time of training so far, `health` what was seen of routers.
    """

    step: int
    seconds: float
    curve: list[tuple[int, float]]
    tensors: dict[str, Tensor]
    health: list[Window] = field(default_factory=list)


def save(path: Path, states: Mapping[str, State]) -> None:
    """Writes named states to one file that is at every moment either the old one or the new one, whole.

    Raises OSError, saying so, where there is no room or no permission.
    """
    tensors = {f"{name}/{key}": value for name, state in states.items() for key, value in state.tensors.items()}
    metadata = {
        name: json.dumps([state.step, state.seconds, state.curve, state.health]) for name, state in states.items()
    }
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(safetensors.torch.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"Saving the checkpoint {path} failed: {error.strerror}. Make room and give the same command again; "
            f"all runs stored before are intact."
        ) from error


def load(path: Path) -> dict[str, State]:
    """The states in a file; none where there is no file.

    Raises ValueError where the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"Resuming from {path}: the file is damaged ({error}). Remove it and give the same command again."
        ) from error
    states = {}
    for name, text in metadata.items():
        step, seconds, curve, *health = json.loads(text)  # which files of older versions lack
        mine = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        seen = [(tokens, looks, sums) for tokens, looks, sums in chain(*health)]
        states[name] = State(step, seconds, [(tokens, loss) for tokens, loss in curve], mine, seen)
    return states


def remove(path: Path) -> None:
    """Removes a file of states, and what a process killed while saving it left."""
    path.unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")
