"""Which tiles and warps are fastest for the Triton kernels, on one GPU in bfloat16, as CSV.

    python benchmarks/tune.py results.csv [--only TEXT ...]

What `einlinear.kernels` launches was chosen from such tables (NOTES.md). Every variant is compiled
beforehand by several processes, as compiling takes longer than timing.
"""

import argparse
import csv
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

import einlinear as el
from einlinear.kernels import bottleneck, junction
from einlinear.kernels.chain import Chain
from einlinear.kernels.product import product_of
from einlinear.kernels.stage import Launch, empty_state, launch_backward, launch_forward
from einlinear.lab.bench import _graph_milliseconds
from einlinear.links import INTO, OUT_OF

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


def bottlenecks() -> Iterator[Case]:
    """Two factors with few blocks, each way with weights beyond the cache: forward, and both factors' gradients."""
    families = (el.Monarch(blocks=4), el.LowRank(rank=64))
    for family, (width, tokens) in product(families, product((512, 1024, 2048), (1, 64, 1024, 4096))):
        first, second = family(width, width).canonical.matrix_shapes
        blocks = bottleneck.Blocks.of(first, second)
        g, a, r, _, e = blocks.sizes
        low, name = g == 1, f"bottleneck {family} {width} {tokens}"

        def forward(
            launch: bottleneck.Launch | None, family: el.Family = family, width: int = width, tokens: int = tokens
        ) -> Callable[[], object]:
            x, (one, two) = half(tokens, width), factors(family(width, width))
            if launch is None:
                run = Chain().prepare(family(width, width).canonical)
                return lambda: run([one, two], x)
            return lambda: bottleneck.launch_forward(
                x, one, two, None, bottleneck.Blocks.of(one.shape, two.shape), launch
            )

        def backward(
            sums: bottleneck.Sums | None, blocks: bottleneck.Blocks = blocks, width: int = width, tokens: int = tokens
        ) -> Callable[[], object]:
            state = blocks.sizes[0] * blocks.sizes[2] * blocks.sizes[3]
            x, z = half(tokens, width), half(tokens, state)
            if sums is None:
                return lambda: bottleneck.stock_weights(x, z, x, z, blocks)
            return lambda: bottleneck.launch_weights(x, z, x, z, blocks, sums)

        yield name, "stock", partial(forward, None)
        for size, out, apart in product((16, 32, 64, 128), (16, 64, 128), (False, True)):
            if size > max(16, tokens) or (low and apart):
                continue
            for block_in in (128, 256, 512):
                splits = max(1, min(e // out, 132 * size // tokens)) if low else 1
                deep = max(1, min(4, 200_000 // (2 * min(block_in, a) * (size + max(r, out)))))
                launch = bottleneck.Launch(size, block_in, out, splits, 8 if size == 128 else 4, deep, apart)
                yield name, str(launch), partial(forward, launch)
        yield name, "stock weights", partial(backward, None)
        for block, states, many, splits in product((64, 128), (64, 128), (64, 256), (1, 4)):
            sums = bottleneck.Sums(block, states, many, splits, 8 if block + states == 256 else 4, 3)
            yield name, str(sums), partial(backward, sums)


def stages() -> Iterator[Case]:
    """The two stages of rank 4 at width 1024, with tokens so few that they do not fill the machine for long."""
    for spec, shape, count in product((INTO, OUT_OF), ((32, 128, 32), (32, 32, 128)), (64, 1024)):
        if (spec == INTO) != (shape[1] == 128):
            continue

        def forward(spec: str, shape: tuple[int, ...], count: int, launch: Launch) -> Callable[[], object]:
            slices, _, width = shape
            x = half(count, slices, width) if spec == INTO else half(width, slices, count)
            weight = half(*shape)
            y = empty_state(x, weight, spec, count)
            return lambda: launch_forward(x, [weight], None, [y], spec, count, launch)

        def backward(spec: str, shape: tuple[int, ...], count: int, launch: Launch) -> Callable[[], object]:
            slices, made, width = shape
            x = half(count, slices, width) if spec == INTO else half(width, slices, count)
            grad = half(slices, made, count) if spec == INTO else half(count, slices, made)
            weight = half(*shape)
            return lambda: launch_backward([grad], x, [weight], spec, count, False, launch)

        for size, warps, resident in product((32, 64, 128), (4, 8), (1, 2)):
            launch = Launch(tokens=size, warps=warps, resident=resident)
            yield f"stage backward {spec} {count}", str(launch), partial(backward, spec, shape, count, launch)
        for size, warps in product((32, 64, 128), (2, 4, 8)):
            launch = Launch(tokens=size, warps=warps, stages=1)
            yield f"stage {spec} {count}", str(launch), partial(forward, spec, shape, count, launch)


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


def cases(only: list[str]) -> list[Case]:
    made = (*bottlenecks(), *products(), *stages(), *junctions())
    return [case for case in made if any(text in case[0] for text in only)]


def compile_some(part: tuple[int, int, list[str]]) -> None:
    """Runs every `count`-th case once, so that Triton keeps it compiled on disk."""
    start, count, only = part
    for name, variant, make in cases(only)[start::count]:
        try:
            make()()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} {variant}: {str(error).splitlines()[0]}", flush=True)


def compile_all(only: list[str], workers: int) -> None:
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_some, [(start, workers, only) for start in range(workers)], chunksize=1)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main(path: Path, only: list[str], compile_only: bool, timed_only: bool, workers: int) -> None:
    begin = time.perf_counter()
    if not timed_only:
        compile_all(only, workers)
    if compile_only:
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", "variant", "us", "device", "torch", "triton"])
        for name, variant, make in cases(only):
            copies = 64 if name.startswith("bottleneck") else 2  # weights beyond the cache
            try:
                microseconds = 1e3 * _graph_milliseconds([make() for _ in range(copies)], rounds=5)
            except Exception as error:
                print(f"{name} {variant}: {str(error).splitlines()[0]}", flush=True)
                continue
            versions = torch.cuda.get_device_name(), torch.__version__, version("triton")
            writer.writerow([name, variant, f"{microseconds:.4g}", *versions])
            file.flush()
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases; all by default")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--timed-only", action="store_true")
    parser.add_argument("--workers", type=int, default=12)
    main(**vars(parser.parse_args()))
