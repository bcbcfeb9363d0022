"""The run store: one file that keeps every finished run and that any dataframe tool reads.

    with Store("runs/demo.sqlite") as store:
        if run.key not in store:
            store.add(train(...))
        frame = pandas.read_sql("select * from runs", "sqlite:///runs/demo.sqlite")

The file is SQLite in WAL mode: each run is committed on its own, so that killing the program loses at most
the run in progress, and several processes of one machine may add runs at once (not over a network drive).
"""

import csv
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, astuple, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from einlinear.lab.extras import extra
from einlinear.lab.run import Run

with extra("lab"):
    import sqlalchemy as sa

# SQLite's header has room for the application that owns a file and for its schema's version.
# https://www.sqlite.org/fileformat2.html, sections 1.3.15 and 1.3.17
APPLICATION = int.from_bytes(b"einl", "big")
SCHEMA = 1
PATIENCE = 60  # seconds to wait for another process that is writing

REMEDIES = {  # by words of the database's own message
    "full": "Free some space and give the same command again; all runs stored before are intact.",
    "readonly": "Make the file and its folder writable, or name another file.",
    "unable to open": "Make the file and its folder writable, or name another file.",
    "locked": "Another program keeps the file locked: close it and give the same command again.",
    "malformed": "The file is damaged: restore a copy, or move it away and give the same command again.",
}


class StoreError(ValueError):
    """A store that cannot be opened, read or written, in one sentence with the remedy."""


class Count(sa.TypeDecorator[int]):
    """An exact count of any size.

    SQLite's integers end at 2^63, which training FLOPs can pass, and beyond it would round them to a float.
    Those few are kept as text with `_` between the thousands: Python's int() reads it, SQLite lets it be.
    """

    impl = sa.BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Elsewhere decimals of 38 digits are exact, and enough."""
        return sa.BigInteger() if dialect.name == "sqlite" else sa.Numeric(38, 0)

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> int | str | None:
        """The count as the database takes it."""
        if value is None:
            return None
        return f"{value:_}" if dialect.name == "sqlite" and abs(value) >= 2**63 else int(value)

    def process_result_value(self, value: int | str | Decimal | None, dialect: sa.Dialect) -> int | None:
        """The count as Python's int."""
        return None if value is None else int(value)


def _column(field: Field[Any]) -> sa.Column[Any]:
    """The column of a field of `Run`, from the field's own type."""
    kinds = typing.get_args(field.type) or (field.type,)
    types: dict[Any, sa.types.TypeEngine[Any]] = {str: sa.Text(), int: Count(), float: sa.Double()}
    return sa.Column(field.name, types[kinds[0]], nullable=type(None) in kinds)


RUNS = sa.Table(
    "runs",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),  # the order of arrival
    *map(_column, fields(Run)),
    sa.UniqueConstraint(*Run.identity),
)


class Store:
    """Finished runs on disk, each experiment once.

    `location` is a file, created with its folders if there is none, or a database URL that SQLAlchemy knows
    ("postgresql://..."; only SQLite is tested).

    Raises StoreError, and leaves the file as it is, where it is not a store, is damaged, or was written by a
    newer version; and where the location cannot be written.
    """

    def __init__(self, location: str | Path) -> None:
        is_url = "://" in str(location)
        url = sa.make_url(str(location)) if is_url else sa.URL.create("sqlite", database=str(location))
        is_file = url.drivername.startswith("sqlite")
        self._place = f"the store {url.database if is_file else url}"
        waiting = {"timeout": PATIENCE} if is_file else {}
        with self._explained("Opening"):
            # No pool: the last connection to close folds the write-ahead log into the file, so that between
            # two calls the store truly is one file, safe to copy.
            self._engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=waiting)
            if is_file:
                self._open_file(Path(url.database or ""))
            else:
                RUNS.metadata.create_all(self._engine)
            found = {column["name"] for column in sa.inspect(self._engine).get_columns(RUNS.name)}
        if differing := sorted(found ^ set(RUNS.c.keys())):
            raise StoreError(
                f"Opening {self._place}: its runs do not have the fields of this einlinear's, they differ in "
                f"{', '.join(differing)}. Use the einlinear that wrote it, or name another store."
            )

    def add(self, run: Run) -> bool:
        """Store a finished run, at once and for good; True if it is new.

        A run whose key is already there is not stored again, whatever its result: the first one stays.
        NaN is stored as None: SQL has no other word for it.
        """
        with self._explained("Storing a run in"):
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.insert(RUNS).values(asdict(run)))
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

    def _open_file(self, path: Path) -> None:
        """Make sure that the file is a store, by its first bytes: opening with SQLite could change it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            header = b""
            if path.exists():
                with path.open("rb") as file:
                    header = file.read(100)
        except OSError as error:
            raise StoreError(f"Opening {self._place} failed: {error.strerror}. Name another file.") from error
        schema, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
        if header and (not header.startswith(b"SQLite format 3\0") or application != APPLICATION):
            raise StoreError(
                f"Opening {self._place}: the file is of another kind, or damaged, and stays as it is. "
                f"Name another file for the runs."
            )
        if schema > SCHEMA:
            raise StoreError(
                f"Opening {self._place}: it has version {schema} of the schema, and this einlinear knows "
                f"{SCHEMA}. Upgrade einlinear, or name another file for the runs."
            )
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")  # transactions as written below
            if header:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if found != "ok":
                    raise StoreError(f"Opening {self._place} failed: {found}. {REMEDIES['malformed']}")
            else:
                # In one transaction and before WAL, so that no other process ever reads an unmarked header.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION}")
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")
                RUNS.metadata.create_all(connection)
                connection.exec_driver_sql("COMMIT")
            _write_ahead(connection)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn the database's errors into one sentence with a remedy."""
        try:
            yield
        except (sa.exc.DBAPIError, sa.exc.ArgumentError) as error:
            cause = str(getattr(error, "orig", error))
            known = (remedy for word, remedy in REMEDIES.items() if word in cause)
            remedy = next(known, "All runs stored before are intact.")
            raise StoreError(f"{doing} {self._place} failed: {cause}. {remedy}") from error


def _write_ahead(connection: sa.Connection) -> None:
    """Turn on WAL, which stays on. Alone among statements it does not wait by itself for a locked file."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            return
        except sa.exc.OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
