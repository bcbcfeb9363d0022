"""Byte-level language modelling: of Python's own source, of the user's files, of web pages."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from einlinear.lab.data.files import find_files, read_file
from einlinear.lab.data.rows import read_rows
from einlinear.lab.data.task import Sequences, fingerprint, held_out

HELD_OUT = 0.05  # share of a corpus kept for validation
MAPPED_FROM = 2**28  # bytes from which a single file is mapped into memory instead of read

# Folders of the standard library that are not Python as people write it: packages of others, tests, tables,
# and lib2to3, which exists in some versions only.
NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
NOT_SOURCE |= {"encodings", "pydoc_data", "lib2to3"}


def python_source(*, context: int = 128, data_seed: int = 0, limit: int = 2**16) -> Sequences:
    """bytes of the Python standard library's own source, held out by file; needs nothing but Python"""
    documents = [
        (relative.encode(), read_file(path))
        for relative, path in find_files([sysconfig.get_paths()["stdlib"]], left_out=NOT_SOURCE)
        # A table again, and the configuration of the build, which differs from machine to machine.
        if relative.endswith(".py") and not relative.startswith(("html/entities", "config-", "_sysconfigdata"))
    ]
    what = f"the source of Python {sys.version_info.major}.{sys.version_info.minor}'s standard library"
    return _corpus("bytes", what, documents, context, data_seed, limit)


def user_text(
    *, paths: Sequence[str | Path] = (), context: int = 128, data_seed: int = 0, limit: int = 2**16
) -> Sequences:
    """bytes of your own files and directories, any encoding; hidden files are left out"""
    if not paths:
        raise ValueError("Loading the task 'text': no paths were given. Name the files or directories.")
    files = find_files(paths)
    if len(files) == 1 and (size := files[0][1].stat().st_size) >= MAPPED_FROM:
        tokens = torch.from_file(str(files[0][1]), shared=False, size=size, dtype=torch.uint8)
        cut = int(size * (1 - HELD_OUT))
        description = f"the given file, mapped: {size / 1e6:.2f} MB, its end held out"
        return _sequences("text", description, tokens[:cut], tokens[cut:], context, limit)
    documents = [(os.fsencode(relative), read_file(path)) for relative, path in files]
    return _corpus("text", "the given files", documents, context, data_seed, limit)


def open_web_text(
    *,
    paths: Sequence[str | Path] = (),
    download: bool = False,
    context: int = 128,
    data_seed: int = 0,
    limit: int = 2**16,
) -> Sequences:
    """bytes of web pages: parquet, json or txt rows with a "text" column, or OpenWebText by download"""
    rows = read_rows("openwebtext", "Skylion007/openwebtext", ["text"], paths, download)
    pages = ((row["text"] or "").encode() for row in rows)
    # A page is its own identity, so that equal pages go to the same side.
    return _corpus("openwebtext", "web pages", [(page, page) for page in pages], context, data_seed, limit)


def _corpus(
    name: str, what: str, documents: Sequence[tuple[bytes, bytes]], context: int, data_seed: int, limit: int
) -> Sequences:
    """Byte sequences of (identity, content) documents, joined by a zero byte.

    Many documents are held out whole, by a hash of their identity. With few (or one that dominates) the end
    of each is held out instead: whole ones would make a validation set of an arbitrary size.
    """
    documents = [(identity, content) for identity, content in documents if content]
    sizes = [len(content) for _, content in documents]
    if len(documents) >= 20 and max(sizes) <= sum(sizes) / 10:
        held = held_out([identity for identity, _ in documents], sizes, HELD_OUT, data_seed)
        train = [content for (_, content), out in zip(documents, held, strict=True) if not out]
        validation = [content for (_, content), out in zip(documents, held, strict=True) if out]
        how = f"{len(validation)} of them held out whole"
    else:
        cuts = [int(size * (1 - HELD_OUT)) for size in sizes]
        train = [content[:cut] for (_, content), cut in zip(documents, cuts, strict=True)]
        validation = [content[cut:] for (_, content), cut in zip(documents, cuts, strict=True)]
        how = "the end of each held out"
    description = f"{what}: {sum(sizes) / 1e6:.2f} MB in {len(documents)} documents, {how}"
    return _sequences(name, description, _joined(train), _joined(validation), context, limit)


def _joined(documents: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(b"\0").join(documents), np.uint8))


def _sequences(name: str, description: str, train: Tensor, validation: Tensor, context: int, limit: int) -> Sequences:
    return Sequences(
        name=name,
        description=description,
        fingerprint=fingerprint(name, limit, train, validation),
        vocabulary=256,
        context=context,
        train=train,
        validation=validation,
        limit=limit,
    )
