"""The guides run as they stand."""

import re
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guide"


@pytest.mark.parametrize("name", ["gp", "hessian", "waves"])
def test_the_guide_runs(name):
    text = (GUIDES / f"{name}.md").read_text()
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, f"{name}.md", "exec"), names)
    assert (GUIDES.parent / "img" / f"{name}.svg").exists()
