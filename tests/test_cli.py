"""The command line as a user meets it: what it prints, what it exits with, and what it loses (nothing)."""

import json
import random
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

import einlinear as el
from einlinear.cli import main

TINY = ["--widths", "16,32", "--horizons", "2048,4096", "--rates", "0.01", "--depth", "1", "--workers", "0"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, cwd: Path = Path()) -> Done:
    """The command in this process, which spares an import of torch for each call."""
    out, err, code = StringIO(), StringIO(), 0
    argv, sys.argv = sys.argv, ["einlinear", *arguments]
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:  # as the interpreter ends: a text is printed, and means 1
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def test_help_needs_no_torch():
    # `python -X importtime` names every module that was imported.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "einlinear", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "einlinear.structures" in done.stderr
    assert not any(line.rsplit("|", 1)[-1].strip() in ("torch", "numpy") for line in done.stderr.splitlines())


def test_table_has_every_family_and_its_counts():
    rows = {row["family"]: row for row in json.loads(run("table", "--in", "96", "--out", "64", "--json").stdout)}
    assert rows.keys() == {str(family) for family in el.families()}
    for family in el.families():
        structure, row = family(96, 64), rows[str(family)]
        assert (row["parameters"], row["flops"]) == (el.parameters(structure), el.flops(structure))
        assert row["rank"] == el.generic_rank(structure)
        assert row["source"]


def test_a_family_that_does_not_fit_says_so_in_its_row():
    rows = {row["family"]: row for row in json.loads(run("table", "--in", "5", "--out", "64", "--json").stdout)}
    assert "padding may add at most 15%" in rows["blast(blocks=4, rank=6)"]["refused"]
    assert rows["dense"]["parameters"] == 5 * 64


def test_the_readme_has_the_generated_table():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert run("table", "--markdown").stdout in readme


def test_describe():
    told = run("describe", "btt(rank=4)", "--in", "768", "--out", "3072", "--tokens", "64").stdout
    structure = el.BTT(rank=4)(768, 3072)
    assert f"{el.parameters(structure):,}" in told
    assert repr(structure) in told
    assert "runs 64 tokens by" in told
    assert "10 → 10, rank 3" in run("describe", "i, r i, o r -> o", "i=10", "r=3", "o=10").stdout


def test_describe_proposes_a_cheaper_order():
    told = run("describe", "b a, d a, e b -> e d", "a=4", "b=8", "d=16", "e=2").stdout
    assert "in another order" in told


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["describe", "bt"], "did you mean 'btt'"),
        (["describe", "btt(rank=-1)"], "pass an integer of at least 1"),
        (["describe", "btt(size=2)"], "no setting 'size'"),
        (["describe", "i, r i, o r -> o", "i=10", "r=x", "o=2"], "expected axis=number"),
        (["describe", "mixture(of='btt', experts=4, active=5)"], "choose active between 1 and 4"),
        (["describe", "i, r i, o r -> q", "i=10", "r=2", "o=2"], "axis 'q' of the output comes from nowhere"),
        (["describe", "monarch(blocks=7)", "--in", "16", "--out", "16"], "padding may add at most 15%"),
        (["table", "--in", "0"], "greater than or equal to 1"),
        (["compare", "nothing"], "nothing"),
        (["compare", "text", "no/such/file"], "no/such/file"),
        (["compare", "--structure", "bt"], "did you mean 'btt'"),
        (["compare", "--widths", "a,b"], "--widths 'a,b'"),
        (["compare", "--widths", "33"], "33"),
        (["compare", "--seeds", "0.5"], "expected whole numbers"),
        (["compare", "--report", "taken/page.html"], "taken is no folder that may be written to"),
        (["compare", "--device", "tpu"], "cannot use the device 'tpu'"),
        (["search", "--store", "taken/runs.sqlite"], "taken is no folder that may be written to"),
        (["describe", "btt", "--device", "tpu"], "cannot use the device 'tpu'"),
        (["describe", "btt", "--device", "cuda:x"], "cannot use the device 'cuda:x'"),
        (["candidates", "--costliest", "-1"], "costs more than -1 of dense's FLOPs"),
        (["candidates", "--costliest", "nan"], "costs more than nan of dense's FLOPs"),
        (["describe", "btt", "--dtype", "int8"], "cannot use the type 'int8'"),
        (["describe", "btt", "512", "512"], "cannot use '512 512' with a family: its widths are given as --in 512"),
        (["bench", "--widths", ""], "cannot use --widths ''"),
        (["bench", "--widths", "64x"], "cannot use --widths '64x'"),
        (["bench", "--widths", "0"], "cannot use --widths '0'"),
        (["bench", "--tokens", "-3"], "cannot use --tokens '-3'"),
        (["bench", "--figure", "speed.pdf"], "only .svg and .png can be written"),
        (["bench", "--file", "taken/rows.csv"], "taken is no folder that may be written to"),
        (["fit", "taken", "--card", "."], "it is a folder"),
        (["compress", "taken", "--out", "small", "--write-plan", "taken/plan.toml"], "may be written to"),
        (["check", "--widths", "64"], "two or more different widths"),
        (["report"], "there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_a_sentence(tmp_path: Path, arguments: list[str], says: str):
    (tmp_path / "taken").touch()
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert says in done.stderr
    assert not done.stdout, "what is wrong is said before anything is done"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.html"))


def test_a_corpus_too_small_is_refused(tmp_path: Path):
    (tmp_path / "small.txt").write_text("too little")
    done = run("compare", "text", "small.txt", *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "where", "says"),
    [
        (["table"], "einlinear.cli.structures._row", "nothing was written"),
        (["compare"], "einlinear.lab.data.load", "the same command goes on"),
    ],
    ids=["table", "compare"],
)
def test_an_interrupt_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], where: str, says: str
):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 130
    assert says in done.stderr


def test_check_passes_right_rates_and_exits_so():
    done = run("check", "btt(rank=2)", "--widths", "64,256")
    assert done.returncode == 0, done.stdout
    assert "own update" in done.stdout


def test_compare_report_and_resume(tmp_path: Path):
    letters = random.Random(0)
    (tmp_path / "corpus.txt").write_text("".join(letters.choices("einsum of all things, ", k=60_000)))
    command = ["compare", "text", "corpus.txt", "-s", "dense", "-s", "low_rank(rank=4)", *TINY]
    first = run(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "low_rank(rank=4), width 32" in first.stdout
    page = tmp_path / "runs" / "compare.html"
    assert "low_rank(rank=4)" in page.read_text()

    page.unlink()
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "low_rank(rank=4), width 32" not in again.stdout, "found in the store, so not trained again"
    assert page.exists()

    page.unlink()
    reported = run("report", "--task", "text", "--figure", "loss.svg", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert page.exists()
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")


def test_a_plan_is_told_and_nothing_trained(tmp_path: Path):
    done = run("compare", "--plan", *TINY, "--seeds", "0,1,2", "--resolve", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training FLOPs" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_that_cannot_answer_is_refused(tmp_path: Path):
    done = run("compare", "--plan", *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot tell a multiplier of 1.4 from 1" in done.stderr and "seeds" in done.stderr
    assert not list(tmp_path.iterdir())
