"""Routed layers for those who take no gradients: BTT experts in one launch, where a cluster holds those of a set.

Two launches write the state of every token's experts, and read it (set_pair.py): two thirds of all that they
move. Here the multiprocessors of a cluster send each other the state (cluster_sets.cu), and what is moved instead are the
factors of a set of experts, once for each cluster that meets it.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.clusters import SIZES, TILES, WARPS, Cut, cut
from einlinear.kernels import nvrtc
from einlinear.kernels.select import choose
from einlinear.kernels.set_pair import forward
from einlinear.kernels.sets import Sizes, empty_counts, lay_out, set_layout

SOURCES = tuple(Path(__file__).with_name(name) for name in ("hopper.cuh", "cluster_sets.cu"))
LARGER = (*SIZES, 16)
"""Multiprocessors in a cluster, up to what a Hopper GPU has."""


@torch.library.custom_op("einlinear::set_result", mutates_args=())
def set_result(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor
) -> Tensor:
    """The result of `set_pair`, without gradients."""
    run, sizes = _planned(x, first, second, index.shape[1])
    layout, gates = set_layout(index, weight, sizes.experts, sizes.run)
    return _result(x, first, second, bias, layout, gates, sizes, run)


@set_result.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, index: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], second.shape[1] * second.shape[2])


@torch.library.custom_op("einlinear::routed_result", mutates_args=())
def routed_result(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, logits and choices of `routed_pair`, without gradients."""
    run, sizes = _planned(x, first, second, active)
    counts = empty_counts(x, sizes)
    logits, index, weight = choose(x, router, scale, router_bias, active, counts)
    layout, gates = lay_out(index, weight, counts, sizes)
    return _result(x, first, second, bias, layout, gates, sizes, run), logits, index


@routed_result.register_fake
def _(
    x: Tensor, router: Tensor, scale: float, router_bias: Tensor | None, first: Tensor, second: Tensor,
    bias: Tensor | None, active: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], second.shape[1] * second.shape[2])
    logits = x.new_empty(x.shape[0], first.shape[0], dtype=torch.float32)
    return y, logits, x.new_empty(x.shape[0], active, dtype=torch.int64)


@register_flop_formula(torch.ops.einlinear.set_result)
def _(x: list[int], first: list[int], second: list[int], bias: object, index: list[int], *_: object, **__: object) -> int:
    return 2 * x[0] * index[1] * (math.prod(first) + math.prod(second)) // first[0]


@register_flop_formula(torch.ops.einlinear.routed_result)
def _(
    x: list[int], router: list[int], scale: float, _: object, first: list[int], second: list[int], bias: object,
    active: int, **__: object,
) -> int:  # fmt: skip
    return 2 * x[0] * (active * (math.prod(first) + math.prod(second)) // first[0] + math.prod(router))


def set_cut(first: tuple[int, ...], second: tuple[int, ...], active: int) -> Cut | str:
    """How the experts of a set are cut over a cluster, from factors of one expert, or why they are not."""
    (slices, rows, width), (later, out, sums) = first, second
    if sums % 8:
        return f"the {sums} sums of an expert are no multiple of 8"
    # Tiles of 16 tokens: a set has few, and what is left of its last tile is idle.
    return cut((slices, active * rows, width), (later, out, active * sums), LARGER, (16,))


def defines(
    found: Cut, first: tuple[int, ...], second: tuple[int, ...], experts: int, active: int, has_bias: bool,
    dtype: torch.dtype,
) -> nvrtc.Defines:  # fmt: skip
    """What cluster_sets.cu is compiled with; factors are those of one expert."""
    (slices, _, width), (later, out, sums) = first, second
    letters = (("G", slices), ("A", width), ("R", sums // slices), ("F", later), ("E", out))
    tiles = (("CLUSTER", found.size), ("WARPS", WARPS), ("TOKENS", found.tokens), ("STAGES", TILES), ("STATES", TILES))
    routing = (("EXPERTS", experts), ("ACTIVE", active))
    return (*letters, *tiles, *routing, ("BIAS", int(has_bias)), ("BFLOAT16", int(dtype == torch.bfloat16)))


def _planned(x: Tensor, first: Tensor, second: Tensor, active: int) -> tuple[Cut | None, Sizes]:
    """A cluster, where less is moved by it than by two launches, and the tables that either wants."""
    plain = Sizes(len(x), len(first), active)
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0) or nvrtc.refusal():
        return None, plain
    found = set_cut(tuple(first.shape[1:]), tuple(second.shape[1:]), active)
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    if isinstance(found, str) or found.memory > room:
        return None, plain
    clusters = torch.cuda.get_device_properties(x.device).multi_processor_count // found.size
    loaded = (plain.filled + clusters) * active * (first.numel() + second.numel()) // len(first)
    state = 2 * active * len(x) * first.shape[1] * first.shape[2]
    return (found, Sizes(len(x), len(first), active, found.tokens)) if loaded < state else (None, plain)


def _result(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, layout: Tensor, gates: Tensor, sizes: Sizes,
    found: Cut | None,
) -> Tensor:  # fmt: skip
    if found is None:
        return forward(x, first, second, bias, layout, gates, sizes)[0]
    if any(x.dtype != each.dtype for each in (first, second)):
        raise ValueError(f"cannot apply factors of {first.dtype} to an input of {x.dtype}: convert one of the two")
    y = x.new_empty(len(x), second.shape[1] * second.shape[2])
    with torch.cuda.device_of(x):
        run = nvrtc.function(
            SOURCES, "layer",
            defines(found, first.shape[1:], second.shape[1:], sizes.experts, sizes.active, bias is not None, x.dtype),
            found.size, 32 * WARPS, found.memory, torch.cuda.current_device(),
        )  # fmt: skip
        if not run.resident:  # of a GPU cut into parts, say
            return forward(x, first, second, bias, layout, gates, sizes)[0]
        x, first, second = (_aligned(each) for each in (x, first, second))
        added = None if bias is None else _aligned(bias)
        _, *tables = sizes.split(layout)
        run(min(run.resident, sizes.runs), [x, first, second, added, y, *tables, gates, sizes.runs, x.stride(0)])
    return y


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
