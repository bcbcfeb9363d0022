"""Each kernel, as launched at d = 4096, compiled for a Hopper GPU without one: it uses the matrix units and fits."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it compiles these kernels")

SHARED, REGISTER_SPILLS = 227 * 1024, 512
"""Bytes of shared memory a program may have, and bytes a thread may spill: the junction's backward, all
accumulators in registers, spills some 300 and is faster than variants that spill nothing (benchmarks/NOTES.md)."""

# In a process of its own: this one interprets kernels, and Triton decides that once.
SCRIPT = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from einlinear.kernels import tiles

stage = dict(OUT=64, IN=64, BLOCK_OUT=64, BLOCK_IN=64, BLOCK_TOKENS=128, HAS_BIAS=False)
into = dict(X_MINOR=False, Y_MINOR=True, x_feature=1, y_token=1)
out = dict(X_MINOR=True, Y_MINOR=False, x_token=1, y_feature=1)
alone = dict(LEADS=False, FOLLOWS=False)
junction = dict(IN=64, HIDDEN=256, OUT=64, BLOCK_IN=64, BLOCK_OUT=64, ACTIVATION="relu2", HAS_BIAS=False)
cases = {
    "stage_forward into": (tiles.stage_forward, stage | into | alone, 4, 3),
    "stage_forward out": (tiles.stage_forward, stage | out | alone, 4, 3),
    "stage_forward follows": (tiles.stage_forward, stage | out | dict(LEADS=False, FOLLOWS=True), 4, 1),
    "stage_backward into": (tiles.stage_backward, stage | into | dict(dx_feature=1), 8, 3),
    "stage_backward out": (tiles.stage_backward, stage | out | dict(dx_token=1), 8, 3),
    "junction_forward": (tiles.junction_forward, junction | dict(BLOCK_HIDDEN=128, BLOCK_TOKENS=64), 4, 3),
    "junction_backward": (tiles.junction_backward, junction | dict(BLOCK_HIDDEN=64, BLOCK_TOKENS=128), 8, 2),
}
sums = {"dweight", "dup", "ddown", "dbias"}
tensors = {"x", "weight", "bias", "y", "grad", "dx", "z", "up", "down", "dz"}
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
for name, (kernel, constants, warps, stages) in cases.items():
    kinds = {n: "constexpr" if n in constants else "*fp32" if n in sums else "*bf16" if n in tensors else "i32"
             for n in kernel.arg_names}
    positions = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    aligned = {positions[n]: [["tt.divisibility", 16]] for n in kinds if kinds[n] != "constexpr"}
    source = ASTSource(kernel, kinds, {positions[n]: value for n, value in constants.items()}, aligned)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=warps, num_stages=stages))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        said = subprocess.run([ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
    spilled = int(re.search(r"(\\d+) bytes spill stores", said)[1])
    wgmma = made.asm["ptx"].count("wgmma.mma_async")
    print(json.dumps(dict(name=name, wgmma=wgmma, spilled=spilled, shared=made.metadata.shared)))
"""


def test_kernels_use_the_matrix_units_and_fit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    kernels = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel["wgmma"] > 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] <= (REGISTER_SPILLS if kernel["name"] == "junction_backward" else 0), kernel
