"""`shared_input`: several layers of one input, such as query, key and value, read it together."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor, nn

from einlinear.kernels import transformed
from einlinear.kernels.shared import Shared, share
from einlinear.layer import Linear
from einlinear.structure import Structure


def shared_input(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`[layer(x) for layer in layers]`, with `x` read once where that can be.

    On a GPU, in 16 bits, structured layers of two factors that cut the input alike (the same family
    at the same `d_in`) share the launch of their first factors, forward and backward; for a few
    tokens they run in one launch altogether. The layers themselves stay as they are: parameters,
    rates and checkpoints know nothing of it.

    Args:
        x: `[..., d_in]`.
        layers: any modules; only `einlinear.Linear` ones gain.

    Returns:
        The output of each layer, in order.

    Example:
        >>> queries, keys, values = el.shared_input(x, self.query, self.key, self.value)
    """
    if x.is_cuda and len(layers) > 1 and all(type(layer) is Linear for layer in layers):
        operands = [layer.operands(x) for layer in layers if isinstance(layer, Linear)]
        factors, tokens = [each for each, _, _ in operands], operands[0][1]
        biases = [bias for _, _, bias in operands if bias is not None]
        run = _plan(tuple(layer.structure for layer in layers if isinstance(layer, Linear)))
        fits = tokens.element_size() == 2 and len(biases) in (0, len(layers))
        if run is not None and fits and not transformed(tokens, *(factor for each in factors for factor in each)):
            return run(factors, tokens, biases)
    return [layer(x) for layer in layers]


@lru_cache(maxsize=1024)
def _plan(structures: Sequence[Structure]) -> Shared | None:
    found = share(structures)
    return None if isinstance(found, str) else found
