"""Triton: the tensor-core tiles of one block-diagonal stage.

Imported by the operators that launch these kernels (`stage.py`, `pair.py`, `junction.py`) when first used, so
that einlinear needs no Triton. Every tile is `[features, tokens]`; `MINOR` says that tokens lie
innermost in memory, and only loads and stores look at it. Tiles have powers of two as sides and
are masked down to the real sizes. Accumulators are float32.
"""

# No jaxtyping, no annotations but constexpr: Triton reads these signatures itself.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def load_tile(base, features, feature_stride, tokens, token_stride, FEATURES, TOKENS, MINOR: tl.constexpr):
    if MINOR:
        inside = (tokens < TOKENS)[None, :]
        if features.shape[0] != FEATURES:
            inside = inside & (features < FEATURES)[:, None]
        at = base + features[:, None] * feature_stride + tokens[None, :] * token_stride
        return tl.load(at, mask=inside, other=0.0)
    else:
        inside = (tokens < TOKENS)[:, None]
        if features.shape[0] != FEATURES:
            inside = inside & (features < FEATURES)[None, :]
        at = base + tokens[:, None] * token_stride + features[None, :] * feature_stride
        return tl.trans(tl.load(at, mask=inside, other=0.0))


@triton.jit
def store_tile(tile, base, features, feature_stride, tokens, token_stride, FEATURES, TOKENS, MINOR: tl.constexpr):
    tile = tile.to(base.dtype.element_ty)
    if MINOR:
        inside = (tokens < TOKENS)[None, :]
        if features.shape[0] != FEATURES:
            inside = inside & (features < FEATURES)[:, None]
        tl.store(base + features[:, None] * feature_stride + tokens[None, :] * token_stride, tile, mask=inside)
    else:
        inside = (tokens < TOKENS)[:, None]
        if features.shape[0] != FEATURES:
            inside = inside & (features < FEATURES)[None, :]
        at = base + tokens[:, None] * token_stride + features[None, :] * feature_stride
        tl.store(at, tl.trans(tile), mask=inside)


@triton.jit
def load_matrix(base, rows, columns, ROWS, COLUMNS):
    """A tile of a row-major matrix with `COLUMNS` columns."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(base + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(tile, base, rows, columns, ROWS, COLUMNS):
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(base + rows[:, None] * COLUMNS + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def multiply(a, b):
    """`a @ b`, `[features, tokens]`; the instruction needs 64 rows, so short features change places with tokens."""
    if a.shape[0] >= 64:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee"))


@triton.jit
def stage_forward(
    x, weights, bias, ys,
    x_tokens, y_tokens, x_slice, x_feature, x_token, y_slices, y_feature, y_token,
    OUTS: tl.constexpr, IN: tl.constexpr, BLOCK_OUTS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    X_MINOR: tl.constexpr, Y_MINOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEADS: tl.constexpr, FOLLOWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[s] = weight[s] x[s] + bias[s] for every slice s and every weight; one program a tile of x.

    `GROUP` tiles of tokens of one slice follow each other, then those of the next slice.
    Of two launches that overlap, the one that leads lets the other start at once, and the one that
    follows loads its weights before it waits for what the first has made.
    """
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    group, place = number // (tl.num_programs(0) * GROUP), number % (tl.num_programs(0) * GROUP)
    s = (place // GROUP).to(tl.int64)
    first = (group * GROUP + place % GROUP).to(tl.int64) * BLOCK_TOKENS
    here = tl.arange(0, BLOCK_TOKENS)
    ins = tl.arange(0, BLOCK_IN)
    ws = ()
    for p in tl.static_range(len(weights)):
        ws += (load_matrix(weights[p] + s * OUTS[p] * IN, tl.arange(0, BLOCK_OUTS[p]), ins, OUTS[p], IN),)
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    v = load_tile(x + s * x_slice + first * x_token, ins, x_feature, here, x_token, IN, x_tokens - first, X_MINOR)
    for p in tl.static_range(len(weights)):
        outs = tl.arange(0, BLOCK_OUTS[p])
        total = multiply(ws[p], v)
        if HAS_BIAS:
            total += tl.load(bias + s * OUTS[p] + outs, mask=outs < OUTS[p], other=0.0).to(tl.float32)[:, None]
        y = ys[p] + s * y_slices[p] + first * y_token
        store_tile(total, y, outs, y_feature, here, y_token, OUTS[p], y_tokens - first, Y_MINOR)


@triton.jit
def stage_backward(
    grads, x, weights, dx, dweights, dbias,
    x_tokens, y_tokens, share, x_slice, x_feature, x_token, dx_slice, dx_feature, dx_token,
    y_slices, y_features, y_tokens_apart,
    OUTS: tl.constexpr, IN: tl.constexpr, BLOCK_OUTS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    X_MINOR: tl.constexpr, Y_MINOR: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """All gradients of a stage in one pass over `share` tokens; those of weights as one partial sum a program."""
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slices = tl.num_programs(0)
    here = tl.arange(0, BLOCK_TOKENS)
    ins = tl.arange(0, BLOCK_IN)
    ws, dws, dbs = (), (), ()
    for p in tl.static_range(len(weights)):
        ws += (load_matrix(weights[p] + s * OUTS[p] * IN, tl.arange(0, BLOCK_OUTS[p]), ins, OUTS[p], IN),)
        dws += (zeros(BLOCK_OUTS[p], BLOCK_IN),)
        dbs += (tl.sum(dws[p], axis=1),)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        v = load_tile(x + s * x_slice + first * x_token, ins, x_feature, here, x_token, IN, x_tokens - first, X_MINOR)
        d = zeros(BLOCK_IN, BLOCK_TOKENS)
        next_dws, next_dbs = (), ()
        for p in tl.static_range(len(weights)):
            outs = tl.arange(0, BLOCK_OUTS[p])
            grad = grads[p] + s * y_slices[p] + first * y_tokens_apart[p]
            g = load_tile(
                grad, outs, y_features[p], here, y_tokens_apart[p], OUTS[p], y_tokens - first, Y_MINOR
            )  # fmt: skip
            next_dws += (tl.dot(g, tl.trans(v), dws[p], input_precision="ieee"),)
            d += multiply(tl.trans(ws[p]), g)
            if HAS_BIAS:
                next_dbs += (dbs[p] + tl.sum(g.to(tl.float32), axis=1),)
        dws = next_dws
        if HAS_BIAS:
            dbs = next_dbs
        into = dx + s * dx_slice + first * dx_token
        store_tile(d, into, ins, dx_feature, here, dx_token, IN, x_tokens - first, X_MINOR)
    at = split * slices + s
    for p in tl.static_range(len(weights)):
        outs = tl.arange(0, BLOCK_OUTS[p])
        store_matrix(dws[p], dweights[p] + at * OUTS[p] * IN, outs, ins, OUTS[p], IN)
        if HAS_BIAS:
            total = dbs[p].to(dbias.dtype.element_ty)
            tl.store(dbias + at * OUTS[p] + outs, total, mask=outs < OUTS[p])


@triton.jit
def add_partials(partials, result, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the first dimension, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partials + split * count + at, mask=at < count, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < count)
