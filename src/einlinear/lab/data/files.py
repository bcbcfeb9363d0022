"""The user's files: finding and reading them."""

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path


def find_files(paths: Iterable[str | Path], left_out: Collection[str] = ()) -> list[tuple[str, Path]]:
    """The files at and under `paths` with their relative names, each file once, sorted by name.

    Inside directories, hidden files and the folders named in `left_out` are passed over.
    Raises ValueError for a path that does not exist and where there is no file at all.
    """
    roots = [Path(path) for path in paths]
    found: dict[Path, str] = {}  # by true location: a file reached twice must not be on both sides of a split
    for path in roots:
        if not path.exists():
            raise ValueError(f"Collecting files: {path} does not exist. Check the spelling of the path.")
        for relative, file in _inside(path, left_out) if path.is_dir() else [(path.name, path)]:
            if file.is_file():
                found.setdefault(file.resolve(), relative)
    if not found:
        raise ValueError(f"Collecting files: there is none under {', '.join(map(str, roots))}. Name others.")
    return sorted(((relative, file) for file, relative in found.items()), key=lambda pair: pair[0])


def read_file(path: Path) -> bytes:
    """The bytes of `path`; raises ValueError with the reason where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"Reading {path} failed: {error.strerror}. Make the file readable, or leave it out of the paths."
        ) from error


def _inside(directory: Path, left_out: Collection[str]) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                yield file.relative_to(directory).as_posix(), file
