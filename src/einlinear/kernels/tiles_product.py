"""Triton: the matrix that two factors stand for (`product.py`)."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def product_forward(
    left, right, weight, ROWS, COLUMNS, RANK: tl.constexpr,
    E: tl.constexpr, A: tl.constexpr,
    LF: tl.constexpr, LE: tl.constexpr, LG: tl.constexpr, LA: tl.constexpr, LR: tl.constexpr,
    RF: tl.constexpr, RE: tl.constexpr, RG: tl.constexpr, RA: tl.constexpr, RR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """weight[(f e), (g a)] = the sum over r of left · right, each read by its strides along f, e, g, a and r."""
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (row < ROWS) & (column < COLUMNS)
    f, e, g, a = row // E, row % E, column // A, column % A
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for r in tl.static_range(RANK):
        one = tl.load(left + f * LF + e * LE + g * LG + a * LA + r * LR, mask=inside, other=0.0)
        two = tl.load(right + f * RF + e * RE + g * RG + a * RA + r * RR, mask=inside, other=0.0)
        total += one.to(tl.float32) * two.to(tl.float32)
    tl.store(weight + row.to(tl.int64) * COLUMNS + column, total.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def product_blocks(
    first, second, weight,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of factors `[g, (r f), a]` and `[f, e, (g r)]`: one program a block (f, g) of the matrix."""
    g, f = tl.program_id(0), tl.program_id(1)
    e, a, r = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_R)
    one, two = ((g * R + r) * F + f)[:, None] * A + a[None, :], (f * E + e)[:, None] * (G * R) + g * R + r[None, :]
    u = tl.load(first + one, mask=(r < R)[:, None] & (a < A)[None, :], other=0.0)
    v = tl.load(second + two, mask=(e < E)[:, None] & (r < R)[None, :], other=0.0)
    total = tl.dot(v, u, input_precision="ieee")
    at = (f * E + e).to(tl.int64)[:, None] * (G * A) + g * A + a[None, :]
    tl.store(weight + at, total.to(weight.dtype.element_ty), mask=(e < E)[:, None] & (a < A)[None, :])


@triton.jit
def product_backward(
    grad, first, second, dfirst, dsecond,
    G: tl.constexpr, A: tl.constexpr, R: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of factors `[g, (r f), a]` and `[f, e, (g r)]`: one program a block (f, g) of the matrix."""
    g, f = tl.program_id(0), tl.program_id(1)
    e, a, r = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_R)
    one, two = ((g * R + r) * F + f)[:, None] * A + a[None, :], (f * E + e)[:, None] * (G * R) + g * R + r[None, :]
    left, right = (r < R)[:, None] & (a < A)[None, :], (e < E)[:, None] & (r < R)[None, :]
    at = (f * E + e).to(tl.int64)[:, None] * (G * A) + g * A + a[None, :]
    block = tl.load(grad + at, mask=(e < E)[:, None] & (a < A)[None, :], other=0.0)
    u, v = tl.load(first + one, mask=left, other=0.0), tl.load(second + two, mask=right, other=0.0)
    du = tl.dot(tl.trans(v), block, input_precision="ieee")
    tl.store(dfirst + one, du.to(dfirst.dtype.element_ty), mask=left)
    dv = tl.dot(block, tl.trans(u), input_precision="ieee")
    tl.store(dsecond + two, dv.to(dsecond.dtype.element_ty), mask=right)
