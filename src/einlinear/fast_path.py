"""torch's encoder layers and the fast path on which they read the weights of the layers in them."""

from torch import nn

from einlinear.layer import Linear


def leave_fast_path(model: nn.Module) -> None:
    """Has `torch.nn.TransformerEncoderLayer`s that hold structured layers call them, in evaluation too.

    The fast path reads `linear1.weight`, which a structured layer does not have. What is set here is what torch
    asks before it takes that path; it is copied and pickled with the module.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _structured(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(map(_structured, module.layers)):
            module.use_nested_tensor = False


def _structured(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), Linear) for name in ("linear1", "linear2"))
