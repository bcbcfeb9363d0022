"""Several processes that train one model together, as `torchrun` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "World":
        """Of torch's default process group, if there is one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return batch[self.rank :: self.size]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.size

    def agreed(self, value: T) -> T:
        """What the first process says."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said)
        return said[0]


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started; gives this one's device, and leaves them at the end.

    Without torchrun, the device as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        # The process waits here, without Python's lock, for the threads of gloo to let go of the last tensors: they
        # need that lock for it, and end the process with an abort where they ask for it while Python shuts down.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, half: bool) -> None:
    """Leaves each process its share of every parameter (FSDP2), gathered block by block when used.

    Factors are `[slices, out, in]` and cut between slices. With `half`, losses and gradients are made by copies
    in bfloat16, and gradients added up in float32.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for module in (*model.get_submodule("blocks").children(), model):
        # Resharded at once, the whole model's own parameters too: those left gathered by an evaluation would
        # hide what a load has put in their place.
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)


def replicated(model: nn.Module) -> nn.Module:
    """The model with gradients that are means over all processes."""
    return DistributedDataParallel(model)


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, wherever its parts are."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().clone()


def put(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor, each process its part."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
