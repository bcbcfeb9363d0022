"""The run store: one file that keeps every finished run and that any dataframe tool reads.

    with Store("runs/demo.sqlite") as store:
        if run.key not in store:
            store.add(train(...))
        frame = pandas.read_sql("select * from runs", "sqlite:///runs/demo.sqlite")

The file is SQLite in WAL mode: each run is committed on its own, so that killing the program loses at most
the run in progress, and several processes of one machine may add runs at once (not over a network drive).
"""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Self

from einlinear.lab.extras import extra
from einlinear.lab.run import Run
from einlinear.lab.schema import (
    DAMAGED,
    PATIENCE,
    RUNS,
    StoreError,
    prepare_database,
    prepare_file,
    refuse_other_fields,
)  # fmt: skip

with extra("lab"):
    import sqlalchemy as sa

REMEDIES = {  # by words of the database's own message
    "full": "Free some space and give the same command again; all runs stored before are intact.",
    "readonly": "Make the file and its folder writable, or name another file.",
    "unable to open": "Make the file and its folder writable, or name another file.",
    "locked": "Another program keeps the file locked: close it and give the same command again.",
    "malformed": DAMAGED,
    "connection": "Make sure that the database is running and the URL is right; all runs stored before are intact.",
}
UNREACHED = 10  # seconds after which a server that does not answer is given up


class Store:
    """Finished runs on disk, each experiment once.

    `location` is a file, created with its folders if there is none, or a database's URL, as in
    "postgresql://user@host/name" (`pip install "einlinear[postgres]"`), where it makes the tables `runs` and
    `einlinear_store`. Stores of older versions are migrated when opened.

    Raises StoreError, and leaves the place as it is, where it is not a store, is damaged, or was written by a
    newer version; and where the location cannot be reached or written.
    """

    def __init__(self, location: str | Path) -> None:
        is_url = "://" in str(location)
        url = sa.make_url(str(location)) if is_url else sa.URL.create("sqlite", database=str(location))
        is_file = url.drivername.startswith("sqlite")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        self._place = f"the store {url.database if is_file else url}"
        waiting = {"timeout": PATIENCE} if is_file else {"connect_timeout": UNREACHED}
        with self._explained("Opening"), extra("postgres"):
            # No pool: the last connection to close folds the write-ahead log into the file, so that between
            # two calls the store truly is one file, safe to copy.
            self._engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=waiting)
            if is_file:
                prepare_file(self._engine, Path(url.database or ""), self._place)
            else:
                prepare_database(self._engine, self._place)
            refuse_other_fields(self._engine, self._place)

    def add(self, run: Run) -> bool:
        """Store a finished run, at once and for good; True if it is new.

        A run whose key is already there is not stored again, whatever its result: the first one stays.
        NaN is stored as None: SQL has no other word for it.
        """
        with self._explained("Storing a run in"):
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.insert(RUNS).values(asdict(run) | {"loss": _number(run.loss)}))
            except sa.exc.IntegrityError:
                if run.key in self:
                    return False
                raise
        return True

    def runs(self, **filters: str | float | None) -> list[Run]:
        """The runs in the order of arrival; `filters` ask for equality: `runs(family="dense", width=64)`.

        Raises ValueError for a name that is not a field of `Run`.
        """
        names = [field.name for field in fields(Run)]
        if unknown := [name for name in filters if name not in names]:
            raise ValueError(f"Selecting runs: they have no {unknown[0]!r}. They have {', '.join(names)}.")
        chosen = sa.select(*(RUNS.c[name] for name in names)).order_by(RUNS.c.id)
        for name, value in filters.items():
            chosen = chosen.where(RUNS.c[name] == value)
        with self._explained("Reading"), self._engine.connect() as connection:
            return [Run(**row) for row in connection.execute(chosen).mappings()]

    def find(self, key: tuple[str | int | float, ...]) -> Run | None:
        """The run with this key (`Run.key`), or None."""
        return next(iter(self.runs(**dict(zip(Run.identity, key, strict=True)))), None)

    def __contains__(self, key: tuple[str | int | float, ...]) -> bool:
        return self.find(key) is not None

    def to_csv(self, path: str | Path) -> None:
        """Write all runs to `path`, a column for each field of `Run`; None is an empty cell."""
        runs = self.runs()
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(field.name for field in fields(Run))
                writer.writerows(map(astuple, runs))
        except OSError as error:
            cause = f"Writing the runs to {path} failed: {error.strerror}"
            raise StoreError(f"{cause}. Name another file; the store is intact.") from error

    def close(self) -> None:
        """Let go of the database. Nothing is pending: every run was committed when it was added."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn the database's errors into one sentence with a remedy."""
        try:
            yield
        except (sa.exc.DBAPIError, sa.exc.ArgumentError) as error:
            cause = " ".join(str(getattr(error, "orig", error)).split()).rstrip(".")
            known = (remedy for word, remedy in REMEDIES.items() if word in cause)
            remedy = next(known, "All runs stored before are intact.")
            raise StoreError(f"{doing} {self._place} failed: {cause}. {remedy}") from error


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
