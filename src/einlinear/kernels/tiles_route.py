"""Triton: the router, and the sort of tokens by their set of experts.

Imported by the operators that launch these kernels (`select.py`, `sets.py`) when first used. A set is
a number whose digits to the base `EXPERTS`, `ACTIVE` of them, are its experts in ascending order. A slot is one token
at one of its experts. The slots of an expert lie next to each other, from a multiple of `PIECE` on, and among them
those of each set, from a multiple of `ALIGN` on; what is left between is nobody's. A run is at most `RUN` tokens of
one set, and a tile at most `TILE`.
"""

# No jaxtyping, no annotations but constexpr: Triton reads these signatures itself.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix


@triton.jit
def route_forward(
    x, weight, scale, bias, logits, index, chosen, counts, tokens, width, x_token,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, TIE: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SETS: tl.constexpr, BLOCK_SETS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Logits, the `ACTIVE` largest and their softmax, reading each token once.

    With `SPLIT`, the weight is the sum of three numbers of 16 bits: the matrix units then give the
    product of float32 with the input as it is. With `COUNTED`, this is `count_sets` too.
    """
    here = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts, inside = tl.arange(0, BLOCK_EXPERTS), here < tokens
    rows = here.to(tl.int64)[:, None] * x_token
    total = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        features = first + tl.arange(0, BLOCK_WIDTH)
        v = tl.load(x + rows + features[None, :], mask=inside[:, None] & (features < width)[None, :], other=0.0)
        w = load_matrix(weight, experts, features, EXPERTS, width).to(tl.float32) * scale
        if SPLIT:
            high = w.to(v.dtype)
            rest = w - high.to(tl.float32)
            middle = rest.to(v.dtype)
            low = (rest - middle.to(tl.float32)).to(v.dtype)
            total = tl.dot(v, tl.trans(high), total)
            total = tl.dot(v, tl.trans(middle), total)
            total = tl.dot(v, tl.trans(low), total)
        else:
            total = tl.dot(v, tl.trans(w), total, input_precision="ieee")
    real = (experts < EXPERTS)[None, :]
    tl.store(logits + here[:, None] * EXPERTS + experts[None, :], total, mask=inside[:, None] & real)
    # Equal logits are parted by turns, as in Router.
    score = total + TIE / EXPERTS * ((experts[None, :] - here[:, None] % EXPERTS + EXPERTS) % EXPERTS).to(tl.float32)
    if HAS_BIAS:
        score += tl.load(bias + experts, mask=experts < EXPERTS, other=0.0)[None, :]
    # No number is as small as what is taken or none: a logit that is infinite, or no number, is an expert all the same.
    score = tl.where(score != score, float("inf"), tl.maximum(score, -3.4e38))
    score = tl.where(real, score, float("-inf"))
    chosen_experts, chosen_logits = (), ()
    largest = tl.full((BLOCK_TOKENS,), float("-inf"), tl.float32)
    for _ in tl.static_range(ACTIVE):
        e = tl.argmax(score, axis=1)
        taken = experts[None, :] == e[:, None]
        v = tl.sum(tl.where(taken, total, 0.0), axis=1)
        largest = tl.maximum(largest, v)
        chosen_experts += (e,)
        chosen_logits += (v,)
        score = tl.where(taken, float("-inf"), score)
    whole = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for j in tl.static_range(ACTIVE):
        whole += tl.exp(chosen_logits[j] - largest)
    for j in tl.static_range(ACTIVE):
        tl.store(index + here * ACTIVE + j, chosen_experts[j].to(tl.int64), mask=inside)
        tl.store(chosen + here * ACTIVE + j, tl.exp(chosen_logits[j] - largest) / whole, mask=inside)
    if COUNTED:
        sets = tl.zeros((BLOCK_TOKENS,), tl.int32)
        for j in tl.static_range(ACTIVE):
            digit = chosen_experts[j].to(tl.int32)
            for i in tl.static_range(ACTIVE):
                digit *= tl.where(chosen_experts[i] > chosen_experts[j], EXPERTS, 1)
            sets += digit
        store_counts(sets, inside, counts, SETS, BLOCK_SETS)


@triton.jit
def route_backward(
    dlogits, dchosen, index, chosen, result, tokens,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits: their own, and through the softmax over the chosen."""
    here = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts, inside = tl.arange(0, BLOCK_EXPERTS), here < tokens
    kept = inside[:, None] & (experts < EXPERTS)[None, :]
    at = here[:, None] * EXPERTS + experts[None, :]
    total = tl.load(dlogits + at, mask=kept, other=0.0)
    mean = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for j in tl.static_range(ACTIVE):
        w = tl.load(chosen + here * ACTIVE + j, mask=inside, other=0.0)
        mean += w * tl.load(dchosen + here * ACTIVE + j, mask=inside, other=0.0)
    for j in tl.static_range(ACTIVE):
        w = tl.load(chosen + here * ACTIVE + j, mask=inside, other=0.0)
        d = w * (tl.load(dchosen + here * ACTIVE + j, mask=inside, other=0.0) - mean)
        e = tl.load(index + here * ACTIVE + j, mask=inside, other=0).to(tl.int32)
        total += tl.where(experts[None, :] == e[:, None], d[:, None], 0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=kept)


@triton.jit
def larger_than(mine, index, token, inside, ACTIVE: tl.constexpr):
    """How many of a token's experts have larger numbers."""
    count = tl.zeros(token.shape, tl.int32)
    for i in tl.static_range(ACTIVE):
        count += (tl.load(index + token * ACTIVE + i, mask=inside, other=0).to(tl.int32) > mine).to(tl.int32)
    return count


@triton.jit
def set_of(index, token, inside, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr):
    """The set of each token's experts, which stand in any order in `index`."""
    key = tl.zeros(token.shape, tl.int32)
    for j in tl.static_range(ACTIVE):
        mine = tl.load(index + token * ACTIVE + j, mask=inside, other=0).to(tl.int32)
        larger = larger_than(mine, index, token, inside, ACTIVE)
        for i in tl.static_range(ACTIVE - 1):
            mine *= tl.where(larger > i, EXPERTS, 1)
        key += mine
    return key


@triton.jit
def member(sets, PLACE: tl.constexpr, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr):
    """The expert at a place of a set."""
    rest = sets
    for _ in tl.static_range(ACTIVE - 1 - PLACE):
        rest = rest // EXPERTS
    return rest % EXPERTS


@triton.jit
def store_counts(sets, inside, counts, SETS: tl.constexpr, BLOCK_SETS: tl.constexpr):
    """How many tokens of this program's chunk have each set; the counter after all chunks starts at zero."""
    if tl.program_id(0) == 0:
        tl.store(counts + tl.num_programs(0) * SETS, 0)
    lanes = tl.arange(0, BLOCK_SETS)
    count = tl.histogram(sets, BLOCK_SETS, mask=inside)
    tl.store(counts + tl.program_id(0) * SETS + lanes, count, mask=lanes < SETS)


@triton.jit
def count_sets(
    index, counts, tokens, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr,
    SETS: tl.constexpr, BLOCK_SETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many tokens of a chunk have each set."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    store_counts(set_of(index, token, inside, EXPERTS, ACTIVE), inside, counts, SETS, BLOCK_SETS)


@triton.jit
def add_chunks(
    counts, before, size, chunks, SETS: tl.constexpr, SOME_SETS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):  # fmt: skip
    """How many tokens of each set there are, and how many before each chunk; for some sets."""
    sets = tl.program_id(0) * SOME_SETS + tl.arange(0, SOME_SETS)
    total = tl.zeros((SOME_SETS,), tl.int32)
    for chunk in range(0, chunks, BLOCK_CHUNKS):
        rows = chunk + tl.arange(0, BLOCK_CHUNKS)
        kept = (rows < chunks)[:, None] & (sets < SETS)[None, :]
        at = rows[:, None] * SETS + sets[None, :]
        here = tl.load(counts + at, mask=kept, other=0)
        tl.store(before + at, total[None, :] + tl.cumsum(here, 0) - here, mask=kept)
        total += tl.sum(here, axis=0)
    tl.store(size + sets, total, mask=sets < SETS)


@triton.jit
def lay_out(
    counts, before, size, place, first_run, first_tile, starts, rooms, chunks,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, SETS: tl.constexpr, BLOCK_SETS: tl.constexpr,
    SOME_SETS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The first slot of each set at each of its experts, its first run and tile, and the slots of each expert.

    Each program adds up the chunks for some sets, and the last one to have done so then knows all sizes: no program
    waits for another.
    """
    add_chunks(counts, before, size, chunks, SETS, SOME_SETS, BLOCK_CHUNKS)
    tl.debug_barrier()  # all of the program's sizes are written before it says so
    if tl.atomic_add(counts + chunks * SETS, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        sets, experts = tl.arange(0, BLOCK_SETS), tl.arange(0, BLOCK_EXPERTS)
        count = tl.load(size + sets, mask=sets < SETS, other=0)
        made = (count + RUN - 1) // RUN
        tl.store(first_run + sets, tl.cumsum(made, 0) - made, mask=sets < SETS)
        tl.store(rooms + EXPERTS, tl.sum(made, axis=0))
        made = (count + TILE - 1) // TILE
        tl.store(first_tile + sets, tl.cumsum(made, 0) - made, mask=sets < SETS)
        tl.store(rooms + EXPERTS + 1, tl.sum(made, axis=0))
        has = tl.zeros((BLOCK_EXPERTS, BLOCK_SETS), tl.int32)
        for j in tl.static_range(ACTIVE):
            has += (member(sets, j, EXPERTS, ACTIVE)[None, :] == experts[:, None]).to(tl.int32)
        mine = tl.where(has > 0, ((count + ALIGN - 1) // ALIGN * ALIGN)[None, :], 0)
        taken = tl.sum(mine, axis=1)
        whole = (taken + PIECE - 1) // PIECE * PIECE
        start = tl.cumsum(whole, 0) - whole
        tl.store(starts + experts, start, mask=experts < EXPERTS)
        tl.store(rooms + experts, taken, mask=experts < EXPERTS)
        slot = start[:, None] + tl.cumsum(mine, 1) - mine
        for j in tl.static_range(ACTIVE):
            here = (member(sets, j, EXPERTS, ACTIVE)[None, :] == experts[:, None]) & (sets < SETS)[None, :]
            tl.store(place + j * SETS + sets[None, :] + 0 * experts[:, None], slot, mask=here)


@triton.jit
def fill_in(
    index, weight, before, size, place, first_run, first_tile, run_set, runs, tile_set, tiles, token_of, gates,
    tokens, chunks, most_runs, most_tiles,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, SETS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Token and gate of each slot (a program for each chunk); the runs and tiles of each set (one for each set)."""
    program, here = tl.program_id(0), tl.arange(0, CHUNK)
    if program < chunks:
        token = program * CHUNK + here
        inside = token < tokens
        key = tl.where(inside, set_of(index, token, inside, EXPERTS, ACTIVE), 0)
        earlier = (key[:, None] == key[None, :]) & (here[None, :] < here[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1) + tl.load(before + program * SETS + key)
        for j in tl.static_range(ACTIVE):
            tl.store(token_of + tl.load(place + j * SETS + key) + rank, token, mask=inside)
        for i in tl.static_range(ACTIVE):
            mine = tl.load(index + token * ACTIVE + i, mask=inside, other=0).to(tl.int32)
            plane = ACTIVE - 1 - larger_than(mine, index, token, inside, ACTIVE)
            gate = tl.load(weight + token * ACTIVE + i, mask=inside, other=0.0)
            tl.store(gates + tl.load(place + plane * SETS + key, mask=inside, other=0) + rank, gate, mask=inside)
    else:
        s = program - chunks
        count, lanes = tl.load(size + s), tl.arange(0, ALIGN)
        for j in tl.static_range(ACTIVE):
            begin = tl.load(place + j * SETS + s)
            gap = count + lanes < (count + ALIGN - 1) // ALIGN * ALIGN
            tl.store(token_of + begin + count + lanes, tl.full((ALIGN,), -1, tl.int32), mask=gap)
            tl.store(gates + begin + count + lanes, tl.zeros((ALIGN,), tl.float32), mask=gap)
            cut(begin, count, s, run_set, runs + j * most_runs, tl.load(first_run + s), RUN, CHUNK)
            cut(begin, count, s, tile_set, tiles + j * most_tiles, tl.load(first_tile + s), TILE, CHUNK)


@triton.jit
def cut(begin, count, set_, set_of_part, parts, first, PART: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of a set in parts: first slot and size of each, packed, and its set."""
    for block in range(0, (count + PART - 1) // PART, CHUNK):
        i = block + tl.arange(0, CHUNK)
        kept = i * PART < count
        tl.store(parts + first + i, (begin + i * PART) * 64 + tl.minimum(count - i * PART, PART) - 1, mask=kept)
        tl.store(set_of_part + first + i, tl.zeros((CHUNK,), tl.int32) + set_, mask=kept)
