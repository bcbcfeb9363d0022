"""How runs lie in a database: the table, its version, and the way from every older version to this one."""

import time
import typing
from dataclasses import Field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from einlinear.lab.extras import extra
from einlinear.lab.run import Run

with extra("lab"):
    import sqlalchemy as sa

# SQLite's header has room for the application that owns a file and for its schema's version.
# https://www.sqlite.org/fileformat2.html, sections 1.3.15 and 1.3.17
APPLICATION = int.from_bytes(b"einl", "big")
PATIENCE = 60  # seconds to wait for another process that is writing
DAMAGED = "The file is damaged: restore a copy, or move it away and give the same command again."

MIGRATIONS = {
    1: ("ALTER TABLE runs ADD COLUMN spec TEXT NOT NULL DEFAULT ''",),
    2: ("ALTER TABLE runs ADD COLUMN routers TEXT NOT NULL DEFAULT '{}'",),
}
"""What takes a store of a version to the next one: statements that every database understands."""

SCHEMA = 1 + max(MIGRATIONS)


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

VERSION = sa.Table("einlinear_store", sa.MetaData(), sa.Column("schema", sa.Integer, nullable=False))
"""Of a database that is no file, which has no header: one row, and the sign that its table of runs is ours."""


def prepare_file(engine: sa.Engine, path: Path, place: str) -> None:
    """Makes sure that a file is a store of this version, by its first bytes: opening with SQLite could change it.

    Creates it where there is none, and migrates an older one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = b""
        if path.exists():
            with path.open("rb") as file:
                header = file.read(100)
    except OSError as error:
        raise StoreError(f"Opening {place} failed: {error.strerror}. Name another file.") from error
    schema, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if header and (not header.startswith(b"SQLite format 3\0") or application != APPLICATION):
        raise StoreError(
            f"Opening {place}: the file is of another kind, or damaged, and stays as it is. "
            f"Name another file for the runs."
        )
    _refuse_newer(schema, place)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")  # transactions as written below
        if header:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise StoreError(f"Opening {place} failed: {found}. {DAMAGED}")
        if schema < SCHEMA:
            # In one transaction and before WAL, so that no other process ever reads an unmarked header.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            if connection.exec_driver_sql("PRAGMA application_id").scalar() != APPLICATION:
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION}")
                RUNS.metadata.create_all(connection)
            else:  # the header may be older than what another process has done since
                _migrate(connection, connection.exec_driver_sql("PRAGMA user_version").scalar() or SCHEMA)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")
            connection.exec_driver_sql("COMMIT")
        _write_ahead(connection)


def prepare_database(engine: sa.Engine, place: str) -> None:
    """Makes sure that a database's table of runs is ours and of this version; creates or migrates it.

    In one transaction, while no other process does the same.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(APPLICATION)))
        present = sa.inspect(connection).has_table
        if not present(VERSION.name):
            if present(RUNS.name):
                raise StoreError(
                    f"Opening {place}: it has a table '{RUNS.name}' that is not ours, and stays as it is. "
                    f"Name another database for the runs."
                )
            RUNS.metadata.create_all(connection)
            VERSION.metadata.create_all(connection)
            connection.execute(sa.insert(VERSION).values(schema=SCHEMA))
            return
        schema = connection.execute(sa.select(VERSION.c.schema)).scalar_one()
        _refuse_newer(schema, place)
        _migrate(connection, schema)
        connection.execute(sa.update(VERSION).values(schema=SCHEMA))


def refuse_other_fields(engine: sa.Engine, place: str) -> None:
    """Raises StoreError where the table does not have the fields of a `Run`."""
    found = {column["name"] for column in sa.inspect(engine).get_columns(RUNS.name)}
    if differing := sorted(found ^ set(RUNS.c.keys())):
        raise StoreError(
            f"Opening {place}: its runs do not have the fields of this einlinear's, they differ in "
            f"{', '.join(differing)}. Use the einlinear that wrote it, or name another store."
        )


def _refuse_newer(schema: int, place: str) -> None:
    if schema > SCHEMA:
        raise StoreError(
            f"Opening {place}: it has version {schema} of the schema, and this einlinear knows {SCHEMA}. "
            f"Upgrade einlinear, or name another place for the runs."
        )


def _migrate(connection: sa.Connection, schema: int) -> None:
    for version in range(schema, SCHEMA):
        for statement in MIGRATIONS[version]:
            connection.exec_driver_sql(statement)


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
