"""The guides on linear algebra run as they stand."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["guide/pde", "guide/spectra", "linear_algebra"])
def test_the_guide_runs(name, capsys):
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    assert snippets
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, f"{name}.md", "exec"), names)
