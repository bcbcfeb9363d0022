"""Triton: the two stages of BTT experts on tokens sorted by their set of experts.

Imported by the operators that launch these kernels (`sets.py`) when first used. Sets, slots and runs are those
of `tiles_route.py`: all tokens of a run have the same experts, whose weights a program loads once. Tiles are
`[features, tokens]`, accumulators float32. The state is `[slots / PIECE, features, PIECE]`: what a program of
the first stage writes, and reads in the backward pass, is one stretch of memory, and what one of the second stage
reads lies close together.
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
    """The first slot of a run, a multiple of 16, times 64; and its tokens less one, below 1024."""
    return tl.multiple_of(packed // 1024 * 16, 16), packed % 1024 + 1


@triton.jit
def find_run(t, rooms, run_set, runs, most, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr):
    """Whether there is a run of this number, its set, its first slot at each expert, and its tokens."""
    real, set_ = t < tl.load(rooms + EXPERTS), tl.load(run_set + t)
    slots, count = (), 1
    for j in tl.static_range(ACTIVE):
        slot, count = unpack(tl.load(runs + j * most + t))
        slots += (slot,)
    return real, set_, slots, count


@triton.jit
def room_for(count):
    """A multiple of 16: what lies between the last token of a set and that is nobody's."""
    return tl.multiple_of((count + 15) // 16 * 16, 16)


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
    """`[tokens, features]` of rows that lie anywhere."""
    kept = inside[:, None]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[None, :]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + features[None, :], mask=kept, other=0.0)


@triton.jit
def store_rows(tile, base, token, stride, inside, features, FEATURES: tl.constexpr):
    kept = inside[:, None]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[None, :]
    at = base + token.to(tl.int64)[:, None] * stride + features[None, :]
    tl.store(at, tl.trans(tile.to(base.dtype.element_ty)), mask=kept)


@triton.jit
def places(features, apart, slot, WHOLE: tl.constexpr, PIECE: tl.constexpr):
    """Where `[features, slots]` of a state of `WHOLE` features lie; `slot` starts at a multiple of 16."""
    pieces = (slot // PIECE).to(tl.int64) * (WHOLE * PIECE)
    return pieces[None, :] + (features * (apart * PIECE))[:, None] + (slot % PIECE)[None, :]


@triton.jit
def kept_places(features, here, room, FEATURES: tl.constexpr):
    """Which of them are in use; `room` is a multiple of 16."""
    kept = (here < room)[None, :]
    if features.shape[0] != FEATURES:
        kept = kept & (features < FEATURES)[:, None]
    return kept


@triton.jit
def load_states(
    base, features, apart, slots, here, room,
    FEATURES: tl.constexpr, WHOLE: tl.constexpr, PIECE: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """`[features, slots]` of the state of every expert of a run."""
    found, kept = (), kept_places(features, here, room, FEATURES)
    for j in tl.static_range(ACTIVE):
        found += (tl.load(base + places(features, apart, slots[j] + here, WHOLE, PIECE), mask=kept, other=0.0),)
    return found


@triton.jit
def into_forward(
    x, first, z, rooms, run_set, runs, token_of, most, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[s] = first[e, s] x[s] at every expert of a run, from one read of its rows of x.

    Here and below what the next block needs is loaded before this one is worked on, and what the first needs before
    the weights: programs are few and short, and what they wait for is memory.
    """
    s, t = tl.program_id(0), tl.program_id(1)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        room, here = room_for(count), tl.arange(0, BLOCK)
        outs, ins = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
        token = tl.load(token_of + slots[0] + here, mask=here < count, other=0)
        next_token = tl.load(token_of + slots[0] + BLOCK + here, mask=BLOCK + here < count, other=0)
        v = load_rows(x + s * IN, token, x_token, here < count, ins, IN)
        ws = matrices(first, set_, s, outs, ins, OUT, IN, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            ahead = block + BLOCK + here
            next_v = load_rows(x + s * IN, next_token, x_token, ahead < count, ins, IN)
            next_token = tl.load(token_of + slots[0] + BLOCK + ahead, mask=BLOCK + ahead < count, other=0)
            kept = kept_places(outs, block + here, room, OUT)
            for j in tl.static_range(ACTIVE):
                at = z + s * (OUT * PIECE) + places(outs, 1, slots[j] + block + here, SLICES * OUT, PIECE)
                tl.store(at, multiply(ws[j], tl.trans(v)).to(z.dtype.element_ty), mask=kept)
            v = next_v


@triton.jit
def out_forward(
    z, second, bias, y, gates, rooms, run_set, runs, token_of, most, y_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, STATE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_STATE: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[s] = sum over a run's experts of gate second[e, s] z[:, s], each row written once.

    Runs in the opposite order: what the first stage wrote last is still in the cache.
    """
    s, t = tl.program_id(0), most - 1 - tl.program_id(1)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        room, here = room_for(count), tl.arange(0, BLOCK)
        outs, states = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
        vs = load_states(z + s * PIECE, states, SLICES, slots, here, room, STATE, SLICES * STATE, PIECE, ACTIVE)
        ws = matrices(second, set_, s, outs, states, OUT, STATE, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            mine, ahead = block + here, block + BLOCK + here
            token = tl.load(token_of + slots[0] + mine, mask=mine < count, other=0)
            next_vs = load_states(
                z + s * PIECE, states, SLICES, slots, ahead, room, STATE, SLICES * STATE, PIECE, ACTIVE
            )
            total = tl.zeros((BLOCK_OUT, BLOCK), tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + s * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)[:, None]
            for j in tl.static_range(ACTIVE):
                gate = tl.load(gates + slots[j] + mine, mask=mine < count, other=0.0)
                total += multiply(ws[j], vs[j]) * gate[None, :]
            store_rows(total, y + s * OUT, token, y_token, mine < count, outs, OUT)
            vs = next_vs


@triton.jit
def out_backward(
    grad, z, second, gates, dz, dgate, dsecond, starts, rooms, token_of, slots, y_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, STATE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_STATE: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All gradients of the second stage, tile after tile of one expert.

    That of a gate comes from the state before the gate: there is no division, and a gate may be zero.
    """
    s, e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes, outs, states = tl.arange(0, TILE), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
    start, room = tl.multiple_of(tl.load(starts + e), PIECE), tl.multiple_of(tl.load(rooms + e), 16)
    w = load_matrix(second + (e.to(tl.int64) * SLICES + s) * OUT * STATE, outs, states, OUT, STATE)
    dw = tl.zeros((BLOCK_OUT, BLOCK_STATE), tl.float32)
    for first in range(split * TILE, room, SPLITS * TILE):
        here = first + lanes
        slot = start + here
        token = tl.load(token_of + slot, mask=here < room, other=-1)
        inside = token >= 0
        gate = tl.load(gates + slot, mask=here < room, other=0.0)[None, :]
        at = s * PIECE + places(states, SLICES, slot, SLICES * STATE, PIECE)
        kept = kept_places(states, here, room, STATE)
        # What lies in gaps was never written, and not all of it is a number.
        v = tl.where(inside[None, :], tl.load(z + at, mask=kept, other=0.0), 0.0)
        g = tl.trans(load_rows(grad + s * OUT, token, y_token, inside, outs, OUT))
        u = multiply(tl.trans(w), g)
        tl.store(dgate + s.to(tl.int64) * slots + slot, tl.sum(u * v.to(tl.float32), axis=0), mask=here < room)
        tl.store(dz + at, (u * gate).to(dz.dtype.element_ty), mask=kept)
        dw = tl.dot((g.to(tl.float32) * gate).to(g.dtype), tl.trans(v), dw, input_precision="ieee")
    at = (split * EXPERTS + e).to(tl.int64) * SLICES + s
    store_matrix(dw, dsecond + at * OUT * STATE, outs, states, OUT, STATE)


@triton.jit
def into_backward_input(
    dz, first, router, dlogits, dx, rooms, run_set, runs, token_of, most, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, HAS_ROUTER: tl.constexpr,
):  # fmt: skip
    """dx[s] = sum over a run's experts of first[e, s]ᵀ dz[s], and routerᵀ dlogits, each row written once."""
    s, t = tl.program_id(0), tl.program_id(1)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        room, here = room_for(count), tl.arange(0, BLOCK)
        outs, ins, experts = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_EXPERTS)
        base = dz + s * (OUT * PIECE)
        ds = load_states(base, outs, 1, slots, here, room, OUT, SLICES * OUT, PIECE, ACTIVE)
        ws = matrices(first, set_, s, outs, ins, OUT, IN, SLICES, EXPERTS, ACTIVE)
        if HAS_ROUTER:
            rows = router + experts[:, None] * x_token + s * IN
            r = tl.load(rows + ins[None, :], mask=(experts < EXPERTS)[:, None] & (ins < IN)[None, :], other=0.0)
        for block in range(0, count, BLOCK):
            mine, ahead = block + here, block + BLOCK + here
            token = tl.load(token_of + slots[0] + mine, mask=mine < count, other=0)
            next_ds = load_states(base, outs, 1, slots, ahead, room, OUT, SLICES * OUT, PIECE, ACTIVE)
            total = tl.zeros((BLOCK_IN, BLOCK), tl.float32)
            for j in tl.static_range(ACTIVE):
                total += multiply(tl.trans(ws[j]), ds[j])
            if HAS_ROUTER:
                g = load_rows(dlogits, token, EXPERTS, mine < count, experts, EXPERTS)
                total += multiply(tl.trans(r), tl.trans(g))
            store_rows(total, dx + s * IN, token, x_token, mine < count, ins, IN)
            ds = next_ds


@triton.jit
def into_backward_weight(
    dz, x, dfirst, starts, rooms, token_of, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dfirst[e, s] = sum over the expert's slots of dz xᵀ."""
    s, e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes, outs, ins = tl.arange(0, TILE), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    start, room = tl.multiple_of(tl.load(starts + e), PIECE), tl.multiple_of(tl.load(rooms + e), 16)
    dw = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for first in range(split * TILE, room, SPLITS * TILE):
        here = first + lanes
        token = tl.load(token_of + start + here, mask=here < room, other=-1)
        at = dz + s * (OUT * PIECE) + places(outs, 1, start + here, SLICES * OUT, PIECE)
        d = tl.load(at, mask=kept_places(outs, here, room, OUT), other=0.0)
        v = load_rows(x + s * IN, token, x_token, token >= 0, ins, IN)
        dw = tl.dot(d, v, dw, input_precision="ieee")
    at = (split * EXPERTS + e).to(tl.int64) * SLICES + s
    store_matrix(dw, dfirst + at * OUT * IN, outs, ins, OUT, IN)


@triton.jit
def add_gates(
    partials, index, dweight, rooms, run_set, runs, token_of, most, all_slots,
    SLICES: tl.constexpr, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's weights, from those that the output slices found."""
    t = tl.program_id(0)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        here = tl.arange(0, RUN)
        inside = here < count
        token = tl.load(token_of + slots[0] + here, mask=inside, other=0)
        for j in tl.static_range(ACTIVE):
            e = member(set_, j, EXPERTS, ACTIVE)
            total = tl.zeros((RUN,), tl.float32)
            at = partials + slots[j] + here
            for _ in range(SLICES):
                total += tl.load(at, mask=inside, other=0.0)
                at += all_slots
            for i in tl.static_range(ACTIVE):
                mine = tl.load(index + token * ACTIVE + i, mask=inside, other=-1).to(tl.int32) == e
                tl.store(dweight + token * ACTIVE + i, total, mask=inside & mine)
