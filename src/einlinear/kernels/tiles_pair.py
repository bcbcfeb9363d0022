"""Triton: a whole two-factor layer in one launch (`pair.py`).

The letters of a BTT: the first factor is `[g, (r f), a]`, the second `[f, e, (g r)]`. G, A, R, F and E
are their sizes; those that begin with B are rounded up to powers of two.
"""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix


@triton.jit
def load_first(first, G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr,
               BG: tl.constexpr, BA: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """[g, (r f), a]"""
    g, a, rf = tl.arange(0, BG)[:, None, None], tl.arange(0, BA)[None, None, :], tl.arange(0, BR * BF)[None, :, None]
    r, f = rf // BF, rf % BF
    at = first + ((g * R + r) * F + f) * A + a
    if BG == G and BA == A and BR == R and BF == F:
        return tl.load(at)
    else:
        return tl.load(at, mask=(g < G) & (a < A) & (r < R) & (f < F), other=0.0)


@triton.jit
def load_second(second, G: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
                BG: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """[f, e, (g r)]"""
    f, e, gr = tl.arange(0, BF)[:, None, None], tl.arange(0, BE)[None, :, None], tl.arange(0, BG * BR)[None, None, :]
    g, r = gr // BR, gr % BR
    at = second + ((f * E + e) * G + g) * R + r
    if BG == G and BR == R and BF == F and BE == E:
        return tl.load(at)
    else:
        return tl.load(at, mask=(g < G) & (r < R) & (f < F) & (e < E), other=0.0)


@triton.jit
def load_blocks(x, tokens, left, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, BW: tl.constexpr, stride):
    """[blocks, tokens, features of a block]"""
    b, i, t = tl.arange(0, B)[:, None, None], tl.arange(0, BW)[None, None, :], tokens[None, :, None]
    inside = t < left
    if B != BLOCKS or BW != WIDTH:
        inside = inside & (b < BLOCKS) & (i < WIDTH)
    return tl.load(x + t * stride + b * WIDTH + i, mask=inside, other=0.0)


@triton.jit
def store_blocks(tile, y, tokens, left, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, BW: tl.constexpr):
    b, i, t = tl.arange(0, B)[:, None, None], tl.arange(0, BW)[None, None, :], tokens[None, :, None]
    inside = t < left
    if B != BLOCKS or BW != WIDTH:
        inside = inside & (b < BLOCKS) & (i < WIDTH)
    tl.store(y + t * (BLOCKS * WIDTH) + b * WIDTH + i, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def pair_tile(
    x, first, second, bias, y, tokens, share, x_token,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    BG: tl.constexpr, BA: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Both factors of `share` tokens: the state goes from one to the other through shared memory.

    `ONCE` says that they are one tile: without a loop, the factors need no place in shared memory.
    """
    here = tl.arange(0, BLOCK_TOKENS)
    w, u = load_first(first, G, A, R, F, BG, BA, BR, BF), load_second(second, G, R, F, E, BG, BR, BF, BE)
    if ONCE:
        share = BLOCK_TOKENS
    for begin in range(0, share, BLOCK_TOKENS):
        start = tl.program_id(0).to(tl.int64) * share + begin
        left = tokens - start
        v = load_blocks(x + start * x_token, here, left, G, A, BG, BA, x_token)
        z = tl.dot(v, tl.permute(w, (0, 2, 1)), input_precision="ieee").to(v.dtype)  # [g, token, (r f)]
        z = tl.permute(tl.reshape(z, (BG, BLOCK_TOKENS, BR, BF)), (3, 1, 0, 2))
        z = tl.reshape(z, (BF, BLOCK_TOKENS, BG * BR))
        total = tl.dot(z, tl.permute(u, (0, 2, 1)), input_precision="ieee")  # [f, token, e]
        if HAS_BIAS:
            f, e = tl.arange(0, BF)[:, None], tl.arange(0, BE)[None, :]
            added = tl.load(bias + f * E + e, mask=(f < F) & (e < E), other=0.0)
            total += added.to(tl.float32)[:, None, :]
        store_blocks(total, y + start * (F * E), here, left, F, E, BF, BE)


@triton.jit
def pair_backward(
    grad, x, first, second, dx, dfirst, dsecond, dbias, tokens, share, x_token, grad_token,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    BG: tl.constexpr, BA: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """All gradients of a layer in one pass over `share` tokens, the state made again; partial sums for the factors."""
    split = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK_TOKENS)
    w, u = load_first(first, G, A, R, F, BG, BA, BR, BF), load_second(second, G, R, F, E, BG, BR, BF, BE)
    dw, du = tl.zeros((BG, BR * BF, BA), tl.float32), tl.zeros((BF, BE, BG * BR), tl.float32)
    db = tl.zeros((BF, BE), tl.float32)
    for begin in range(0, share, BLOCK_TOKENS):
        start = split * share + begin
        left = tokens - start
        v = load_blocks(x + start * x_token, here, left, G, A, BG, BA, x_token)
        g = load_blocks(grad + start * grad_token, here, left, F, E, BF, BE, grad_token)
        z = tl.dot(v, tl.permute(w, (0, 2, 1)), input_precision="ieee").to(v.dtype)
        z = tl.permute(tl.reshape(z, (BG, BLOCK_TOKENS, BR, BF)), (3, 1, 0, 2))
        z = tl.reshape(z, (BF, BLOCK_TOKENS, BG * BR))
        du = tl.dot(tl.permute(g, (0, 2, 1)), z, du, input_precision="ieee")
        if HAS_BIAS:
            db += tl.sum(g.to(tl.float32), axis=1)
        dz = tl.dot(g, u, input_precision="ieee").to(v.dtype)  # [f, token, (g r)]
        dz = tl.permute(tl.reshape(dz, (BF, BLOCK_TOKENS, BG, BR)), (2, 1, 3, 0))
        dz = tl.reshape(dz, (BG, BLOCK_TOKENS, BR * BF))
        dw = tl.dot(tl.permute(dz, (0, 2, 1)), v, dw, input_precision="ieee")
        d = tl.dot(dz, w, input_precision="ieee")
        store_blocks(d, dx + start * (G * A), here, left, G, A, BG, BA)
    g, a, rf = tl.arange(0, BG)[:, None, None], tl.arange(0, BA)[None, None, :], tl.arange(0, BR * BF)[None, :, None]
    r, f = rf // BF, rf % BF
    into = dfirst + split * (G * R * F * A) + ((g * R + r) * F + f) * A + a
    tl.store(into, dw, mask=(g < G) & (a < A) & (r < R) & (f < F))
    f, e, gr = tl.arange(0, BF)[:, None, None], tl.arange(0, BE)[None, :, None], tl.arange(0, BG * BR)[None, None, :]
    g, r = gr // BR, gr % BR
    into = dsecond + split * (F * E * G * R) + ((f * E + e) * G + g) * R + r
    tl.store(into, du, mask=(g < G) & (r < R) & (f < F) & (e < E))
    if HAS_BIAS:
        f, e = tl.arange(0, BF)[:, None], tl.arange(0, BE)[None, :]
        tl.store(dbias + split * (F * E) + f * E + e, db, mask=(f < F) & (e < E))


@triton.jit
def pair_token(
    x, firsts, seconds, biases, ys, x_token,
    G: tl.constexpr, A: tl.constexpr, RS: tl.constexpr, FS: tl.constexpr, ES: tl.constexpr,
    BLOCK_STATES: tl.constexpr, BA: tl.constexpr, BES: tl.constexpr,
):  # fmt: skip
    """One output slice of one layer for one token, the state that it reads made anew: for a few tokens."""
    s, token, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    for p in tl.static_range(len(firsts)):
        if (layer == p) & (s < FS[p]):
            ins, outs, states = tl.arange(0, BA), tl.arange(0, BES[p]), tl.arange(0, BLOCK_STATES[p])
            of = states // RS[p]
            inside = (states < G * RS[p])[:, None] & (ins < A)[None, :]
            row = of * (RS[p] * FS[p]) + (states % RS[p]) * FS[p] + s
            w = tl.load(firsts[p] + row[:, None] * A + ins[None, :], mask=inside, other=0.0).to(tl.float32)
            v = load_matrix(seconds[p] + s * (ES[p] * G * RS[p]), outs, states, ES[p], G * RS[p]).to(tl.float32)
            u = tl.load(x + token * x_token + of[:, None] * A + ins[None, :], mask=inside, other=0.0).to(tl.float32)
            z = tl.sum(w * u, axis=1).to(x.dtype.element_ty).to(tl.float32)
            total = tl.sum(v * z[None, :], axis=1)
            if len(biases):
                total += tl.load(biases[p] + s * ES[p] + outs, mask=outs < ES[p], other=0.0).to(tl.float32)
            into = ys[p] + token * (FS[p] * ES[p]) + s * ES[p] + outs
            tl.store(into, total.to(x.dtype.element_ty), mask=outs < ES[p])
