"""Two stages with an activation between them as one operator: the wide hidden features stay on the chip.

The second factor of one layer, a pointwise activation and the first factor of the next layer are
local to a block where the blocks that the one makes are those that the other reads. An MLP's
hidden features, four times as wide as its input, then never reach memory (docs/kernels.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.chain import follow, through
from einlinear.kernels.stage import Launch, add_partials, empty_partials, tile
from einlinear.links import INTO, OUT_OF, Link, links
from einlinear.structure import Structure


def relu2(v: Tensor) -> Tensor:
    """Squared ReLU: as a product, whose derivative is three times as fast on a CPU as that of a power."""
    r = functional.relu(v)
    return r * r


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": functional.relu,
    "relu2": relu2,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
}
"""The activations that a junction knows, by name."""

CHEAP = ("identity", "relu", "relu2")
"""Those that take no exponential."""


@torch.library.custom_op("einlinear::junction", mutates_args=())
def junction(
    zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str
) -> Tensor:
    """`down[s] @ activation(up[s] @ z[:, s] + bias[s])` for every slice s.

    With a second z and up the hidden features are gated: those of the first are activated, and
    multiplied by those of the second.

    Args:
        zs: one or two, each `[in, slices, tokens]`.
        ups: as many, each `[slices, hidden, in]`.
        biases: none, or as many, each `[slices * hidden]`.
        down: `[slices, out, hidden]`.
        activation: one of `ACTIVATIONS`.

    Returns:
        `[slices, out, tokens]`.
    """
    return launch_forward(zs, ups, biases, down, activation, forward_launch(ups, down, activation))


@junction.register_fake
def _(zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str) -> Tensor:
    return zs[0].new_empty(*down.shape[:2], zs[0].shape[-1])


@torch.library.custom_op("einlinear::junction_backward", mutates_args=())
def junction_backward(
    grad: Tensor, zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str
) -> list[Tensor]:
    """The gradients of every z, up and bias, and of `down`."""
    launch = backward_launch(ups, biases, down, activation)
    return launch_backward(grad, zs, ups, biases, down, activation, launch)


@junction_backward.register_fake
def _(
    grad: Tensor, zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str
) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in (*zs, *ups, *biases, down)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    zs, ups, biases, down, ctx.activation = inputs
    ctx.parts, ctx.has_bias = len(zs), len(biases) > 0
    ctx.save_for_backward(*zs, *ups, *biases, down)


def _backward(ctx, grad: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    zs, ups, biases, (down,) = _split(ctx.saved_tensors, ctx.parts)
    made = junction_backward(grad, zs, ups, biases, down, ctx.activation)
    dzs, dups, dbiases, (ddown,) = _split(made, ctx.parts)
    return dzs, dups, dbiases, ddown, None


def _split(tensors: Sequence[Tensor], parts: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """What is there of every part, and the last one."""
    *each, last = tensors
    return each[:parts], each[parts : 2 * parts], each[2 * parts :], [last]


junction.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.junction)
def _(zs: list[list[int]], ups: list[list[int]], biases: object, down: list[int], *_: object, **__: object) -> int:
    return 2 * zs[0][-1] * (sum(map(math.prod, ups)) + math.prod(down))


@register_flop_formula(torch.ops.einlinear.junction_backward)
def _(
    grad: object, zs: list[list[int]], ups: list[list[int]], biases: object, down: list[int], *_: object, **__: object
) -> int:
    return 2 * zs[0][-1] * (3 * sum(map(math.prod, ups)) + 2 * math.prod(down))


@dataclass(frozen=True)
class Nested:
    """Layers of two factors each whose blocks nest, around an activation: three kernels.

    `up` are one layer, or the two of a gate.
    """

    up: tuple[tuple[Link, Link], ...]
    down: tuple[Link, Link]
    activation: str

    def __call__(
        self,
        ups: Sequence[Sequence[Tensor]],
        down: Sequence[Tensor],
        x: Tensor,
        hidden_biases: Sequence[Tensor] = (),
        bias: Tensor | None = None,
    ) -> Tensor:
        """Applies all layers, given by their pairs of factors, to `x`, `[..., d_in]`."""
        onward, out = self.down
        rows = x.reshape(-1, x.shape[-1])
        tokens = len(rows)
        states = through([into for into, _ in self.up], rows, [factors[0] for factors in ups])
        seconds = [factors[1].reshape(hidden.weight) for factors, (_, hidden) in zip(ups, self.up, strict=True)]
        states = [state.reshape(hidden.view) for state, (_, hidden) in zip(states, self.up, strict=True)]
        state = junction(states, seconds, list(hidden_biases), down[0].reshape(onward.weight), self.activation)
        width = math.prod(out.weight[:2])
        return follow(out, state, down[1], tokens, bias, out.tiled).reshape(*x.shape[:-1], width)


def nest(ups: Sequence[Structure], down: Structure, activation: str) -> Nested | str:
    """How canonical structures run as one around an activation, or why they cannot.

    Two of `ups` are a gate and what it multiplies.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    pairs: list[tuple[Link, Link]] = []
    for structure in (*ups, down):
        if structure.pad_in or structure.pad_out:
            return "a width is padded"
        chain = links(structure)
        if isinstance(chain, str):
            return f"{structure}: {chain}"
        if [link.spec for link in chain] != [INTO, OUT_OF]:
            return f"{structure} is not made of two block-diagonal factors"
        pairs.append((chain[0], chain[1]))
    *firsts, (onward, out) = pairs
    if len({hidden.weight for _, hidden in firsts}) > 1 or len({into.weight[::2] for into, _ in firsts}) > 1:
        return "the gate has other blocks than what it multiplies"
    (slices, hidden, width), (blocks, made, block) = firsts[0][1].weight, onward.weight
    if (slices, hidden) != (blocks, block):
        return (
            f"the first layer makes {slices} blocks of {hidden} hidden features, the second reads {blocks} of {block}"
        )
    if not fits(hidden, width * len(ups), made):
        return f"blocks of {width} -> {hidden} -> {made} features are too large, or too small, for one program"
    return Nested(tuple(firsts), (onward, out), activation)


def launch_forward(
    zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str,
    launch: Launch, hidden: int = 128,
) -> Tensor:  # fmt: skip
    """The result, `hidden` features at a time."""
    from einlinear.kernels import tiles_junction

    zs, tokens = _alike(zs), zs[0].shape[-1]
    y = zs[0].new_empty(*down.shape[:2], tokens)
    splits, share = launch.splits(tokens, len(down), down.device)
    with torch.cuda.device_of(down):
        tiles_junction.junction_forward[(len(down), splits)](
            tuple(zs), tuple(up.contiguous() for up in ups), tuple(biases), down.contiguous(), y,
            tokens, share, *zs[0].stride()[:2], *y.stride()[:2],
            **_tiles(ups, down, hidden, launch), ACTIVATION=activation, SHORT=down.element_size() == 2,
            HOLD_BIASES=_size(ups, down) > 128 * 128,
        )  # fmt: skip
    return y


def launch_backward(
    grad: Tensor, zs: Sequence[Tensor], ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str,
    launch: Launch, hidden: int = 64,
) -> list[Tensor]:  # fmt: skip
    """The gradients of every z, up and bias, and of `down`."""
    from einlinear.kernels import tiles_junction

    zs, tokens = _alike(zs), zs[0].shape[-1]
    dzs = [z.new_empty(z.shape) for z in zs]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    splits, share = launch.splits(tokens, len(down), down.device)
    dups = [empty_partials(splits, up, up.numel()) for up in ups]
    ddown = empty_partials(splits, down, down.numel())
    dbiases = [bias.new_zeros(splits, len(bias), dtype=torch.float32) for bias in biases]
    cheap = _cheap(ups, biases, activation)
    with torch.cuda.device_of(down):
        tiles_junction.junction_backward[(len(down), splits)](
            grad, tuple(zs), tuple(up.contiguous() for up in ups), tuple(biases), down.contiguous(),
            tuple(dzs), tuple(dups), tuple(dbiases), ddown,
            tokens, share, *zs[0].stride()[:2], *dzs[0].stride()[:2], *grad.stride()[:2],
            **_tiles(ups, down, hidden, launch), ACTIVATION=activation, SHORT=down.element_size() == 2,
            NARROW=not cheap, DOWN_LAST=cheap and _small(ups, down),
        )  # fmt: skip
    sums = zip((*dups, *dbiases, ddown), (*ups, *biases, down), strict=True)
    return [*dzs, *(add_partials(partial, like).view(like.shape) for partial, like in sums)]


def _alike(zs: Sequence[Tensor]) -> list[Tensor]:
    """States with the same strides, tokens innermost."""
    same = {z.stride() for z in zs}
    return list(zs) if len(same) == 1 and zs[0].stride(-1) == 1 else [z.contiguous() for z in zs]


def fits(hidden: int, width: int, out: int) -> bool:
    """Whether a junction takes blocks of this size: their gradients are summed in the registers of one program."""
    return min(hidden, width, out) >= 8 and tile(hidden) * (tile(width) + tile(out)) <= 256 * 128


def forward_launch(ups: Sequence[Tensor], down: Tensor, activation: str) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    cheap = len(ups) == 1 and activation in CHEAP and _size(ups, down) <= 128 * 128
    return Launch(tokens=128 if cheap else 64, resident=4)


def backward_launch(ups: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, activation: str) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    if _cheap(ups, biases, activation) and _small(ups, down):
        return Launch(tokens=64)
    small = len(ups) == 1 and _size(ups, down) <= 128 * 128
    return Launch(tokens=128, warps=8, stages=3 if small else 2, resident=1)


def _cheap(ups: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> bool:
    return len(ups) == 1 and activation in CHEAP and not biases


def _small(ups: Sequence[Tensor], down: Tensor) -> bool:
    return _size(ups, down) <= 128 * 64


def _size(ups: Sequence[Tensor], down: Tensor) -> int:
    """The weights that one program holds."""
    return tile(down.shape[2]) * (len(ups) * tile(ups[0].shape[2]) + tile(down.shape[1]))


def _tiles(ups: Sequence[Tensor], down: Tensor, hidden: int, launch: Launch) -> dict[str, int]:
    (_, middle, width), out = ups[0].shape, down.shape[1]
    return {
        "IN": width, "HIDDEN": middle, "OUT": out,
        "BLOCK_IN": tile(width), "BLOCK_HIDDEN": min(hidden, tile(middle)), "BLOCK_OUT": tile(out),
        "BLOCK_TOKENS": launch.tokens, "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
