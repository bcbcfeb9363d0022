"""A chain of matmuls by compiled C++ (native.cpp): forward, and all gradients, in one call each."""

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from einlinear.kernels.chain import Columns
from einlinear.kernels.chained import backward_work, chained, differentiable, work
from einlinear.kernels.kernel import Kernel, Runner
from einlinear.kernels.pairwise import plain
from einlinear.links import Link, chain_of
from einlinear.structure import Structure
from einlinear.toolchain import library

KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

MANY = 16
"""Tokens from which on their number has no bearing on the memory that a call needs."""

SHARED = 1 << 18
"""Multiplications of a thread below which it is not worth waking another."""


class Native(Kernel):
    """Tokens are rows and pass all factors a few at a time; what lies between is float32, in the nearest cache.

    Nothing is transposed but the factors, once in a call, and for a few tokens not those either.
    """

    name: ClassVar = "native"

    def prepare(self, structure: Structure) -> Runner:
        chain = chain_of(structure)
        specs, views = ";".join(link.spec for link in chain), tuple(size for link in chain for size in link.view)
        maps = _maps(specs, views, tuple(link.weight for link in chain), structure.size(structure.x))
        return NativeRunner(chain, specs, views, maps, structure.size(structure.y), Columns().prepare(structure))


@dataclass(frozen=True)
class NativeRunner:
    """`specs`, `views` and `width` are what the operator takes; `otherwise` serves numbers that it does not know."""

    links: tuple[Link, ...]
    specs: str
    views: tuple[int, ...]
    maps: bytes
    width: int
    otherwise: Runner

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype, leaves = x.dtype, (x, *factors) if bias is None else (x, *factors, bias)
        if dtype not in KINDS or not all([_plain(leaf, dtype) for leaf in leaves]):
            return self.otherwise(factors, x, bias)
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        if watched or any([leaf.is_neg() for leaf in leaves]):
            weights = [factor.reshape(link.weight) for link, factor in zip(self.links, factors, strict=True)]
            y: Tensor = native(x, weights, bias, self.specs, self.views, self.width)
            return y
        if library() is None:
            return self.otherwise(factors, x, bias)
        if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):
            return _Recorded.apply(x, bias, self, *factors)  # type: ignore[no-any-return, no-untyped-call]
        return _forward(x, factors, bias, self.maps, self.width)


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether its numbers lie in this process's memory, as torch's own tensors have them (not sharded, say)."""
    kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and tensor.is_cpu and tensor.dtype == dtype


class _Recorded(torch.autograd.Function):
    """The operator without its dispatch, which takes as long as a hundred tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, run: NativeRunner, *factors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        ctx.save_for_backward(x, *factors)
        ctx.run = run
        return _forward(x, factors, bias, run.maps, run.width)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        x, *factors = ctx.saved_tensors
        run, (needs_x, needs_bias, _, *needs) = ctx.run, ctx.needs_input_grad
        dbias = grad.sum(0) if needs_bias else None
        if torch.is_grad_enabled():  # what is compiled has no derivative
            weights = [factor.reshape(link.weight) for link, factor in zip(run.links, factors, strict=True)]
            dx, *made = differentiable(grad, x, weights, chained(run.specs, run.views))
            dfactors = [dweight.reshape(factor.shape) for dweight, factor in zip(made, factors, strict=True)]
        elif _batched(grad):
            with torch.enable_grad():
                own = [tensor.detach().requires_grad_() for tensor in (x, *factors)]
                dx, *dfactors = torch.autograd.grad(run.otherwise(own[1:], own[0]), own, grad)
        else:
            dx, *dfactors = _backward(grad, x, factors, run.maps, (needs_x, *needs))
        return dx if needs_x else None, dbias, None, *(g if n else None for g, n in zip(dfactors, needs, strict=True))


def _batched(tensor: Tensor) -> bool:
    """Whether it stands for many, in a `vmap` or in `torch.autograd.grad(..., is_grads_batched=True)`."""
    try:
        tensor.data_ptr()
    except RuntimeError:  # the two kinds of vmap have no other sign in common
        return True
    return False


def _forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, maps: bytes, width: int) -> Tensor:
    tokens, compiled = x.shape[0], library()
    y = x.new_empty(tokens, width)
    if not tokens:
        return y
    assert compiled is not None
    x, weights = _rows(x), [weight.contiguous() for weight in weights]
    if bias is not None:
        bias = bias.contiguous()
    threads, plan = _threads(tokens, weights), _plan(maps, len(weights)) if x.dtype == torch.bfloat16 else None
    getattr(compiled, f"einlinear_forward_{KINDS[x.dtype]}")(
        len(weights), maps, _addresses(weights), x.data_ptr(), x.stride(0), None if bias is None else bias.data_ptr(),
        y.data_ptr(), tokens, threads, _memory("forward", maps, len(weights), tokens, threads, plan), plan,
    )  # fmt: skip
    return y


def _backward(grad: Tensor, x: Tensor, weights: Sequence[Tensor], maps: bytes, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of `x` and of each weight, where `needs` says so; empty ones elsewhere."""
    compiled = library()
    assert compiled is not None
    made = [
        torch.empty_like(like, memory_format=torch.contiguous_format) if needed else like.new_empty(0)
        for like, needed in zip((x, *weights), needs, strict=True)
    ]
    if not len(x):
        return [gradient.zero_() for gradient in made]
    grad, x, weights = _rows(grad), _rows(x), [weight.contiguous() for weight in weights]
    threads, plan = _threads(len(x), weights), _plan(maps, len(weights)) if x.dtype == torch.bfloat16 else None
    getattr(compiled, f"einlinear_backward_{KINDS[x.dtype]}")(
        len(weights), maps, _addresses(weights), x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0),
        made[0].data_ptr() if needs[0] else None, _addresses(made[1:]), len(x), threads,
        _memory("backward", maps, len(weights), len(x), threads, plan), plan,
    )  # fmt: skip
    return made


def _rows(tokens: Tensor) -> Tensor:
    """Each row's numbers next to each other."""
    return tokens if tokens.stride(1) == 1 or tokens.shape[1] == 1 else tokens.contiguous()


def _addresses(tensors: Sequence[Tensor]) -> bytes:
    """Null where there is nothing."""
    return struct.pack(f"{len(tensors)}P", *(tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors))


def _threads(tokens: int, weights: Sequence[Tensor]) -> int:
    threads = torch.get_num_threads()
    return threads if threads == 1 else min(threads, 1 + tokens * sum(map(Tensor.numel, weights)) // SHARED)


_KEPT = threading.local()


def _memory(mode: str, maps: bytes, count: int, tokens: int, threads: int, plan: bytes | None) -> int:
    """The address of memory that this thread keeps for its next call: new pages take as long as all else."""
    size = _size(mode, maps, count, min(tokens, MANY), threads, plan)
    kept: Tensor | None = vars(_KEPT).get("memory")
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _KEPT.memory = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept.data_ptr()


@lru_cache(maxsize=4096)
def _size(mode: str, maps: bytes, count: int, tokens: int, threads: int, plan: bytes | None) -> int:
    size: int = getattr(library(), f"einlinear_{mode}_memory")(count, maps, tokens, threads, plan)
    return size


@lru_cache(maxsize=4096)
def _plan(maps: bytes, count: int) -> bytes | None:
    """How a chain goes by instructions that multiply pairs of bfloat16, or None where it does not."""
    compiled = library()
    assert compiled is not None
    if not (size := compiled.einlinear_plan(count, maps, None)):
        return None
    found = ctypes.create_string_buffer(size)
    compiled.einlinear_plan(count, maps, found)
    return found.raw


@lru_cache(maxsize=4096)
def _maps(specs: str, views: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], width: int) -> bytes:
    """What native.cpp knows of each link; `width` are the features of the input."""
    numbers: list[int] = []
    for (view, spec), (*slices, made, summed) in zip(chained(specs, views), shapes, strict=True):
        inner = view[-1] if spec == "bkq,nk->bnq" else 1
        parts = width // (summed * inner)
        numbers += [parts, made, summed, spec.startswith("kb"), not slices and parts * inner > 1, inner]
        width = parts * made * inner
    return struct.pack(f"{len(numbers)}q", *numbers)


def _shapes(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(weight.shape) for weight in weights)


# As an operator, for torch.compile and whatever else looks at operators.


@torch.library.custom_op("einlinear::native", mutates_args=())
def native(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, specs: str, views: Sequence[int], width: int
) -> Tensor:
    """Applies a chain (`einlinear.links`) to `x`, `[tokens, d_in]`, and adds `bias`, `[width]`.

    Args:
        x: any strides.
        weights: of the links' shapes.
        bias: or None.
        specs: of the links, parted by semicolons.
        views: of the links, one after the other.
        width: features of the output.

    Returns:
        `[tokens, width]`, contiguous.
    """
    if library() is not None and x.dtype in KINDS:
        return _forward(x, weights, bias, _maps(specs, tuple(views), _shapes(weights), x.shape[1]), width)
    state = x
    for weight, (view, spec) in zip(weights, chained(specs, views), strict=True):
        state = plain(state.reshape(view), weight, spec)
    state = state.reshape(-1, width).clone(memory_format=torch.contiguous_format)
    return state if bias is None else state + bias


@native.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, specs: str, views: Sequence[int], width: int
) -> Tensor:
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("einlinear::native_backward", mutates_args=())
def native_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], specs: str, views: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of `x` and of each weight, where `needs` says so; empty ones elsewhere."""
    if library() is not None and x.dtype in KINDS:
        return _backward(grad, x, weights, _maps(specs, tuple(views), _shapes(weights), x.shape[1]), needs)
    found = differentiable(grad, x, weights, chained(specs, views))
    return [
        g.clone(memory_format=torch.contiguous_format) if needed else g.new_empty(0)
        for g, needed in zip(found, needs, strict=True)
    ]


@native_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], specs: str, views: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    return [like.new_empty(like.shape if needed else 0) for like, needed in zip((x, *weights), needs, strict=True)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, weights, bias, ctx.specs, ctx.views, _ = inputs
    ctx.has_bias, ctx.needs = bias is not None, [tensor.requires_grad for tensor in (x, *weights)]
    ctx.save_for_backward(x, *weights)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], Tensor | None, None, None, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    x, *weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # the operator has no derivative
        dx, *dweights = differentiable(grad, x, weights, chained(ctx.specs, ctx.views))
    else:
        dx, *dweights = native_backward(grad, x, weights, ctx.specs, ctx.views, ctx.needs)
    asked = [g if needed else None for g, needed in zip((dx, *dweights), ctx.needs, strict=True)]
    return asked[0], asked[1:], grad.sum(0) if ctx.has_bias else None, None, None, None


native.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.einlinear.native)
def _(x: list[int], weights: list[list[int]], *_: object, **__: object) -> int:
    return sum(work(x, weights))


@register_flop_formula(torch.ops.einlinear.native_backward)
def _(
    grad: object,
    x: list[int],
    weights: list[list[int]],
    specs: object,
    views: object,
    needs: list[bool],
    *_: object,
    **__: object,
) -> int:
    return backward_work(x, weights, needs)
