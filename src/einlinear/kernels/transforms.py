"""Where custom operators cannot go."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ORDINARY = frozenset({Tensor, nn.Parameter})


def ordinary(*tensors: Tensor) -> bool:
    """Whether all are torch's own, and none of another class that custom ops do not know, such as DTensor."""
    return ORDINARY.issuperset(map(type, tensors))


def exported() -> bool:
    """Whether what is traced will run elsewhere, without custom ops: under `torch.export` or `torch.jit.trace`."""
    # Of torch.compile too, torch 2.11 says that it is exporting.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch._C._get_tracing_state() is not None


def transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives or a `torch.func` transform are at work: custom ops know neither."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    inside = forward_ad._current_level >= 0  # of a dual_level(); asking each tensor takes longer
    return inside and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def hooked(module: nn.Module | None) -> bool:
    """Whether something else is called with it, which an operator that does its work would pass by."""
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
