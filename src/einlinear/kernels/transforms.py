"""Where custom operators cannot go."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = frozenset({Tensor, nn.Parameter})


def transformed(*tensors: Tensor) -> bool:
    """Whether custom ops do not know what is at work.

    That is forward-mode derivatives, a `torch.func` transform, or tensors of another class, such as DTensor.
    """
    if not PLAIN.issuperset(map(type, tensors)):
        return True
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
