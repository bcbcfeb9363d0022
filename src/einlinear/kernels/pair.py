"""Two block-diagonal factors in one launch: for a few tokens, and for layers small enough that a tile's state fits.

Between two launches the state of a layer goes through memory, and each launch costs 1 to 3 microseconds.
Where there are few tokens, every program makes anew what it reads of the state. In small layers, a
tile of tokens with its whole state fits into one multiprocessor (docs/kernels.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.chain import Tiles, chain_of
from einlinear.kernels.kernel import CPU, Runner, Target
from einlinear.kernels.stage import Launch, add_partials, gradients, launch_forward, padded, stage, tile
from einlinear.structure import Structure

INTO, OUT_OF = "mbk,bnk->bnm", "kbm,bnk->mbn"
"""The two stages, as contractions (`einlinear.kernels.stage.SPECS`)."""

FEW = 64
"""Tokens beyond which two ordinary launches are faster."""

AGAIN = 32768
"""Up to so many numbers of input each program makes all of the state that it reads."""

STATE, SUMS = 1024, 32768
"""The widest state that a tile holds, and the most weights whose gradients the registers of one program hold."""


class Pair(Tiles):
    """Two block-diagonal factors of small blocks, for a few tokens or in a small layer."""

    name: ClassVar = "pair"

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        if refusal := super().refuses(structure, target):
            return refusal
        if [(link.spec, link.tiled) for link in chain_of(structure)] != [(INTO, True), (OUT_OF, True)]:
            return "it takes two block-diagonal factors with a transposition between, both of small blocks"
        return None

    def cost(self, structure: Structure, tokens: int, target: Target = CPU) -> float:
        # Affine like all costs, one launch cheaper than Tiles and equal to it at FEW tokens.
        return super().cost(structure, tokens, target) + target.launch * (tokens / FEW - 1)

    def prepare(self, structure: Structure) -> Runner:
        return PairRunner(structure.matrix_shapes[0], structure.matrix_shapes[1])


@dataclass(frozen=True)
class PairRunner:
    """`pair` with factors of these shapes."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        first, second = factors
        added = [] if bias is None else [bias]
        made: Tensor = pair(x, [first.reshape(self.first)], [second.reshape(self.second)], added)[0]
        return made


@torch.library.custom_op("einlinear::pair", mutates_args=())
def pair(x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Layers of two block-diagonal factors with a transposition between, applied to the same input.

    Args:
        x: `[tokens, slices * in]`.
        firsts: of each layer, `[slices, rank * later slices, in]`.
        seconds: of each layer, `[later slices, out, slices * rank]`.
        biases: of each layer, `[later slices * out]`, or none at all.

    Returns:
        For each layer, `[tokens, later slices * out]`.
    """
    tokens = len(x)
    ys = [x.new_empty(tokens, second.shape[0], second.shape[1]) for second in seconds]
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.numel() <= AGAIN:
        _by_token(x, firsts, seconds, biases, ys)
    else:
        for p, (first, second, y) in enumerate(zip(firsts, seconds, ys, strict=True)):
            sizes, bias = Sizes.of(first, second), biases[p] if biases else None
            if sizes.state <= STATE:
                launch_tile(x, first, second, bias, y, tile_launch(sizes))
            else:
                _by_stages(x, first, second, bias, y)
    return [y.view(tokens, -1) for y in ys]


@pair.register_fake
def _(x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), second.shape[0] * second.shape[1]) for second in seconds]


@torch.library.custom_op("einlinear::pair_backward", mutates_args=())
def pair_backward(
    grads: Sequence[Tensor], x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], has_bias: bool
) -> list[Tensor]:
    """The gradient of `x`, then those of each layer's factors and, where there is one, bias."""
    if len(firsts) == 1 and Sizes.of(firsts[0], seconds[0]).sums <= SUMS:
        return launch_backward(grads[0], x, firsts[0], seconds[0], has_bias)
    return _backward_by_stages(grads, x, firsts, seconds, has_bias)


@pair_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], has_bias: bool
) -> list[Tensor]:
    made = [x.new_empty(x.shape)]
    for first, second in zip(firsts, seconds, strict=True):
        made += [first.new_empty(first.shape), second.new_empty(second.shape)]
        made += [x.new_empty(second.shape[0] * second.shape[1])] if has_bias else []
    return made


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, firsts, seconds, biases = inputs
    ctx.has_bias = len(biases) > 0
    ctx.save_for_backward(x, *firsts, *seconds)


def _backward(ctx, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, *factors = ctx.saved_tensors
    firsts, seconds = factors[: len(grads)], factors[len(grads) :]
    run = _backward_by_stages if torch.is_grad_enabled() else pair_backward
    dx, *rest = run(grads, x, firsts, seconds, ctx.has_bias)
    each = 3 if ctx.has_bias else 2
    return dx, rest[::each], rest[1::each], rest[2::each] if ctx.has_bias else []


pair.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.pair)
def _(x: list[int], firsts: list[list[int]], seconds: list[list[int]], *_: object, **__: object) -> int:
    return 2 * x[0] * sum(math.prod(factor) for factor in (*firsts, *seconds))


@register_flop_formula(torch.ops.einlinear.pair_backward)
def _(grads: object, x: list[int], firsts: list[list[int]], seconds: list[list[int]], *_: object, **__: object) -> int:
    return 2 * x[0] * sum(3 * math.prod(first) + 2 * math.prod(s) for first, s in zip(firsts, seconds, strict=True))


@dataclass(frozen=True)
class Sizes:
    """Of a layer in the letters of a BTT: factors `[g, (r f), a]` and `[f, e, (g r)]`."""

    g: int
    a: int
    r: int
    f: int
    e: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Sizes":
        (g, middle, a), (f, e, _) = first.shape, second.shape
        return cls(g, a, middle // f, f, e)

    @property
    def blocks(self) -> dict[str, int]:
        """The sides of tiles: powers of two, and what a product sums over at least 16."""
        r = 1 << (self.r - 1).bit_length()
        g, f = (max(1 << (size - 1).bit_length(), 16 // r) for size in (self.g, self.f))
        return {"BG": g, "BA": tile(self.a), "BR": r, "BF": f, "BE": tile(self.e)}

    @property
    def state(self) -> int:
        """The widest of input, state and output, as tiles hold them."""
        b = self.blocks
        return max(b["BG"] * b["BR"] * b["BF"], b["BG"] * b["BA"], b["BF"] * b["BE"])

    @property
    def sums(self) -> int:
        """The weights, as tiles hold them."""
        b = self.blocks
        return b["BG"] * b["BR"] * b["BF"] * (b["BA"] + b["BE"])

    @property
    def constants(self) -> dict[str, int]:
        return {"G": self.g, "A": self.a, "R": self.r, "F": self.f, "E": self.e, **self.blocks}


def tile_launch(sizes: Sizes) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    return Launch(tokens=32, warps=8, stages=1, resident=0)


def backward_launch(sizes: Sizes) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    return Launch(tokens=16, warps=8, stages=1, resident=1)


def launch_tile(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, y: Tensor, launch: Launch) -> None:
    """Fills `y`. A launch that keeps no programs `resident` has one for each tile."""
    from einlinear.kernels import tiles_pair

    tokens = len(x)
    splits, share = launch.splits(tokens, 1, x.device) if launch.resident else (-(-tokens // launch.tokens), 0)
    with torch.cuda.device_of(x):
        tiles_pair.pair_tile[(splits,)](
            x, first.contiguous(), second.contiguous(), bias, y, tokens, share, x.stride(0),
            **Sizes.of(first, second).constants, BLOCK_TOKENS=launch.tokens, HAS_BIAS=bias is not None,
            ONCE=not launch.resident, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def launch_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, has_bias: bool, launch: Launch | None = None
) -> list[Tensor]:
    """The gradients of `x`, both factors and, where there is one, the bias."""
    from einlinear.kernels import tiles_pair

    sizes, tokens = Sizes.of(first, second), len(x)
    launch = launch or backward_launch(sizes)
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad))
    splits, share = launch.splits(tokens, 1, x.device)
    dx = x.new_empty(x.shape)
    counts = (first.numel(), second.numel(), sizes.f * sizes.e if has_bias else 0)
    sums = [x.new_empty(splits, count, dtype=torch.float32) for count in counts]
    with torch.cuda.device_of(x):
        tiles_pair.pair_backward[(splits,)](
            grad, x, first.contiguous(), second.contiguous(), dx, *sums, tokens, share, x.stride(0), grad.stride(0),
            **sizes.constants, BLOCK_TOKENS=launch.tokens, HAS_BIAS=has_bias,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    dfirst, dsecond = add_partials(sums[0], first), add_partials(sums[1], second)
    made = [dx, dfirst.view(first.shape), dsecond.view(second.shape)]
    return [*made, add_partials(sums[2], x)] if has_bias else made


def _by_token(
    x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], biases: Sequence[Tensor], ys: Sequence[Tensor]
) -> None:
    from einlinear.kernels import tiles_pair

    sizes = [Sizes.of(first, second) for first, second in zip(firsts, seconds, strict=True)]
    g, a = sizes[0].g, sizes[0].a
    with torch.cuda.device_of(x):
        tiles_pair.pair_token[(max(size.f for size in sizes), len(x), len(sizes))](
            x, tuple(first.contiguous() for first in firsts), tuple(second.contiguous() for second in seconds),
            tuple(biases), tuple(ys), x.stride(0),
            G=g, A=a, RS=tuple(size.r for size in sizes), FS=tuple(size.f for size in sizes),
            ES=tuple(size.e for size in sizes), BLOCK_STATES=tuple(tile(g * size.r) for size in sizes), BA=tile(a),
            BES=tuple(tile(size.e) for size in sizes), num_warps=8,
        )  # fmt: skip


def _by_stages(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Two launches, of which the second loads its weights while the first still runs."""
    overlaps = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    tokens, launch = len(x), Launch(tokens=min(64, tile(len(x))), stages=1)
    z = x.new_empty(*first.shape[:2], padded(tokens))
    launch_forward(_blocks(x, first), [first], None, [z], INTO, tokens, launch, "leads" if overlaps else "")
    z = z.view(second.shape[2], second.shape[0], -1)
    launch_forward(z, [second], bias, [y], OUT_OF, tokens, launch, "follows" if overlaps else "")


def _backward_by_stages(
    grads: Sequence[Tensor], x: Tensor, firsts: Sequence[Tensor], seconds: Sequence[Tensor], has_bias: bool
) -> list[Tensor]:
    """The state is made again by the first stage; differentiable where gradients are recorded."""
    tokens, blocks = len(x), _blocks(x, firsts[0])
    dzs, rest = [], []
    for grad, z, second in zip(grads, stage(blocks, firsts, None, INTO, tokens), seconds, strict=True):
        later, out, state = second.shape
        made = gradients(
            [grad.reshape(tokens, later, out)], z.view(state, later, -1), [second], OUT_OF, tokens, has_bias
        )
        dzs.append(made[0].reshape(z.shape))
        rest.append(made[1:])
    dx, *dfirsts = gradients(dzs, blocks, firsts, INTO, tokens, False)
    return [dx.reshape(x.shape), *(t for dfirst, made in zip(dfirsts, rest, strict=True) for t in (dfirst, *made))]


def _blocks(x: Tensor, first: Tensor) -> Tensor:
    """`[tokens, slices, in]`."""
    return x.reshape(-1, first.shape[0], first.shape[2])
