"""How the benchmarks keep their tables; what they measure needs a GPU."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_what_the_profiler_wrote_becomes_rows_in_one_unit() -> None:
    """Marks part the cases, numbers have commas, and a counter that the machine lacks stays empty."""
    counters = benchmark("counters")
    heads = ["ID", "Process ID", "Kernel Name", *counters.COUNTERS.values()]
    units = ["", "", "", "ms", "Gbyte", "Mbyte", "Kbyte", *["%"] * (len(heads) - 7)]
    mark = ["0", "7", "void spin_kernel(long)", *["1"] * (len(heads) - 3)]
    first = ["1", "7", "stage_forward", "0.5", "1.5", "1,234", "2,000", "n/a", *["50"] * (len(heads) - 8)]
    second = ["3", "7", "gemm", "2", "0", "0", "0", *["60"] * (len(heads) - 7)]
    lines = [",".join(f'"{value}"' for value in row) for row in (heads, units, mark, first, mark, second)]
    one, two = counters.read("==PROF== Connected\n" + "\n".join(lines) + "\n", ["a", "b"])
    assert (one["case"], one["kernel"], two["case"], two["kernel"]) == ("a", "stage_forward", "b", "gemm")
    assert (one["us"], one["dram_read_mb"], one["dram_written_mb"], one["cache_mb"]) == (500, 1500, 1234, 2)
    assert one["dram_percent"] == "" and two["dram_percent"] == 60
    with pytest.raises(SystemExit, match="ncu wrote no table; the end of what it said: nothing"):
        counters.read("nothing", [])


def test_a_model_measured_anew_takes_the_place_of_its_row(tmp_path: Path) -> None:
    renew, path = benchmark("gpt_step").renew, tmp_path / "steps.csv"
    for family, ms in (("dense", 3), ("btt", 2), ("dense", 1), ("low_rank", 4)):
        renew(path, {"family": family, "width": 64}, [{"family": family, "width": 64, "ms": ms}])
    with path.open() as file:
        assert [(row["family"], row["ms"]) for row in csv.DictReader(file)] == [
            ("dense", "1"), ("btt", "2"), ("low_rank", "4"),
        ]  # fmt: skip
