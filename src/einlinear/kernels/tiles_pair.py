"""Triton: layers of two factors in one launch, for a few tokens (`pair.py`)."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl

from einlinear.kernels.tiles import load_matrix


@triton.jit
def pair_token(
    x, firsts, seconds, biases, ys, x_token,
    G: tl.constexpr, A: tl.constexpr, RS: tl.constexpr, FS: tl.constexpr, ES: tl.constexpr,
    BLOCK_STATES: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_ES: tl.constexpr,
):  # fmt: skip
    """One output slice of one layer for one token, the state that it reads made anew.

    The letters of a BTT: first factors are `[g, (r f), a]`, second ones `[f, e, (g r)]`.
    """
    s, token, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    for p in tl.static_range(len(firsts)):
        if (layer == p) & (s < FS[p]):
            ins, outs, states = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_ES[p]), tl.arange(0, BLOCK_STATES[p])
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
