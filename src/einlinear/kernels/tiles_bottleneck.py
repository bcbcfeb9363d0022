"""Triton: two plain factors in one launch (`bottleneck.py`)."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import multiply, zeros


@triton.jit
def bottleneck_forward(
    x, first, second, bias, z, y, tokens, share, x_token, first_rank, first_in, second_out, second_rank,
    IN: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """z = first x and y = second z + bias, of a tile of tokens and `share` features of y; each program makes its z."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    begin = tl.program_id(1) * share
    ranks, ins, outs = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    there, real = token < tokens, ranks < RANK
    row = token.to(tl.int64)
    total = zeros(BLOCK_RANK, BLOCK_TOKENS)
    for start in range(0, IN, BLOCK_IN):
        at = start + ins
        inside = at < IN
        v = tl.load(x + row[:, None] * x_token + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            first + ranks[:, None] * first_rank + at[None, :] * first_in,
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(w, tl.trans(v), total, input_precision="ieee")
    state = total.to(x.dtype.element_ty)
    if begin == 0:
        into = z + row[None, :] * RANK + ranks[:, None]
        tl.store(into, state, mask=there[None, :] & real[:, None])
    for start in range(0, share, BLOCK_OUT):
        at = begin + start + outs
        inside = at < OUT
        where = second + at[:, None] * second_out + ranks[None, :] * second_rank
        w = tl.load(where, mask=inside[:, None] & real[None, :], other=0.0)
        made = multiply(w, state)
        if HAS_BIAS:
            made += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        into = y + row[:, None] * OUT + at[None, :]
        tl.store(into, tl.trans(made).to(y.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def bottleneck_weights(
    x, z, grad, dz, dfirst, dsecond, tokens, x_token, grad_token,
    IN: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The sums over tokens of grad[o] z[r], dsecond, by the first programs, and of dz[r] x[i], dfirst, by the rest."""
    tile, tiles = tl.program_id(0), tl.cdiv(OUT, BLOCK)
    if tile < tiles:
        add_up(
            grad, z, dsecond, tile * BLOCK, tokens, grad_token, RANK, 1, OUT, RANK, BLOCK, BLOCK_RANK, BLOCK_TOKENS
        )  # fmt: skip
    else:
        first = (tile - tiles) * BLOCK
        add_up(x, dz, dfirst, first, tokens, x_token, 1, IN, IN, RANK, BLOCK, BLOCK_RANK, BLOCK_TOKENS)


@triton.jit
def add_up(
    wide, narrow, result, first, tokens, wide_token, result_wide, result_narrow,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The sum over tokens of `wide`'s features from `first` on times `narrow`'s, in the order of the tokens."""
    features, ranks = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_RANK)
    inside, real = features < WIDTH, ranks < RANK
    total = zeros(BLOCK, BLOCK_RANK)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        there, row = token < tokens, token.to(tl.int64)
        a = tl.load(
            wide + row[:, None] * wide_token + features[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(narrow + row[:, None] * RANK + ranks[None, :], mask=there[:, None] & real[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    into = result + features[:, None] * result_wide + ranks[None, :] * result_narrow
    tl.store(into, total.to(result.dtype.element_ty), mask=inside[:, None] & real[None, :])
