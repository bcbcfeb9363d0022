"""Which tiles and warps are fastest for the Triton kernels, on one GPU in bfloat16, as CSV.

    python benchmarks/tune.py results.csv

What `einlinear.kernels` launches was chosen from such tables (NOTES.md). Every variant is compiled
beforehand by several processes, as compiling takes longer than timing.
"""

import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch

import einlinear as el
from einlinear.kernels import junction
from einlinear.kernels.product import product_of
from einlinear.kernels.stage import Launch
from einlinear.lab.bench import _graph_milliseconds

TOKENS = 16384
Case = tuple[str, str, Callable[[], Callable[[], object]]]
"""Kernel and shape, variant, and what makes the call."""


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


def factors(structure: el.Structure) -> list[torch.Tensor]:
    return [half(*shape) for shape in structure.canonical.matrix_shapes]


def products() -> Iterator[Case]:
    """W of two factors, and the gradients of these."""
    for width, family in product((512, 1024, 2048), (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.Kronecker())):
        structure = family(width, width).canonical
        found = product_of(structure)
        assert found is not None
        strides = [*found.strides[0], *found.strides[1]]

        def forward(structure: el.Structure, sizes: tuple[int, ...], strides: list[int]) -> Callable[[], object]:
            first, second = factors(structure)
            return lambda: torch.ops.einlinear.product(first, second, sizes, strides)

        yield f"product {family} {width}", "", partial(forward, structure, found.sizes, strides)
        if found.is_block:

            def backward(structure: el.Structure, sizes: tuple[int, ...], width: int) -> Callable[[], object]:
                (first, second), grad = factors(structure), half(width, width)
                return lambda: torch.ops.einlinear.product_backward(grad, first, second, sizes)

            yield f"product backward {family} {width}", "", partial(backward, structure, found.sizes, width)


def junctions() -> Iterator[Case]:
    shapes = [
        ("4096-11008 swiglu", "silu", 2, (86, 64, 128, 64), False),
        ("4096-11008 swiglu bias", "silu", 2, (86, 64, 128, 64), True),
        ("4096-16384 gelu bias", "gelu", 1, (64, 64, 256, 64), True),
        ("4096-16384 gelu", "gelu", 1, (64, 64, 256, 64), False),
        ("4096-16384 relu2", "relu2", 1, (64, 64, 256, 64), False),
        ("1024-4096 swiglu", "silu", 2, (32, 32, 128, 32), False),
        ("1024-4096 gelu bias", "gelu", 1, (32, 32, 128, 32), True),
        ("1024-4096 relu2", "relu2", 1, (32, 32, 128, 32), False),
        ("512-2048 relu2", "relu2", 1, (16, 32, 128, 32), False),
        ("512-2048 gelu bias", "gelu", 1, (16, 32, 128, 32), True),
    ]
    for name, activation, parts, (slices, width, hidden, out), bias in shapes:

        def inputs(
            parts: int, slices: int, width: int, hidden: int, out: int, bias: bool
        ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
            zs = [half(width, slices, TOKENS) for _ in range(parts)]
            ups = [half(slices, hidden, width) for _ in range(parts)]
            return zs, ups, [half(slices * hidden) for _ in range(parts if bias else 0)], half(slices, out, hidden)

        make = partial(inputs, parts, slices, width, hidden, out, bias)
        for size, warps, resident, block in ((64, 4, 4, 128), (128, 4, 4, 128), (128, 8, 2, 128)):  # fmt: skip
            launch = Launch(tokens=size, warps=warps, resident=resident)

            def forward(make: Callable, activation: str, launch: Launch, block: int) -> Callable[[], object]:
                operands = make()
                return lambda: junction.launch_forward(*operands, activation, launch, block)

            yield f"junction {name}", f"{launch} {block}", partial(forward, make, activation, launch, block)
        for size, warps, stages, block in ((128, 8, 2, 64), (128, 8, 3, 64), (128, 8, 2, 32), (64, 4, 3, 64)):
            launch = Launch(tokens=size, warps=warps, stages=stages, resident=1)

            def backward(
                make: Callable, activation: str, launch: Launch, block: int, slices: int, out: int
            ) -> Callable[[], object]:
                operands, grad = make(), half(slices, out, TOKENS)
                return lambda: junction.launch_backward(grad, *operands, activation, launch, block)

            yield (
                f"junction backward {name}",
                f"{launch} {block}",
                partial(backward, make, activation, launch, block, slices, out),
            )


def cases() -> list[Case]:
    return [*products(), *junctions()]


def compile_some(part: tuple[int, int]) -> None:
    """Runs every `count`-th case once, so that Triton keeps it compiled on disk."""
    start, count = part
    for name, variant, make in cases()[start::count]:
        try:
            make()()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} {variant}: {str(error).splitlines()[0]}", flush=True)


def main(path: Path, workers: int = 12) -> None:
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_some, [(start, workers) for start in range(workers)])
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", "variant", "us", "device", "torch", "triton"])
        for name, variant, make in cases():
            try:
                microseconds = 1e3 * _graph_milliseconds([make() for _ in range(2)])
            except Exception as error:
                print(f"{name} {variant}: {str(error).splitlines()[0]}", flush=True)
                continue
            writer.writerow([name, variant, f"{microseconds:.4g}", torch.cuda.get_device_name(), torch.__version__])
            file.flush()
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
