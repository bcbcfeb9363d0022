"""One block-diagonal stage as an operator: the forward is one kernel, the backward one pass for all gradients.

Stock batched matmuls leave most of the GPU idle in a weight gradient, whose few output tiles each
sum over all tokens. Here that sum is split over programs, which make the input's gradient from the
same tiles on the way (docs/kernels.md), and the partial sums are added in a fixed order:
results do not vary between runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.launches import tile as tile


@dataclass(frozen=True)
class Launch:
    """Tokens of a tile, warps, pipeline stages, programs that share a multiprocessor, and tiles in a row of a slice."""

    tokens: int = 128
    warps: int = 4
    stages: int = 3
    resident: int = 2
    group: int = 1

    def splits(self, tokens: int, slices: int, device: torch.device) -> tuple[int, int]:
        """Into how many ranges the tokens are cut, and the tokens of each, so that no multiprocessor is long idle."""
        at_once = self.resident * multiprocessors(device)
        tiles = -(-tokens // self.tokens)
        # The time of a count: waves of programs, each as long as its range. Each range has a partial sum to add.
        ranges = min(
            range(1, max(1, min(tiles, 32)) + 1), key=lambda n: -(-slices * n // at_once) * -(-tiles // n) + 0.1 * n
        )
        share = max(1, -(-tiles // ranges)) * self.tokens
        return -(-tokens // share), share


@torch.library.custom_op("einlinear::stage", mutates_args=())
def stage(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, spec: str, tokens: int) -> list[Tensor]:
    """`torch.einsum(spec, x, weight)`, plus `bias`, for each weight; `x` is read once.

    A state with tokens innermost has `padded(tokens)` of them, so that its rows are aligned; the
    surplus ones are zero.

    Args:
        x: the state, `[tokens, slices, in]` or `[in, slices, padded tokens]` as `spec` says, any strides.
        weights: each `[slices, out, in]`, `out` and `in` at most `einlinear.links.LARGEST`.
        bias: `[slices * out]`; only with a single weight.
        spec: one of `STAGES`.
        tokens: how many there are.

    Returns:
        For each weight, `[slices, out, padded tokens]` or `[tokens, slices, out]`.
    """
    ys = [empty_state(x, weight, spec, tokens) for weight in weights]
    launch_forward(x, weights, bias, ys, spec, tokens, forward_launch(weights))
    return ys


@stage.register_fake
def _(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, spec: str, tokens: int) -> list[Tensor]:
    return [empty_state(x, weight, spec, tokens) for weight in weights]


@torch.library.custom_op("einlinear::stage_backward", mutates_args=())
def stage_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], spec: str, tokens: int, has_bias: bool
) -> list[Tensor]:
    """The gradients of `x`, of each weight and, where there is one, of the bias."""
    return launch_backward(grads, x, weights, spec, tokens, has_bias, backward_launch(weights))


@stage_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], spec: str, tokens: int, has_bias: bool
) -> list[Tensor]:
    dweights = [weight.new_empty(weight.shape) for weight in weights]
    slices, out, _ = weights[0].shape
    return [x.new_empty(x.shape), *dweights, *([x.new_empty(slices * out)] if has_bias else [])]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, weights, bias, ctx.spec, ctx.tokens = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *weights)


def gradients(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], spec: str, tokens: int, has_bias: bool
) -> list[Tensor]:
    """`stage_backward`, differentiable where gradients are recorded: the kernel has no derivative."""
    if not torch.is_grad_enabled():
        made: list[Tensor] = stage_backward(grads, x, weights, spec, tokens, has_bias)
        return made
    operands, names = spec.split("->")
    names_x, names_w = operands.split(",")
    v, grads = (narrow(x, names_x, tokens), [narrow(grad, names, tokens) for grad in grads])
    parts = [torch.einsum(f"{names},{names_w}->{names_x}", g, w) for g, w in zip(grads, weights, strict=True)]
    dx = torch.nn.functional.pad(sum(parts[1:], parts[0]), (0, x.shape[-1] - v.shape[-1]))
    dweights = [torch.einsum(f"{names_x},{names}->{names_w}", v, grad) for grad in grads]
    return [dx, *dweights, *([grads[0].sum(names.index("m")).flatten()] if has_bias else [])]


def _backward(ctx, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, *weights = ctx.saved_tensors
    dx, *dweights = gradients(grads, x, weights, ctx.spec, ctx.tokens, ctx.has_bias)
    return dx, dweights[: len(weights)], dweights[-1] if ctx.has_bias else None, None, None


stage.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.stage)
def _(x: list[int], weights: list[list[int]], bias: list[int] | None, spec: str, tokens: int, **_: object) -> int:
    return 2 * tokens * sum(math.prod(weight) for weight in weights)


@register_flop_formula(torch.ops.einlinear.stage_backward)
def _(grads: object, x: object, weights: list[list[int]], spec: str, tokens: int, *_: object, **__: object) -> int:
    return 4 * tokens * sum(math.prod(weight) for weight in weights)


def launch_forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, ys: Sequence[Tensor], spec: str, tokens: int,
    launch: Launch, overlap: str = "",
) -> None:  # fmt: skip
    """Fills `ys`. Of two launches that may overlap, one `"leads"` and the next one `"follows"`."""
    from einlinear.kernels import tiles  # needs Triton, which only those need who have a GPU

    if any(x.dtype != weight.dtype for weight in weights):
        raise ValueError(f"cannot apply factors of {weights[0].dtype} to an input of {x.dtype}: convert one of the two")
    outs, (slices, _, width) = [weight.shape[1] for weight in weights], weights[0].shape
    y_strides = [_strides(y, spec[-3:]) for y in ys]
    count = -(-tokens // launch.tokens)
    with torch.cuda.device_of(x):
        tiles.stage_forward[(slices, count)](
            x, tuple(weight.contiguous() for weight in weights), bias, tuple(ys),
            _length(x, spec[:3], tokens), _length(ys[0], spec[-3:], tokens),
            *_strides(x, spec[:3]), tuple(slice_ for slice_, _, _ in y_strides), *y_strides[0][1:],
            OUTS=tuple(outs), IN=width, BLOCK_OUTS=tuple(map(tile, outs)), BLOCK_IN=tile(width),
            BLOCK_TOKENS=launch.tokens, X_MINOR=spec[2] == "m", Y_MINOR=spec[-1] == "m", HAS_BIAS=bias is not None,
            LEADS=overlap == "leads", FOLLOWS=overlap == "follows", GROUP=1 if count % launch.group else launch.group,
            num_warps=launch.warps, num_stages=launch.stages, launch_pdl=overlap == "follows",
        )  # fmt: skip


def launch_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], spec: str, tokens: int, has_bias: bool,
    launch: Launch,
) -> list[Tensor]:  # fmt: skip
    """The gradients of `x`, of each weight and, where there is one, of the bias."""
    from einlinear.kernels import tiles

    outs, (slices, _, width) = [weight.shape[1] for weight in weights], weights[0].shape
    dx = x.new_empty(x.shape)
    splits, share = launch.splits(tokens, slices, x.device)
    dweights = [empty_partials(splits, weight, weight.numel()) for weight in weights]
    dbias = empty_partials(splits, x, slices * outs[0] if has_bias else 0)
    strides = [_strides(grad, spec[-3:]) for grad in grads]
    with torch.cuda.device_of(x):
        tiles.stage_backward[(slices, splits)](
            tuple(grads), x, tuple(weight.contiguous() for weight in weights), dx, tuple(dweights), dbias,
            _length(x, spec[:3], tokens), _length(grads[0], spec[-3:], tokens), share,
            *_strides(x, spec[:3]), *_strides(dx, spec[:3]), *(tuple(kind) for kind in zip(*strides, strict=True)),
            OUTS=tuple(outs), IN=width, BLOCK_OUTS=tuple(map(tile, outs)), BLOCK_IN=tile(width),
            BLOCK_TOKENS=launch.tokens, X_MINOR=spec[2] == "m", Y_MINOR=spec[-1] == "m", HAS_BIAS=has_bias,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    sums = [add_partials(part, weight).view(weight.shape) for part, weight in zip(dweights, weights, strict=True)]
    return [dx, *sums, *([add_partials(dbias, x)] if has_bias else [])]


def empty_partials(splits: int, like: Tensor, count: int) -> Tensor:
    """Memory for so many partial sums; a single one is the sum, in `like`'s type."""
    return like.new_empty(splits, count, dtype=like.dtype if splits == 1 else torch.float32)


def add_partials(partials: Tensor, like: Tensor) -> Tensor:
    """The sum over the first dimension, in `like`'s type."""
    from einlinear.kernels import tiles

    splits, count = partials.shape
    if splits == 1:
        return partials[0].to(like.dtype)
    result = like.new_empty(count)
    with torch.cuda.device_of(like):
        tiles.add_partials[(-(-count // 1024),)](partials, result, count, SPLITS=splits, BLOCK=1024, num_warps=8)
    return result


def empty_state(x: Tensor, weight: Tensor, spec: str, tokens: int) -> Tensor:
    """Memory for the result of a stage."""
    size = {"m": padded(tokens) if spec[-1] == "m" else tokens, "b": weight.shape[0], "n": weight.shape[1]}
    return x.new_empty([size[name] for name in spec[-3:]])


def padded(tokens: int) -> int:
    """The tokens of a state that has them innermost: rows then begin at multiples of 32 bytes.

    On an H200, 16383 tokens in rows of their own took 2 to 7 times as long as 16384 (benchmarks/NOTES.md).
    """
    return -(-tokens // 16) * 16


def narrow(state: Tensor, names: str, tokens: int) -> Tensor:
    """`state` without surplus tokens; `names` are the letters of its dimensions."""
    return state[..., :tokens] if names[-1] == "m" and state.shape[-1] != tokens else state


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shares(weights: Sequence[Tensor]) -> bool:
    """Whether one stage may apply all of them: their gradients are summed in the registers of one program."""
    (slices, _, width), outs = weights[0].shape, [weight.shape[1] for weight in weights]
    if any(weight.shape[0] != slices or weight.shape[2] != width for weight in weights):
        return False
    return len(weights) == 1 or sum(map(tile, outs)) * tile(width) <= 128 * 128


def forward_launch(weights: Sequence[Tensor]) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    return Launch(tokens=64 if max(weight.shape[1] for weight in weights) > 64 else 128)


def backward_launch(weights: Sequence[Tensor]) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    out, width = sum(tile(weight.shape[1]) for weight in weights), tile(weights[0].shape[2])
    return Launch(tokens=128 if out + width <= 192 else 64, warps=4 if max(out, width) <= 32 else 8)


def _length(state: Tensor, names: str, tokens: int) -> int:
    """The tokens that a state holds, with tokens innermost the surplus ones too: masks then end on aligned numbers."""
    return state.shape[-1] if names[-1] == "m" else tokens


def _strides(state: Tensor, names: str) -> tuple[int, int, int]:
    """The strides of slices, features and tokens; `names` are the letters of the state's dimensions."""
    slices, tokens = names.index("b"), names.index("m")
    return state.stride(slices), state.stride(3 - slices - tokens), state.stride(tokens)
