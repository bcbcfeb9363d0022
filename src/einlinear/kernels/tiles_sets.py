"""Triton: the two stages of BTT experts on tokens sorted by their set of experts.

Imported by the operators that launch these kernels (`sets.py`) when first used. Sets, runs and tiles are those
of `tiles_route.py`: all tokens of a run have the same experts, whose weights a program loads once. Tiles are
`[features, tokens]`, accumulators float32.
"""

# No jaxtyping, no annotations but constexpr: Triton reads these signatures itself.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix, multiply, store_matrix
from einlinear.kernels.tiles_route import member


@triton.jit
def unpack(packed):
    """The first position of a run or tile, how many tokens it has, and the place of the expert.

    In a number: the position, itself a multiple of 16, times 128; the place, below 8, times 256; tokens less one.
    """
    return tl.multiple_of(packed // 2048 * 16, 16), packed % 256 + 1, packed // 256 % 8


@triton.jit
def room_for(count):
    """A multiple of 16: what lies between the last token of a set and that is nobody's."""
    return tl.multiple_of((count + 15) // 16 * 16, 16)


@triton.jit
def tokens_at(token_of, begin, here, count):
    """Which of the positions `here` hold a token, and which token."""
    inside = here < count
    return inside, tl.load(token_of + begin + here, mask=inside, other=0).to(tl.int64)


@triton.jit
def matrices(
    base, set_, s, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """Slice `s` of each expert of a set."""
    found = ()
    for j in tl.static_range(ACTIVE):
        e = member(set_, j, EXPERTS, ACTIVE).to(tl.int64)
        found += (load_matrix(base + (e * SLICES + s) * ROWS * COLUMNS, rows, columns, ROWS, COLUMNS),)
    return found


@triton.jit
def load_rows(base, token, stride, inside, features, FEATURES: tl.constexpr):
    """`[features, tokens]` of rows that lie anywhere."""
    kept = inside[:, None]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[None, :]
    return tl.trans(tl.load(base + token[:, None] * stride + features[None, :], mask=kept, other=0.0))


@triton.jit
def store_rows(tile, base, token, stride, inside, features, FEATURES: tl.constexpr):
    kept = inside[:, None]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[None, :]
    at = base + token[:, None] * stride + features[None, :]
    tl.store(at, tl.trans(tile.to(base.dtype.element_ty)), mask=kept)


@triton.jit
def load_state(base, features, stride, here, room, FEATURES: tl.constexpr):
    """`[features, tokens]` of a state with tokens innermost; `room` is a multiple of 16."""
    kept = (here < room)[None, :]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[:, None]
    return tl.load(base + features[:, None] * stride + here[None, :], mask=kept, other=0.0)


@triton.jit
def store_state(tile, base, features, stride, here, room, FEATURES: tl.constexpr):
    kept = (here < room)[None, :]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[:, None]
    tl.store(base + features[:, None] * stride + here[None, :], tile.to(base.dtype.element_ty), mask=kept)


@triton.jit
def into_forward(
    x, first, z, totals, run_set, runs, token_of, positions, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[j, s] = first[e_j, s] x[s] for every expert of a run, from one read of its rows of x."""
    s, t = tl.program_id(0), tl.program_id(1)
    set_, packed = tl.load(run_set + t), tl.load(runs + t)
    if t < tl.load(totals + EXPERTS):
        begin, count, _ = unpack(packed)
        room = room_for(count)
        outs, ins = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
        ws = matrices(first, set_, s, outs, ins, OUT, IN, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            here = block + tl.arange(0, BLOCK)
            inside, token = tokens_at(token_of, begin, here, count)
            v = load_rows(x + s * IN, token, x_token, inside, ins, IN)
            for j in tl.static_range(ACTIVE):
                at = z + ((j * SLICES + s) * OUT).to(tl.int64) * positions + begin
                store_state(multiply(ws[j], v), at, outs.to(tl.int64), positions, here, room, OUT)


@triton.jit
def out_forward(
    z, second, bias, y, gates, totals, run_set, runs, token_of, positions, y_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, STATE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_STATE: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[s] = sum over a run's experts of gate_j second[e_j, s] z[j, :, s], each row written once."""
    s, t = tl.program_id(0), tl.program_id(1)
    set_, packed = tl.load(run_set + t), tl.load(runs + t)
    if t < tl.load(totals + EXPERTS):
        begin, count, _ = unpack(packed)
        room = room_for(count)
        outs, states = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
        ws = matrices(second, set_, s, outs, states, OUT, STATE, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            here = block + tl.arange(0, BLOCK)
            inside, token = tokens_at(token_of, begin, here, count)
            total = tl.zeros((BLOCK_OUT, BLOCK), tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + s * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)[:, None]
            for j in tl.static_range(ACTIVE):
                at = z + (j * STATE * SLICES + s).to(tl.int64) * positions + begin
                v = load_state(at, states.to(tl.int64), SLICES * positions, here, room, STATE)
                gate = tl.load(gates + j * positions + begin + here, mask=inside, other=0.0)
                total += multiply(ws[j], v) * gate[None, :]
            store_rows(total, y + s * OUT, token, y_token, inside, outs, OUT)


@triton.jit
def out_backward(
    grad, z, second, gates, dz, dgate, dsecond, totals, listed, token_of, positions, most, y_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, STATE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_STATE: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All gradients of the second stage, tile after tile of one expert.

    That of a gate comes from the state before the gate: there is no division, and a gate may be zero.
    """
    s, e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here, outs, states = tl.arange(0, TILE), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
    mine, last = listed + e * most, tl.load(totals + e)
    w = load_matrix(second + (e.to(tl.int64) * SLICES + s) * OUT * STATE, outs, states, OUT, STATE)
    dw = tl.zeros((BLOCK_OUT, BLOCK_STATE), tl.float32)
    # The next tile's whereabouts are fetched while this one is worked on: each depends on the one before.
    packed = tl.load(mine + split, mask=split < last, other=0)
    for i in range(split, last, SPLITS):
        begin, count, plane = unpack(packed)
        room = room_for(count)
        packed = tl.load(mine + i + SPLITS, mask=i + SPLITS < last, other=0)
        inside, token = tokens_at(token_of, begin, here, count)
        gate = tl.load(gates + plane.to(tl.int64) * positions + begin + here, mask=inside, other=0.0)[None, :]
        offset = (plane * STATE * SLICES + s).to(tl.int64) * positions + begin
        v = load_state(z + offset, states.to(tl.int64), SLICES * positions, here, room, STATE)
        g = load_rows(grad + s * OUT, token, y_token, inside, outs, OUT)
        u = multiply(tl.trans(w), g)
        at = dgate + (s * ACTIVE + plane).to(tl.int64) * positions + begin
        tl.store(at + here, tl.sum(u * v.to(tl.float32), axis=0), mask=here < room)
        store_state(u * gate, dz + offset, states.to(tl.int64), SLICES * positions, here, room, STATE)
        dw = tl.dot((g.to(tl.float32) * gate).to(g.dtype), tl.trans(v), dw, input_precision="ieee")
    at = (split * EXPERTS + e).to(tl.int64) * SLICES + s
    store_matrix(dw, dsecond + at * OUT * STATE, outs, states, OUT, STATE)


@triton.jit
def into_backward_input(
    dz, first, dx, totals, run_set, runs, token_of, positions, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx[s] = sum over a run's experts of first[e_j, s]ᵀ dz[j, s], each row written once."""
    s, t = tl.program_id(0), tl.program_id(1)
    set_, packed = tl.load(run_set + t), tl.load(runs + t)
    if t < tl.load(totals + EXPERTS):
        begin, count, _ = unpack(packed)
        room = room_for(count)
        outs, ins = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
        ws = matrices(first, set_, s, outs, ins, OUT, IN, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            here = block + tl.arange(0, BLOCK)
            inside, token = tokens_at(token_of, begin, here, count)
            total = tl.zeros((BLOCK_IN, BLOCK), tl.float32)
            for j in tl.static_range(ACTIVE):
                at = dz + ((j * SLICES + s) * OUT).to(tl.int64) * positions + begin
                total += multiply(tl.trans(ws[j]), load_state(at, outs.to(tl.int64), positions, here, room, OUT))
            store_rows(total, dx + s * IN, token, x_token, inside, ins, IN)


@triton.jit
def into_backward_weight(
    dz, x, dfirst, totals, listed, token_of, positions, most, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dfirst[e, s] = sum over the expert's tiles of dz xᵀ."""
    s, e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here, outs, ins = tl.arange(0, TILE), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    dw = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for i in range(split, tl.load(totals + e), SPLITS):
        begin, count, plane = unpack(tl.load(listed + e * most + i))
        room = room_for(count)
        inside, token = tokens_at(token_of, begin, here, count)
        at = dz + ((plane * SLICES + s) * OUT).to(tl.int64) * positions + begin
        d = load_state(at, outs.to(tl.int64), positions, here, room, OUT)
        v = load_rows(x + s * IN, token, x_token, inside, ins, IN)
        dw = tl.dot(d, tl.trans(v), dw, input_precision="ieee")
    at = (split * EXPERTS + e).to(tl.int64) * SLICES + s
    store_matrix(dw, dfirst + at * OUT * IN, outs, ins, OUT, IN)


@triton.jit
def add_gates(
    partials, index, dweight, totals, run_set, runs, token_of, positions,
    SLICES: tl.constexpr, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's weights, from those that the output slices found."""
    t = tl.program_id(0)
    set_, packed = tl.load(run_set + t), tl.load(runs + t)
    if t < tl.load(totals + EXPERTS):
        begin, count, _ = unpack(packed)
        here = tl.arange(0, RUN)
        inside = here < count
        token = tl.load(token_of + begin + here, mask=inside, other=0)
        for j in tl.static_range(ACTIVE):
            e = member(set_, j, EXPERTS, ACTIVE)
            total = tl.zeros((RUN,), tl.float32)
            at = partials + begin + j * positions + here
            for _ in range(SLICES):
                total += tl.load(at, mask=inside, other=0.0)
                at += ACTIVE * positions
            for i in tl.static_range(ACTIVE):
                mine = tl.load(index + token * ACTIVE + i, mask=inside, other=-1).to(tl.int32) == e
                tl.store(dweight + token * ACTIVE + i, total, mask=inside & mine)
