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
def into_forward(
    x, first, z, rooms, run_set, runs, token_of, most, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[s] = first[e, s] x[s] at every expert of a run, from one read of its rows of x.

    What the next block needs is loaded before this one is worked on, and what the first one needs before the weights.
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
        room = room_for(count)
        outs, states = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_STATE)
        ws = matrices(second, set_, s, outs, states, OUT, STATE, SLICES, EXPERTS, ACTIVE)
        for block in range(0, count, BLOCK):
            here = block + tl.arange(0, BLOCK)
            inside, kept = here < count, kept_places(states, here, room, STATE)
            token = tl.load(token_of + slots[0] + here, mask=inside, other=0)
            total = tl.zeros((BLOCK_OUT, BLOCK), tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + s * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)[:, None]
            for j in tl.static_range(ACTIVE):
                at = z + s * PIECE + places(states, SLICES, slots[j] + here, SLICES * STATE, PIECE)
                v = tl.load(at, mask=kept, other=0.0)
                gate = tl.load(gates + slots[j] + here, mask=inside, other=0.0)
                total += multiply(ws[j], v) * gate[None, :]
            store_rows(total, y + s * OUT, token, y_token, inside, outs, OUT)


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
        v = tl.load(z + at, mask=kept, other=0.0)
        g = tl.trans(load_rows(grad + s * OUT, token, y_token, inside, outs, OUT))
        u = multiply(tl.trans(w), g)
        tl.store(dgate + s.to(tl.int64) * slots + slot, tl.sum(u * v.to(tl.float32), axis=0), mask=here < room)
        tl.store(dz + at, (u * gate).to(dz.dtype.element_ty), mask=kept)
        dw = tl.dot((g.to(tl.float32) * gate).to(g.dtype), tl.trans(v), dw, input_precision="ieee")
    at = (split * EXPERTS + e).to(tl.int64) * SLICES + s
    store_matrix(dw, dsecond + at * OUT * STATE, outs, states, OUT, STATE)


@triton.jit
def into_backward_input(
    dz, first, router, scale, dlogits, dx, rooms, run_set, runs, token_of, most, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, HAS_ROUTER: tl.constexpr,
):  # fmt: skip
    """dx[s] = sum over a run's experts of first[e, s]ᵀ dz[s], and scale routerᵀ dlogits, each row written once."""
    s, t = tl.program_id(0), tl.program_id(1)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        room = room_for(count)
        outs, ins, experts = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_EXPERTS)
        ws = matrices(first, set_, s, outs, ins, OUT, IN, SLICES, EXPERTS, ACTIVE)
        if HAS_ROUTER:
            rows = router + experts[:, None] * x_token + s * IN
            r = tl.load(rows + ins[None, :], mask=(experts < EXPERTS)[:, None] & (ins < IN)[None, :], other=0.0)
        for block in range(0, count, BLOCK):
            here = block + tl.arange(0, BLOCK)
            inside, kept = here < count, kept_places(outs, here, room, OUT)
            token = tl.load(token_of + slots[0] + here, mask=inside, other=0)
            total = tl.zeros((BLOCK_IN, BLOCK), tl.float32)
            for j in tl.static_range(ACTIVE):
                at = dz + s * (OUT * PIECE) + places(outs, 1, slots[j] + here, SLICES * OUT, PIECE)
                total += multiply(tl.trans(ws[j]), tl.load(at, mask=kept, other=0.0))
            if HAS_ROUTER:
                g = load_rows(dlogits, token, EXPERTS, inside, experts, EXPERTS)
                total += multiply(tl.trans(r), tl.trans(g)) * scale
            store_rows(total, dx + s * IN, token, x_token, inside, ins, IN)


@triton.jit
def into_backward_weight(
    dz, x, dlogits, dfirst, drouter, starts, rooms, token_of, x_token,
    SLICES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, HAS_ROUTER: tl.constexpr,
):  # fmt: skip
    """dfirst[e, s] = sum over the expert's slots of dz xᵀ.

    And of x dlogitsᵀ: of all experts together that is the router's gradient, in which a token counts `ACTIVE` times.
    """
    s, e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes, outs, ins = tl.arange(0, TILE), tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    experts = tl.arange(0, BLOCK_EXPERTS)
    start, room = tl.multiple_of(tl.load(starts + e), PIECE), tl.multiple_of(tl.load(rooms + e), 16)
    dw = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    dr = tl.zeros((BLOCK_IN, BLOCK_EXPERTS), tl.float32)
    for first in range(split * TILE, room, SPLITS * TILE):
        here = first + lanes
        token = tl.load(token_of + start + here, mask=here < room, other=-1)
        at = dz + s * (OUT * PIECE) + places(outs, 1, start + here, SLICES * OUT, PIECE)
        d = tl.load(at, mask=kept_places(outs, here, room, OUT), other=0.0)
        v = load_rows(x + s * IN, token, x_token, token >= 0, ins, IN)
        dw = tl.dot(d, v, dw, input_precision="ieee")
        if HAS_ROUTER:
            g = load_rows(dlogits, token, EXPERTS, token >= 0, experts, EXPERTS)
            dr = tl.dot(tl.trans(v), g, dr, input_precision="ieee")
    part = (split * EXPERTS + e).to(tl.int64)
    store_matrix(dw, dfirst + (part * SLICES + s) * OUT * IN, outs, ins, OUT, IN)
    if HAS_ROUTER:
        rows = drouter + (part * EXPERTS * SLICES + s) * IN + experts[None, :] * (SLICES * IN)
        tl.store(rows + ins[:, None], dr, mask=(ins < IN)[:, None] & (experts < EXPERTS)[None, :])


@triton.jit
def add_gates(
    partials, index, gates, dlogits, result, rooms, run_set, runs, token_of, most, all_slots,
    SLICES: tl.constexpr, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, RUN: tl.constexpr, SOME_SLICES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, HAS_ROUTER: tl.constexpr, HAS_LOGITS: tl.constexpr,
):  # fmt: skip
    """The gradient of each token's weights, from those that the output slices found.

    With a router, it goes on through the softmax over the chosen, and is added to what the logits have of their own.
    """
    t = tl.program_id(0)
    real, set_, slots, count = find_run(t, rooms, run_set, runs, most, EXPERTS, ACTIVE)
    if real:
        here, some = tl.arange(0, RUN), tl.arange(0, SOME_SLICES)
        inside = here < count
        token = tl.load(token_of + slots[0] + here, mask=inside, other=0)
        found = ()
        for j in tl.static_range(ACTIVE):
            total = tl.zeros((RUN,), tl.float32)
            for first in range(0, SLICES, SOME_SLICES):
                at = (first + some).to(tl.int64)[:, None] * all_slots + (slots[j] + here)[None, :]
                kept = (first + some < SLICES)[:, None] & inside[None, :]
                total += tl.sum(tl.load(partials + at, mask=kept, other=0.0), axis=0)
            found += (total,)
        if HAS_ROUTER:
            experts, mean = tl.arange(0, BLOCK_EXPERTS), tl.zeros((RUN,), tl.float32)
            for j in tl.static_range(ACTIVE):
                mean += tl.load(gates + slots[j] + here, mask=inside, other=0.0) * found[j]
            at = token[:, None] * EXPERTS + experts[None, :]
            kept = inside[:, None] & (experts < EXPERTS)[None, :]
            if HAS_LOGITS:
                whole = tl.load(dlogits + at, mask=kept, other=0.0)
            else:
                whole = tl.zeros((RUN, BLOCK_EXPERTS), tl.float32)
            for j in tl.static_range(ACTIVE):
                d = tl.load(gates + slots[j] + here, mask=inside, other=0.0) * (found[j] - mean)
                whole += tl.where((experts == member(set_, j, EXPERTS, ACTIVE))[None, :], d[:, None], 0.0)
            tl.store(result + at, whole.to(result.dtype.element_ty), mask=kept)
        else:
            for j in tl.static_range(ACTIVE):
                e = member(set_, j, EXPERTS, ACTIVE)
                for i in tl.static_range(ACTIVE):
                    mine = tl.load(index + token * ACTIVE + i, mask=inside, other=-1).to(tl.int32) == e
                    tl.store(result + token * ACTIVE + i, found[j], mask=inside & mine)


@triton.jit
def add_sums(parts, sums, lengths, factors, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of several tensors over their first dimensions, each times a factor; always in the same order."""
    program = tl.program_id(0)
    for p in tl.static_range(len(parts)):
        if program >= 0 and program * BLOCK < lengths[p]:
            at = program * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(SPLITS[p]):
                part = parts[p] + tl.full((1,), split, tl.int64) * lengths[p]
                total += tl.load(part + at, mask=at < lengths[p], other=0.0)
            tl.store(sums[p] + at, (total * factors[p]).to(sums[p].dtype.element_ty), mask=at < lengths[p])
        program -= (lengths[p] + BLOCK - 1) // BLOCK
