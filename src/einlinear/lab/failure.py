"""Training that cannot go on, as a result."""

import torch

LACKING = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""How torch, CUDA and its libraries say that memory is short."""


class Failure(Exception):
    """A training run that cannot go on: a result, not an error. `status` and the message go into its `Run`."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def out_of_memory(error: BaseException) -> BaseException | None:
    """The error that says a tensor found no room: this one or what caused it; None where none does.

    Torch has a type of its own for this on accelerators, and only where its own allocator finds none. A lack of memory
    while a graph was recorded comes as the error of ending the record, with the cause behind it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError) or any(words in str(cause) for words in LACKING):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def failed(error: Failure | RuntimeError) -> dict[str, object]:
    """Status and reason of a run that ended so; errors that are not results are raised again."""
    if isinstance(error, Failure):
        return {"status": error.status, "reason": str(error)}
    if (cause := out_of_memory(error)) is not None:
        return {"status": "out of memory", "reason": str(cause).splitlines()[0]}
    raise error
