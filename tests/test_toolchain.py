"""Code that is compiled where it runs: built once, kept where nobody else can write, done without where it must be."""

import stat
import tempfile
from pathlib import Path

import pytest

from einlinear import toolchain

needs_a_compiler = pytest.mark.skipif(toolchain.refusal() is not None, reason=str(toolchain.refusal()))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of this test's own, and a source that takes no time."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer(void) { return 42; }\n')
    monkeypatch.setattr(toolchain, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "einlinear"


@needs_a_compiler
def test_is_built_once_and_again_when_what_it_is_made_of_changes(home):
    compiler = toolchain.compiler()
    assert toolchain._loaded(compiler, False).answer() == 42
    (first,) = home.iterdir()
    made = first.stat().st_mtime_ns
    again = toolchain._loaded(compiler, False)
    assert again._name == str(first) and first.stat().st_mtime_ns == made
    toolchain.SOURCE.write_text('extern "C" int answer(void) { return 43; }\n')
    assert toolchain._loaded(compiler, False).answer() == 43
    toolchain.SOURCE.write_text('#include "other.h"\nextern "C" int answer(void) { return OTHER; }\n')
    for number in (44, 45):
        (toolchain.SOURCE.parent / "other.h").write_text(f"#define OTHER {number}\n")
        assert toolchain._loaded(compiler, False).answer() == number
    assert len([*home.iterdir()]) == 4
    assert stat.S_IMODE(home.stat().st_mode) == stat.S_IMODE(first.stat().st_mode) == 0o700


@needs_a_compiler
@pytest.mark.parametrize("which", ["folder", "file"])
def test_nothing_is_loaded_that_others_could_have_written(home, which):
    compiler = toolchain.compiler()
    toolchain._loaded(compiler, False)
    (first,) = home.iterdir()
    first.write_bytes(b"not ours")
    (home if which == "folder" else first).chmod(0o777)
    assert toolchain._loaded(compiler, False).answer() == 42
    assert (first.read_bytes() == b"not ours") == (which == "folder")


@needs_a_compiler
def test_a_cache_that_cannot_be_written_is_gone_without(home, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert toolchain._loaded(toolchain.compiler(), False).answer() == 42
    assert not [*(tmp_path / "temporary").iterdir()]  # nothing is left behind


@needs_a_compiler
def test_code_that_does_not_compile_is_said_once_and_done_without(home):
    toolchain.SOURCE.write_text("nonsense\n")
    with pytest.warns(UserWarning, match=r"slower ways run instead: .* said: .*nonsense"):
        assert toolchain.library.__wrapped__() is None


def test_a_compiler_can_be_named_and_turned_off(monkeypatch, tmp_path):
    own = tmp_path / "my-compiler"
    own.write_text("#!/bin/sh\nexit 1\n")
    own.chmod(0o700)
    monkeypatch.setenv("CXX", str(own))
    assert toolchain.compiler.__wrapped__() == str(own)
    monkeypatch.setenv("EINLINEAR_NATIVE", "0")
    assert toolchain.compiler.__wrapped__() is None
    assert "turns compiled code off" in str(toolchain.refusal())
    monkeypatch.setenv("EINLINEAR_NATIVE", "1")
    monkeypatch.setattr(toolchain, "compiler", lambda: None)
    assert "install g++ or clang++" in str(toolchain.refusal())


def test_the_source_is_part_of_the_package():
    assert Path(toolchain.__file__).parent in toolchain.SOURCE.parents
    assert toolchain.SOURCE.is_file()
