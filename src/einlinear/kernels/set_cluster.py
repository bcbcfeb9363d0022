"""BTT experts in one launch, where the multiprocessors of a cluster hold those of a set.

Two launches write the state of every token's experts, and read it (set_pair.py): two thirds of all that they move with
two active experts. Here the multiprocessors of a cluster send each other the state (cluster_sets.cu); it is written
where a backward pass will want it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from einlinear.clusters import SIZES, TILES, WARPS, Cut, cut
from einlinear.kernels import nvrtc
from einlinear.kernels.sets import PIECE, TILE, Sizes

SOURCES = tuple(Path(__file__).with_name(name) for name in ("hopper.cuh", "cluster.cuh", "cluster_sets.cu"))
LARGER = (*SIZES, 16)
"""Multiprocessors in a cluster, up to what a Hopper GPU has."""

TILE_BYTES = 1e7
"""What two launches move on an H200 in the 3 us in which a cluster is done with a tile (benchmarks/NOTES.md)."""


def set_cut(first: tuple[int, ...], second: tuple[int, ...], active: int) -> Cut | str:
    """How the experts of a set are cut over a cluster, from factors of one expert, or why they are not."""
    (slices, rows, width), (later, out, sums) = first, second
    if sums % 8:
        return f"the {sums} sums of an expert are no multiple of 8"
    return cut((slices, active * rows, width), (later, out, active * sums), LARGER, (TILE,))


def defines(
    found: Cut, first: tuple[int, ...], second: tuple[int, ...], experts: int, active: int, kept: bool, has_bias: bool,
    dtype: torch.dtype,
) -> nvrtc.Defines:  # fmt: skip
    """What cluster_sets.cu is compiled with; factors are those of one expert."""
    (slices, _, width), (later, out, sums) = first, second
    letters = (("G", slices), ("A", width), ("R", sums // slices), ("F", later), ("E", out))
    tiles = (("CLUSTER", found.size), ("WARPS", WARPS), ("TOKENS", found.tokens), ("STAGES", TILES), ("STATES", TILES))
    routing = (("EXPERTS", experts), ("ACTIVE", active), ("PIECE", PIECE), ("KEPT", int(kept)))
    return (*letters, *tiles, *routing, ("BIAS", int(has_bias)), ("BFLOAT16", int(dtype == torch.bfloat16)))


def clustered(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, layout: Tensor, gates: Tensor, sizes: Sizes,
    y: Tensor, z: Tensor | None,
) -> bool:  # fmt: skip
    """Fills `y`, and `z` where it is given, if that is faster than two launches; returns whether it did."""
    found = _pays(x, first, second, bias, sizes)
    if found is None:
        return False
    with torch.cuda.device_of(x):
        options = sizes.experts, sizes.active, z is not None, bias is not None, x.dtype
        run = nvrtc.function(
            SOURCES, "layer", defines(found, first.shape[1:], second.shape[1:], *options),
            found.size, 32 * WARPS, found.memory, torch.cuda.current_device(),
        )  # fmt: skip
        if not run.resident:  # of a GPU cut into parts, say
            return False
        x, first, second = (_aligned(each) for each in (x, first, second))
        added = None if bias is None else _aligned(bias)
        _, rooms, _, _, token_of, *tiles = sizes.split(layout)
        tables = [rooms, token_of, *tiles, gates]
        run(min(run.resident, sizes.tiles), [x, first, second, added, y, z, *tables, sizes.tiles, x.stride(0)])
    return True


def _pays(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, sizes: Sizes) -> Cut | None:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0) or nvrtc.refusal():
        return None
    if any(each is not None and each.dtype != x.dtype for each in (first, second, bias)):
        return None
    found = set_cut(tuple(first.shape[1:]), tuple(second.shape[1:]), sizes.active)
    device: Any = torch.cuda.get_device_properties(x.device)
    if isinstance(found, str) or found.memory > device.shared_memory_per_block_optin:
        return None
    (_, slices, rows, width), (_, later, out, _) = first.shape, second.shape
    moved = sizes.tokens * x.element_size() * (slices * width + 2 * sizes.active * slices * rows + later * out)
    clusters = device.multi_processor_count // found.size
    return found if TILE_BYTES * sizes.tiles / clusters < moved else None


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
