"""Triton: two stages around an activation, plain or gated (`junction.py`)."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix, load_tile, store_matrix, store_tile

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Number by number a few registers do; step by step, each a whole tile, the backward spills twice as much.
each = (lambda function, values: function(values)) if INTERPRETED else tl.map_elementwise


@triton.jit
def tanh(v):
    """By one instruction of the machine, within 2^-11 of it (PTX ISA, `tanh.approx.f32`)."""
    if INTERPRETED:
        return 2.0 * tl.sigmoid(2.0 * v) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)


@triton.jit
def halved(v, u, du):
    """v (1 + tanh u) / 2 and its derivative, where that of u is `du`."""
    t, half = tanh(u), 0.5 * v
    return half + half * t, 0.5 + 0.5 * t + half * (1.0 - t * t) * du


@triton.jit
def silu_short(v):
    return halved(v, 0.5 * v, 0.5)


@triton.jit
def gelu_tanh_short(v):
    s = v * v
    return halved(v, v * (0.7978845608 + 0.0356774081 * s), 0.7978845608 + 0.1070322243 * s)


@triton.jit
def gelu_short(v):
    """By the polynomial that fits best: within 2.6e-5 of GELU by erf, and the derivative within 1.2e-4."""
    s = tl.minimum(v * v, 49.0)  # where the polynomial turns, tanh is 1
    u = v * (0.7975027546 + s * (0.0370103023 - 0.0003522716 * s))
    return halved(v, u, 0.7975027546 + s * (0.1110309069 - 0.001761358 * s))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """The activation and its derivative; `SHORT` for numbers that are rounded to 16 bits right after.

    Then GELU and SiLU take one instruction of the special-function unit, and some seven others. What `tanh` errs by is
    2^-12 |v| at most, an eighth of what rounding to bfloat16 may cost where v is positive, a half in float16.
    """
    if ACTIVATION == "identity":
        return v, tl.full(v.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        return tl.maximum(v, 0.0), (v > 0.0).to(tl.float32)
    elif ACTIVATION == "relu2":
        r = tl.maximum(v, 0.0)
        return r * r, 2.0 * r
    elif SHORT and ACTIVATION == "silu":
        return each(silu_short, v)
    elif SHORT and ACTIVATION == "gelu":
        return each(gelu_short, v)
    elif SHORT and ACTIVATION == "gelu_tanh":
        return each(gelu_tanh_short, v)
    elif ACTIVATION == "silu":
        p = tl.sigmoid(v)
        return v * p, p * (1.0 + v * (1.0 - p))
    elif ACTIVATION == "gelu":
        # Abramowitz and Stegun 7.1.26, within 1.5e-7: erf itself takes three times as long, and e is needed anyway.
        e = tl.exp(-0.5 * v * v)
        t = 1.0 / (1.0 + 0.2316418905 * tl.abs(v))
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.7265760135 + t * 0.5307027145)))) * e
        p = tl.where(v < 0.0, tail, 1.0 - tail)
        return v * p, p + v * 0.3989422804014327 * e
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        p = tl.sigmoid(1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
        return v * p, p + v * p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)


@triton.jit
def junction_forward(
    zs, ups, biases, down, y,
    tokens, share, z_feature, z_slice, y_slice, y_feature,
    IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr, SHORT: tl.constexpr, HOLD_BIASES: tl.constexpr,
):  # fmt: skip
    """y[s] = down[s] activation(up[s] z[s] + bias[s]); all states have tokens innermost.

    With a second z and up, their hidden features multiply the activated ones of the first: a gate.
    """
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    here = tl.arange(0, BLOCK_TOKENS)
    ins, outs = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    weights, added, downs = (), (), ()
    for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        hidden = start + tl.arange(0, BLOCK_HIDDEN)
        for p in tl.static_range(len(ups)):
            weights += (load_matrix(ups[p] + s * HIDDEN * IN, hidden, ins, HIDDEN, IN),)
            if HOLD_BIASES and len(biases):
                bias = tl.load(biases[p] + s * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
                added += (bias.to(tl.float32),)
        downs += (load_matrix(down + s * OUT * HIDDEN, outs, hidden, OUT, HIDDEN),)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        left = tokens - first
        vs = ()
        for p in tl.static_range(len(ups)):
            vs += (load_tile(zs[p] + s * z_slice + first, ins.to(tl.int64), z_feature, here, 1, IN, left, True),)
        total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            hidden = start + tl.arange(0, BLOCK_HIDDEN)
            hs = ()
            for p in tl.static_range(len(ups)):
                h = tl.dot(
                    tl.trans(vs[p]), tl.trans(weights[start // BLOCK_HIDDEN * len(ups) + p]), input_precision="ieee"
                )
                if HOLD_BIASES and len(biases):
                    h += added[start // BLOCK_HIDDEN * len(ups) + p][None, :]
                elif len(biases):
                    bias = tl.load(biases[p] + s * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
                    h += bias.to(tl.float32)[None, :]
                hs += (h,)
            h, _ = activate(hs[0], ACTIVATION, SHORT)
            if len(ups) == 2:
                h *= hs[1]
            w = downs[start // BLOCK_HIDDEN]
            total = tl.dot(h.to(w.dtype), tl.trans(w), total, input_precision="ieee")
        store_tile(tl.trans(total), y + s * y_slice + first, outs.to(tl.int64), y_feature, here, 1, OUT, left, True)


@triton.jit
def junction_backward(
    grad, zs, ups, biases, down, dzs, dups, dbiases, ddown,
    tokens, share, z_feature, z_slice, dz_feature, dz_slice, y_slice, y_feature,
    IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr, SHORT: tl.constexpr, NARROW: tl.constexpr, DOWN_LAST: tl.constexpr,
):  # fmt: skip
    """All gradients of a junction in one pass over `share` tokens, the hidden features computed again.

    Sums for the weights stay in registers. Those of biases are added up in memory, each program in
    its own, which starts at zero: in registers they would push the others out. `NARROW` keeps slopes in 16
    bits, and `DOWN_LAST` makes the second weight's gradient after that of the hidden features: both are for time alone.
    """
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slices = tl.num_programs(0)
    at = split * slices + s
    here = tl.arange(0, BLOCK_TOKENS)
    ins, outs = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    ups_sums, down_sums = (), ()
    for _ in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        for _ in tl.static_range(len(ups)):
            ups_sums += (tl.zeros((BLOCK_HIDDEN, BLOCK_IN), tl.float32),)
        down_sums += (tl.zeros((BLOCK_OUT, BLOCK_HIDDEN), tl.float32),)
    for begin in range(0, share, BLOCK_TOKENS):
        first = split * share + begin
        left = tokens - first
        vs, ds = (), ()
        for p in tl.static_range(len(ups)):
            vs += (load_tile(zs[p] + s * z_slice + first, ins.to(tl.int64), z_feature, here, 1, IN, left, True),)
            ds += (tl.zeros((BLOCK_TOKENS, BLOCK_IN), tl.float32),)
        g = load_tile(grad + s * y_slice + first, outs.to(tl.int64), y_feature, here, 1, OUT, left, True)
        next_ups, next_downs = (), ()
        for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
            hidden = start + tl.arange(0, BLOCK_HIDDEN)
            us, hs = (), ()
            for p in tl.static_range(len(ups)):
                u = load_matrix(ups[p] + s * HIDDEN * IN, hidden, ins, HIDDEN, IN)
                h = tl.dot(tl.trans(vs[p]), tl.trans(u), input_precision="ieee")
                if len(biases):
                    added = tl.load(biases[p] + s * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
                    h += added.to(tl.float32)[None, :]
                us += (u,)
                hs += (h,)
            w = load_matrix(down + s * OUT * HIDDEN, outs, hidden, OUT, HIDDEN)
            h, slope = activate(hs[0], ACTIVATION, SHORT)
            ungated = h.to(g.dtype)
            if len(ups) == 2:
                h *= hs[1]
                slope *= hs[1]
            if NARROW:
                slope = slope.to(g.dtype)
            if not DOWN_LAST:
                next_downs += (tl.dot(g, h.to(g.dtype), down_sums[start // BLOCK_HIDDEN], input_precision="ieee"),)
            dh = tl.dot(tl.trans(g), w, input_precision="ieee")
            dhs = (dh * slope,)
            if len(ups) == 2:
                dhs += (dh * ungated,)
            if DOWN_LAST:
                next_downs += (tl.dot(g, h.to(g.dtype), down_sums[start // BLOCK_HIDDEN], input_precision="ieee"),)
            next_ds = ()
            for p in tl.static_range(len(ups)):
                if len(biases):
                    into = dbiases[p] + at * HIDDEN + hidden
                    tl.atomic_add(into, tl.sum(dhs[p], axis=0), mask=hidden < HIDDEN, sem="relaxed")
                d = dhs[p].to(g.dtype)
                total = ups_sums[start // BLOCK_HIDDEN * len(ups) + p]
                next_ups += (tl.dot(tl.trans(d), tl.trans(vs[p]), total, input_precision="ieee"),)
                next_ds += (tl.dot(d, us[p], ds[p], input_precision="ieee"),)
            ds = next_ds
        ups_sums, down_sums = next_ups, next_downs
        for p in tl.static_range(len(ups)):
            into = dzs[p] + s * dz_slice + first
            store_tile(tl.trans(ds[p]), into, ins.to(tl.int64), dz_feature, here, 1, IN, left, True)
    for start in tl.static_range(0, HIDDEN, BLOCK_HIDDEN):
        hidden = start + tl.arange(0, BLOCK_HIDDEN)
        for p in tl.static_range(len(ups)):
            store_matrix(
                ups_sums[start // BLOCK_HIDDEN * len(ups) + p], dups[p] + at * HIDDEN * IN, hidden, ins, HIDDEN, IN
            )
        store_matrix(down_sums[start // BLOCK_HIDDEN], ddown + at * OUT * HIDDEN, outs, hidden, OUT, HIDDEN)
