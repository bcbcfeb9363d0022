"""`MixtureMLP`: the standard mixture of experts, with experts of any structure."""

from typing import Any

import torch
from torch import Tensor, nn

from einlinear.family import Family
from einlinear.kernels import Routing, plan, transformed
from einlinear.kernels.junction import ACTIVATIONS
from einlinear.kernels.kernel import CUDA, CUDA_HALF
from einlinear.kernels.routed import ExpertSorted
from einlinear.kernels.slots import Experts, combine, dispatch
from einlinear.layer import Linear
from einlinear.routing import Router
from einlinear.structure import StructureError, is_count


class MixtureMLP(nn.Module):
    """The standard mixture of experts: `experts` MLPs, of which each token passes through `active`.

    y = Σ_e g_e(x) down_e(activation(up_e(x))), each expert on its own tokens (docs/experts.md); with the
    family "dense", the layer of Switch Transformers and GShard.

    Args:
        d_model: features of the input and of the output.
        hidden: features between the layers of one expert.
        family: of both layers: a family, or its short text.
        activation: as in `StructuredMLP`, but for the gated ones.
        experts: how many MLPs there are.
        active: how many each token passes through.
        zero: whether the last factor of `down` starts at zero.
        router: None for a new `Router(d_model, experts, active)`, or one made with other options.
        device, dtype: as in `einlinear.Linear`. There are no biases.

    Shape:
        `[..., d_model]` to `[..., d_model]`.

    Raises:
        ValueError: for an unknown activation.
        StructureError: where the family cannot be had at these widths, an input does not fit, or `active` is
            more than `experts`.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        family: Family | str = "dense",
        activation: str = "gelu",
        *,
        experts: int,
        active: int,
        zero: bool = False,
        router: Router | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"cannot make an MLP with activation={activation!r}: pass one of {', '.join(ACTIVATIONS)}")
        if not is_count(experts) or not isinstance(router, Router | None):
            raise StructureError(
                f"cannot make a mixture of {experts!r} MLPs with router={router!r}: pass an integer of at least 1, and "
                f"None for a new Router or one made with other options"
            )
        self.activation = activation
        options = {"experts": experts, "active": active, "bias": False, "device": device, "dtype": dtype}
        self.up = Linear(d_model, hidden, family, router=router, **options)  # type: ignore[arg-type]
        self.exchange: Any = None  # how tokens reach experts on other devices (`einlinear.parallelize_experts`)
        self.down = Linear(hidden, d_model, family, router=False, zero=zero, **options)  # type: ignore[arg-type]
        ones = [layer.structure.expert for layer in (self.up, self.down)]
        self._experts = tuple(map(Experts.of, ones))
        self._plans = tuple(map(plan, ones))
        self._sparse, self._sparse_half = (
            all(ExpertSorted().refuses(layer.structure, target) is None for layer in (self.up, self.down))
            for target in (CUDA, CUDA_HALF)
        )

    def forward(self, x: Tensor) -> Tensor:
        router = self.up.router
        assert router is not None
        routing = router(x)
        up, tokens, _ = self.up.operands(x)
        down, _, _ = self.down.operands(x)
        tokens = tokens.reshape(-1, tokens.shape[-1])
        sparse = self.exchange is not None or (self._sparse_half if tokens.element_size() == 2 else self._sparse)
        if tokens.device.type != "cuda":
            sparse = True
        apply = self._sorted if sparse and not transformed(tokens, *up) else self._all
        return apply(tokens, up, down, routing).reshape(x.shape)

    def _sorted(self, tokens: Tensor, up: list[Tensor], down: list[Tensor], routing: Routing) -> Tensor:
        slots = routing.slots()
        if self.exchange is not None:
            up, down = self.exchange.local(up), self.exchange.local(down)

        def run(state: Tensor, offsets: Tensor) -> Tensor:
            state = self._experts[0](up, state, offsets)
            return self._experts[1](down, ACTIVATIONS[self.activation](state), offsets)

        state = dispatch(tokens, slots)
        y = run(state, slots.offsets) if self.exchange is None else self.exchange(state, slots.offsets, run)
        return combine(y, slots, tokens.shape[0])

    def _all(self, tokens: Tensor, up: list[Tensor], down: list[Tensor], routing: Routing) -> Tensor:
        """All experts on all tokens."""
        gate, total = routing.gate(tokens.shape[0]).to(tokens.dtype), torch.zeros_like(tokens)
        for e in range(routing.experts):
            first, second = ([factor.chunk(routing.experts)[e] for factor in factors] for factors in (up, down))
            hidden = ACTIVATIONS[self.activation](self._plans[0](first, tokens))
            total = total + gate[:, e, None] * self._plans[1](second, hidden)
        return total

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
