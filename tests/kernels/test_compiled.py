"""Each kernel, as launched at d = 4096, compiled for a Hopper GPU without one: it uses the matrix units and fits."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it compiles these kernels")

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""

SPILLS = {"junction_backward": 512, "junction_backward by tanh": 768, "junction_backward gated": 1024}
"""Bytes that a thread may spill: the junction's backward, all accumulators in registers, spills some 250, and 700 with
GELU or a gate, and is faster than variants that spill less (benchmarks/NOTES.md)."""

# In a process of its own: this one interprets kernels, and Triton decides that once.
SCRIPT = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from einlinear.kernels import tiles, tiles_bottleneck, tiles_junction, tiles_pair, tiles_product
from einlinear.kernels import tiles_route, tiles_sets

half, sums = "*bf16", "*fp32"
alone, hold = dict(LEADS=False, FOLLOWS=False, GROUP=1), dict(HOLD_BIASES=True)

def stage(parts=1, **more):
    blocks = (64,) * parts
    return dict(OUTS=blocks, IN=64, BLOCK_OUTS=blocks, BLOCK_IN=64, BLOCK_TOKENS=128, HAS_BIAS=False) | more

def junction(parts, hidden, activation, **more):
    return dict(IN=64, HIDDEN=hidden, OUT=64, BLOCK_IN=64, BLOCK_OUT=64, ACTIVATION=activation, SHORT=True) | more

gradient = dict(BLOCK_HIDDEN=64, BLOCK_TOKENS=128, NARROW=True, DOWN_LAST=False)

def sets(**more):
    return dict(SLICES=64, OUT=64, BLOCK_OUT=64, EXPERTS=16, ACTIVE=2, PIECE=128) | more

low = dict(IN=1024, RANK=64, OUT=1024, BLOCK_RANK=64, HAS_BIAS=False, OVERLAPS=True)

def blocks(g, a, r, turned=False, **more):
    first, second = (r * g * a, g * a, a, 1), (a * g * r, g * r, r, 1)
    if turned:
        (fg, fr, ff, fa), (sf, se, sg, sr) = first, second
        first, second = (sf, sr, sg, se), (fg, fa, ff, fr)
    names = ("G", "A", "R", "F", "E", "FG", "FR", "FF", "FA", "SF", "SE", "SG", "SR")
    return dict(zip(names, (g, a, r, g, a, *first, *second)), OVERLAPS=True) | more

few = dict(BLOCK_TOKENS=64, BLOCK_IN=256, BLOCK_RANK=64, BLOCK_OUT=128, HAS_BIAS=False)
apart = dict(X_SLICE=512, W_SLICE=2**18, NUMBERS=2**20, OTHERS=2**20, N=512, K=512, BLOCK_TOKENS=64, BLOCK_OUT=32,
             BLOCK_IN=128, HAS_BIAS=False, OVERLAPS=True)
ins, state = dict(IN=64, BLOCK_IN=64), dict(STATE=64, BLOCK_STATE=64)
wide = dict(OUT=128, BLOCK_OUT=128, IN=128, BLOCK_IN=128)  # as at d = 8192
into = dict(X_MINOR=False, Y_MINOR=True, x_feature=1)
out = dict(X_MINOR=True, Y_MINOR=False, x_token=1)
# Kernel, constants, how many tensors in each tuple of them, warps, pipeline stages.
cases = {
    "stage_forward into": (tiles.stage_forward, stage() | into | alone | dict(y_token=1), 1, 4, 3),
    "stage_forward out": (tiles.stage_forward, stage() | out | alone | dict(y_feature=1), 1, 4, 3),
    "stage_forward follows": (
        tiles.stage_forward, stage() | out | dict(y_feature=1, LEADS=False, FOLLOWS=True, GROUP=1), 1, 4, 1),
    "stage_forward of three": (tiles.stage_forward, stage(3) | into | alone | dict(y_token=1), 3, 4, 3),
    "stage_backward into": (tiles.stage_backward, stage() | into | dict(dx_feature=1, y_tokens_apart=(1,)), 1, 8, 3),
    "stage_backward out": (tiles.stage_backward, stage() | out | dict(dx_token=1, y_features=(1,)), 1, 8, 3),
    "stage_backward of three": (
        tiles.stage_backward, stage(3) | into | dict(dx_feature=1, y_tokens_apart=(1, 1, 1)), 3, 8, 3),
    "junction_forward": (
        tiles_junction.junction_forward, junction(1, 256, "relu2", BLOCK_HIDDEN=128, BLOCK_TOKENS=64, **hold), 1, 4, 3),
    "junction_forward gated": (
        tiles_junction.junction_forward, junction(2, 128, "silu", BLOCK_HIDDEN=128, BLOCK_TOKENS=64, **hold), 2, 4, 3),
    "junction_forward by tanh": (
        tiles_junction.junction_forward, junction(1, 256, "gelu", BLOCK_HIDDEN=128, BLOCK_TOKENS=64, **hold), 1, 4, 3),
    "junction_backward by tanh": (
        tiles_junction.junction_backward, junction(1, 256, "gelu", **gradient), 1, 8, 2),
    "bottleneck_forward": (
        tiles_bottleneck.bottleneck_forward,
        low | dict(first_in=1, second_rank=1, BLOCK_TOKENS=16, BLOCK_IN=128, BLOCK_OUT=64), 1, 4, 4),
    "bottleneck_forward of transposes": (
        tiles_bottleneck.bottleneck_forward,
        low | dict(first_rank=1, second_out=1, BLOCK_TOKENS=16, BLOCK_IN=128, BLOCK_OUT=64), 1, 4, 4),
    "bottleneck_weights": (
        tiles_bottleneck.bottleneck_weights, blocks(4, 256, 64, BLOCK=64, BLOCK_STATE=64, BLOCK_TOKENS=64), 1, 4, 4),
    "blocks_forward": (tiles_bottleneck.blocks_forward, blocks(4, 256, 64) | few, 1, 4, 2),
    "blocks_forward of transposes": (tiles_bottleneck.blocks_forward, blocks(4, 256, 64, True) | few, 1, 4, 2),
    "factor_forward": (
        tiles_bottleneck.factor_forward,
        apart | dict(Y_SLICE=128, N_INNER=128, W_OUTER=512, W_INNER=2048, Y_OUTER=512, K_INNER=512, W_SUMMED=0,
                     W_ALONG=1, LEADS=True), 1, 4, 4),
    "factor_forward of transposes": (
        tiles_bottleneck.factor_forward,
        apart | dict(Y_SLICE=512, N_INNER=512, W_OUTER=0, W_INNER=1, Y_OUTER=0, K_INNER=128, W_SUMMED=512,
                     W_ALONG=2048, LEADS=False), 1, 4, 4),
    "junction_backward": (
        tiles_junction.junction_backward, junction(1, 256, "relu2", **gradient | dict(NARROW=False)), 1, 8, 2),
    "junction_backward gated": (
        tiles_junction.junction_backward, junction(2, 128, "silu", **gradient), 2, 8, 2),
    "pair_token of three": (
        tiles_pair.pair_token, dict(G=64, A=64, RS=(1,) * 3, FS=(64,) * 3, ES=(64,) * 3, BLOCK_STATES=(64,) * 3,
                                    BLOCK_A=64, BLOCK_ES=(64,) * 3), 3, 8, 3),
    "product_blocks": (
        tiles_product.product_blocks, dict(G=32, A=32, R=4, F=32, E=32, BLOCK_A=32, BLOCK_E=32, BLOCK_R=16),
        1, 4, 3),
    "route_forward": (
        tiles_route.route_forward, dict(EXPERTS=16, ACTIVE=2, TIE=1e-6, BLOCK_EXPERTS=16, BLOCK_TOKENS=64,
                                       BLOCK_WIDTH=128, SPLIT=True, HAS_BIAS=True, SETS=256, BLOCK_SETS=256,
                                       COUNTED=True), 1, 4, 3),
    "sort's count": (
        tiles_route.count_sets, dict(EXPERTS=16, ACTIVE=2, SETS=256, BLOCK_SETS=256, CHUNK=64), 1, 4, 3),
    "sort's layout": (
        tiles_route.lay_out, dict(EXPERTS=16, ACTIVE=2, SETS=256, BLOCK_SETS=256, SOME_SETS=16, BLOCK_CHUNKS=128,
                                  BLOCK_EXPERTS=16, RUN=256, TILE=16, ALIGN=16, PIECE=128), 1, 8, 3),
    "sort's slots": (
        tiles_route.fill_in, dict(EXPERTS=16, ACTIVE=2, SETS=256, CHUNK=64, RUN=256, TILE=16, ALIGN=16), 1, 4, 3),
    "into_forward of experts": (tiles_sets.into_forward, sets(**ins, BLOCK=64), 1, 4, 1),
    "into_forward of wide experts": (tiles_sets.into_forward, sets(**wide, BLOCK=64), 1, 8, 1),
    "into_backward_weight of wide experts": (
        tiles_sets.into_backward_weight,
        sets(**wide, TILE=64, SPLITS=1, BLOCK_EXPERTS=16, HAS_ROUTER=True), 1, 8, 3),
    "out_forward of experts": (tiles_sets.out_forward, sets(**state, BLOCK=64, HAS_BIAS=False), 1, 8, 3),
    "out_backward of experts": (tiles_sets.out_backward, sets(**state, TILE=128, SPLITS=1), 1, 4, 4),
    "into_backward_input of experts": (
        tiles_sets.into_backward_input, sets(**ins, BLOCK=64, BLOCK_EXPERTS=16, HAS_ROUTER=True), 1, 4, 2),
    "into_backward_weight of experts": (
        tiles_sets.into_backward_weight,
        sets(**ins, TILE=128, SPLITS=1, BLOCK_EXPERTS=16, HAS_ROUTER=True), 1, 4, 2),
    "sort's gates": (
        tiles_sets.add_gates, dict(SLICES=64, EXPERTS=16, ACTIVE=2, RUN=256, SOME_SLICES=16, BLOCK_EXPERTS=16,
                                   HAS_ROUTER=True, HAS_LOGITS=True), 1, 8, 3),
    "sort's gradients added up": (tiles_sets.add_sums, dict(SPLITS=(3, 3, 24), BLOCK=1024), 3, 8, 3),
}
tuples = {"weights", "ys", "grads", "dweights", "y_slices", "y_features", "y_tokens_apart", "zs", "ups", "dzs", "dups",
          "firsts", "seconds", "parts", "sums", "lengths", "factors"}
none = {"biases", "dbiases"}
accumulated = {"dweight", "dweights", "dups", "ddown", "dbias"}
accumulated |= {"drouter", "dfirst", "dsecond", "dgate", "gates", "logits", "chosen", "partials", "parts"}
integers = {"index", "starts", "rooms", "run_set", "runs", "token_of"}
integers |= {"counts", "before", "size", "place", "first_run", "first_tile", "tile_set", "tiles"}
tensors = {"result", "x", "router", "dlogits", "z", "dz", "weight", "bias", "y", "grad", "dx", "down", "first"}
tensors |= tuples | {"second", "other"}
numbers = {"y_slices", "y_features", "y_tokens_apart", "lengths"}
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
for name, (kernel, constants, parts, warps, stages) in cases.items():
    kinds, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind = sums if argument in accumulated else half if argument in tensors - numbers else "i32"
        kind = "*i64" if argument == "index" else "*i32" if argument in integers else kind
        kind = "fp32" if argument in ("scale", "factors") else kind
        if argument in constants:
            kinds[argument] = "constexpr"
        elif argument in none:
            kinds[argument] = ()
        elif argument in tuples:
            kinds[argument] = (kind,) * parts
            aligned |= {(position, part): [["tt.divisibility", 16]] for part in range(parts) if kind != "fp32"}
        elif kind == "fp32":
            kinds[argument] = kind
        else:
            kinds[argument] = kind
            aligned[position,] = [["tt.divisibility", 16]]
    places = {argument: position for position, argument in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, kinds, {(places[n],): value for n, value in constants.items()}, aligned)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=warps, num_stages=stages))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        said = subprocess.run([ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
    spilled = int(re.search(r"(\\d+) bytes spill stores", said)[1])
    wgmma = made.asm["ptx"].count("wgmma.mma_async")
    special = {name: made.asm["ptx"].count(name) for name in ("tanh.approx", "ex2.approx")}
    print(json.dumps(dict(name=name, wgmma=wgmma, spilled=spilled, shared=made.metadata.shared, special=special)))
"""


def test_kernels_use_the_matrix_units_and_fit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    kernels = {kernel["name"]: kernel for kernel in map(json.loads, ran.stdout.splitlines())}
    assert len(kernels) == 35
    for name, kernel in kernels.items():
        # For one token, for W and to sort, there is nothing to multiply by tiles.
        assert (kernel["wgmma"] > 0) == (not name.startswith(("pair", "product", "sort"))), kernel
        assert kernel["shared"] <= SHARED, kernel
        by_tanh = "gated" in name or "by tanh" in name
        assert (kernel["special"]["tanh.approx"] > 0, kernel["special"]["ex2.approx"] > 0) == (
            by_tanh,
            name.startswith("route"),
        ), kernel
        assert kernel["spilled"] <= SPILLS.get(name, 0), kernel
