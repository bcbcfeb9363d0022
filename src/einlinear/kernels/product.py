"""The matrix of two factors as one operator: where a dense matmul is fastest, making W must cost next to nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.stage import tile
from einlinear.structure import Axes, Structure

LARGEST_RANK = 16
"""Beyond, the products are many enough for matmuls."""

WARPS = 0


@dataclass(frozen=True)
class Product:
    """W `[(f e), (g a)]` as a sum over r: the sizes of f, e, g, a and r, and each factor's strides along them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def is_block(self) -> bool:
        """Whether the factors are `[g, (r f), a]` and `[f, e, (g r)]`, whose gradients one kernel makes."""
        f, e, g, a, r = self.sizes
        return self.strides == ((a, 0, r * f * a, 1, f * a), (e * g * r, g * r, r, 0, 1))


def product_of(structure: Structure) -> Product | None:
    """How W of two factors is a product, where it is one: no axis lies on both sides, and neither side has over two."""
    if len(structure.factors) != 2 or {*structure.x} & {*structure.y} or any(step.inner for step in structure.steps):
        return None
    shared = tuple(axis for axis in structure.sizes if axis not in (*structure.x, *structure.y))
    if max(len(structure.x), len(structure.y)) > 2 or len(shared) > 1 or structure.size(shared) > LARGEST_RANK:
        return None
    # An axis that is not there is one of size 1, the outer one.
    axes = [*_pair(structure.y), *_pair(structure.x), *(shared or ("",))]
    strides = tuple(tuple(_stride(structure, factor, axis) for axis in axes) for factor in structure.factors)
    f, e, g, a, r = (structure.sizes.get(axis, 1) for axis in axes)
    return Product((f, e, g, a, r), (strides[0], strides[1]))


@torch.library.custom_op("einlinear::product", mutates_args=())
def product(left: Tensor, right: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """`W[(f e), (g a)]`, the sum over r of `left` times `right`.

    Args:
        left: the first factor, contiguous.
        right: the second factor, contiguous.
        sizes: of f, e, g, a and r.
        strides: of `left` along f, e, g, a and r, then of `right`.
    """
    from einlinear.kernels import tiles_product

    f, e, g, a, r = sizes
    weight = left.new_empty(f * e, g * a)
    if Product(tuple(sizes), (tuple(strides[:5]), tuple(strides[5:]))).is_block:
        with torch.cuda.device_of(left):
            tiles_product.product_blocks[(g, f)](
                left.contiguous(), right.contiguous(), weight, g, a, r, f, e,
                BLOCK_A=tile(a), BLOCK_E=tile(e), BLOCK_R=tile(r), num_warps=WARPS or (4 if a * e > 2048 else 1),
            )  # fmt: skip
        return weight
    columns = min(128, tile(g * a))
    grid = (-(-(g * a) // columns), -(-(f * e) // 16))
    with torch.cuda.device_of(left):
        tiles_product.product_forward[grid](
            left.contiguous(), right.contiguous(), weight, f * e, g * a, r, e, a, *strides,
            BLOCK_ROWS=16, BLOCK_COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return weight


@product.register_fake
def _(left: Tensor, right: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    f, e, g, a, _ = sizes
    return left.new_empty(f * e, g * a)


@torch.library.custom_op("einlinear::product_backward", mutates_args=())
def product_backward(grad: Tensor, first: Tensor, second: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The gradients of factors `[g, (r f), a]` and `[f, e, (g r)]`."""
    from einlinear.kernels import tiles_product

    f, e, g, a, r = sizes
    dfirst, dsecond = first.new_empty(first.shape), second.new_empty(second.shape)
    with torch.cuda.device_of(grad):
        tiles_product.product_backward[(g, f)](
            grad.contiguous(), first.contiguous(), second.contiguous(), dfirst, dsecond, g, a, r, f, e,
            BLOCK_A=tile(a), BLOCK_E=tile(e), BLOCK_R=tile(r), num_warps=WARPS or (4 if a * e > 2048 else 1),
        )  # fmt: skip
    return dfirst, dsecond


@product_backward.register_fake
def _(grad: Tensor, first: Tensor, second: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), second.new_empty(second.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    left, right, ctx.sizes, ctx.strides = inputs
    ctx.save_for_backward(left, right)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    left, right = ctx.saved_tensors
    strides = tuple(ctx.strides[:5]), tuple(ctx.strides[5:])
    shape = Product(tuple(ctx.sizes), strides)
    if shape.is_block and not torch.is_grad_enabled():
        return *product_backward(grad, left, right, ctx.sizes), None, None
    # Each factor along the axes it has, then one contraction for each gradient.
    block = grad.reshape(shape.sizes[:4])
    names = ["".join(n for n, stride in zip("fegar", along, strict=True) if stride) for along in strides]
    views = [
        tensor.as_strided(
            [size for size, stride in zip(shape.sizes, along, strict=True) if stride],
            [stride for stride in along if stride],
        )
        for tensor, along in zip((left.contiguous(), right.contiguous()), strides, strict=True)
    ]
    made = []
    for mine, other in ((0, 1), (1, 0)):
        like, along = (left, right)[mine], strides[mine]
        order = [n for _, n in sorted(((s, n) for s, n in zip(along, "fegar", strict=True) if s), reverse=True)]
        kept = [n for n in order if n in "fega" or n in names[other]]
        found = torch.einsum(f"fega,{names[other]}->{''.join(kept)}", block, views[other])
        made.append(found.reshape(like.shape))
    return made[0], made[1], None, None


product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.product)
def _(left: list[int], right: list[int], sizes: list[int], *_: object, **__: object) -> int:
    return 2 * math.prod(sizes)


@register_flop_formula(torch.ops.einlinear.product_backward)
def _(grad: object, first: object, second: object, sizes: list[int], *_: object, **__: object) -> int:
    return 4 * math.prod(sizes)


def _pair(axes: Axes) -> tuple[str, str]:
    return (axes[0], axes[1]) if len(axes) == 2 else ("", axes[0])


def _stride(structure: Structure, factor: Axes, axis: str) -> int:
    """How far apart the entries of `axis` lie in a factor stored in its own order; 0 where it has no such axis."""
    return structure.size(factor[factor.index(axis) + 1 :]) if axis in factor else 0
