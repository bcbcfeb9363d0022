"""Tasks: the same data for every run, in any process; nothing of the validation set in training."""

import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import einlinear.lab.data.task
import einlinear.lab.data.text
from einlinear.lab.data import Examples, Sequences, Task, load, tasks

BUNDLED = ["bytes", "pixels", "images", "teacher"]


bundled = functools.cache(load)


@pytest.fixture(params=BUNDLED)
def task(request: pytest.FixtureRequest) -> Task:
    return bundled(request.param)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 files of different content in folders."""
    for number in range(40):
        file = tmp_path / "corpus" / f"part{number % 3}" / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(random.Random(number).randbytes(300).hex())
    return tmp_path / "corpus"


def text(*paths: str | Path, **options: Any) -> Sequences:
    task = load("text", paths=paths, **options)
    assert isinstance(task, Sequences)
    return task


def content(tokens: torch.Tensor) -> bytes:
    return tokens.to(torch.uint8).numpy().tobytes()


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


# ---- every task -------------------------------------------------------------------------------------------


def test_a_batch_depends_on_its_arguments_alone(task: Task) -> None:
    first = digest(*task.batch(5, 8, seed=1))
    task.batch(6, 4, seed=2)
    list(task.validation_batches(64))
    assert digest(*task.batch(5, 8, seed=1)) == first
    others = [digest(*task.batch(step, 8, seed)) for step, seed in [(1, 5), (6, 1), (5, 2), (51, 0)]]
    assert len({first, *others}) == 5


def test_two_processes_see_the_same_data() -> None:
    program = (
        "import hashlib, torch\n"
        "from einlinear.lab.data import load\n"
        "torch.set_num_threads(1)\n"
        f"for name in {BUNDLED}:\n"
        "    task = load(name)\n"
        "    tensors = [*task.batch(3, 8, 0), *next(iter(task.validation_batches(8)))]\n"
        "    content = b''.join(tensor.numpy().tobytes() for tensor in tensors)\n"
        "    print(task.fingerprint, hashlib.sha256(content).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here = []
    for name in BUNDLED:
        task = bundled(name)
        tensors = [*task.batch(3, 8, 0), *next(iter(task.validation_batches(8)))]
        here.append(f"{task.fingerprint} {digest(*tensors)}")
    assert ran.stdout.split("\n")[:-1] == here


def test_the_validation_set_is_fixed_whatever_the_batch_size(task: Task) -> None:
    inputs, targets = (torch.cat(parts) for parts in zip(*task.validation_batches(50), strict=True))
    again = [torch.cat(parts) for parts in zip(*task.validation_batches(7), strict=True)]
    assert torch.equal(inputs, again[0])
    assert torch.equal(targets, again[1])


def test_shapes_and_types(task: Task) -> None:
    inputs, targets = task.batch(0, 6, seed=0)
    if isinstance(task, Sequences):
        assert inputs.shape == targets.shape == (6, task.context)
        assert inputs.dtype == targets.dtype == torch.int64
        assert max(inputs.max(), targets.max()) < task.vocabulary
    else:
        assert inputs.shape == (6, task.d_in)
        assert inputs.dtype == torch.float32
        if task.loss == "cross-entropy":
            assert targets.shape == (6,)
            assert targets.max() < task.d_out
        else:
            assert targets.shape == (6, task.d_out)


@pytest.mark.parametrize("name", ["bytes", "pixels"])
def test_targets_are_the_inputs_one_token_ahead(name: str) -> None:
    task = bundled(name)
    assert isinstance(task, Sequences)
    for inputs, targets in [task.batch(0, 16, seed=0), next(iter(task.validation_batches(16)))]:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = content(task.train)
    inputs, targets = task.batch(1, 16, seed=0)
    for window in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert content(window) in stream


def test_a_task_survives_pickle(task: Task) -> None:
    copy = pickle.loads(pickle.dumps(task))
    assert digest(*copy.batch(2, 4, seed=0)) == digest(*task.batch(2, 4, seed=0))


@pytest.mark.parametrize("name", [*BUNDLED, "flipped"])
def test_data_are_made_where_the_task_is(name: str) -> None:
    """On a device without numbers every tensor must be there: torch refuses to mix it with another."""
    task = bundled("images" if name == "flipped" else name)
    if name == "flipped":
        task = replace(task, sample=replace(task.sample, flip=True, shift=2))
    there = torch.device("meta")
    for inputs, targets in (task.on(there).batch(0, 8, 0), next(iter(task.on(there).validation_batches(8)))):
        assert (inputs.device, targets.device) == (there, there)
    for mine, theirs in zip(task.on(torch.device("cpu")).batch(0, 8, 0), task.batch(0, 8, 0), strict=True):
        assert torch.equal(mine, theirs)


def test_a_text_too_large_for_a_device_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    task = bundled("bytes")
    monkeypatch.setattr(einlinear.lab.data.task, "RESIDENT", 100)
    assert task.on(torch.device("meta")) is task


def test_every_task_has_one_line_of_description() -> None:
    assert next(iter(tasks())) == "bytes"
    assert all(line and "\n" not in line for line in tasks().values())


# ---- text -------------------------------------------------------------------------------------------------


def test_validation_windows_cover_each_token_once(corpus: Path) -> None:
    task = text(corpus, context=16, limit=10**9)
    predicted = torch.cat([targets.flatten() for _, targets in task.validation_batches(5)])
    assert torch.equal(predicted, task.validation[1 : len(predicted) + 1].long())
    assert len(task.validation) - 1 - len(predicted) < 16


def test_a_limit_spreads_the_windows_over_the_whole_validation_set(corpus: Path) -> None:
    task = text(corpus, context=4, limit=40)
    windows = torch.cat([inputs for inputs, _ in task.validation_batches(3)])
    assert windows.numel() == 40
    places = [content(task.validation).index(content(window)) for window in windows]
    assert places == sorted(places)
    assert places[-1] > 0.85 * len(task.validation)


def test_training_reaches_both_ends_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(1, 201)))
    task = text(tmp_path / "text", context=4)
    inputs, targets = task.batch(0, 5000, seed=0)
    assert inputs.min() == task.train[0]
    assert targets.max() == task.train[-1]


def test_many_files_are_held_out_whole(corpus: Path) -> None:
    task = text(corpus, context=16)
    train, validation = content(task.train).split(b"\0"), content(task.validation).split(b"\0")
    files = {file.read_bytes() for file in corpus.rglob("*.txt")}
    assert len(train) + len(validation) == 40
    assert {*train, *validation} == files
    assert not {*train} & {*validation}
    assert 0.05 <= len(validation) / 40 < 0.15


def test_few_files_give_the_end_of_each(tmp_path: Path) -> None:
    for name, byte in [("a", b"a"), ("b", b"b")]:
        (tmp_path / name).write_bytes(byte * 1000)
    task = text(tmp_path, context=16)
    assert content(task.train) == b"a" * 950 + b"\0" + b"b" * 950
    assert content(task.validation) == b"a" * 50 + b"\0" + b"b" * 50
    assert "the end of each" in task.description


def test_one_dominating_file_is_not_held_out_whole(corpus: Path) -> None:
    (corpus / "large").write_bytes(b"x" * 100_000)
    for data_seed in range(5):
        task = text(corpus, context=16, data_seed=data_seed)
        assert len(task.validation) < 0.1 * len(task.train)


def test_a_file_given_twice_is_read_once(corpus: Path) -> None:
    twice = text(corpus, corpus / "part0" / "00.txt", corpus / "part1" / ".." / "part1", context=16)
    assert twice.fingerprint == text(corpus, context=16).fingerprint


def test_a_mapped_file_is_the_same_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(random.Random(0).randbytes(1234))
    read = text(tmp_path / "text", context=16)
    monkeypatch.setattr(einlinear.lab.data.text, "MAPPED_FROM", 1000)
    mapped = text(tmp_path / "text", context=16)
    assert "mapped" in mapped.description
    assert mapped.fingerprint == read.fingerprint
    assert digest(*mapped.batch(0, 8, seed=0)) == digest(*read.batch(0, 8, seed=0))


def test_the_fingerprint_is_of_the_content_and_its_split(corpus: Path, tmp_path: Path) -> None:
    original = text(corpus, context=16).fingerprint
    assert len(original) == 16
    assert text(shutil.copytree(corpus, tmp_path / "elsewhere"), context=16).fingerprint == original
    assert text(corpus, context=32).fingerprint == original
    assert text(corpus, context=16, data_seed=1).fingerprint != original
    assert text(corpus, context=16, limit=99).fingerprint != original
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "file").write_text("not part of it")
    (corpus / ".file").write_text("nor this")
    (corpus / "empty.txt").touch()
    assert text(corpus, context=16).fingerprint == original
    for name in ["part0/00.txt", "part2/38.txt"]:
        file = corpus / name
        before = file.read_bytes()
        file.write_bytes(b"!" + before[1:])
        assert text(corpus, context=16).fingerprint != original
        file.write_bytes(before)
    assert text(corpus, context=16).fingerprint == original


def test_bytes_is_the_standard_library_without_tests_and_tables() -> None:
    task = bundled("bytes")
    assert isinstance(task, Sequences)
    library = Path(sysconfig.get_paths()["stdlib"])
    train, validation = (set(content(part).split(b"\0")) for part in (task.train, task.validation))
    assert not {document for document in train & validation if len(document) > 1000}
    assert ((library / "os.py").read_bytes() in train) != ((library / "os.py").read_bytes() in validation)
    assert (library / "encodings" / "cp1252.py").read_bytes() not in train | validation
    assert not any(b"test.support import" in document[:500] for document in train | validation)
    assert 7e6 < len(task.train) + len(task.validation) < 12e6
    assert 0.05 <= len(task.validation) / len(task.train) < 0.07


# ---- images and vectors -----------------------------------------------------------------------------------


def test_pixels_come_as_whole_images_after_a_start_token() -> None:
    task = bundled("pixels")
    assert isinstance(task, Sequences)
    for inputs, targets in [task.batch(0, 32, seed=0), *task.validation_batches(32)]:
        assert (inputs[:, 0] == 17).all()
        assert targets.max() <= 16
    train, validation = ({content(row) for row in part.view(-1, 65)} for part in (task.train, task.validation))
    assert not train & validation
    assert len(task.train) + len(task.validation) == 1797 * 65
    assert load("pixels", data_seed=1).fingerprint != task.fingerprint
    assert sum(len(inputs) for inputs, _ in task.validation_batches(100)) == len(task.validation) // 65


def test_images_are_shifted_and_noisy_to_train_and_plain_to_validate() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    task = bundled("images")
    assert isinstance(task, Examples)
    plain, _ = task.validation
    low, high = plain.min(), plain.max()  # levels 0 and 16
    levels = (plain - low) / (high - low) * 16
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    digits = torch.nn.functional.pad(torch.tensor(load_digits().images), [1] * 4)
    shifted = torch.stack([digits[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]).flatten(2)
    inputs, targets = task.batch(0, 40, seed=0)
    noisy = (inputs - low) / (high - low) * 16
    distance = (noisy.double() - shifted[:, :, None]).square().mean(-1).sqrt()  # [shifts, digits, batch]
    nearest = distance.flatten(0, 1).min(0)
    assert (nearest.values < 1).all()
    assert (nearest.values > 0.3).all()
    assert torch.equal(torch.tensor(load_digits().target)[nearest.indices % len(digits)], targets)
    assert len({int(shift) for shift in nearest.indices // len(digits)}) >= 6
    inputs, _ = task.batch(1, 4096, seed=0)
    assert abs(inputs.mean()) < 0.1
    assert abs(inputs.std() - 1) < 0.1


def test_the_teacher_is_a_fixed_function_of_unit_variance() -> None:
    task, other = bundled("teacher"), load("teacher", data_seed=1)
    assert isinstance(task, Examples)
    assert isinstance(other, Examples)
    assert task.fingerprint != other.fingerprint
    inputs, targets = (torch.cat(parts) for parts in zip(*(task.batch(s, 512, 0) for s in range(8)), strict=True))
    assert len(inputs.unique(dim=0)) == 4096
    assert abs(targets.mean()) < 0.1
    assert abs(targets.std() - 1) < 0.1
    # A linear function explains little of it, and inputs that are close have targets that are close.
    residual = targets - inputs @ torch.linalg.lstsq(inputs, targets).solution
    assert residual.std() > 0.5
    near = torch.cdist(inputs, inputs).fill_diagonal_(torch.inf).argmin(1)
    assert (targets - targets[near]).square().mean() < 0.5 * 2 * targets.var()


# ---- datasets ---------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The dataset library, where using the network or writing a cache fails the test."""
    library = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("cache")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the network was used without being asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", cache)
    yield library
    assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]


def as_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


def as_json_lines(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def as_text(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("\n".join(row["text"] for row in rows))


@pytest.mark.parametrize(("write", "name"), [(as_parquet, "w.parquet"), (as_json_lines, "w.jsonl"), (as_text, "w.txt")])
def test_web_pages_from_local_files(datasets: Any, write: Callable[..., None], name: str, tmp_path: Path) -> None:
    pages = [f"page {number}: " + random.Random(number).randbytes(40).hex() for number in range(60)]
    write([{"text": page, "url": "-"} for page in [*pages, pages[0]]], tmp_path / name)
    task = load("openwebtext", paths=tmp_path / name, context=16)
    assert isinstance(task, Sequences)
    train, validation = ({*content(part).decode().split("\0")} for part in (task.train, task.validation))
    assert train | validation == set(pages)
    assert not train & validation
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]


@pytest.fixture
def pictures() -> list[dict[str, Any]]:
    """Rows as in CIFAR-10: 30 encoded images, the left half dark, the right half bright."""
    image = pytest.importorskip("PIL.Image")
    rows = []
    for number in range(30):
        picture = image.new("RGB", (32, 32), (number, 0, 0))
        picture.paste((200, 200, 200 + number), (16, 0, 32, 32))
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        rows.append({"img": {"bytes": encoded.getvalue(), "path": None}, "label": number % 10})
    return rows


@pytest.mark.parametrize("with_metadata", [False, True])
def test_cifar_from_local_files(
    datasets: Any, pictures: list[dict[str, Any]], with_metadata: bool, tmp_path: Path
) -> None:
    if with_metadata:
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        datasets.Dataset.from_list(pictures, features=features).to_parquet(tmp_path / "train.parquet")
    else:
        as_parquet(pictures, tmp_path / "train.parquet")
    task = load("cifar10", paths=tmp_path)
    assert isinstance(task, Examples)
    assert (task.d_in, task.d_out, task.loss) == (3072, 10, "cross-entropy")
    assert len(task.validation[0]) == 6
    inputs, targets = task.batch(0, 64, seed=0)
    left, right = inputs.view(64, 32, 2, 16, 3).mean((1, 3, 4)).T
    assert 16 < (left > right).sum() < 48  # about half of them mirrored
    assert targets.unique().tolist() == list(range(10))


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("byte", {}, "no 'byte'. Did you mean 'bytes'"),
        ("bytes", {"paths": ["x"]}, "takes no paths.*text, openwebtext, cifar10"),
        ("images", {"context": 9}, "takes no context"),
        ("pixels", {"context": 9}, "takes no context"),
        ("bytes", {"context": 0}, "context must be at least 1"),
        ("bytes", {"limit": -3}, "limit must be at least 1"),
        ("teacher", {"download": True}, "takes no download"),
        ("text", {}, "no paths were given"),
        ("text", {"paths": "no/such/file"}, "no/such/file does not exist"),
    ],
)
def test_a_wrong_request_is_one_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(name, **options)


def test_an_unusable_corpus_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is none under"):
        text(tmp_path)
    file = tmp_path / "small"
    file.touch()
    with pytest.raises(ValueError, match="0 tokens to train and 0 to validate"):
        text(file)
    file.write_bytes(b"x" * 400)
    with pytest.raises(ValueError, match=r"380 tokens to train and 20 to validate.*context of at most 19"):
        text(file)
    assert text(file, context=19).batch(0, 1, seed=0)[0].shape == (1, 19)
    with pytest.raises(ValueError, match="context of 20 needs 21 in each"):
        text(file, context=20)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"Reading .*small failed: Permission denied"):
        text(file)


def test_unusable_rows_are_one_sentence(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not part of this package.*download=True"):
        load("openwebtext")
    as_json_lines([{"body": "x"}], tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="the column 'text' is missing among body"):
        load("openwebtext", paths=tmp_path)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"files of one kind, of \.parquet"):
        load("openwebtext", paths=tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"reading .*c.parquet failed: Parquet magic"):
        load("openwebtext", paths=tmp_path / "c.parquet")
    as_json_lines([], tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"openwebtext.*(failed|too small)"):
        load("openwebtext", paths=tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("images", "sklearn.datasets", "lab"), ("openwebtext", "datasets", "hf"), ("cifar10", "PIL", "hf")],
)
def test_a_missing_package_names_its_extra(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "einlinear\[{extra}\]"'):
        load(name)
