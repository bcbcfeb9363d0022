"""`StructuredMLP`: structured layers with an activation between, run as one where their blocks nest."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from einlinear.family import Family
from einlinear.kernels import hooked, ordinary, transformed
from einlinear.kernels.junction import ACTIVATIONS, nest
from einlinear.layer import Linear
from einlinear.structure import StructureError

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "bilinear": "identity"}
"""Gated forms, `down(activation(gate(x)) * up(x))`, by their gate's activation (Shazeer 2020, arXiv 2002.05202)."""


class StructuredMLP(nn.Module):
    """`down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))`, with structured layers.

    On a GPU, in 16 bits, and where the blocks that `up` makes are the blocks that `down` reads, the
    hidden features never reach memory: the second factor of `up` (and `gate`, which reads x with it), the
    activation and the first factor of `down` are one kernel, forward and backward (docs/kernels.md).
    BTT nests by itself, and so does any family with the same number of blocks on both sides:
    `el.BTT(blocks=(32, 32))`. Elsewhere the layers run one after the other, and compute the same.

    Args:
        d_model: features of the input and of the output.
        hidden: features between the layers.
        family: of all layers: a family, or its short text.
        activation: "gelu", "gelu_tanh", "relu", "relu2" (squared), "silu" or "identity"; gated: "swiglu",
            "geglu", "geglu_tanh", "reglu" or "bilinear".
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
        options = {"cap": cap, "device": device, "dtype": dtype}
        up = Linear(d_model, hidden, family, bias, **options)  # type: ignore[arg-type]
        gated = isinstance(activation, str) and activation in GATED
        gate = Linear(d_model, hidden, family, bias, **options) if gated else None  # type: ignore[arg-type]
        down = Linear(hidden, d_model, family, bias, zero=zero, **options)  # type: ignore[arg-type]
        self._assemble(up, down, activation, gate)

    @classmethod
    def of(
        cls,
        up: Linear,
        down: Linear,
        activation: str,
        gate: Linear | None = None,
        *,
        names: Mapping[str, str] | None = None,
    ) -> "StructuredMLP":
        """An MLP of layers that exist.

        Args:
            up, down: read the input and make the output.
            activation: that of the gate where there is one: "silu", not "swiglu".
            gate: what is activated in place of `up`, and multiplied by it.
            names: what state dicts call the layers, where not "up", "down" and "gate": those of another module,
                whose checkpoints then fit.

        Raises:
            ValueError: for an unknown activation.
            StructureError: for what are no structured layers, or whose widths do not fit.
        """
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        gated = {plain: name for name, plain in GATED.items()}
        mlp._assemble(up, down, activation if gate is None else gated.get(activation, activation), gate, names)
        return mlp

    def _assemble(
        self, up: Linear, down: Linear, activation: str, gate: Linear | None, names: Mapping[str, str] | None = None
    ) -> None:
        known = [*ACTIVATIONS, *(() if gate is None else GATED)]
        if activation not in known:
            raise ValueError(
                f"cannot make an MLP with activation={activation!r}: pass one of {', '.join(ACTIVATIONS)}, or with a "
                f"gate one of {', '.join(GATED)}"
            )
        plain = GATED.get(activation, activation)
        layers = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
        _check(layers)
        self.activation, self._plain = activation, plain
        self._names = {part: (names or {}).get(part, part) for part in layers}
        for part, layer in layers.items():
            self._modules[self._names[part]] = layer
        ups = [layer.structure for layer in self._ups()]
        nested = nest(ups, self.down.structure, plain)
        if not isinstance(nested, str) and len({layer.bias is None for layer in self._ups()}) > 1:
            nested = "only one of gate and up has a bias"
        self.unfused = nested if isinstance(nested, str) else None
        self._nested = None if isinstance(nested, str) else nested
        self._planned = [*ups, self.down.structure]

    def _layer(self, part: str) -> Linear:
        return cast(Linear, self._modules[self._names[part]])

    @property
    def up(self) -> Linear:
        """What makes the hidden features: without a gate by itself, else those that the gate is multiplied by."""
        return self._layer("up")

    @property
    def down(self) -> Linear:
        """What makes the output of the hidden features."""
        return self._layer("down")

    @property
    def gate(self) -> Linear | None:
        """What is activated in a gated MLP."""
        return self._layer("gate") if "gate" in self._names else None

    def _ups(self) -> list[Linear]:
        """What reads the input: the gate, where there is one, first."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    def _is_as_planned(self) -> bool:
        """Whether no other layer was put in the place of one, a dense one say."""
        layers = zip((*self._ups(), self.down), self._planned, strict=True)
        return all(isinstance(layer, Linear) and layer.structure is planned for layer, planned in layers)

    def forward(self, x: Tensor) -> Tensor:
        if (
            self._nested is not None
            and x.is_cuda
            and self._is_as_planned()
            and not any(map(hooked, self._modules.values()))
        ):
            operands = [layer.operands(x) for layer in self._ups()]
            factors, tokens = [factors for factors, _, _ in operands], operands[0][1]
            simple = ordinary(tokens, *factors[0]) and not transformed(tokens, *factors[0])
            if tokens.element_size() == 2 and simple:
                down, _, bias = self.down.operands(x)
                hidden_biases = [added for _, _, added in operands if added is not None]
                return self._nested(factors, down, tokens, hidden_biases, bias)
        hidden = ACTIVATIONS[self._plain]((self.gate or self.up)(x))
        result: Tensor = self.down(hidden if self.gate is None else hidden * self.up(x))
        return result

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _check(layers: Mapping[str, object]) -> None:
    """Refuses layers that cannot follow each other."""
    widths: dict[str, tuple[int, int]] = {}
    for part, layer in layers.items():
        if not isinstance(layer, Linear):
            raise StructureError(
                f"cannot make an MLP with {part}={layer!r}: it takes structured layers, einlinear.Linear(...) or "
                f"einlinear.Linear.from_dense(layer, family)"
            )
        widths[part] = layer.in_features, layer.out_features
    if widths["down"][0] != widths["up"][1] or widths.get("gate", widths["up"]) != widths["up"]:
        told = ", ".join(f"{part} {d_in} to {d_out}" for part, (d_in, d_out) in widths.items())
        raise StructureError(
            f"cannot make an MLP of layers that do not fit ({told}): down reads what up makes, and gate and up have "
            f"the same widths"
        )
