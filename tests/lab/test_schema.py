"""Stores of other versions and in other databases: migrated, shared, or refused and left alone."""

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from einlinear.lab.run import Run
from einlinear.lab.schema import MIGRATIONS, RUNS, SCHEMA
from einlinear.lab.store import Store, StoreError

RUN = Run(task="bytes", fingerprint="f", family="dense", width=64, depth=2, tokens=4096, rate=0.003, seed=0, loss=2.5)
processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

FIRST_VERSION = """
CREATE TABLE runs (
    id INTEGER NOT NULL, task TEXT NOT NULL, fingerprint TEXT NOT NULL, family TEXT NOT NULL, width BIGINT NOT NULL,
    depth BIGINT NOT NULL, tokens BIGINT NOT NULL, rate DOUBLE NOT NULL, seed BIGINT NOT NULL, purpose TEXT NOT NULL,
    setup TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, loss DOUBLE, parameters BIGINT NOT NULL,
    flops BIGINT NOT NULL, linear_flops BIGINT NOT NULL, seconds DOUBLE NOT NULL, trunk TEXT NOT NULL,
    curve TEXT NOT NULL, device TEXT NOT NULL, versions TEXT NOT NULL, "commit" TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (task, fingerprint, family, width, depth, tokens, rate, seed, purpose, setup)
);
INSERT INTO runs VALUES (1, 'bytes', 'f', 'dense', 64, 2, 4096, 0.003, 0, 'measure', '{}', 'done', '', 2.5, 0, 0, 0, 0,
    '', '[]', '', '{}', '', '');
PRAGMA application_id = 1701408364;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store that the first version wrote."""
    path = tmp_path / "runs.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST_VERSION)
    return path


def test_a_store_of_the_first_version_is_migrated(old: Path) -> None:
    with Store(old) as store:
        assert store.runs() == [RUN]
        assert (store.runs()[0].spec, store.runs()[0].routers) == ("", "{}")
        assert not store.add(RUN)
        assert store.add(replace(RUN, seed=1, spec="Structure.parse('i, o i -> o', i=64, o=64)"))
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    assert [run.spec for run in Store(old).runs()] == ["", "Structure.parse('i, o i -> o', i=64, o=64)"]


def open_at_once(path: Path, barrier: Barrier) -> None:
    barrier.wait()
    Store(path).add(replace(RUN, seed=os.getpid()))


def test_processes_migrate_at_once(old: Path) -> None:
    barrier = processes.Barrier(4)
    workers = [processes.Process(target=open_at_once, args=(old, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(Store(old).runs()) == 5


def test_a_migration_that_fails_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    monkeypatch.setitem(MIGRATIONS, 1, (*MIGRATIONS[1], "ALTER TABLE nowhere ADD COLUMN x TEXT"))
    with pytest.raises(StoreError, match="no such table: nowhere"):
        Store(old)
    assert old.read_bytes() == before
    monkeypatch.undo()
    assert Store(old).runs() == [RUN]


def test_every_version_has_its_migration() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA))


def test_the_table_is_one_that_postgresql_takes() -> None:
    text = str(sa.schema.CreateTable(RUNS).compile(dialect=postgresql.dialect()))
    assert "flops NUMERIC(38, 0) NOT NULL" in text and "loss DOUBLE PRECISION" in text and "id SERIAL" in text


# ---- a PostgreSQL server of this machine ----------------------------------------------------------------------


def command(*words: object, user: str | None) -> None:
    switch = ["runuser", "-u", user, "--"] if user else []
    subprocess.run([*switch, *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a folder of its own, reached by a socket in it; skipped where PostgreSQL is not installed."""
    pytest.importorskip("psycopg")
    programs = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "/nowhere").parent]
    home = next((folder for folder in programs if (folder / "initdb").exists()), None)
    if home is None:
        pytest.skip("PostgreSQL's server is not installed")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder = Path("/tmp") / f"einlinear-{os.getpid()}"  # a socket's path may be 107 characters long
    folder.mkdir()
    try:
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        command(home / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync", user=user)
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        control = home / "pg_ctl"
        command(control, "-D", data, "-w", "-l", folder / "log", "-o", options, "start", user=user)
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            command(control, "-D", data, "-w", "-m", "immediate", "stop", user=user)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """Of the server, whose tables are dropped afterwards."""
    yield server
    engine = sa.create_engine(server.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS runs, einlinear_store")
    engine.dispose()


def test_a_server_keeps_runs_as_a_file_does(url: str) -> None:
    odd = replace(
        RUN, seed=-(2**70), flops=10**37, rate=0.1 + 0.2, loss=float("nan"), status="diverged", seconds=float("inf"),
        reason="δ ∞ 🙂\nsecond 'line'", curve="[[1, 2.0]]",
    )  # fmt: skip
    with Store(url) as store:
        assert store.add(RUN) and store.add(odd)
        assert not store.add(replace(RUN, loss=9.0))
        assert store.runs() == [RUN, replace(odd, loss=None)]
        assert store.find(RUN.key) == RUN and odd.key in store
        assert [run.seed for run in store.runs(loss=None)] == [odd.seed]
        assert type(store.runs()[1].flops) is int
    assert Store(url).runs(family="dense")[0].loss == 2.5


def write(url: str, barrier: Barrier, width: int) -> None:
    barrier.wait()
    store = Store(url)
    for seed in range(5):
        store.add(replace(RUN, width=width, seed=seed))
        store.add(replace(RUN, width=1, seed=seed))  # the same experiment in every process


def test_processes_share_a_server(url: str) -> None:
    barrier = processes.Barrier(4)
    writers = [processes.Process(target=write, args=(url, barrier, width)) for width in range(2, 6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(Store(url).runs()) == 5 * 5


def test_a_server_s_table_is_migrated_refused_or_left_alone(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))

    def do(statement: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)

    Store(url).add(RUN)
    do("ALTER TABLE runs DROP COLUMN spec, DROP COLUMN routers")
    do("UPDATE einlinear_store SET schema = 1")
    assert Store(url).runs() == [RUN]
    do("UPDATE einlinear_store SET schema = 99")
    with pytest.raises(StoreError, match="has version 99 of the schema"):
        Store(url)
    do("DROP TABLE einlinear_store")
    with pytest.raises(StoreError, match="has a table 'runs' that is not ours, and stays as it is"):
        Store(url)
    engine.dispose()


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(
        StoreError, match=r"Opening the store postgresql\+psycopg://me:\*\*\*@/runs.* failed: "
    ) as error:
        Store("postgresql://me:secret@/runs?host=/nowhere")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert "Make sure that the database is running" in str(error.value)
