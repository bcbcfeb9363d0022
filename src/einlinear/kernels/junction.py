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

from einlinear.kernels.chain import Link, aligned, links
from einlinear.kernels.stage import Launch, add_partials, tile
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
}
"""The activations that a junction knows, by name."""


@torch.library.custom_op("einlinear::junction", mutates_args=())
def junction(z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str) -> Tensor:
    """`down[s] @ activation(up[s] @ z[:, s] + bias[s])` for every slice s.

    Args:
        z: `[in, slices, tokens]`.
        up: `[slices, hidden, in]`.
        bias: `[slices * hidden]`.
        down: `[slices, out, hidden]`.
        activation: one of `ACTIVATIONS`.

    Returns:
        `[slices, out, tokens]`.
    """
    return launch_forward(z, up, bias, down, activation, forward_launch(up, down))


@junction.register_fake
def _(z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str) -> Tensor:
    return z.new_empty(*down.shape[:2], z.shape[-1])


@torch.library.custom_op("einlinear::junction_backward", mutates_args=())
def junction_backward(
    grad: Tensor, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `z`, `up`, the bias (empty where there is none) and `down`."""
    return launch_backward(grad, z, up, bias, down, activation, backward_launch(up, down))


@junction_backward.register_fake
def _(
    grad: Tensor, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape),
        torch.empty_like(up),
        up.new_empty(0 if bias is None else len(bias)),
        torch.empty_like(down),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    z, up, bias, down, ctx.activation = inputs
    ctx.save_for_backward(z, up, bias, down)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    z, up, bias, down = ctx.saved_tensors
    dz, dup, dbias, ddown = junction_backward(grad, z, up, bias, down, ctx.activation)
    return dz, dup, None if bias is None else dbias, ddown, None


junction.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.junction)
def _(z: list[int], up: list[int], bias: list[int] | None, down: list[int], activation: str, **_: object) -> int:
    return 2 * z[-1] * (math.prod(up) + math.prod(down))


@register_flop_formula(torch.ops.einlinear.junction_backward)
def _(grad: list[int], z: list[int], up: list[int], bias: object, down: list[int], *_: object, **__: object) -> int:
    return 2 * z[-1] * (3 * math.prod(up) + 2 * math.prod(down))


@dataclass(frozen=True)
class Nested:
    """Two layers of two factors each whose blocks nest, around an activation: three kernels."""

    up: tuple[Link, Link]
    down: tuple[Link, Link]
    activation: str

    def __call__(
        self,
        factors: Sequence[Tensor],
        x: Tensor,
        hidden_bias: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Applies both layers, whose four factors come in the order of use, to `x`, `[..., d_in]`."""
        into, hidden = self.up
        onward, out = self.down
        first, second, third, fourth = factors
        tokens = x.reshape(-1, x.shape[-1])
        padded = aligned(tokens)
        state = into(padded, first, tiled=into.tiled).reshape(hidden.view)
        state = junction(
            state, second.reshape(hidden.weight), hidden_bias, third.reshape(onward.weight), self.activation
        )
        y = out(state, fourth, bias, tiled=out.tiled)
        y = y if padded is tokens else y[: tokens.shape[0]]
        return y.reshape(*x.shape[:-1], -1)


def nest(up: Structure, down: Structure, activation: str) -> Nested | str:
    """How two canonical structures run as one around an activation, or why they cannot."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if up.pad_in or up.pad_out or down.pad_in or down.pad_out:
        return "a width is padded"
    pair = []
    for structure in (up, down):
        chain = links(structure)
        if isinstance(chain, str):
            return f"{structure}: {chain}"
        if [link.spec for link in chain] != ["mbk,bnk->bnm", "kbm,bnk->mbn"]:
            return f"{structure} is not made of two block-diagonal factors"
        pair.append((chain[0], chain[1]))
    (slices, hidden, width), (blocks, out, block) = pair[0][1].weight, pair[1][0].weight
    if (slices, hidden) != (blocks, block):
        return (
            f"the first layer makes {slices} blocks of {hidden} hidden features, the second reads {blocks} of {block}"
        )
    if not fits(hidden, width, out):
        return f"blocks of {width} -> {hidden} -> {out} features are too large, or too small, for one program"
    return Nested(pair[0], pair[1], activation)


def launch_forward(
    z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str, launch: Launch, hidden: int = 128
) -> Tensor:
    """The result, `hidden` features at a time."""
    from einlinear.kernels import tiles

    y = z.new_empty(*down.shape[:2], z.shape[-1])
    slices = len(up)
    splits, share = launch.splits(z.shape[-1], slices, z.device)
    with torch.cuda.device_of(z):
        tiles.junction_forward[(slices, splits)](
            z, up.contiguous(), bias, down.contiguous(), y,
            z.shape[-1], share, slices, z.stride(0), z.stride(1), y.stride(0), y.stride(1),
            **_tiles(up, down, hidden, launch), ACTIVATION=activation, HAS_BIAS=bias is not None,
        )  # fmt: skip
    return y


def launch_backward(
    grad: Tensor, z: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, activation: str, launch: Launch,
    hidden: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `z`, `up`, bias and `down`."""
    from einlinear.kernels import tiles

    dz = z.new_empty(z.shape)
    slices, tokens = len(up), z.shape[-1]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    splits, share = launch.splits(tokens, slices, z.device)
    dup = up.new_empty(splits, up.numel(), dtype=torch.float32)
    ddown = up.new_empty(splits, down.numel(), dtype=torch.float32)
    dbias = up.new_empty(splits, 0 if bias is None else len(bias), dtype=torch.float32)
    with torch.cuda.device_of(z):
        tiles.junction_backward[(slices, splits)](
            grad, z, up.contiguous(), bias, down.contiguous(), dz, dup, dbias, ddown,
            tokens, share, slices, z.stride(0), z.stride(1), dz.stride(0), dz.stride(1), grad.stride(0), grad.stride(1),
            **_tiles(up, down, hidden, launch), ACTIVATION=activation, HAS_BIAS=bias is not None,
        )  # fmt: skip
    return dz, add_partials(dup, up).view(up.shape), add_partials(dbias, up), add_partials(ddown, down).view(down.shape)


def fits(hidden: int, width: int, out: int) -> bool:
    """Whether a junction takes blocks of this size: their gradients are summed in the registers of one program."""
    return min(hidden, width, out) >= 8 and tile(hidden) * (tile(width) + tile(out)) <= 256 * 128


def forward_launch(up: Tensor, down: Tensor) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    return Launch(tokens=64 if _size(up, down) > 128 * 128 else 128, resident=4)


def backward_launch(up: Tensor, down: Tensor) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    if _size(up, down) <= 128 * 64:
        return Launch(tokens=64)
    return Launch(tokens=128, warps=8, stages=3 if _size(up, down) <= 128 * 128 else 2, resident=1)


def _size(up: Tensor, down: Tensor) -> int:
    """The weights that one program holds."""
    return tile(up.shape[1]) * (tile(up.shape[2]) + tile(down.shape[1]))


def _tiles(up: Tensor, down: Tensor, hidden: int, launch: Launch) -> dict[str, int]:
    (_, middle, width), out = up.shape, down.shape[1]
    return {
        "IN": width, "HIDDEN": middle, "OUT": out,
        "BLOCK_IN": tile(width), "BLOCK_HIDDEN": min(hidden, tile(middle)), "BLOCK_OUT": tile(out),
        "BLOCK_TOKENS": launch.tokens, "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
