"""What a structure takes in seconds, for each way of running it. No tensor is needed.

On a GPU a roofline of measured ceilings: every launch takes a fixed time, and then as long as its arithmetic or its
bytes, whichever is longer. Its numbers were read off benchmarks/results/nvidia_h200/kernels.csv (benchmarks/NOTES.md
says how well they foretell other shapes, and tests/test_clock.py holds them to it). For a CPU: `einlinear.clock_cpu`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import einlinear.clock_cpu as clock_cpu
import einlinear.launches as launches
import einlinear.toolchain as toolchain
from einlinear.clusters import Cut, cut
from einlinear.launches import Blocks
from einlinear.links import INTO, OUT_OF, STAGES, links
from einlinear.structure import Structure, StructureError

Mode = Literal["forward", "training"]
"""The forward pass alone, or also the gradients of the input and of all factors. Decoding is forward of few tokens."""


@dataclass(frozen=True)
class Machine:
    """Ceilings, in FLOPs or bytes per second, and fixed times, in seconds, of one kind of machine and number."""

    name: str
    bytes: int
    """Of a number."""
    matmul: float
    memory: float
    launch: float = 0.0
    """Of a stock matmul."""
    batch: float = 0.0
    """Of a stock batched matmul."""
    kernel: float = 0.0
    """Of a Triton kernel."""
    narrow: float = math.inf
    """FLOPs per second, for each row or column of its smaller side, that a batched matmul of small blocks reaches."""
    tiny: float = 0.0
    """Of one small matmul in a batch with one for each token."""


CPU = Machine("one CPU core, float32", 4, matmul=9.2e10, memory=5e9, launch=4e-5)
CPU_HALF = Machine("one CPU core, 16 bits", 2, matmul=2.1e11, memory=5e9, launch=8e-5)
CUDA = Machine("H200, float32", 4, matmul=5e13, memory=3.8e12, launch=3e-6, batch=2.6e-6, kernel=1.3e-6, tiny=8e-9)
CUDA_HALF = Machine(
    "H200, 16 bits", 2, matmul=6.9e14, memory=3.8e12, launch=3e-6, batch=2.6e-6, kernel=1.3e-6, narrow=1.7e12, tiny=6e-9
)

AGAIN = 32768
"""Up to so many numbers of input, one launch runs a two-factor layer, making its state again where it is read."""

RESIDENT = {1: 132, 2: 66, 4: 30, 8: 15}
"""Clusters of so many multiprocessors that run at once: they lie in groups of 16 or 18, which are not always filled."""

WIDEST = 128
"""The largest rank whose state one program holds."""

FEW_BLOCKS = 8
"""The most blocks of a factor for which one launch is made."""

FEW = 1024
"""Tokens up to which the second launch of a two-factor layer begins before the first one ends."""


def machine(device: str = "cpu", dtype: object = None) -> Machine:
    """The machine that times are told for; `dtype` is a name such as "bfloat16" or a type of torch.

    By default float32 on a CPU and bfloat16 on a GPU.
    """
    name = str(dtype or ("float32" if device == "cpu" else "bfloat16")).removeprefix("torch.")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise StructureError(f"cannot foretell times on the device '{device}': only for cpu and cuda")
    half = name in ("bfloat16", "float16")
    if device == "cpu":
        return CPU_HALF if half else CPU
    return CUDA_HALF if half else CUDA


def seconds(
    structure: Structure, tokens: int, device: str = "cpu", dtype: object = None, mode: Mode = "forward"
) -> float:
    """The modelled time of a layer on `tokens` vectors, run as `einlinear.Linear` would.

    Args:
        structure: unrouted.
        tokens: how many vectors.
        device: "cuda", modelled after one H200, or "cpu", after one core of a Zen 4 or, where this machine has AMX,
            of a Sapphire Rapids.
        dtype: "bfloat16", "float16" or "float32", or torch's; by default bfloat16 on a GPU.
        mode: "forward", or "training": also the gradients of the input and of all factors.

    Raises:
        StructureError: for a routed structure, a device or a mode that is not known.
    """
    if structure.routed:
        raise StructureError(
            f"cannot foretell the time of {structure!r}: it depends on the gates of a routed structure"
        )
    if mode not in ("forward", "training"):
        raise StructureError(f"cannot foretell the time of mode '{mode}': pass 'forward' or 'training'")
    here, canonical = machine(device, dtype), structure.canonical
    return min(
        way(canonical, tokens, here, mode == "training") for fits, way in WAYS.values() if fits(canonical, here) is None
    )


# How a structure may be run. Each way says why it cannot, and what it takes.


def refuses_chain(structure: Structure, here: Machine) -> str | None:
    found = links(structure)
    return found if isinstance(found, str) else None


def refuses_rows(structure: Structure, here: Machine) -> str | None:
    return None if on_cpu(here) else "it was measured on CPUs alone"


def refuses_columns(structure: Structure, here: Machine) -> str | None:
    return refuses_rows(structure, here) or refuses_chain(structure, here)


def refuses_blocked(structure: Structure, here: Machine) -> str | None:
    if not on_cpu(here):
        return "its blocks of tokens are sized for a CPU's cache"
    found = links(structure)
    if isinstance(found, str):
        return found
    if len(found) < 2 or any(link.spec not in STAGES for link in found):
        return "it takes two or more block-diagonal factors"
    return None


def refuses_native(structure: Structure, here: Machine) -> str | None:
    if not on_cpu(here):
        return "it is compiled for CPUs"
    found = links(structure)
    if isinstance(found, str):
        return found
    return toolchain.refusal()


def refuses_tiles(structure: Structure, here: Machine) -> str | None:
    if here is not CUDA_HALF:
        return "it takes numbers of 16 bits on a CUDA device"
    found = links(structure)
    if isinstance(found, str):
        return found
    return None if any(link.tiled for link in found) else "none of its factors has blocks of 128 x 128 or smaller"


def refuses_pair(structure: Structure, here: Machine) -> str | None:
    if refusal := refuses_tiles(structure, here):
        return refusal
    found = links(structure)
    if [(link.spec, link.tiled) for link in found if not isinstance(link, str)] != [(INTO, True), (OUT_OF, True)]:
        return "it takes two block-diagonal factors with a transposition between, both of small blocks"
    return None


def refuses_cluster(structure: Structure, here: Machine) -> str | None:
    if refusal := refuses_pair(structure, here):
        return refusal
    found = cut(structure.matrix_shapes[0], structure.matrix_shapes[1])
    return found if isinstance(found, str) else None


def refuses_bottleneck(structure: Structure, here: Machine) -> str | None:
    if here is not CUDA_HALF:
        return "it takes numbers of 16 bits on a CUDA device"
    shapes, found = structure.matrix_shapes, links(structure)
    if len(shapes) != 2 or isinstance(found, str):
        return "it takes two factors"
    (g, rows, a), (f, e, _) = shapes
    if [link.spec for link in found] == [INTO, OUT_OF]:
        if max(g, f) > FEW_BLOCKS or any(side % 8 for side in (a, rows // f, e)):
            return f"it takes up to {FEW_BLOCKS} blocks, whose sides and ranks are multiples of 8"
        return None
    if any(step.batch or step.passive or step.inner for step in structure.steps):
        return "it takes two plain factors, as of a low rank, or two of a few blocks"
    if rows % 8 or not 8 <= rows <= WIDEST:
        return f"it takes ranks up to {WIDEST} that are multiples of 8"
    return None


def refuses_nothing(structure: Structure, here: Machine) -> str | None:
    return None


def measured(way: str) -> "Way":
    """What `way` was measured to take on a CPU."""

    def time(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
        return clock_cpu.seconds(way, structure, tokens, here.bytes, training)

    return time


def chain(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """Stock matmuls: one for each factor, and two more backward."""
    if on_cpu(here):
        return clock_cpu.AGAIN * measured("columns")(structure, tokens, here, training)
    total, found = 0.0, links(structure)
    for k, (slices, made, summed, passive, state, result) in enumerate(_steps(structure)):
        weights = slices * made * summed
        work = 2.0 * weights * passive * tokens
        moved = here.bytes * (weights + tokens * (state + result))
        rate = _rate(here, made, summed) if slices > 1 else here.matmul
        fixed = here.batch if slices > 1 else here.launch + _latency(here, made, summed)
        each = fixed + max(work / rate, moved / here.memory)
        if here.tiny and not isinstance(found, str) and found[k].spec == "bkq,nk->bnq":  # one small matmul a token
            each = max(each, fixed + tokens * here.tiny)
            total += 5 * fixed + tokens * (1.8 * here.tiny + 7.7e-12 * state) if training else each
        else:
            total += 3 * each if training else each
    return total


def tiles(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """Triton kernels where blocks are small: one pass over the tokens forward and one backward."""
    found = links(structure)
    assert not isinstance(found, str)
    total = 0.0
    for (slices, made, summed, _, state, result), link in zip(_steps(structure), found, strict=True):
        work, weights = 2.0 * slices * made * summed * tokens, here.bytes * slices * made * summed
        fixed = here.kernel + 8e-9 * (made + summed)
        if not link.tiled:
            total += chain(structure, tokens, here, training) / len(found)
            continue
        rate = min(190e12, 2.25e12 * math.sqrt(made * summed))
        moved = here.bytes * tokens * (state + result) + weights
        total += fixed + max(work / rate, moved / (1.1 * here.memory))
        if training:
            splits = min(32, max(1, tokens // 512)) if tokens > 128 else 1
            moved = here.bytes * tokens * (2 * state + result) + 4 * weights * splits
            adding = 1.5 * here.kernel if splits > 1 else 0.0
            total += 1.25 * fixed + adding + max(work / (0.8 * rate), moved / here.memory)
    return total


def pair(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """One launch for a few tokens, two that overlap for some more."""
    weights = here.bytes * sum(slices * made * summed for slices, made, summed in structure.matrix_shapes)
    width = structure.size(structure.x)
    if tokens * width <= AGAIN:
        forward = 0.9e-6 + 25e-9 * math.sqrt(width) + tokens * (20e-9 + 17e-12 * width) + weights / here.memory
    else:
        overlap = 0.9e-6 if tokens <= FEW else -1e-6
        forward = tiles(structure, tokens, here, False) - overlap
    return forward + (_again(structure, tokens, here) if training else 0.0)


def cluster(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """One launch; each cluster fetches its factors, and then goes from tile to tile of the tokens."""
    found = cut(structure.matrix_shapes[0], structure.matrix_shapes[1])
    assert isinstance(found, Cut)
    (_, state), (_, made) = (step[4:] for step in _steps(structure))
    passed, written = (here.bytes * found.tokens * width / found.size for width in (state, made))
    if structure.matrix_shapes[1][1] % 16:  # then features are stored two at a time
        written *= 2
    taken = found.tokens * found.line
    rounds = math.ceil(math.ceil(tokens / found.tokens) / RESIDENT[found.size])
    each, filling = taken / 6.4e10 + passed / 5.0e10 + written / 3.2e10, (taken + passed + written) / 1.04e11
    forward = 2.7e-6 + here.bytes * found.weights / 5.7e10 + rounds * each + min(rounds - 1, 3) * filling
    return forward + (_again(structure, tokens, here) if training else 0.0)


def _again(structure: Structure, tokens: int, here: Machine) -> float:
    """The backward pass of stages, the state made again by the first of them."""
    return tiles(structure, tokens, here, True) - 0.5 * tiles(structure, tokens, here, False)


def bottleneck(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """One launch, or two that overlap; the input's gradient as many, and one or two for those of the weights."""
    blocks, tokens = Blocks.of(*structure.matrix_shapes), max(1, tokens)
    # Launches of several blocks were read off up to 8192 tokens; with 16384, 8 blocks took 1.7 times as long as told.
    beyond = 1.7 if tokens > launches.SUMMED_BLOCKS and not blocks.is_one else 1.0
    forward = beyond * launches.forward(blocks.sizes, tokens)[1]
    if not training:
        return forward
    sums, weights = launches.weights(blocks.sizes, tokens)
    if sums is None:
        weights = (1 if blocks.is_one else 2) * chain(structure, tokens, here, False)
    return forward + beyond * launches.forward(blocks.mT.sizes, tokens)[1] + weights


def reference(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """One `torch.einsum` for each factor, with copies. Measured against `chain`: 1.4 to 3.6 times slower."""
    if on_cpu(here):
        return 2.0 * measured("rows")(structure, tokens, here, training)
    return 2.0 * chain(structure, tokens, here, training)


def materialised(structure: Structure, tokens: int, here: Machine, training: bool) -> float:
    """W is made, and then multiplied."""
    rows, columns, found = structure.size(structure.x), structure.size(structure.y), links(structure)
    whole, bond = here.bytes * rows * columns, math.prod(structure.sizes.values()) / (rows * columns)
    if len(structure.factors) != 2 or bond < 1 or {*structure.x} & {*structure.y}:
        making = reference(structure, rows, here, training)
    elif bond > 16 or here.kernel == 0.0:
        copies = 3 if on_cpu(here) else 1
        moved = copies * whole + here.bytes * sum(math.prod(shape) for shape in structure.factor_shapes)
        work, moving = 2 * bond * rows * columns / here.matmul, moved / here.memory
        # A GPU moves bytes while it works; one core of a CPU does one thing at a time.
        making = here.launch + (work + moving if on_cpu(here) else max(work, moving))
        if not on_cpu(here) and not isinstance(found, str) and [link.spec for link in found] == [INTO, OUT_OF]:
            making += 3 * here.launch  # its factors, and itself, are brought into another order
        making *= 3 if training else 1
    else:
        making = here.kernel + (1 + 0.2 * bond) * whole / here.memory
        if training and not isinstance(found, str) and [link.spec for link in found] == [INTO, OUT_OF]:
            making *= 2.5
        elif training:  # gradients by several contractions of W's
            making += 12e-6 + 23 * whole / here.memory
    return making + dense_seconds(rows, columns, tokens, here, training)


def dense_seconds(d_in: int, d_out: int, tokens: int, here: Machine, training: bool) -> float:
    """A plain matmul."""
    way = measured("dense") if on_cpu(here) else chain
    return way(Structure.parse("i, o i -> o", i=d_in, o=d_out), tokens, here, training)


Refusal = Callable[[Structure, Machine], str | None]
Way = Callable[[Structure, int, Machine, bool], float]
WAYS: dict[str, tuple[Refusal, Way]] = {
    "pair": (refuses_pair, pair),
    "bottleneck": (refuses_bottleneck, bottleneck),
    "cluster": (refuses_cluster, cluster),
    "tiles": (refuses_tiles, tiles),
    "rows": (refuses_rows, measured("rows")),
    "columns": (refuses_columns, measured("columns")),
    "blocked": (refuses_blocked, measured("blocked")),
    "turned": (refuses_blocked, measured("turned")),
    "native": (refuses_native, measured("native")),
    "chain": (refuses_chain, chain),
    "reference": (refuses_nothing, reference),
    "materialised": (refuses_nothing, materialised),
}
"""By the names of the kernels (`einlinear.kernels.KERNELS`)."""


def on_cpu(here: Machine) -> bool:
    return here in (CPU, CPU_HALF)


def _steps(structure: Structure) -> list[tuple[int, int, int, int, int, int]]:
    """Of each step slices, outputs and inputs of a matrix, what it is repeated over, features before and after."""
    return [
        (*shape, structure.size(step.passive), structure.size(step.state), structure.size(step.result))
        for step, shape in zip(structure.steps, structure.matrix_shapes, strict=True)
    ]


def _rate(here: Machine, made: int, summed: int) -> float:
    """Of a batched matmul."""
    return min(0.7 * here.matmul, here.narrow * math.sqrt(made * summed))


def _latency(here: Machine, made: int, summed: int) -> float:
    """Of a sum that one program goes through in steps; fewer programs, where little is made, share it out."""
    return 0.0 if here.bytes == 4 else summed * (0.7e-9 if made <= 256 else 0.35e-9)
