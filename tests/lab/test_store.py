"""The store: every finished run once, exactly as it was, whatever happens to the process that wrote it."""

import csv
import dataclasses
import math
import multiprocessing
import os
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einlinear.lab.run import Run
from einlinear.lab.schema import SCHEMA
from einlinear.lab.store import Store, StoreError

names = [field.name for field in dataclasses.fields(Run)]
# Forking spares each process the imports; elsewhere it is not safe.
processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def run(**changes: Any) -> Run:
    """A finished run, except for the changes."""
    experiment = {
        "task": "bytes",
        "fingerprint": "0123456789abcdef",
        "family": "dense",
        "width": 64,
        "depth": 2,
    }
    outcome = {"loss": 2.5, "flops": 10**12, "created": "2026-01-01T00:00:00Z"}
    return Run(**(experiment | {"tokens": 65536, "rate": 0.003, "seed": 0} | outcome | changes))  # type: ignore[arg-type]


@contextmanager
def pragma(statement: str) -> Iterator[None]:
    """Every connection opened inside starts with this statement: how a sick disk is simulated."""

    def state(connection: Any, _: Any) -> None:
        connection.execute(f"PRAGMA {statement}")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", state)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", state)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "runs.sqlite"


# ---- what is stored ---------------------------------------------------------------------------------------


def test_every_field_comes_back_exactly(path: Path) -> None:
    words = {
        "family": 'btt"; drop table runs; --',
        "reason": "δ ∞ 🙂\nsecond line\0end",
        "setup": '{"batch": 8}',
    }
    counts = {"flops": 10**20, "linear_flops": 10**20 + 1, "parameters": 2**63 - 1, "seed": -(2**63) - 1}
    numbers = {"loss": None, "rate": 0.1 + 0.2, "seconds": math.inf}
    odd = run(**words, **counts, **numbers, status="diverged", curve="[[1, 2.0]]", trunk="t", commit="abc")
    Store(path).add(odd)
    (back,) = Store(path).runs()
    assert dataclasses.asdict(back) == dataclasses.asdict(odd)
    assert type(back.flops) is int
    assert back.key in Store(path)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
real = st.floats(allow_nan=False)
anything = st.builds(
    Run,
    **{
        field.name: {str: text, int: st.integers(-(10**30), 10**30), float: real}.get(field.type, st.none() | real)
        for field in dataclasses.fields(Run)
    },
)


@settings(max_examples=40, deadline=None)
@given(anything)
def test_any_run_comes_back_exactly(any_run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "runs.sqlite")) as store:
        assert store.add(any_run)
        assert dataclasses.asdict(store.runs()[0]) == dataclasses.asdict(any_run)
        assert store.find(any_run.key) == any_run


def test_the_table_has_the_fields_of_a_run(path: Path) -> None:
    Store(path)
    with closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(runs)")]
    assert columns == ["id", *names]


def test_numbers_of_other_libraries_are_welcome(path: Path) -> None:
    with Store(path) as store:
        store.add(run(flops=torch.tensor(10**12).numpy()[()], loss=torch.tensor(math.nan).numpy()[()].astype(float)))
        (stored,) = store.runs()
    assert stored == run(loss=None)
    assert type(stored.flops) is int


def test_an_experiment_is_stored_once_and_the_first_result_stays(path: Path) -> None:
    with Store(path) as store:
        assert store.add(run(loss=2.5))
        assert not store.add(run(loss=9.0, status="diverged"))
        assert [stored.loss for stored in store.runs()] == [2.5]


@pytest.mark.parametrize("name", names[: names.index("status")])
def test_a_run_is_another_experiment_when_any_part_of_its_key_differs(path: Path, name: str) -> None:
    value = getattr(run(), name)
    with Store(path) as store:
        store.add(run())
        other = run(**{name: value + "x" if isinstance(value, str) else value * 2 + 1})
        assert other.key not in store
        assert store.add(other)
        assert store.find(other.key) == other
        assert store.find(run().key) == run()


def test_a_sweep_resumes_where_it_was_interrupted(path: Path) -> None:
    """Two calls of the same sweep, the first one stopped: each run is trained once."""
    trained = []

    def sweep(stop_at: int | None = None) -> None:
        with Store(path) as store:
            for width in (8, 16, 32, 64):
                if width == stop_at:
                    raise KeyboardInterrupt
                if run(width=width).key not in store:
                    trained.append(width)
                    store.add(run(width=width))

    with pytest.raises(KeyboardInterrupt):
        sweep(stop_at=32)
    sweep()
    assert trained == [8, 16, 32, 64]
    assert [stored.width for stored in Store(path).runs()] == trained


def test_runs_are_selected_by_fields_in_the_order_of_arrival(path: Path) -> None:
    store = Store(path)
    for width in (64, 8, 32):
        for family in ("dense", "btt(rank=2)"):
            store.add(run(width=width, family=family, loss=None if width == 8 else 1.0, flops=10**20 * width))
    assert [stored.width for stored in store.runs(family="dense")] == [64, 8, 32]
    assert len(store.runs()) == 6
    assert [stored.family for stored in store.runs(width=8, loss=None)] == ["dense", "btt(rank=2)"]
    assert [stored.width for stored in store.runs(flops=32 * 10**20, family="dense")] == [32]
    assert store.runs(family="monarch") == []
    with pytest.raises(ValueError, match=r"no 'widht'\. They have task, "):
        store.runs(widht=8)


def test_a_dataframe_tool_reads_the_file(path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    store = Store(path)
    store.add(run())
    store.add(run(width=128, loss=None, status="diverged"))
    with closing(sqlite3.connect(path)) as connection:
        frame = pandas.read_sql("select * from runs", connection)
    assert frame.flops.tolist() == [10**12] * 2
    assert frame.flops.dtype.kind == "i"
    assert frame.loss.dtype.kind == "f"
    assert frame.loss.isna().tolist() == [False, True]
    by_table = pandas.read_sql_table("runs", f"sqlite:///{path}")
    pandas.testing.assert_frame_equal(by_table, frame, check_dtype=False)


def test_csv_has_a_column_for_each_field(path: Path, tmp_path: Path) -> None:
    store = Store(path)
    runs = [run(reason='comma, "quote"\nline', loss=None, flops=10**20), run(width=128, loss=1 / 3)]
    for each in runs:
        store.add(each)
    store.to_csv(tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [["" if value is None else str(value) for value in dataclasses.astuple(each)] for each in runs]
    assert [list(row.values()) for row in rows] == texts
    assert list(rows[0]) == names
    with pytest.raises(StoreError, match=r"Writing the runs to .* failed: .*; the store is intact"):
        store.to_csv(tmp_path / "no" / "folder.csv")


# ---- several processes, and sudden ends -------------------------------------------------------------------


def write(path: Path, barrier: Barrier, width: int) -> None:
    barrier.wait()
    store = Store(path)
    for seed in range(5):
        store.add(run(width=width, seed=seed))
        store.add(run(width=1, seed=seed))  # the same experiment in every process


def test_processes_add_runs_at_once(path: Path) -> None:
    barrier = processes.Barrier(6)
    writers = [processes.Process(target=write, args=(path, barrier, width)) for width in range(2, 8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 6
    keys = [stored.key for stored in Store(path).runs()]
    assert len(keys) == len(set(keys)) == 7 * 5


def test_opening_waits_for_another_process(path: Path) -> None:
    """Switching on WAL fails at once, without waiting, while another connection reads the file."""
    Store(path).add(run())
    with closing(sqlite3.connect(path, check_same_thread=False, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT * FROM runs").fetchall()
        release = threading.Timer(0.2, lambda: other.execute("COMMIT"))
        release.start()
        assert len(Store(path).runs()) == 1
        release.join()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def add_forever(path: Path, progress: Connection) -> None:
    store = Store(path)
    for seed in range(10**6):
        store.add(run(seed=seed))
        progress.send(seed)


def test_a_killed_process_loses_no_stored_run(path: Path) -> None:
    receiver, sender = processes.Pipe(duplex=False)
    writer = processes.Process(target=add_forever, args=(path, sender))
    writer.start()
    while (last := receiver.recv()) < 10:
        pass
    assert writer.pid
    os.kill(writer.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    writer.join()
    while receiver.poll():
        last = receiver.recv()
    store = Store(path)
    stored = [each.seed for each in store.runs()]
    assert stored == list(range(len(stored)))
    assert len(stored) > last
    assert store.add(run(seed=-1))


def test_between_calls_the_store_is_one_file(path: Path) -> None:
    store = Store(path)
    store.add(run())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ---- what cannot be a store -------------------------------------------------------------------------------


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE runs (mine TEXT)")
        connection.commit()


def newer(path: Path) -> None:
    Store(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def truncated(path: Path) -> None:
    store = Store(path)
    for seed in range(20):
        store.add(run(seed=seed, curve="x" * 1000))
    path.write_bytes(path.read_bytes()[: 3 * 4096])


def overwritten(path: Path) -> None:
    store = Store(path)
    for seed in range(20):
        store.add(run(seed=seed, curve="x" * 1000))
    content = path.read_bytes()
    path.write_bytes(content[: 5 * 4096] + bytes(4096) + content[6 * 4096 :])


def other_fields(path: Path) -> None:
    Store(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE runs ADD COLUMN mood TEXT")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (foreign, "the file is of another kind, or damaged, and stays as it is"),
        (lambda path: path.write_bytes(b"task,loss\nbytes,2.5\n"), "the file is of another kind"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"?" * 50), "the file is of another kind"),
        (newer, f"has version 99 of the schema, and this einlinear knows {SCHEMA}. Upgrade einlinear"),
        (truncated, "The file is damaged: restore a copy"),
        (overwritten, "The file is damaged: restore a copy"),
        (other_fields, "differ in mood. Use the einlinear that wrote it"),
    ],
)
def test_what_is_not_a_store_is_refused_and_left_alone(path: Path, make: Callable[[Path], None], sentence: str) -> None:
    path.parent.mkdir(parents=True)
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=sentence) as refusal:
        Store(path)
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"Is a directory|Permission denied"):
        Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"Opening the store .*Name another file"):
        Store(tmp_path / "file" / "runs.sqlite")


def test_a_full_disk_loses_only_the_run_that_does_not_fit(path: Path) -> None:
    store = Store(path)

    def fill() -> None:
        for seed in range(1000):
            store.add(run(seed=seed, curve="x" * 5000))

    with (
        pragma("max_page_count = 30"),
        pytest.raises(StoreError, match=r"Storing a run in .* full\. Free some"),
    ):
        fill()
    stored = [each.seed for each in store.runs()]
    assert stored == list(range(len(stored)))
    assert len(stored) > 3
    assert store.add(run(seed=len(stored), curve="x" * 5000))
    assert len(Store(path).runs()) == len(stored) + 1


def test_a_full_disk_while_creating_leaves_nothing_in_the_way(path: Path) -> None:
    with pragma("max_page_count = 1"), pytest.raises(StoreError, match=r"Opening .*full"):
        Store(path)
    assert Store(path).add(run())


def test_a_store_that_cannot_be_written_says_so(path: Path) -> None:
    store = Store(path)
    with pragma("query_only = 1"), pytest.raises(StoreError, match=r"readonly.*writable"):
        store.add(run())


def test_a_location_that_cannot_be_written_says_so() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder that refuses files")
    with pytest.raises(StoreError, match=r"Opening the store /proc/self/runs.sqlite failed: .*writable"):
        Store("/proc/self/runs.sqlite")


def test_a_url_is_a_location_too(path: Path) -> None:
    path.parent.mkdir(parents=True)
    Store(f"sqlite:///{path}").add(run())
    assert Store(path).runs() == [run()]
    assert Store(path.with_name("odd?name%20#.db")).add(run())
    with pytest.raises(StoreError, match=r"Opening the store nosuch://user:\*\*\*@host/db failed: Can't load plugin"):
        Store("nosuch://user:secret@host/db")
