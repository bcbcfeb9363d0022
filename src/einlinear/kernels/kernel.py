"""What a kernel is: one way to apply a structure, which says what it cannot do and how long it would take."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from einlinear.clock import WAYS, Machine, machine
from einlinear.structure import Structure, StructureError


@dataclass(frozen=True)
class Target:
    """The kind of machine that a structure runs on, as far as the choice of a kernel goes."""

    device: str = "cpu"
    half: bool = False
    ridge: float = 0.0
    """FLOPs of a large matmul in the time that memory takes to move a byte."""
    launch: float = 0.0
    """FLOPs of a large matmul in the time that it takes to start one."""

    @classmethod
    def of(cls, device: torch.device | str, dtype: torch.dtype) -> "Target":
        """That of a device, as "cpu" or "cuda:0", and a type.

        Raises:
            StructureError: for another device.
        """
        kind = str(device).partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise StructureError(f"cannot choose a kernel for the device '{device}': pass cpu or cuda")
        half = dtype.itemsize == 2
        return (CUDA_HALF if half else CUDA) if kind == "cuda" else (CPU_HALF if half else CPU)

    @property
    def machine(self) -> Machine:
        """What times are modelled by."""
        return machine(self.device, "bfloat16" if self.half else "float32")


# The numbers for CUDA are an H200's: 728 TFLOP/s in 16 bits (about 50 in 32), 4.27 TB/s, 2.5 microseconds a kernel.
CPU = Target()
CPU_HALF = Target(half=True)
CUDA = Target("cuda", ridge=12.0, launch=1.2e8)
CUDA_HALF = Target("cuda", half=True, ridge=170.0, launch=1.8e9)


class Runner(Protocol):
    """Applies one structure; torch.compile traces it, so it holds plain integers and strings."""

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the map to `x`, `[tokens, padded d_in]`, and adds `bias`, `[padded d_out]`.

        Returns `[tokens, padded d_out]`, contiguous.
        """


class Kernel(ABC):
    """Applies an unrouted structure to tokens, faster than the reference or not at all.

    A refusal is a sentence, never an exception; an exception is a fault and propagates.
    """

    name: ClassVar[str]

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        """Why this kernel cannot run the structure, or None where it can."""
        return WAYS[self.name][0](structure, target.machine)

    def seconds(self, structure: Structure, tokens: int, target: Target = CPU, training: bool = False) -> float:
        """Modelled time for `tokens` vectors, forward alone or with all gradients (`einlinear.clock`)."""
        return WAYS[self.name][1](structure, tokens, target.machine, training)

    @abstractmethod
    def prepare(self, structure: Structure) -> Runner:
        """All that can be decided from the spec, done once: what is left works on tensors and integers."""


class InTriton(Kernel):
    """A kernel that Triton compiles."""

    def refuses(self, structure: Structure, target: Target = CPU) -> str | None:
        refusal = super().refuses(structure, target)
        if refusal is None and find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        return refusal
