"""`StructuredMLP`: two structured layers with an activation between, run as one where their blocks nest."""

import torch
from torch import Tensor, nn

from einlinear.family import Family
from einlinear.kernels import transformed
from einlinear.kernels.junction import ACTIVATIONS, nest
from einlinear.layer import Linear


class StructuredMLP(nn.Module):
    """`down(activation(up(x)))` with structured layers `up` and `down`.

    On a GPU, in 16 bits, and where the blocks that `up` makes are the blocks that `down` reads, the
    hidden features never reach memory: the second factor of `up`, the activation and the first
    factor of `down` are one kernel, forward and backward (docs/kernels.md). BTT nests by itself, and
    so does any family with the same number of blocks on both sides: `el.BTT(blocks=(32, 32))`.
    Elsewhere the two layers run one after the other, and compute the same.

    Args:
        d_model: features of the input and of the output.
        hidden: features between the layers.
        family: of both layers: a family, or its short text.
        activation: "gelu", "relu", "relu2" (squared), "silu" or "identity".
        bias, cap, zero, device, dtype: as in `einlinear.Linear`; `zero` is for `down`.

    Shape:
        `[..., d_model]` to `[..., d_model]`.

    Raises:
        ValueError: for an unknown activation.
        StructureError: where the family cannot be had at these widths, or an input does not fit.

    `unfused` says why the layers are run one after the other even on a GPU; None where they are not.
    The fused backward has no derivative of its own.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        family: Family | str,
        activation: str = "gelu",
        bias: bool = True,
        *,
        cap: bool = False,
        zero: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"cannot make an MLP with activation={activation!r}: pass one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.up = Linear(d_model, hidden, family, bias, cap=cap, device=device, dtype=dtype)
        self.down = Linear(hidden, d_model, family, bias, cap=cap, zero=zero, device=device, dtype=dtype)
        nested = nest(self.up.structure, self.down.structure, activation)
        self.unfused = nested if isinstance(nested, str) else None
        self._nested = None if isinstance(nested, str) else nested

    def forward(self, x: Tensor) -> Tensor:
        up, tokens, hidden_bias = self.up.operands(x)
        if self._nested is None or not tokens.is_cuda or tokens.element_size() != 2 or transformed(tokens, *up):
            result: Tensor = self.down(ACTIVATIONS[self.activation](self.up(x)))
            return result
        down, _, bias = self.down.operands(x)
        return self._nested([*up, *down], tokens, hidden_bias, bias)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
