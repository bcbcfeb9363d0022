"""Layers of experts against dense ones, against all experts on all tokens, and standard mixtures, as CSV.

    python benchmarks/experts.py [--brief] [folder] # on a GPU, in bfloat16; in brief, without what compares other ways
    python benchmarks/experts.py --cpu [folder]     # in float32, on one thread
    ncu <COUNTERS> python benchmarks/experts.py --once 4096 8 > counted.csv   # each kernel of one layer, once
    python benchmarks/experts.py --counted counted.csv [folder]               # as a table

Writes `experts.csv` (or `cpu_experts.csv`, `experts_counters.csv`) into the folder, by default `results/<device>`
(`results`). Routers have random weights, so that loads are even and every set of experts occurs: the hardest case. A
layer's time includes its router's; "given" is the same layer with the routing of another layer. "forward" takes no
gradients, so that nothing is kept for them; "training" is both passes.
"""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import einlinear as el
from einlinear.kernels import Routing
from einlinear.kernels.routed import Everyone
from einlinear.lab.bench import MODES, milliseconds, provenance

TOKENS, ACTIVE = 16384, 2
LAYERS = [(width, experts) for width in (2048, 4096, 8192, 1024) for experts in (8, 16)]
MLPS = ((1024, 4096, 8), (2048, 8192, 8), (2048, 8192, 16))
CPU = [
    (family, width, experts)
    for family, width in (("btt", 1024), ("low_rank(rank=64)", 1024), ("kronecker", 1024), ("dense", 512))
    for experts in (2, 4, 8, 16, 32)
]
COUNTERS = {  # what the profiler counts, in which unit, and what a table calls it
    "gpu__time_duration.sum": ("us", 1e3),
    "dram__bytes_read.sum": ("dram_read_mb", 1e6),
    "dram__bytes_write.sum": ("dram_written_mb", 1e6),
    "lts__t_bytes.sum": ("cache_mb", 1e6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", 1),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("cache_percent", 1),
    "lts__ltcfabric2ltc_cycles_active.avg.pct_of_peak_sustained_elapsed": ("between_cache_halves_percent", 1),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("multiprocessor_percent", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps_percent", 1),
}
"""`ncu --clock-control none --profile-from-start off --csv --page raw --print-units base --metrics <these>`."""
Row = dict[str, Any]
M = TypeVar("M", bound=nn.Module)


class Everywhere(nn.Module):
    """All experts on all tokens: what published code does."""

    def __init__(self, layer: el.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.run = Everyone().prepare(layer.structure)

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.router is not None
        return self.run(list(self.layer.factors), x, self.layer.router(x), None)


class Given(nn.Module):
    """A layer whose routing was made elsewhere."""

    def __init__(self, layer: el.Linear) -> None:
        super().__init__()
        self.layer, self.routers = layer, [layer.router]  # in a list: its parameters are not this layer's
        self.layer.router = None
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.routing is None:
            router = self.routers[0]
            assert router is not None
            self.routing = Routing(*(part.detach() if isinstance(part, Tensor) else part for part in router(x)))
        out: Tensor = self.layer(x, self.routing)
        return out


class Grouped(nn.Module):
    """A mixture of dense MLPs as one would write it with torch's grouped matmul."""

    def __init__(self, d_model: int, hidden: int, experts: int, **where: object) -> None:
        super().__init__()
        self.router = routed(el.Router(d_model, experts, ACTIVE, **where))
        self.up = nn.Parameter(torch.randn(experts, d_model, hidden, **where) / d_model**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, d_model, **where) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        index, weight, experts, *_ = self.router(x)
        chosen, order = index.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(1, experts + 1, device=x.device)).int()
        token = order // ACTIVE
        h = functional.relu(torch._grouped_mm(x[token], self.up, offs=ends)).square()
        y = torch._grouped_mm(h, self.down, offs=ends) * weight.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, y)


def routed(module: M) -> M:
    """With random logits instead of none."""
    for part in module.modules():
        if isinstance(part, el.Router):
            nn.init.normal_(part.weight)
    return module


def layer(family: str, width: int, experts: int, **where: object) -> el.Linear:
    made: el.Linear = routed(el.Linear(width, width, family, False, experts=experts, active=ACTIVE, **where))
    return made


def measured(what: str, make: Callable[[], nn.Module], like: Row, tokens: int, mode: str, where: Row) -> Row:
    row = {"what": what, **like, "tokens": tokens, "mode": mode}
    try:
        return row | {
            "ms": round(milliseconds(make, like["width"], tokens, mode), 4),
            "error": "",
            **provenance(**where),
        }
    except Exception as error:  # the other rows still count
        return row | {"ms": float("nan"), "error": f"{type(error).__name__}: {str(error)[:200]}", **provenance(**where)}


def layers(where: Row, brief: bool) -> Iterator[Row]:
    kinds: dict[str, Callable[[int, int], nn.Module]] = {
        "dense": lambda width, _: nn.Linear(width, width, False, **where),
        "btt of rank 2": lambda width, _: el.Linear(width, width, "btt(rank=2)", False, **where),
        "experts": lambda width, experts: layer("btt", width, experts, **where),
        "experts, routing given": lambda width, experts: Given(layer("btt", width, experts, **where)),
        "all experts on all tokens": lambda width, experts: Everywhere(layer("btt", width, experts, **where)),
    }
    for width, experts in LAYERS:
        for mode in MODES:
            base = float("nan")
            for what, make in kinds.items():
                if what.startswith("all") and (brief or experts * width > 16 * 4096):
                    continue  # of the largest, tens of gigabytes of states
                about = {"width": width, "experts": experts, "active": ACTIVE}
                row = measured(what, partial(make, width, experts), about, TOKENS, mode, where)
                base = row["ms"] if what == "dense" else base
                yield row | {"ratio_to_dense": round(base / row["ms"], 3)}


def mlps(where: Row) -> Iterator[Row]:
    for width, hidden, experts in MLPS:
        kinds: dict[str, Callable[[], nn.Module]] = {
            "mixture of mlps, grouped matmuls": partial(Grouped, width, hidden, experts, **where),
            "mixture of mlps": lambda w=width, h=hidden, e=experts: routed(  # type: ignore[misc]
                el.MixtureMLP(w, h, "dense", "relu2", experts=e, active=ACTIVE, **where)
            ),
        }
        for mode in MODES:
            for what, make in kinds.items():
                about = {"width": width, "experts": experts, "active": ACTIVE}
                yield measured(what, make, about, TOKENS, mode, where)


def memory(where: Row, brief: bool) -> Iterator[Row]:
    """Bytes that a forward pass keeps for the backward pass, input and output included."""
    for width, experts in ((4096, 8), (4096, 16)):
        kinds = {
            "btt of rank 2": el.Linear(width, width, "btt(rank=2)", False, **where),
            "experts": layer("btt", width, experts, **where),
        }
        if not brief:
            kinds["all experts on all tokens"] = Everywhere(layer("btt", width, experts, **where))
        for what, module in kinds.items():
            x = torch.randn(TOKENS, width, **where, requires_grad=True)
            module(x).sum().backward()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated() - x.numel() * x.element_size()
            y = module(x)
            kept = torch.cuda.memory_allocated() - before
            del y
            about = {"width": width, "experts": experts, "active": ACTIVE, "tokens": TOKENS, "mode": "training"}
            yield {"what": what, **about, "kept_bytes": kept, **provenance(**where)}


def cpu() -> Iterator[Row]:
    where: Any = {"device": torch.device("cpu"), "dtype": torch.float32}
    for family, width, experts in CPU:
        for mode in MODES:
            about = {"family": family, "width": width, "experts": experts, "active": ACTIVE}
            row = measured("experts", partial(layer, family, width, experts, **where), about, 1024, mode, where)
            full = measured(
                "all",
                lambda f=family, w=width, e=experts: Everywhere(layer(f, w, e, **where)),
                about,
                1024,
                mode,
                where,
            )
            yield row | {"all_ms": full["ms"], "ratio_to_all": round(full["ms"] / row["ms"], 3)}


def once(width: int, experts: int, where: Row) -> None:
    """A forward pass without gradients, then one with them and the backward pass, for a profiler."""
    module, x = layer("btt", width, experts, **where), torch.randn(TOKENS, width, **where, requires_grad=True)
    grad = torch.randn_like(x)
    for counting in (False, True):
        if counting:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        with torch.no_grad():
            module(x)
        module(x).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counted(file: Path, where: Row) -> Iterator[Row]:
    """What the profiler printed, a row for each kernel that took at least 5 us."""
    lines = file.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    for kernel in list(csv.DictReader(lines[first:]))[1:]:  # the first has units
        numbers = {name: round(float(kernel[of].replace(",", "")) / unit, 1) for of, (name, unit) in COUNTERS.items()}
        if numbers["us"] >= 5:
            yield {"kernel": kernel["Kernel Name"].split("(")[0][:60], **numbers, **provenance(**where)}


def warm(where: Row) -> None:
    """Compiles the kernels of every case, each in a process of its own."""
    code = "import sys; sys.path.insert(0, 'benchmarks'); import torch, experts; w, e = map(int, sys.argv[1:]); "
    code += "d = {'device': 'cuda', 'dtype': torch.bfloat16}; x = torch.randn(16384, w, **d, requires_grad=True); "
    code += "experts.layer('btt', w, e, **d)(x).sum().backward(); "
    code += "experts.el.Linear(w, w, 'btt(rank=2)', False, **d)(x).sum().backward()"
    started = [subprocess.Popen([sys.executable, "-c", code, str(width), str(experts)]) for width, experts in LAYERS]
    for process in started:
        process.wait()


def write(file: Path, rows: Iterator[Row]) -> None:
    """Rows as they come; those known so far survive a crash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    for row in rows:
        done.append(row)
        print(
            " ".join(f"{key}={value}" for key, value in row.items() if key not in ("device", "torch", "triton")),
            flush=True,
        )
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(dict.fromkeys(key for one in done for key in one)))
            writer.writeheader()
            writer.writerows(done)


def gpu(where: Row, brief: bool) -> Iterator[Row]:
    yield from layers(where, brief)
    if not brief:
        yield from mlps(where)
    yield from memory(where, brief)


def main(arguments: list[str]) -> None:
    torch.manual_seed(0)
    folders = [Path(argument) for argument in arguments if not argument.startswith("--")]
    results = Path(__file__).parent / "results"
    if "--cpu" in arguments:
        torch.set_num_threads(1)
        write((folders or [results])[0] / "cpu_experts.csv", cpu())
        return
    where: Any = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    if "--once" in arguments:
        once(*map(int, arguments[arguments.index("--once") + 1 :]), where)
        return
    named = torch.cuda.get_device_name().lower().replace(" ", "_")
    if "--counted" in arguments:
        write((folders[1:] or [results / named])[0] / "experts_counters.csv", counted(folders[0], where))
        return
    warm(where)
    write((folders or [results / named])[0] / "experts.csv", gpu(where, "--brief" in arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
