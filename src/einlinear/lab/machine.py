"""The machine that trains: its device, how models are executed on it, and by how many processes."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from einlinear.lab.step import Execution


@dataclass(frozen=True, kw_only=True)
class Machine(Execution):
    """How to train many trunks, as far as it does not change what comes out.

    `workers` processes train a trunk each, with `threads` threads of the CPU; without any, the calling process
    trains. One thread each by default: two on a busy machine run small batched matmuls many times slower. The
    workers are processes of this machine or, by `engine="ray"`, of a Ray cluster.
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
