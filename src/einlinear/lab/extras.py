"""Packages that only a part of the lab needs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the import of an optional package: if it is missing, one sentence says how to install it.

    `name` is the extra of this package that brings it: `with extra("hf"): import datasets`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'This needs the package {error.name}, which is not installed: pip install "einlinear[{name}]"',
            name=error.name,
        ) from error
