"""Triton: two factors with few blocks in one launch (`bottleneck.py`)."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import multiply, zeros


@triton.jit
def fetch(base, NUMBERS: tl.constexpr):
    """Asks memory for this program's part of so many numbers of 16 bits, 64 to a line of the cache; waits for nothing.

    All programs together ask for all of a factor at once; each alone would wait for what it reads, step by step.
    """
    LINES: tl.constexpr = (NUMBERS + 63) // 64
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    share = tl.cdiv(LINES, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2))
    for start in range(0, share, 128):
        line = tl.minimum(program * share + tl.minimum(start + tl.arange(0, 128), share - 1), LINES - 1)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [(base + line * 64).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def fetch_and_wait(first, second, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Lets the next launch begin, asks memory for factors of so many numbers, and waits for whatever came before."""
    tl.extra.cuda.gdc_launch_dependents()
    fetch(first, FIRST)
    fetch(second, SECOND)
    tl.extra.cuda.gdc_wait()


@triton.jit
def wait():
    """Lets the next launch begin, and waits for whatever came before."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def bottleneck_forward(
    x, first, second, bias, z, y, tokens, share, x_token, first_rank, first_in, second_out, second_rank,
    IN: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """z = first x and y = second z + bias, of a tile of tokens and `share` features of y; each program makes its z."""
    if OVERLAPS:
        fetch_and_wait(first, second, RANK * IN, OUT * RANK)
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
def blocks_forward(
    x, first, second, bias, z, y, tokens, x_token,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    FG: tl.constexpr, FR: tl.constexpr, FF: tl.constexpr, FA: tl.constexpr,
    SF: tl.constexpr, SE: tl.constexpr, SG: tl.constexpr, SR: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """z[f, g, r] = sum of first[g, r, f, a] x[g, a], and y[f, e] = sum of second[f, e, g, r] z[f, g, r] + bias[f, e].

    One program for a tile of tokens, an output slice f, and some of its e. No two slices read the same of z.
    """
    f, part = tl.program_id(1), tl.program_id(2)
    if OVERLAPS:
        fetch_and_wait(first, second, G * A * R * F, G * R * F * E)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    outs, ranks, ins = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_IN)
    there, real, read, made = (token < tokens)[:, None], ranks < R, ins < A, outs < E
    row = token.to(tl.int64)[:, None]
    total = zeros(BLOCK_TOKENS, BLOCK_OUT)
    for g in range(G):
        v = tl.load(x + row * x_token + g * A + ins[None, :], mask=there & read[None, :], other=0.0)
        u = tl.load(
            first + g * FG + f * FF + ins[:, None] * FA + ranks[None, :] * FR,
            mask=read[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            second + f * SF + g * SG + ranks[:, None] * SR + outs[None, :] * SE,
            mask=real[:, None] & made[None, :], other=0.0,
        )  # fmt: skip
        state = tl.dot(v, u, input_precision="ieee").to(x.dtype.element_ty)
        if part == 0:
            tl.store(z + row * (F * G * R) + (f * G + g) * R + ranks[None, :], state, mask=there & real[None, :])
        total = tl.dot(state, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + f * E + outs, mask=made, other=0.0).to(tl.float32)[None, :]
    into = y + row * (F * E) + f * E + outs[None, :]
    tl.store(into, total.to(y.dtype.element_ty), mask=there & made[None, :])


@triton.jit
def factor_forward(
    x, weight, other, bias, y, tokens, x_token, y_token,
    X_SLICE: tl.constexpr, W_SLICE: tl.constexpr, Y_SLICE: tl.constexpr, NUMBERS: tl.constexpr, OTHERS: tl.constexpr,
    N: tl.constexpr, N_INNER: tl.constexpr, W_OUTER: tl.constexpr, W_INNER: tl.constexpr, Y_OUTER: tl.constexpr,
    K: tl.constexpr, K_INNER: tl.constexpr, W_SUMMED: tl.constexpr, W_ALONG: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr, LEADS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """y[slice, n] = sum over k of weight[slice, n, k] x[slice, k] + bias[slice, n], for a tile of tokens and n.

    n is (outer, inner), the inner one `N_INNER` long and dense in y; `W_OUTER` and `W_INNER` are the weight's strides
    along them, `W_SUMMED` and `W_ALONG` those along the two parts of k. `other` is what the next launch reads.
    """
    slice_ = tl.program_id(2)
    if OVERLAPS:
        if LEADS:
            fetch_and_wait(weight, other, NUMBERS, OTHERS)
        else:
            wait()
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    outs, summed = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    there, inside, row = (token < tokens)[:, None], (outs < N)[None, :], token.to(tl.int64)[:, None]
    columns = weight + slice_ * W_SLICE + outs // N_INNER * W_OUTER + outs % N_INNER * W_INNER
    total = zeros(BLOCK_TOKENS, BLOCK_OUT)
    for start in range(0, K, BLOCK_IN):
        k = start + summed
        v = tl.load(x + row * x_token + slice_ * X_SLICE + k[None, :], mask=there & (k < K)[None, :], other=0.0)
        w = tl.load(
            columns[None, :] + (k // K_INNER * W_SUMMED + k % K_INNER * W_ALONG)[:, None],
            mask=(k < K)[:, None] & inside, other=0.0,
        )  # fmt: skip
        total = tl.dot(v, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + slice_ * N + outs, mask=outs < N, other=0.0).to(tl.float32)[None, :]
    into = y + row * y_token + slice_ * Y_SLICE + (outs // N_INNER * Y_OUTER + outs % N_INNER)[None, :]
    tl.store(into, total.to(y.dtype.element_ty), mask=there & inside)


@triton.jit
def bottleneck_weights(
    x, z, grad, dz, dfirst, dsecond, tokens, share, x_token, grad_token,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    FG: tl.constexpr, FR: tl.constexpr, FF: tl.constexpr, FA: tl.constexpr,
    SF: tl.constexpr, SE: tl.constexpr, SG: tl.constexpr, SR: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Sums over `share` tokens of grad[f, e] z[f, g, r], dsecond, by the first programs, and of dz[g, f, r] x[g, a]."""
    if OVERLAPS:
        wait()
    tile = tl.program_id(0)
    tiles = F * tl.cdiv(E, BLOCK) * tl.cdiv(G * R, BLOCK_STATE)
    if tile < tiles:
        add_up(
            grad, z, dsecond + tl.program_id(1) * (F * E * G * R), tile, tokens, share, grad_token,
            E, G, R, F, SF, SE, SG, SR, BLOCK, BLOCK_STATE, BLOCK_TOKENS,
        )  # fmt: skip
    else:
        add_up(
            x, dz, dfirst + tl.program_id(1) * (F * A * G * R), tile - tiles, tokens, share, x_token,
            A, F, R, G, FG, FA, FF, FR, BLOCK, BLOCK_STATE, BLOCK_TOKENS,
        )  # fmt: skip


@triton.jit
def add_up(
    wide, narrow, result, tile, tokens, share, wide_token,
    WIDTH: tl.constexpr, OTHERS: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr,
    SLICE: tl.constexpr, ACROSS: tl.constexpr, OTHER: tl.constexpr, ALONG: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_STATE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of result[slice, width, other, r], the sum of wide[slice, width] narrow[slice, other, r], token by token.

    The strides of `result` are `SLICE`, `ACROSS`, `OTHER` and `ALONG`.
    """
    WIDE: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    STATE: tl.constexpr = OTHERS * R
    across, along, slice_ = tile % WIDE, tile // WIDE // SLICES, tile // WIDE % SLICES
    features, states = across * BLOCK + tl.arange(0, BLOCK), along * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    inside, real = features < WIDTH, states < STATE
    begin = tl.program_id(1) * share
    total = zeros(BLOCK, BLOCK_STATE)
    for start in range(0, share, BLOCK_TOKENS):
        token = begin + start + tl.arange(0, BLOCK_TOKENS)
        there, row = token < tokens, token.to(tl.int64)
        a = tl.load(
            wide + row[:, None] * wide_token + slice_ * WIDTH + features[None, :],
            mask=there[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            narrow + row[:, None] * (SLICES * STATE) + slice_ * STATE + states[None, :],
            mask=there[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    into = result + slice_ * SLICE + features[:, None] * ACROSS + (states // R * OTHER + states % R * ALONG)[None, :]
    tl.store(into, total.to(result.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def add_both(firsts, seconds, dfirst, dsecond, SPLITS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The sums over ranges of tokens of both factors' partial gradients, always in the same order."""
    BLOCK: tl.constexpr = 1024
    tile, tiles = tl.program_id(0), tl.cdiv(FIRST, BLOCK)
    if tile < tiles:
        add_ranges(firsts, dfirst, tile * BLOCK, SPLITS, FIRST, BLOCK)
    else:
        add_ranges(seconds, dsecond, (tile - tiles) * BLOCK, SPLITS, SECOND, BLOCK)


@triton.jit
def add_ranges(partials, result, begin, SPLITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = begin + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + split * COUNT + at, mask=at < COUNT, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < COUNT)
