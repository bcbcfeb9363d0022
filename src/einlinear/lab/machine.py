"""The machine that trains: its device, how models are executed on it, and by how many processes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from einlinear.lab.step import Execution

SHARED_GPU = {1: 1.0, 2: 1.3, 4: 1.7, 8: 1.9}
"""How many trainings' worth of steps so many processes do at once on one GPU where NVIDIA's MPS daemon runs: measured
on an H200, GPTs of four blocks, widths 128 to 512, 8192 tokens a step (benchmarks/NOTES.md)."""

TURNS = 1.1
"""The same for any number of them without the daemon: their kernels take turns."""


@dataclass(frozen=True, kw_only=True)
class Machine(Execution):
    """How to train many trunks, as far as it does not change what comes out.

    `workers` processes train a trunk each, with `threads` threads of the CPU; without any, the calling process
    trains. One thread each by default: two on a busy machine run small batched matmuls many times slower. The
    workers are processes of this machine or, by `engine="ray"`, of a Ray cluster. On a GPU they share it.
    """

    workers: int = 1
    threads: int = 1
    engine: Literal["processes", "ray"] = "processes"

    @classmethod
    def here(cls, device: str | None = None) -> "Machine":
        """All of this machine: its accelerator if there is one, else a worker for each core it may use."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device != "cpu":
            return cls(device=device, graphed=torch.device(device).type == "cuda")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(workers=cores or 1)

    @property
    def at_once(self) -> float:
        """How many trainings' worth of steps the workers do in the time that one alone takes for its own."""
        if self.workers < 2 or self.engine == "ray" or torch.device(self.device).type != "cuda":
            return float(max(1, self.workers))
        if not mps_daemon():
            return TURNS
        return float(np.interp(self.workers, [*SHARED_GPU], [*SHARED_GPU.values()]))


def mps_daemon() -> bool:
    """Whether processes that start now share a GPU by NVIDIA's Multi-Process Service (`nvidia-cuda-mps-control -d`)."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()
