"""Triton: the router, and the sort of tokens by their set of experts.

Imported by the operators that launch these kernels (`select.py`, `sets.py`) when first used. A set is
a number whose digits to the base `EXPERTS`, `ACTIVE` of them, are its experts in ascending order. Tokens of
one set lie next to each other from a multiple of 16 on. A run is at most `RUN` of them. For the gradients of
weights, each expert has a list of tiles of at most `TILE` such tokens.
"""

# No jaxtyping, no annotations but constexpr: Triton reads these signatures itself.
# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix


@triton.jit
def route_forward(
    x, weight, bias, logits, index, chosen, tokens, width, x_token,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, TIE: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits, the `ACTIVE` largest and their softmax, reading each token once.

    With `SPLIT`, the weight is the sum of three numbers of 16 bits: the matrix units then give the
    product of float32 with the input as it is.
    """
    here = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts, inside = tl.arange(0, BLOCK_EXPERTS), here < tokens
    rows = here.to(tl.int64)[:, None] * x_token
    total = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        features = first + tl.arange(0, BLOCK_WIDTH)
        v = tl.load(x + rows + features[None, :], mask=inside[:, None] & (features < width)[None, :], other=0.0)
        w = load_matrix(weight, experts, features, EXPERTS, width).to(tl.float32)
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
def count_sets(
    index, counts, tokens, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr,
    SETS: tl.constexpr, BLOCK_SETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many tokens of a chunk have each set."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    key = tl.where(inside, set_of(index, token, inside, EXPERTS, ACTIVE), -1)
    sets = tl.arange(0, BLOCK_SETS)
    count = tl.sum((key[:, None] == sets[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * SETS + sets, count, mask=sets < SETS)


@triton.jit
def add_chunks(
    counts, before, count, chunks,
    SETS: tl.constexpr, SOME_SETS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """How many tokens of each set there are, and how many before each chunk; one program for some sets."""
    sets = tl.program_id(0) * SOME_SETS + tl.arange(0, SOME_SETS)
    size = tl.zeros((SOME_SETS,), tl.int32)
    for chunk in range(0, chunks, BLOCK_CHUNKS):
        rows = chunk + tl.arange(0, BLOCK_CHUNKS)
        kept = (rows < chunks)[:, None] & (sets < SETS)[None, :]
        at = rows[:, None] * SETS + sets[None, :]
        here = tl.load(counts + at, mask=kept, other=0)
        tl.store(before + at, size[None, :] + tl.cumsum(here, 0) - here, mask=kept)
        size += tl.sum(here, axis=0)
    tl.store(count + sets, size, mask=sets < SETS)


@triton.jit
def lay_out(
    count, start, first_run, place, totals,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, SETS: tl.constexpr, BLOCK_SETS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where each set starts, its runs, and its tiles among those of each of its experts; one program."""
    sets, experts = tl.arange(0, BLOCK_SETS), tl.arange(0, BLOCK_EXPERTS)
    real = sets < SETS
    size = tl.load(count + sets, mask=real, other=0)
    room = (size + 15) // 16 * 16
    tl.store(start + sets, tl.cumsum(room, 0) - room, mask=real)
    runs = (size + RUN - 1) // RUN
    tl.store(first_run + sets, tl.cumsum(runs, 0) - runs, mask=real)
    tl.store(totals + EXPERTS, tl.sum(runs, axis=0))
    inside = tl.zeros((BLOCK_EXPERTS, BLOCK_SETS), tl.int32)
    for j in tl.static_range(ACTIVE):
        inside += (member(sets, j, EXPERTS, ACTIVE)[None, :] == experts[:, None]).to(tl.int32)
    mine = tl.where(inside > 0, ((size + TILE - 1) // TILE)[None, :], 0)
    kept = (experts < EXPERTS)[:, None] & real[None, :]
    tl.store(place + experts[:, None] * SETS + sets[None, :], tl.cumsum(mine, 1) - mine, mask=kept)
    tl.store(totals + experts, tl.sum(mine, axis=1), mask=experts < EXPERTS)


@triton.jit
def fill_in(
    index, weight, before, start, count, first_run, place, token_of, gates, run_set, runs, listed,
    tokens, chunks, most, positions, EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, SETS: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Token and gates at each position (a program for each chunk); runs and tiles of each set (one for each set)."""
    program, here = tl.program_id(0), tl.arange(0, CHUNK)
    if program < chunks:
        token = program * CHUNK + here
        inside = token < tokens
        key = tl.where(inside, set_of(index, token, inside, EXPERTS, ACTIVE), 0)
        earlier = (key[:, None] == key[None, :]) & (here[None, :] < here[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        position = tl.load(start + key) + tl.load(before + program * SETS + key) + rank
        tl.store(token_of + position, token, mask=inside)
        for j in tl.static_range(ACTIVE):
            mine = tl.load(index + token * ACTIVE + j, mask=inside, other=0).to(tl.int32)
            plane = ACTIVE - 1 - larger_than(mine, index, token, inside, ACTIVE)
            gate = tl.load(weight + token * ACTIVE + j, mask=inside, other=0.0)
            tl.store(gates + plane.to(tl.int64) * positions + position, gate, mask=inside)
    else:
        s = program - chunks
        size, begin, first = tl.load(count + s), tl.load(start + s), tl.load(first_run + s)
        made = (size + RUN - 1) // RUN
        for block in range(0, made, CHUNK):
            i = block + here
            tl.store(run_set + first + i, tl.full((CHUNK,), 0, tl.int32) + s, mask=i < made)
            packed = (begin + i * RUN) * 128 + tl.minimum(size - i * RUN, RUN) - 1
            tl.store(runs + first + i, packed, mask=i < made)
        made = (size + TILE - 1) // TILE
        for block in range(0, made, CHUNK):
            i = block + here
            packed = (begin + i * TILE) * 128 + tl.minimum(size - i * TILE, TILE) - 1
            for j in tl.static_range(ACTIVE):
                e = member(s, j, EXPERTS, ACTIVE)
                at = listed + e * most + tl.load(place + e * SETS + s)
                tl.store(at + i, packed + j * 256, mask=i < made)
