"""Triton: the tensor-core tiles of one block-diagonal stage, and of two stages around an activation.

Imported by the operators that launch these kernels (`stage.py`, `junction.py`) when first used, so
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
def multiply(a, b):
    """`a @ b`, `[features, tokens]`; the instruction needs 64 rows, so short features change places with tokens."""
    if a.shape[0] >= 64:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee"))


@triton.jit
def stage_forward(
    x, weight, bias, y,
    tokens, x_slice, x_feature, x_token, y_slice, y_feature, y_token,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    X_MINOR: tl.constexpr, Y_MINOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """y[s] = weight[s] x[s] + bias[s] for every slice s; one program a tile, programs side by side on neighbours.

    Of two launches that overlap, the one that leads lets the other start at once, and the one that
    follows loads its weights before it waits for what the first has made.
    """
    if LEADS:
        tl.extra.cuda.gdc_launch_dependents()
    s = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS
    here = tl.arange(0, BLOCK_TOKENS)
    outs, ins = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    w = load_matrix(weight + s * OUT * IN, outs, ins, OUT, IN)
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    v = load_tile(x + s * x_slice + first * x_token, ins, x_feature, here, x_token, IN, tokens - first, X_MINOR)
    total = multiply(w, v)
    if HAS_BIAS:
        total += tl.load(bias + s * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)[:, None]
    store_tile(
        total, y + s * y_slice + first * y_token, outs, y_feature, here, y_token, OUT, tokens - first, Y_MINOR
    )  # fmt: skip


@triton.jit
def pair_forward(
    x, first, second, bias, y, tokens, slices, x_token, y_token,
    SLICES: tl.constexpr, MIDDLE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STATE: tl.constexpr,
    BLOCK_STATE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Two stages in one launch for a few tokens: each program makes anew what its output slice reads of the state.

    `STATE` features of it, `STATE // SLICES` from each slice of the first stage, which has `MIDDLE` outputs a slice.
    """
    s, token = tl.program_id(0), tl.program_id(1)
    ins, outs, states = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
    rank: tl.constexpr = STATE // SLICES
    of = states // rank
    inside = (states < STATE)[:, None] & (ins < IN)[None, :]
    row = of * MIDDLE + (states % rank) * slices + s
    w = tl.load(first + row[:, None] * IN + ins[None, :], mask=inside, other=0.0).to(tl.float32)
    v = load_matrix(second + s * OUT * STATE, outs, states, OUT, STATE).to(tl.float32)
    u = tl.load(x + token * x_token + of[:, None] * IN + ins[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.sum(w * u, axis=1).to(x.dtype.element_ty).to(tl.float32)
    total = tl.sum(v * z[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + s * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)
    tl.store(y + token * y_token + s * OUT + outs, total.to(y.dtype.element_ty), mask=outs < OUT)


@triton.jit
def stage_backward(
    grad, x, weight, dx, dweight, dbias,
    tokens, share, x_slice, x_feature, x_token, dx_slice, dx_feature, dx_token, y_slice, y_feature, y_token,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    X_MINOR: tl.constexpr, Y_MINOR: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Both gradients of a stage in one pass over `share` tokens; those of the weight as one partial sum a program."""
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slices = tl.num_programs(0)
    here = tl.arange(0, BLOCK_TOKENS)
    outs, ins = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    w = load_matrix(weight + s * OUT * IN, outs, ins, OUT, IN)
    dw = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    db = tl.zeros((BLOCK_OUT,), tl.float32)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        left = tokens - first
        g = load_tile(grad + s * y_slice + first * y_token, outs, y_feature, here, y_token, OUT, left, Y_MINOR)
        v = load_tile(x + s * x_slice + first * x_token, ins, x_feature, here, x_token, IN, left, X_MINOR)
        dw = tl.dot(g, tl.trans(v), dw, input_precision="ieee")
        d = multiply(tl.trans(w), g)
        store_tile(d, dx + s * dx_slice + first * dx_token, ins, dx_feature, here, dx_token, IN, left, X_MINOR)
        if HAS_BIAS:
            db += tl.sum(g.to(tl.float32), axis=1)
    at = split * slices + s
    store_matrix(dw, dweight + at * OUT * IN, outs, ins, OUT, IN)
    if HAS_BIAS:
        tl.store(dbias + at * OUT + outs, db, mask=outs < OUT)


@triton.jit
def add_partials(partials, result, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the first dimension, always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partials + split * count + at, mask=at < count, other=0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < count)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "identity":
        return v, tl.full(v.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        return tl.maximum(v, 0.0), (v > 0.0).to(tl.float32)
    elif ACTIVATION == "relu2":
        r = tl.maximum(v, 0.0)
        return r * r, 2.0 * r
    elif ACTIVATION == "silu":
        p = tl.sigmoid(v)
        return v * p, p * (1.0 + v * (1.0 - p))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        p = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        return v * p, p + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@triton.jit
def junction_forward(
    z, up, bias, down, y,
    tokens, share, slices, z_feature, z_slice, y_slice, y_feature,
    IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[s] = down[s] activation(up[s] z[s] + bias[s]); all states have tokens innermost."""
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    here = tl.arange(0, BLOCK_TOKENS)
    ins, outs = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    ups, downs = (), ()
    for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        hidden = start + tl.arange(0, BLOCK_HIDDEN)
        ups += (load_matrix(up + s * HIDDEN * IN, hidden, ins, HIDDEN, IN),)
        downs += (load_matrix(down + s * OUT * HIDDEN, outs, hidden, OUT, HIDDEN),)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        left = tokens - first
        v = load_tile(z + s * z_slice + first, ins.to(tl.int64), z_feature, here, 1, IN, left, True)
        total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            hidden = start + tl.arange(0, BLOCK_HIDDEN)
            h = tl.dot(tl.trans(v), tl.trans(ups[start // BLOCK_HIDDEN]), input_precision="ieee")
            if HAS_BIAS:
                h += tl.load(bias + s * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0).to(tl.float32)[None, :]
            h, _ = activate(h, ACTIVATION)
            w = downs[start // BLOCK_HIDDEN]
            total = tl.dot(h.to(w.dtype), tl.trans(w), total, input_precision="ieee")
        store_tile(tl.trans(total), y + s * y_slice + first, outs.to(tl.int64), y_feature, here, 1, OUT, left, True)


@triton.jit
def junction_backward(
    grad, z, up, bias, down, dz, dup, dbias, ddown,
    tokens, share, slices, z_feature, z_slice, dz_feature, dz_slice, y_slice, y_feature,
    IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """All gradients of a junction in one pass over `share` tokens, the hidden features computed again."""
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    here = tl.arange(0, BLOCK_TOKENS)
    ins, outs = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    dups, ddowns, dbs = (), (), ()
    for _ in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        dups += (tl.zeros((BLOCK_HIDDEN, BLOCK_IN), tl.float32),)
        ddowns += (tl.zeros((BLOCK_OUT, BLOCK_HIDDEN), tl.float32),)
        dbs += (tl.zeros((BLOCK_HIDDEN,), tl.float32),)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        left = tokens - first
        v = load_tile(z + s * z_slice + first, ins.to(tl.int64), z_feature, here, 1, IN, left, True)
        g = load_tile(grad + s * y_slice + first, outs.to(tl.int64), y_feature, here, 1, OUT, left, True)
        d = tl.zeros((BLOCK_TOKENS, BLOCK_IN), tl.float32)
        next_dups, next_ddowns, next_dbs = (), (), ()
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            hidden = start + tl.arange(0, BLOCK_HIDDEN)
            u = load_matrix(up + s * HIDDEN * IN, hidden, ins, HIDDEN, IN)
            w = load_matrix(down + s * OUT * HIDDEN, outs, hidden, OUT, HIDDEN)
            h = tl.dot(tl.trans(v), tl.trans(u), input_precision="ieee")
            if HAS_BIAS:
                h += tl.load(bias + s * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0).to(tl.float32)[None, :]
            h, slope = activate(h, ACTIVATION)
            dh = tl.dot(tl.trans(g), w, input_precision="ieee") * slope
            if HAS_BIAS:
                next_dbs += (dbs[start // BLOCK_HIDDEN] + tl.sum(dh, axis=0),)
            dh = dh.to(v.dtype)
            next_ddowns += (tl.dot(g, h.to(g.dtype), ddowns[start // BLOCK_HIDDEN], input_precision="ieee"),)
            next_dups += (tl.dot(tl.trans(dh), tl.trans(v), dups[start // BLOCK_HIDDEN], input_precision="ieee"),)
            d = tl.dot(dh, u, d, input_precision="ieee")
        dups, ddowns = next_dups, next_ddowns
        if HAS_BIAS:
            dbs = next_dbs
        store_tile(tl.trans(d), dz + s * dz_slice + first, ins.to(tl.int64), dz_feature, here, 1, IN, left, True)
    at = split * slices + s
    for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        hidden = start + tl.arange(0, BLOCK_HIDDEN)
        store_matrix(dups[start // BLOCK_HIDDEN], dup + at * HIDDEN * IN, hidden, ins, HIDDEN, IN)
        store_matrix(ddowns[start // BLOCK_HIDDEN], ddown + at * OUT * HIDDEN, outs, hidden, OUT, HIDDEN)
        if HAS_BIAS:
            tl.store(dbias + at * HIDDEN + hidden, dbs[start // BLOCK_HIDDEN], mask=hidden < HIDDEN)
