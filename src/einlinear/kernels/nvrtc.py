"""CUDA C++ that is compiled when it first runs, by NVRTC, which comes with every torch that has CUDA."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Defines = tuple[tuple[str, int], ...]


def refusal() -> str | None:
    """Why nothing can be compiled, or None."""
    found = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
    return None if found else "cuda-bindings is not installed; pip install cuda-bindings"


def compiled(sources: tuple[Path, ...], defines: Defines, architecture: str) -> bytes:
    """Machine code of files that follow each other, for an `architecture` such as "sm_90". No GPU is needed.

    Raises:
        RuntimeError: with what the compiler said.
    """
    from cuda.bindings import nvrtc

    text, name = b"".join(source.read_bytes() for source in sources), sources[-1].name
    program = _checked(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines)]
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    except RuntimeError as error:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"cannot compile {name} with {' '.join(options)}: {log.decode()}") from error
    code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


@dataclass(frozen=True)
class Function:
    """A kernel on one device, launched in clusters of `cluster` programs of `threads` threads."""

    handle: Any
    cluster: int
    threads: int
    memory: int
    resident: int
    """Clusters that run at once."""

    def __call__(self, clusters: int, arguments: Sequence[Tensor | int | None]) -> None:
        """Launches on the current device and stream; tensors are handed over as addresses."""
        from cuda.bindings import driver

        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        values = tuple(each if isinstance(each, int) else 0 if each is None else each.data_ptr() for each in arguments)
        types = tuple(ctypes.c_int if isinstance(each, int) else ctypes.c_void_p for each in arguments)
        grid, block = (clusters * self.cluster, 1, 1), (self.threads, 1, 1)
        _checked(driver.cuLaunchKernel(self.handle, *grid, *block, self.memory, stream, (values, types), 0))


@lru_cache(maxsize=1024)
def function(
    sources: tuple[Path, ...], name: str, defines: Defines, cluster: int, threads: int, memory: int, device: int
) -> Function:
    """The kernel `name`, compiled for the current device, whose number is `device`."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    module = _checked(driver.cuModuleLoadData(compiled(sources, defines, f"sm_{major}{minor}")))
    handle = _checked(driver.cuModuleGetFunction(module, name.encode()))
    dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(handle, dynamic, memory))
    if cluster > 8:  # the most that every GPU with clusters has; a Hopper GPU has twice as many for those who ask
        larger = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _checked(driver.cuFuncSetAttribute(handle, larger, 1))
    config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = memory
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
    config.attrs, config.numAttrs = [attribute], 1
    resident = _checked(driver.cuOccupancyMaxActiveClusters(handle, config))
    return Function(handle, cluster, threads, memory, resident)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA's gave, if it went well."""
    status, *made = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA says {status.name}")
    return made[0] if made else None
