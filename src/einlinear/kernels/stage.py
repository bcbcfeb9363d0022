"""One block-diagonal stage as an operator: the forward is one kernel, the backward one pass for all gradients.

Stock batched matmuls leave most of the GPU idle in a weight gradient, whose few output tiles each
sum over all tokens. Here that sum is split over programs, which make the input's gradient from the
same tiles on the way (docs/kernels.md), and the partial sums are added in a fixed order:
results do not vary between runs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SPECS = ("mbk,bnk->bnm", "kbm,bnk->mbn", "kbm,bnk->bnm", "mbk,bnk->mbn")
"""The contractions that are stages: of tokens m, slices b, summed features k and new ones n."""

LARGEST = 128
"""The side of the largest block: its gradient is summed in the registers of one program."""


@dataclass(frozen=True)
class Launch:
    """Tokens of a tile, warps, pipeline stages, and programs that share a multiprocessor."""

    tokens: int = 128
    warps: int = 4
    stages: int = 3
    resident: int = 2

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
def stage(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    """`torch.einsum(spec, x, weight)`, plus `bias`, for one of `SPECS`.

    Args:
        x: the state, `[tokens, slices, in]` or `[in, slices, tokens]` as `spec` says, any strides.
        weight: `[slices, out, in]`, `out` and `in` at most `LARGEST`.
        bias: `[slices * out]`.
        spec: one of `SPECS`.

    Returns:
        `[slices, out, tokens]` or `[tokens, slices, out]`.
    """
    y = empty_state(x, weight, spec)
    return launch_forward(x, weight, bias, y, spec, forward_launch(weight))


@stage.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str) -> Tensor:
    return empty_state(x, weight, spec)


@torch.library.custom_op("einlinear::stage_backward", mutates_args=())
def stage_backward(grad: Tensor, x: Tensor, weight: Tensor, spec: str, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight` and, where there is one, the bias."""
    return launch_backward(grad, x, weight, spec, has_bias, backward_launch(weight))


@stage_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, spec: str, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    slices, out, _ = weight.shape
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(slices * out if has_bias else 0)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, weight, bias, ctx.spec = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, spec: str, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`stage_backward`, differentiable where gradients are recorded: the kernel has no derivative."""
    if not torch.is_grad_enabled():
        made: tuple[Tensor, Tensor, Tensor] = stage_backward(grad, x, weight, spec, has_bias)
        return made
    operands, names = spec.split("->")
    names_x, names_w = operands.split(",")
    dx = torch.einsum(f"{names},{names_w}->{names_x}", grad, weight)
    dw = torch.einsum(f"{names_x},{names}->{names_w}", x, grad)
    return dx, dw, grad.sum(names.index("m")).flatten()


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, weight = ctx.saved_tensors
    dx, dw, db = gradients(grad, x, weight, ctx.spec, ctx.has_bias)
    return dx, dw, db if ctx.has_bias else None, None


stage.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.stage)
def _(x: list[int], weight: list[int], bias: list[int] | None, spec: str, **_: object) -> int:
    return 2 * math.prod(weight) * x[spec.index("m")]


@register_flop_formula(torch.ops.einlinear.stage_backward)
def _(grad: list[int], x: list[int], weight: list[int], spec: str, has_bias: bool, **_: object) -> int:
    return 4 * math.prod(weight) * x[spec.index("m")]


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, spec: str, launch: Launch, overlap: str = ""
) -> Tensor:
    """Fills `y`. Of two launches that may overlap, one `"leads"` and the next one `"follows"`."""
    from einlinear.kernels import tiles  # needs Triton, which only those need who have a GPU

    if x.dtype != weight.dtype:
        raise ValueError(f"cannot apply factors of {weight.dtype} to an input of {x.dtype}: convert one of the two")
    slices, out, width = weight.shape
    tokens = x.shape[spec.index("m")]
    with torch.cuda.device_of(x):
        tiles.stage_forward[(slices, -(-tokens // launch.tokens))](
            x, weight.contiguous(), bias, y, tokens, *_strides(x, spec[:3]), *_strides(y, spec[-3:]),
            OUT=out, IN=width, BLOCK_OUT=tile(out), BLOCK_IN=tile(width), BLOCK_TOKENS=launch.tokens,
            X_MINOR=spec[2] == "m", Y_MINOR=spec[-1] == "m", HAS_BIAS=bias is not None,
            LEADS=overlap == "leads", FOLLOWS=overlap == "follows",
            num_warps=launch.warps, num_stages=launch.stages, launch_pdl=overlap == "follows",
        )  # fmt: skip
    return y


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, spec: str, has_bias: bool, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight` and bias."""
    from einlinear.kernels import tiles

    slices, out, width = weight.shape
    tokens = x.shape[spec.index("m")]
    dx = x.new_empty(x.shape)
    splits, share = launch.splits(tokens, slices, x.device)
    dweight = weight.new_empty(splits, slices * out * width, dtype=torch.float32)
    dbias = weight.new_empty(splits, slices * out if has_bias else 0, dtype=torch.float32)
    with torch.cuda.device_of(x):
        tiles.stage_backward[(slices, splits)](
            grad, x, weight.contiguous(), dx, dweight, dbias,
            tokens, share, *_strides(x, spec[:3]), *_strides(dx, spec[:3]), *_strides(grad, spec[-3:]),
            OUT=out, IN=width, BLOCK_OUT=tile(out), BLOCK_IN=tile(width), BLOCK_TOKENS=launch.tokens,
            X_MINOR=spec[2] == "m", Y_MINOR=spec[-1] == "m", HAS_BIAS=has_bias,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return dx, add_partials(dweight, weight).view(weight.shape), add_partials(dbias, weight)


def add_partials(partials: Tensor, like: Tensor) -> Tensor:
    """The sum over the first dimension, in `like`'s type."""
    from einlinear.kernels import tiles

    splits, count = partials.shape
    result = like.new_empty(count)
    if count:
        with torch.cuda.device_of(like):
            tiles.add_partials[(-(-count // 1024),)](partials, result, count, SPLITS=splits, BLOCK=1024, num_warps=8)
    return result


def empty_state(x: Tensor, weight: Tensor, spec: str) -> Tensor:
    """Memory for the result of a stage."""
    size = {"m": x.shape[spec.index("m")], "b": weight.shape[0], "n": weight.shape[1]}
    return x.new_empty([size[name] for name in spec[-3:]])


def tile(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, at least what the matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def fits(out: int, width: int) -> bool:
    """Whether a stage takes blocks of this size. Below 8 a tile would be mostly padding."""
    return min(out, width) >= 8 and max(out, width) <= LARGEST


def forward_launch(weight: Tensor) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    return Launch(tokens=64 if min(weight.shape[1:]) > 64 else 128)


def backward_launch(weight: Tensor) -> Launch:
    """The fastest of those measured (benchmarks/NOTES.md)."""
    out, width = weight.shape[1:]
    return Launch(tokens=128 if tile(out) + tile(width) <= 192 else 64, warps=4 if max(out, width) <= 32 else 8)


def _strides(state: Tensor, names: str) -> tuple[int, int, int]:
    """The strides of slices, features and tokens; `names` are the letters of the state's dimensions."""
    slices, tokens = names.index("b"), names.index("m")
    return state.stride(slices), state.stride(3 - slices - tokens), state.stride(tokens)
