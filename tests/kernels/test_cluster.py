"""CUDA C++ without a GPU: on threads that a CPU emulates, and as the compiler for a Hopper GPU sees it."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import einlinear as el
from einlinear import clusters, toolchain
from einlinear.clusters import SHARED, Cut, cut
from einlinear.kernels import nvrtc
from einlinear.kernels.cluster import SOURCES, Cluster, cluster, defines
from einlinear.kernels.kernel import CUDA, CUDA_HALF

ENTRY = """
#include "{emulated}"
{kernel}
extern "C" void run(const u16* x, const u16* first, const u16* second, const u16* bias, u16* y, int tokens, int x_token,
                    int clusters, int memory, int late) {{
  emulate(clusters, memory, late, [=] {{ layer(x, first, second, bias, y, tokens, x_token); }});
}}
"""
Shape = tuple[int, int, int]
# A cluster of one; of two; a warp with a part of a slice's rows, sums that are no multiple of 32; rank 4 over eight;
# tiles of 16 tokens.
CASES: list[tuple[Shape, Shape, torch.dtype, bool]] = [
    ((4, 64, 64), (4, 64, 64), torch.bfloat16, True),
    ((16, 64, 32), (32, 16, 32), torch.float16, False),
    ((16, 96, 32), (32, 16, 48), torch.bfloat16, False),
    ((32, 128, 32), (32, 32, 128), torch.bfloat16, True),
    ((24, 32, 32), (32, 24, 24), torch.float16, True),
]


def whole(first: Shape, second: Shape) -> Cut:
    found = cut(first, second)
    assert isinstance(found, Cut), found
    return found


def emulated(folder: Path, first: Shape, second: Shape, dtype: torch.dtype, bias: bool) -> ctypes.CDLL:
    """cluster.cu as a C++ compiler sees it, with emulated.h for the machine's instructions."""
    compiler = toolchain.compiler()
    if compiler is None:
        pytest.skip(toolchain.refusal())
    source = folder / "run.cpp"
    source.write_text(
        ENTRY.format(
            emulated=Path(__file__).with_name("emulated.h"),
            kernel="\n".join(f'#include "{source}"' for source in SOURCES[1:]),
        )
    )
    given = [f"-D{name}={value}" for name, value in defines(whole(first, second), first, second, bias, dtype)]
    options = ["-std=c++17", "-O2", "-w", "-fPIC", "-shared", "-o", str(folder / "run.so")]
    subprocess.run([compiler, *given, *options, str(source)], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "run.so"))


def reference(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, with the state rounded as the kernel rounds it."""
    (slices, _, width), (later, out, sums) = first.shape, second.shape
    state = torch.einsum("tga,gna->tgn", x.double().view(-1, slices, width), first.double())
    state = state.to(x.dtype).double().view(-1, slices, sums // slices, later)
    y = torch.einsum("tgrf,fegr->tfe", state, second.double().view(later, out, slices, -1)).flatten(1)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("first", "second", "dtype", "bias"), CASES, ids=str)
def test_the_kernel_on_emulated_threads_is_the_reference(
    first: Shape, second: Shape, dtype: torch.dtype, bias: bool, tmp_path: Path
) -> None:
    run, found = emulated(tmp_path, first, second, dtype, bias).run, whole(first, second)
    # More tiles than shared memory holds, an odd number of tokens, rows apart; then two clusters.
    for tokens, parts, late in ((4 * found.tokens + 5, 1, 0), (found.tokens + 1, 2, 1)):
        wide = torch.full((tokens, first[0] * first[2] + 8), float("nan"), dtype=dtype)
        x = wide[:, :-8].normal_()
        factors = [torch.randn(shape).div(shape[2] ** 0.5).to(dtype) for shape in (first, second)]
        added = torch.randn(second[0] * second[1]).to(dtype) if bias else None
        y = torch.full((tokens, second[0] * second[1]), float("nan"), dtype=dtype)
        addresses = [0 if t is None else t.data_ptr() for t in (x, *factors, added, y)]
        pointers = map(ctypes.c_void_p, addresses)
        run(*pointers, tokens, x.stride(0), parts, found.memory, late)
        assert_close(y.double(), reference(x, *factors, added), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("first", "second", "dtype", "bias"), [*CASES, ((64, 64, 64), (64, 64, 64), torch.bfloat16, True)], ids=str
)
def test_a_hopper_gpu_runs_it_on_matrix_units_and_from_registers(
    first: Shape, second: Shape, dtype: torch.dtype, bias: bool, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed: its disassembler reads the machine code")
    if refusal := nvrtc.refusal():
        pytest.skip(refusal)
    code = tmp_path / "layer.cubin"
    code.write_bytes(nvrtc.compiled(SOURCES, defines(whole(first, second), first, second, bias, dtype), "sm_90"))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", used), f"factors should stay in registers: {used}"
    assembly = subprocess.run([tool, "-sass", code], capture_output=True, text=True, check=True).stdout
    matrix, remote = assembly.count("HMMA.16816"), assembly.count("STAS")
    assert matrix >= 16 and remote >= 1, "products by the matrix unit, and state sent to other multiprocessors"
    assert second[1] % 16 or not re.search(r"STG\.E desc", assembly), "the result is stored by vectors"
    loop = assembly[assembly.index("STAS") :]
    assert loop.count("MEMBAR.ALL.GPU") <= 1, "only the end waits for all that was written"


SIDES = st.sampled_from([8, 16, 24, 32, 48, 64, 96, 128])


@settings(max_examples=15, deadline=None)
@given(slices=st.sampled_from([4, 6, 8, 12, 16, 32]), later=st.sampled_from([4, 6, 8, 12, 16, 32]),
       rank=st.integers(1, 4), width=SIDES, out=SIDES)  # fmt: skip
def test_whatever_is_cut_compiles(slices: int, later: int, rank: int, width: int, out: int) -> None:
    """cluster.cu asserts, as it compiles, all that it assumes of shapes."""
    first, second = (slices, rank * later, width), (later, out, slices * rank)
    found = cut(first, second)
    if isinstance(found, str):
        assert found.startswith(("blocks of", "no cluster of")) and len(found) > 40
        return
    assert found.memory <= SHARED and slices % found.size == later % found.size == 0
    if nvrtc.refusal() is None:
        assert nvrtc.compiled(SOURCES, defines(found, first, second, False, torch.float16), "sm_90")


def test_a_smaller_cluster_is_taken_where_it_holds_the_factors() -> None:
    """Both factors of BTT have 2 d √d numbers, and a multiprocessor keeps 65536."""
    sizes = {d: whole(*el.BTT()(d, d).canonical.matrix_shapes).size for d in (1024, 2048, 4096)}
    assert sizes == {1024: 2, 2048: 4, 4096: 8}
    refused = cut(*el.BTT()(8192, 8192).canonical.matrix_shapes)
    assert isinstance(refused, str) and "no cluster of up to 8" in refused
    assert clusters.SIZES == (1, 2, 4, 8)


def test_what_it_refuses() -> None:
    kernel = Cluster()
    assert kernel.refuses(el.BTT()(1024, 1024).canonical, CUDA_HALF) == nvrtc.refusal()
    assert "16 bits" in str(kernel.refuses(el.BTT()(1024, 1024).canonical, CUDA))
    assert "none of its factors has blocks" in str(kernel.refuses(el.LowRank(8)(64, 64).canonical, CUDA_HALF))
    with pytest.raises(ValueError, match=r"factors of torch.float16 to an input of torch.float32"):
        cluster(torch.ones(2, 64), torch.ones(2, 32, 32).half(), torch.ones(2, 32, 32).half(), None)


@pytest.mark.usefixtures("poisoned")
def test_elsewhere_two_stages_take_its_place_and_gradients_are_theirs() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
    structure = el.BTT(rank=2, blocks=(4, 8))(128, 64).canonical
    leaves = {"x": torch.randn(37, 128), "first": torch.randn(structure.matrix_shapes[0]),
              "second": torch.randn(structure.matrix_shapes[1]), "bias": torch.randn(64)}  # fmt: skip
    ours = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    theirs = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    y = cluster(*ours.values())
    expected = el.apply(structure, [theirs["first"], theirs["second"]], theirs["x"]) + theirs["bias"]
    direction = torch.randn_like(expected)
    torch.autograd.backward([y, expected], [direction.float(), direction])
    assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for name in leaves:
        assert_close(ours[name].grad.double(), theirs[name].grad, rtol=1e-5, atol=1e-3, msg=name)
    torch.library.opcheck(
        torch.ops.einlinear.cluster, tuple(leaf.detach().requires_grad_() for leaf in ours.values()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
