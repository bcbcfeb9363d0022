"""Layers, MLPs and decoding in bfloat16 on one GPU against dense, as CSV.

    python benchmarks/gpu.py [folder]

Writes `layers.csv`, `mlps.csv`, `decode.csv` and `kernels.csv` (each kernel that fits, and the one that is
chosen) into the folder, by default `results/<device>`.
"""

import csv
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import einlinear as el
from einlinear.kernels import KERNELS, Kernel
from einlinear.kernels.kernel import Target
from einlinear.lab.bench import MODES, bench, milliseconds, provenance

TOKENS = 16384
FAMILIES = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.Monarch(blocks=32), el.LowRank(), el.Kronecker())
WIDTHS = (1024, 2048, 4096, 8192, (4096, 11008), (11008, 4096))
MLPS = (
    (1024, 4096, el.BTT(blocks=(32, 32))),
    (1024, 4096, el.BTT()),
    (2048, 8192, el.BTT(blocks=(32, 32), rank=2)),
    (2048, 8192, el.BTT()),
    (4096, 16384, el.BTT(blocks=(64, 64))),
    (4096, 16384, el.BTT()),
    (4096, 11008, el.BTT()),
)
WHERE: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


class DenseMLP(nn.Module):
    """What `einlinear.StructuredMLP` replaces."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=False, **WHERE)
        self.down = nn.Linear(hidden, d_model, bias=False, **WHERE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.relu(self.up(x)).square())
        return out


def mlps() -> list[dict[str, Any]]:
    """Squared ReLU between the layers; the dense MLP also compiled, which fuses its activation."""
    rows: list[dict[str, Any]] = []
    for d_model, hidden, family in MLPS:
        structured = partial(el.StructuredMLP, d_model, hidden, family, "relu2", bias=False, **WHERE)
        for mode in MODES:
            ms = milliseconds(structured, d_model, TOKENS, mode)
            dense_ms, compiled_ms = _dense_milliseconds(d_model, hidden, mode)
            rows.append(
                {
                    "family": str(family),
                    "d_model": d_model,
                    "hidden": hidden,
                    "tokens": TOKENS,
                    "mode": mode,
                    "ms": round(ms, 4),
                    "dense_ms": round(dense_ms, 4),
                    "dense_compiled_ms": round(compiled_ms, 4),
                    "ratio_to_dense": round(dense_ms / ms, 2),
                    "flop_ratio": (el.flops(family(d_model, hidden)) + el.flops(family(hidden, d_model)))
                    / (4 * d_model * hidden),
                    **provenance(**WHERE),
                }
            )
    return rows


def kernels() -> list[dict[str, Any]]:
    """The forward time of every kernel that fits a layer beside its modelled cost; the planner takes the cheapest."""
    rows: list[dict[str, Any]] = []
    target = Target.of("cuda", torch.bfloat16)
    for family, width, tokens in product(FAMILIES, (512, 1024, 2048), (64, 1024, 16384)):
        structure = family(width, width).canonical
        fitting = [kernel for kernel in KERNELS if kernel.refuses(structure, target) is None]
        cheapest = min(fitting, key=lambda kernel: kernel.cost(structure, tokens, target))
        dense_ms = _layer_milliseconds(width, tokens)
        for kernel in fitting:
            ms = milliseconds(partial(_Run, structure, kernel), width, tokens, "forward")
            rows.append(
                {
                    "family": str(family),
                    "d_in": width,
                    "d_out": width,
                    "tokens": tokens,
                    "mode": "forward",
                    "kernel": kernel.name,
                    "chosen": kernel is cheapest,
                    "ms": round(ms, 5),
                    "modelled_ms": round(kernel.cost(structure, tokens, target) / 728e9, 5),
                    "ratio_to_dense": round(dense_ms / ms, 3),
                    **provenance(**WHERE),
                }
            )
    return rows


class _Run(nn.Module):
    """A layer that one kernel runs."""

    def __init__(self, structure: el.Structure, kernel: Kernel) -> None:
        super().__init__()
        self.run = kernel.prepare(structure)
        self.factors = nn.ParameterList(
            torch.randn(shape, **WHERE) / shape[-1] ** 0.5 for shape in structure.matrix_shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run(list(self.factors), x)


@cache
def _layer_milliseconds(width: int, tokens: int) -> float:
    return milliseconds(partial(nn.Linear, width, width, False, **WHERE), width, tokens, "forward")


@cache
def _dense_milliseconds(d_model: int, hidden: int, mode: str) -> tuple[float, float]:
    """Of the dense MLP as it stands, and compiled."""

    def compiled() -> nn.Module:
        model = DenseMLP(d_model, hidden)
        model.compile()
        return model

    plain = partial(DenseMLP, d_model, hidden)
    return milliseconds(plain, d_model, TOKENS, mode), milliseconds(compiled, d_model, TOKENS, mode)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "layers": lambda: bench(FAMILIES, WIDTHS, (TOKENS,), **WHERE),
        "mlps": mlps,
        "decode": lambda: bench(
            (el.BTT(), el.LowRank()), (1024, 2048, 4096, 8192), (1, 8, 32), modes=("forward",), **WHERE
        ),
        "kernels": kernels,
    }
    for name, make in tables.items():
        rows = make()
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            width = row.get("d_out", row.get("hidden"))
            sizes = f"{row.get('d_in', row.get('d_model')):5} -> {width:5} tokens {row['tokens']:5}"
            what = f"{row['family']:28} {row.get('kernel', ''):12}"
            print(f"{name:7} {row['mode']:8} {sizes} {what} {row['ms']:9.4f} ms {row['ratio_to_dense']:6} x")


if __name__ == "__main__":
    named = torch.cuda.get_device_name().lower().replace(" ", "_")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / named)
