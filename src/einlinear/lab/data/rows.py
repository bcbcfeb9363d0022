"""Rows of datasets in the usual formats, through the `datasets` library."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from einlinear.lab.data.files import find_files
from einlinear.lab.extras import extra

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}


def read_rows(
    name: str, repository: str, columns: Sequence[str], paths: Sequence[str | Path], download: bool
) -> Iterator[dict[str, Any]]:
    """The rows of local files, read in place without a cache, or those of `repository` if `download`.

    Raises ValueError where there is neither, and where the rows cannot be read or lack one of `columns`.
    """
    with extra("hf"):
        import datasets  # type: ignore[import-untyped]
    if paths:
        files = [str(file) for _, file in find_files(paths)]
        kinds = {FORMATS.get(Path(file).suffix, "") for file in files}
        if len(kinds) != 1 or "" in kinds:
            raise ValueError(f"Loading the task {name!r}: give files of one kind, of {', '.join(FORMATS)}.")
        # Not load_dataset(..., data_files=...): that asks the network to count the download.
        open_rows = partial(getattr(datasets.Dataset, f"from_{kinds.pop()}"), files, streaming=True)
    elif download:
        open_rows = partial(datasets.load_dataset, repository, split="train")
    else:
        raise ValueError(
            f"Loading the task {name!r}: its data is not part of this package. Give paths of local files "
            f"with the columns {', '.join(columns)}, or allow the download of {repository} (download=True)."
        )
    try:
        for row in open_rows():
            if missing := [column for column in columns if column not in row]:
                raise LookupError(f"the column {missing[0]!r} is missing among {', '.join(row)}")
            yield row
    except Exception as error:  # of many kinds, from parquet, json, the file system and the network
        cause = str(error).rstrip(".") or type(error).__name__
        source = ", ".join(map(str, paths)) or repository
        raise ValueError(f"Loading the task {name!r}: reading {source} failed: {cause}.") from error
