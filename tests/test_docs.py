"""What is written runs: examples in docstrings, snippets in the README, and its generated table."""

import csv
import doctest
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import einlinear as el

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = [
    module.name
    for module in pkgutil.walk_packages(el.__path__, "einlinear.")
    if not module.name.endswith("__main__") and not module.name.startswith(("einlinear.lab", "einlinear.cli"))
]
PUBLIC = sorted(name for name in dir(el) if not name.startswith("_"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) > 3


def test_the_readme_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


@pytest.mark.parametrize("page", ["experts", "linear_algebra"])
def test_pages_run(page, capsys):
    """The others have tests beside those of what they are about."""
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL):
        exec(compile(snippet, f"{page}.md", "exec"), names)


def test_the_readme_names_only_what_exists():
    named = set(re.findall(r"\bel\.(\w+)", README))
    assert named
    assert not {name for name in named if not hasattr(el, name)}


def test_every_public_name_is_documented():
    for name in PUBLIC:
        value = getattr(el, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring"


def test_every_family_is_in_the_readme():
    table = README.partition("<!-- families -->")[2]
    for family in el.families():
        assert f"| {family} |" in table, f"{family} is missing; write the output of `einlinear table --markdown` there"
        structure = family(1024, 1024)
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {family} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == [f"{el.parameters(structure):,}", f"{el.flops(structure):,}"]
        assert cells[4] == f"{el.generic_rank(structure):,}"
        assert [float(value) for value in cells[5].split()] == [*el.taxonomy(family)]


def test_the_guide_to_compression_runs(monkeypatch, tmp_path, capsys):
    """Its commands on a tiny model with a tokenizer of letters, and its snippets."""
    import transformers

    from einlinear.cli import main

    guide = (ROOT / "docs" / "guide" / "compress.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(snippet, "compress.md", "exec"), names)
    letters = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained("dense")
    (tmp_path / "README.md").write_text(README[:20_000])
    for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL):
        for command in block.splitlines():
            monkeypatch.setattr("sys.argv", command.replace(" DIR ", " dense ").split())
            try:
                main()
            except SystemExit as end:
                assert not end.code, (command, end.code)
    for folder in ("small", "tiny"):
        assert isinstance(transformers.AutoModel.from_pretrained(folder), transformers.BertModel)
    capsys.readouterr()


def test_the_guides_tables_are_those_of_the_results():
    """`python benchmarks/minilm_figures.py` writes it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("minilm_figures", ROOT / "benchmarks" / "minilm_figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    text = figures.GUIDE.read_text()
    assert all(table() in text for table in figures.TABLES.values())


def test_the_table_of_goals_is_what_was_measured():
    spec = importlib.util.spec_from_file_location("goals", ROOT / "benchmarks" / "goals.py")
    goals = importlib.util.module_from_spec(spec)
    sys.modules["goals"] = goals
    spec.loader.exec_module(goals)
    assert goals.page() == goals.PAGE.read_text(), "run python benchmarks/goals.py"


def test_the_readmes_table_of_speed_is_what_was_measured():
    with (ROOT / "benchmarks" / "results" / "nvidia_h200" / "layers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tokens"] == "16384" and row["d_in"] == row["d_out"]]
    found = {(row["family"], row["d_in"], row["mode"]): f"{float(row['ratio_to_dense']):.2g}" for row in rows}
    _, after = (ROOT / "README.md").read_text().split("| forward / training, times as fast as dense |")
    head, _, *lines = after.partition("\n\n")[0].splitlines()
    widths = [cell.strip() for cell in head.strip("| ").split("|")]
    assert len(lines) == 6
    for line in lines:
        family, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        for width, cell in zip(widths, cells, strict=True):
            speeds = (found.get((family.strip("`"), width, mode), "–") for mode in ("forward", "training"))
            assert cell == " / ".join(speeds), f"{family} at {width}"
