"""Time of structured layers against dense ones in the same process, as rows for a table."""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.cost import flops
from einlinear.family import Family
from einlinear.lab.failure import out_of_memory
from einlinear.lab.provenance import checked_out
from einlinear.layer import Linear
from einlinear.structure import Structure

Row = dict[str, Any]

MODES = ("forward", "training")
"""The forward pass alone, or also the gradients of the input and of all parameters."""


class TooLarge(ValueError):
    """A layer that the device has no memory for; the message says so in a sentence."""


CACHE = 1 << 28
"""Bytes of inputs and weights in rotation on a GPU: several times its cache, or that would be measured."""


def bench(
    families: Sequence[Family],
    widths: Iterable[int | tuple[int, int]],
    tokens: Iterable[int] = (16384,),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    modes: Sequence[str] = MODES,
) -> list[Row]:
    """Times one layer of each family, and the dense one, at each width and number of tokens, without bias.

    On a GPU calls are timed inside a CUDA graph, over inputs and layers in rotation, and on a CPU
    by the thread's own time on the threads that torch has been given. Times are medians.

    Returns:
        Rows with `family`, `d_in`, `d_out`, `tokens`, `mode`, `ms`, `ratio_to_dense` (how many times
        as fast), `flop_ratio` (FLOPs over dense ones), `floor_ms` (what FLOPs, or the bytes of
        inputs, outputs and weights, take at the speeds measured here), `reach` (floor over time),
        `device`, `dtype`, `torch`, `triton` and `commit`.

    Raises:
        TooLarge: where the device has too little memory for a layer, its input and its gradients.
    """
    device = torch.device(device)
    options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
    speeds, here = ceilings(device, dtype), provenance(device, dtype)
    rows: list[Row] = []
    for d_in, d_out in ((width, width) if isinstance(width, int) else width for width in widths):
        for count in tokens:
            for mode in modes:
                makers: dict[str, Callable[[], nn.Module]] = {"dense": partial(nn.Linear, d_in, d_out, **options)}
                makers |= {str(family): partial(Linear, d_in, d_out, family, **options) for family in families}
                times = {name: milliseconds(make, d_in, count, mode) for name, make in makers.items()}
                for name, ms in times.items():
                    layer = makers[name]()
                    weights = sum(parameter.numel() for parameter in layer.parameters())
                    work = flops(layer.structure) if isinstance(layer, Linear) else 2 * d_in * d_out
                    passes, moved = (1, d_in + d_out) if mode == "forward" else (3, 3 * d_in + 2 * d_out)
                    floor = max(
                        passes * work * count / speeds[0],
                        dtype.itemsize * (count * moved + passes * weights) / speeds[1],
                    )
                    rows.append(
                        {
                            "family": name,
                            "d_in": d_in,
                            "d_out": d_out,
                            "tokens": count,
                            "mode": mode,
                            "ms": float(f"{ms:.4g}"),
                            "ratio_to_dense": round(times["dense"] / ms, 3),
                            "flop_ratio": float(f"{work / (2 * d_in * d_out):.4g}"),
                            "floor_ms": float(f"{1e3 * floor:.4g}"),
                            "reach": round(1e3 * floor / ms, 3),
                            **here,
                        }
                    )
    return rows


def bench_structure(structure: Structure, tokens: int, device: str, dtype: str) -> list[Row]:
    """Times one structure as a layer without bias against dense: `mode`, `ms`, `ratio_to_dense` and provenance.

    Raises:
        TooLarge: where the device has too little memory for it.
    """
    kind = getattr(torch, dtype)
    options: dict[str, Any] = {"bias": False, "device": torch.device(device), "dtype": kind}
    d_in, d_out = structure.d_in, structure.d_out
    rows: list[Row] = []
    for mode in MODES:
        plain = milliseconds(partial(nn.Linear, d_in, d_out, **options), d_in, tokens, mode)
        ms = milliseconds(partial(Linear, d_in, d_out, structure, **options), d_in, tokens, mode)
        rows.append({"mode": mode, "ms": ms, "ratio_to_dense": plain / ms, **provenance(torch.device(device), kind)})
    return rows


def milliseconds(make: Callable[[], nn.Module], d_in: int, tokens: int, mode: str) -> float:
    """The median time of one call of what `make` makes, on the device and in the type of its parameters.

    Raises:
        TooLarge: where the device has too little memory for it.
    """
    try:
        return _milliseconds(make, d_in, tokens, mode)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        raise TooLarge(
            f"cannot time {tokens} tokens of {d_in} features, {mode}: {_memory()} too little memory for the layer, its "
            f"input and what is made of them; pass fewer tokens or a smaller width"
        ) from error


def _memory() -> str:
    """The device's memory, as the start of a sentence."""
    if not torch.cuda.is_available():
        return "this machine has"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return f"{torch.cuda.get_device_name()}, with {free:.1f} of {total:.1f} GiB free, has"


def _milliseconds(make: Callable[[], nn.Module], d_in: int, tokens: int, mode: str) -> float:
    layer = make()
    like = next(layer.parameters())
    x = torch.randn(tokens, d_in, device=like.device, dtype=like.dtype)
    size = (x.numel() + sum(parameter.numel() for parameter in layer.parameters())) * x.element_size()
    copies = min(128, max(2, CACHE // size)) if like.is_cuda else 1
    layers = [layer, *(make() for _ in range(copies - 1))]
    calls = [_call(layer, torch.randn_like(x), mode) for layer in layers]
    return _graph_milliseconds(calls) if like.is_cuda else _thread_milliseconds(calls)


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs per second of a large matmul, and bytes per second, read and written, of a large elementwise pass.

    Not of a copy: in a CUDA graph that is no kernel, and on an H200 a third slower than one.
    """
    cuda = device.type == "cuda"
    side, length = (8192, 1 << 30) if cuda else (1024, 1 << 24)
    if cuda:  # a quarter of what is free, where that is less
        length = min(length, torch.cuda.mem_get_info(device)[0] // (8 * dtype.itemsize))
    timed = _graph_milliseconds if cuda else _thread_milliseconds
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    multiply = timed([lambda: a @ b])
    source, target = (torch.randn(length, device=device, dtype=dtype) for _ in range(2))
    negate = timed([lambda: torch.neg(source, out=target)])
    return 2e3 * side**3 / multiply, 2e3 * length * source.element_size() / negate


def provenance(device: torch.device, dtype: torch.dtype) -> Row:
    """Where and with what something was measured."""
    installed = find_spec("triton") is not None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": version("triton") if installed else "",
        "commit": checked_out(),
    }


def _call(layer: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":

        @torch.no_grad()
        def forward() -> object:
            return layer(x)

        return forward
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    with torch.no_grad():
        grad = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), leaves, grad)


def _graph_milliseconds(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Median over replays of a CUDA graph that holds every call, as often as makes a replay last some milliseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once
        for call in (*calls[:2], calls[-1]):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        each = (time.perf_counter() - begin) / len(calls[:2])
    repeats = max(1, round(20e-3 / (each * len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / (repeats * len(calls)))
    return statistics.median(times)


def _thread_milliseconds(calls: Sequence[Callable[[], object]], rounds: int = 7, least: float = 0.03) -> float:
    """Median over rounds of at least `least` seconds; the first one warms up and does not count."""
    (call,) = calls
    times: list[float] = []
    for _ in range(rounds + 1):
        count, begin = 0, time.thread_time()
        while (spent := time.thread_time() - begin) < least:
            call()
            count += 1
        times.append(1e3 * spent / count)
    return statistics.median(times[1:])
