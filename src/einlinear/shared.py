"""`shared_input`: several layers of one input, such as query, key and value, read it together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from einlinear.kernels import hooked, ordinary, transformed
from einlinear.kernels.joint import Joint, join
from einlinear.kernels.shared import Shared, share
from einlinear.layer import Linear
from einlinear.structure import Structure


def shared_input(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`[layer(x) for layer in layers]`, with `x` read once where that can be.

    Layers of one structure run as one layer, in as many matmuls as one of them takes. On a GPU, in 16
    bits, structured layers of two factors that cut the input alike (the same family at the same
    `d_in`) share the launch of their first factors, forward and backward; for a few tokens they run
    in one launch altogether. The layers themselves stay as they are: parameters, rates and
    checkpoints know nothing of it.

    torch.compile of torch 2.11 cannot trace how this is planned: in a model to be compiled, plan once, by
    `self.together = el.Together.of(self.query, self.key, self.value)`, and call that.

    Args:
        x: `[..., d_in]`.
        layers: any modules; only `einlinear.Linear` ones gain.

    Returns:
        The output of each layer, in order, possibly as views of one tensor.

    Example:
        >>> import torch, einlinear as el
        >>> layers = [el.Linear(64, 64, "btt") for _ in range(3)]
        >>> queries, keys, values = el.shared_input(torch.randn(1000, 64), *layers)
        >>> queries.shape
        torch.Size([1000, 64])
    """
    return Together.of(*layers)(x, *layers)


@dataclass(frozen=True)
class Together:
    """How layers that read one input run, decided once; see `shared_input`."""

    joint: Joint | None
    shared: Shared | None

    @classmethod
    def of(cls, *layers: nn.Module) -> "Together":
        """For these layers, or others of the same structures."""
        structured = [layer for layer in layers if type(layer) is Linear]
        if len(structured) < 2 or len(structured) < len(layers):
            return cls(None, None)
        return _together(tuple(layer.structure for layer in structured))

    def __call__(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """What each layer makes of `x`, `[..., d_in]`."""
        if (self.joint is None and (self.shared is None or not x.is_cuda)) or any(map(hooked, layers)):
            return [layer(x) for layer in layers]
        operands = [layer.operands(x) for layer in layers if isinstance(layer, Linear)]
        factors, tokens = [each for each, _, _ in operands], operands[0][1]
        biases = [bias for _, _, bias in operands if bias is not None]
        everything = [factor for each in factors for factor in each]
        simple = ordinary(tokens, *everything) and not transformed(tokens, *everything)
        if len(biases) in (0, len(layers)) and simple:
            # On a GPU 2.1 to 8.3 times as fast as dense in training (benchmarks/NOTES.md), and without a copy.
            if self.shared and tokens.is_cuda and tokens.element_size() == 2:
                return self.shared(factors, tokens, biases)
            # A joint layer copies its factors first: not worth it for a few tokens.
            if self.joint and tokens.numel() > sum(factor.numel() for factor in everything):
                return self.joint(factors, tokens, biases)
        return [layer(x) for layer in layers]


@lru_cache(maxsize=1024)
def _together(structures: Sequence[Structure]) -> Together:
    joint = join(structures[0], len(structures)) if len({*structures}) == 1 else ""
    shared = share(structures)
    return Together(None if isinstance(joint, str) else joint, None if isinstance(shared, str) else shared)
