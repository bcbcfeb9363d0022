"""The house: imports only ever point down, and what needs no tensor loads none."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import einlinear

ROOT = Path(einlinear.__file__).parent
FLOORS = [
    {"structure", "toolchain"},
    {"family", "cost", "scaling", "links", "clusters", "launches"},
    {"clock_cpu", "clock_experts"},
    {"clock"},
    {"taxonomy", "equivalence", "structures", "contract", "operator"},
    {"space", "kernels"},
    {"projection", "routing"},
    {"layer", "operators"},
    {"fast_path"},
    {"mlp", "expert_mlp", "shared", "optim", "muon", "storage", "targeting", "linalg"},
    {"hf"},
    {"conversion"},
    {"loading", "compression", "fusion"},
    {"transfer", "expert_parallel"},
    {"lab"},
    {"cli"},
    {"__main__"},
]
ENTRANCES = {"__init__", "with_torch"}
"""What gathers the public names; nothing below the lab imports them."""

LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def room(file: Path) -> str:
    """The module or package directly under einlinear that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports by dots; write the module's full name"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


def test_every_module_has_a_floor():
    assert {room(file) for file in FILES} == {*LEVEL} | ENTRANCES


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in ENTRANCES], ids=lambda f: f.stem)
def test_imports_point_down(file):
    here = room(file)
    for line, name in imports(file):
        first, _, rest = name.partition(".")
        if first != "einlinear":
            continue
        there = rest.split(".")[0]
        if there in LEVEL:
            assert there == here or LEVEL[there] < LEVEL[here], f"{file.name}:{line} imports upwards: {name}"
        else:
            assert LEVEL[here] >= LEVEL["lab"], f"{file.name}:{line} imports the package's entrance: {name}"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in ENTRANCES], ids=lambda f: f.stem)
def test_no_module_is_asked_of_the_entrance(file):
    """It would load all that needs torch to look for it, and what is being loaded is then asked for itself."""
    here = LEVEL[room(file)]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "einlinear" and here < LEVEL["lab"]:
            pytest.fail(f"{file.name}:{node.lineno} imports from the entrance; write import einlinear.name as name")


@pytest.mark.parametrize("module", ["einlinear.kernels", "einlinear.lab.bench"])
def test_any_module_may_be_loaded_first(module):
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


@pytest.mark.parametrize(
    "name", sorted(FLOORS[0] | FLOORS[1] | {"taxonomy", "structures", "allocation", "cli", "__main__"})
)
def test_what_needs_no_tensor_names_no_torch(name):
    files = [file for file in FILES if name in (room(file), file.stem)]
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        top = [alias for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        named = [alias.name for alias in top] + [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
        assert not any(module.split(".")[0] == "torch" for module in named), file.name


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_describing_structures_needs_no_torch():
    code = """
import sys, einlinear as el
for family in el.families():
    structure = el.structure(str(family))(64, 64)
    el.flops(structure), el.parameters(structure), el.generic_rank(structure), el.spectral(structure)
el.taxonomy(el.BTT()), el.cheapest(el.BTT()(64, 64))
print("torch" in sys.modules)
"""
    assert run(code) == "False"


def test_a_layer_is_one_import_away():
    """In a process of its own: test suites import parts of torch that a user's script has not."""
    assert run("from einlinear import Linear; print(Linear(4, 4, 'btt').in_features)") == "4"


def test_kernels_are_imported_before_anything_else_that_needs_torch():
    """`from einlinear import <module>` asks for a lazy name first, and with it for all that needs torch."""
    assert run("import einlinear; from einlinear.kernels import KERNELS; print(len(KERNELS) > 1)") == "True"


def test_help_needs_no_torch():
    code = """
import sys
from einlinear.cli import main
try:
    sys.argv = ["einlinear", "--help"]
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""
    assert run(code).splitlines()[-1] == "False"


def test_no_lazy_name_is_hidden_by_a_module():
    """`einlinear.name` would be the module or the function, depending on what was imported before."""
    modules = {module.name for module in pkgutil.iter_modules([str(ROOT)])}
    lazy = {name.rpartition(".")[2] for _, name in imports(ROOT / "with_torch.py")}
    assert lazy >= {"apply", "dense", "explain", "Linear", "project", "refine"}
    assert lazy & modules == {"linalg"}  # a namespace: the module is what is meant
    assert callable(einlinear.structure)  # loaded with the package, after the module of that name
    assert callable(einlinear.taxonomy)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'einlinear' has no attribute 'nonsense'"):
        einlinear.nonsense  # noqa: B018
