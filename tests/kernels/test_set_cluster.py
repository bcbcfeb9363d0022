"""Experts over clusters without a GPU: on threads that a CPU emulates, and as the compiler for a Hopper GPU sees it."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import einlinear as el
from einlinear import toolchain
from einlinear.clusters import Cut
from einlinear.kernels import nvrtc
from einlinear.kernels.set_cluster import SOURCES, defines, set_cut
from einlinear.kernels.set_pair import _empty, forward
from einlinear.kernels.sets import Sizes, set_layout

ENTRY = """
#include "{emulated}"
{kernel}
extern "C" void run(const u16* x, const u16* first, const u16* second, const u16* bias, u16* y, u16* z,
                    const int* rooms, const int* token_of, const int* tile_set, const int* tiles, const float* gates,
                    int most, int x_token, int clusters, int memory, int late) {{
  emulate(clusters, memory, late, [=] {{
    layer(x, first, second, bias, y, z, rooms, token_of, tile_set, tiles, gates, most, x_token);
  }});
}}
"""
# Factors of one expert, experts, active, tokens, clusters: sets change within a cluster, and one cluster has no token;
# one active expert; all of three, with state of rank 2.
CASES = [
    ((16, 32, 32), (32, 16, 16), 4, 2, 150, 2, torch.bfloat16, True),
    ((16, 32, 32), (32, 16, 16), 3, 1, 5, 4, torch.float16, False),
    ((8, 16, 32), (8, 16, 16), 3, 3, 40, 1, torch.bfloat16, False),
]


@pytest.mark.parametrize(("first", "second", "experts", "active", "tokens", "parts", "dtype", "bias"), CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kept", [False, True], ids=["alone", "with its state"])
def test_the_kernel_on_emulated_threads_is_the_sum_over_a_tokens_experts(
    first, second, experts, active, tokens, parts, dtype, bias, kept, tmp_path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its interpreter sorts the tokens")
    compiler, found = toolchain.compiler(), set_cut(first, second, active)
    if compiler is None:
        pytest.skip(toolchain.refusal())
    assert isinstance(found, Cut), found
    (tmp_path / "run.cpp").write_text(
        ENTRY.format(
            emulated=Path(__file__).with_name("emulated.h"),
            kernel="\n".join(f'#include "{source}"' for source in SOURCES[1:]),
        )
    )
    named = [f"-D{n}={v}" for n, v in defines(found, first, second, experts, active, kept, bias, dtype)]
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", str(tmp_path / "run.so")]
    subprocess.run([compiler, *named, *options, str(tmp_path / "run.cpp")], check=True, timeout=120)
    run = ctypes.CDLL(str(tmp_path / "run.so")).run

    x = torch.randn(tokens, first[0] * first[2]).to(dtype)
    factors = [torch.randn(experts, *shape).div(shape[2] ** 0.5).to(dtype) for shape in (first, second)]
    added = torch.randn(second[0] * second[1]).to(dtype) if bias else None
    index = torch.stack([torch.randperm(experts)[:active] for _ in range(tokens)])
    weight = torch.rand(tokens, active)
    layout, gates = set_layout(index, weight, experts)
    sizes = Sizes(tokens, experts, active)
    _, rooms, _, _, token_of, *tiles = (table.contiguous() for table in sizes.split(layout))
    y, z = (torch.full_like(one, float("nan")) for one in _empty(x, *factors, sizes))
    z = z if kept else None
    addresses = [0 if t is None else t.data_ptr() for t in (x, *factors, added, y, z, rooms, token_of, *tiles, gates)]
    run(*map(ctypes.c_void_p, addresses), sizes.tiles, x.stride(0), parts, found.memory, int(kept))

    gate = torch.zeros(tokens, experts).scatter(1, index, weight).double()
    state = torch.einsum("tga,xgna->txgn", x.double().view(tokens, first[0], -1), factors[0].double())
    state = state.view(tokens, experts, first[0], -1, second[0])
    last = factors[1].double().view(experts, *second[:2], first[0], -1)
    expected = torch.einsum("txgrf,xfegr,tx->tfe", state, last, gate).flatten(1)
    assert_close(y.double(), expected + added.double() if bias else expected, rtol=2**-6, atol=2**-5)
    if z is not None:  # as the first of two launches would write it
        apart = [each.float() for each in (x, *factors)]
        assert_close(z.float(), forward(*apart, None, layout, gates, sizes)[1], rtol=2**-6, atol=2**-6, equal_nan=True)


def test_a_hopper_gpu_keeps_the_factors_of_a_set_in_registers(tmp_path) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed: its disassembler reads the machine code")
    if refusal := nvrtc.refusal():
        pytest.skip(refusal)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    sizes = {}
    for width in (1024, 2048, 4096):
        first, second = el.BTT()(width, width).canonical.matrix_shapes
        found = set_cut(first, second, 2)
        assert isinstance(found, Cut), found
        sizes[width] = found.size
        code = tmp_path / "layer.cubin"
        named = defines(found, first, second, 16, 2, True, False, torch.bfloat16)
        code.write_bytes(nvrtc.compiled(SOURCES, named, "sm_90"))
        used = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
        # Those of two experts leave the registers a few numbers short at widths of 2048 and 4096.
        assert int(re.search(r"STACK:(\d+) .*LOCAL:0 ", used)[1]) <= 64, used
    assert sizes == {1024: 4, 2048: 8, 4096: 16}
    refused = set_cut(*el.BTT()(8192, 8192).canonical.matrix_shapes, 2)
    assert isinstance(refused, str)
    assert "no cluster of up to 16" in refused
