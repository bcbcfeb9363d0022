"""`Router`: which experts run on which tokens, how evenly, and the losses that keep it so."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from einlinear.kernels import Routing, hooked
from einlinear.kernels.select import TIE, route, routes
from einlinear.structure import StructureError, is_count

SHARPNESS = 8.0
"""Logits are this over the width times the sum over features: at any width they then move alike at a step of the
optimizer, as they must for a learning rate that does not depend on the width."""


class Choices(NamedTuple):
    """What a router did in one call: logits `[tokens, experts]`, its choices, and as in `Routing.chosen` those kept.

    What was chosen too often for a capacity is in `chosen`: by what is kept, a router would look evenly loaded.
    """

    logits: Tensor
    chosen: Tensor
    kept: Tensor


class Router(nn.Module):
    """Linear logits that start at zero, and for each token the softmax over its `active` largest.

    Logits, softmax and losses are computed in float32 at least, under autocast too. What is chosen is
    not differentiable; the weights of the chosen are.

    Args:
        d_in: features of a token.
        experts: E, how many there are.
        active: k, how many each token passes through.
        choice: "token", every token chooses `active` experts; or "expert", every expert chooses the
            tokens with the largest softmax over experts (Zhou et al. 2022, https://arxiv.org/abs/2202.09368):
            always balanced, but a choice depends on all tokens, later ones included.
        capacity: with "token", the most tokens of an expert over the even share; what comes later is
            dropped and counted (`router_statistics`). None drops nothing. With "expert", the tokens of an
            expert over the even share, 1 where None.
        jitter: in training, inputs are multiplied by numbers drawn from [1 - jitter, 1 + jitter]
            (Switch Transformers, Fedus et al. 2021, https://arxiv.org/abs/2101.03961).
        bias: whether tokens choose by logits plus a bias that `rebalance` moves towards even loads (Wang et al.
            2024, https://arxiv.org/abs/2408.15664), beside the loss or instead of it. Weights ignore it, and
            it is zero until `rebalance` is called.
        device, dtype: of the parameter.

    Shape:
        `[..., d_in]` to a `Routing` of all tokens, leading dimensions flattened.

    Raises:
        StructureError: for `active` beyond `experts`, and other settings out of range.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_in: int,
        experts: int,
        active: int = 1,
        *,
        choice: Literal["token", "expert"] = "token",
        capacity: float | None = None,
        jitter: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        doing = f"cannot make a router of {active!r} of {experts!r} experts"
        if not is_count(experts) or not is_count(active):
            raise StructureError(f"{doing}: pass two integers of at least 1")
        if not is_count(d_in):
            raise StructureError(f"{doing} for {d_in!r} features: pass an integer of at least 1")
        if active > experts:
            raise StructureError(f"{doing}: choose active between 1 and {experts}")
        if choice not in ("token", "expert"):
            raise StructureError(f"{doing} with choice={choice!r}: pass 'token' or 'expert'")
        numbers = all(isinstance(number, int | float) for number in (capacity or 0.0, jitter))
        if not numbers or not (capacity is None or 0 < capacity < math.inf) or not 0 <= jitter < 1:
            raise StructureError(
                f"{doing} with {capacity=} and {jitter=}: one is a positive number or None, one is in [0, 1)"
            )
        if not (dtype or torch.get_default_dtype()).is_floating_point:
            raise StructureError(f"{doing} in {dtype}: its logits are learned and compared; pass a real dtype")
        self.d_in, self.experts, self.active = d_in, experts, active
        self.choice, self.capacity, self.jitter = choice, capacity, jitter
        self.weight = nn.Parameter(torch.empty(experts, d_in, device=device, dtype=dtype))
        biased = bias and choice == "token"  # where experts choose, loads are even already
        self.register_buffer("bias", torch.empty(experts, device=device, dtype=torch.float32) if biased else None)
        self.latest: Choices | None = None
        self.collected: Choices | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: all experts weigh alike, and ties are spread evenly over them."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Routing:
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise StructureError(
                f"cannot route an input of shape {tuple(x.shape)}: its last dimension must be {self.d_in}"
            )
        tokens = x.reshape(-1, self.d_in)
        if self.training and self.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        if self.choice == "token" and routes(tokens, self.experts):
            logits, index, weight = route(tokens, self.weight, self.scale, self.bias, self.active)
        else:
            logits = self._logits(tokens)
            index, weight = self._chosen(logits)
        kept = index
        if self.choice == "token" and self.capacity is not None:
            kept, weight = self._within_capacity(index, weight)
        self.record(logits, index, kept)
        return Routing(kept, weight, self.experts, self.choice == "expert", self.capacity is not None)

    def record(self, logits: Tensor, chosen: Tensor, kept: Tensor | None = None) -> None:
        """Keeps what was chosen in training, for `balance_loss` and `router_statistics`; None drops nothing."""
        if self.training and not _recomputing():
            self.latest = Choices(logits, chosen, chosen if kept is None else kept)

    def joins(self, x: Tensor) -> bool:
        """Whether a layer may route `x` in an operator of its own, and then `record` what was chosen."""
        choices = self.choice == "token" and self.capacity is None and not (self.training and self.jitter)
        return choices and type(self) is Router and not hooked(self) and routes(x, self.experts)

    @property
    def scale(self) -> float:
        """Logits are the product of tokens with the weight, times this."""
        return SHARPNESS / self.d_in

    def _logits(self, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, self.weight.dtype), torch.float32)
        if tokens.device.type == "meta":
            return functional.linear(tokens.to(dtype), self.weight.to(dtype))
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.linear(tokens.to(dtype), self.weight.to(dtype) * self.scale)

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights, `[tokens, active]`, or `[experts, capacity]` where experts choose."""
        count = logits.shape[0]
        turn = torch.arange(self.experts, device=logits.device) - torch.arange(count, device=logits.device)[:, None]
        score = logits.detach() + TIE / self.experts * torch.remainder(turn, self.experts)
        if self.choice == "expert":
            shares = logits.softmax(-1).mT
            index = (score - score.logsumexp(-1, keepdim=True)).mT.topk(self._room(count), dim=-1).indices
            return index, shares.gather(1, index)
        if self.bias is not None:
            score = score + self.bias
        index = score.topk(self.active, dim=-1).indices
        return index, logits.gather(1, index).softmax(-1)

    def _room(self, tokens: int) -> int:
        """Tokens that an expert takes."""
        return min(tokens, math.ceil((self.capacity or 1.0) * tokens * self.active / self.experts))

    def _within_capacity(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """First choices come before second ones, and earlier tokens before later ones (GShard, 2020)."""
        queue = functional.one_hot(index.mT.flatten(), self.experts).cumsum(0)
        place = queue.gather(1, index.mT.reshape(-1, 1)).view(self.active, -1).mT
        kept = place <= self._room(index.shape[0])
        return torch.where(kept, index, self.experts), torch.where(kept, weight, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves and casts as any module, but for the type of `bias`: in 16 bits its steps would round to nothing."""
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.bias is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What was recorded belongs to a graph, which neither copies nor pickles.
        return {**self.__dict__, "latest": None, "collected": None}

    @property
    def options(self) -> dict[str, Any]:
        """The settings that it was made with, beside its sizes."""
        bias = self.bias is not None
        return {"choice": self.choice, "capacity": self.capacity, "jitter": self.jitter, "bias": bias}

    def extra_repr(self) -> str:
        told = (f"{name}={value!r}" for name, value in self.options.items())
        return ", ".join([f"{self.d_in}, experts={self.experts}, active={self.active}", *told])


def balance_loss(model: nn.Module, z: float = 0.1) -> Tensor:
    """What to add, with a small weight, to the loss of a model with experts: the mean over its routers.

        loss = cross_entropy(model(x), y) + 0.01 * el.balance_loss(model)

    For each router E · Σ_e p̄_e f̄_e + z · mean(logsumexp(logits)²), with p̄ the mean probability of an expert over
    tokens and f̄ its share of the choices made, those that a capacity then drops too: 1 where loads are even and
    logits small. A router whose experts choose has the second term alone.

    The contract: a forward pass in training mode leaves each router's logits, part of the graph, in
    `router.latest`, and this function takes them: call it once after each forward pass and before
    its backward pass. Under `torch.compile` they are outputs of the compiled graph; under activation
    checkpointing (`use_reentrant=False`) what is recomputed in the backward pass records nothing. A router
    that ran several times since counts with its last call. To compile a checkpointed block with
    `fullgraph=True`, set `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`.

    Raises:
        RuntimeError: if no router has run since, or one ran without recording gradients.

    Sources: Fedus et al. 2021, https://arxiv.org/abs/2101.03961 (balance); Zoph et al. 2022,
    https://arxiv.org/abs/2202.08906 (z); docs/mathematics.md section 4.
    """
    losses: list[Tensor] = []
    for name, router in _routers(model):
        if router.latest is None:
            continue
        logits, chosen, kept = router.latest
        if torch.is_grad_enabled() and router.weight.requires_grad and not logits.requires_grad:
            raise RuntimeError(
                f"cannot collect the balance loss: the router '{name}' ran without recording gradients; do not run it "
                f"under torch.no_grad, and checkpoint with use_reentrant=False"
            )
        # Sums over counts, where a mean over no tokens would be no number.
        tokens = max(1, logits.shape[0])
        loss = z * logits.logsumexp(-1).square().sum() / tokens
        if router.choice == "token":
            load = _counts(chosen, router.experts)
            share = logits.softmax(-1).sum(0) / tokens
            loss = loss + router.experts * (share * load / load.sum().clamp(min=1)).sum()
        losses.append(loss)
        router.latest, router.collected = None, Choices(logits.detach(), chosen, kept)
    if not losses:
        raise RuntimeError(
            "cannot collect the balance loss: no router of the model has run in training mode since it was last "
            "collected; call this once after each forward pass of a model with experts"
        )
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class RouterStatistics:
    """One router's latest call: `load` is each expert's share of all choices, and sums to 1 less what was `dropped`.

    Where experts choose, `dropped` is the share of tokens that none of them chose.
    `entropy` is the mean over tokens of that of the softmax, over its largest value log E: 1 is undecided.
    """

    load: tuple[float, ...]
    entropy: float
    dropped: float
    tokens: int

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts that no token went to."""
        return tuple(e for e, share in enumerate(self.load) if share == 0)


@torch.no_grad()
def router_statistics(model: nn.Module) -> dict[str, RouterStatistics]:
    """The latest call, in training mode, of each router of a model, by the router's name. Waits for the device."""
    found: dict[str, RouterStatistics] = {}
    for name, router in _routers(model):
        seen = router.latest or router.collected
        if seen is None:
            continue
        logits, _, index = seen
        count, choices = max(1, logits.shape[0]), max(1, index.numel())
        share = logits.log_softmax(-1)
        entropy = -(share.exp() * share).sum() / (count * math.log(max(2, router.experts)))
        if router.choice == "expert":
            load = index.new_full((router.experts,), index.shape[1], dtype=torch.float32) / choices
            dropped = (_counts(index, logits.shape[0]) == 0).sum() / count
        else:
            load = _counts(index, router.experts) / choices
            dropped = (index == router.experts).sum() / choices
        numbers: list[float] = torch.cat([load, entropy[None], dropped[None]]).tolist()  # the one wait for the device
        found[name] = RouterStatistics(tuple(numbers[:-2]), numbers[-2], numbers[-1], logits.shape[0])
    return found


@torch.no_grad()
def rebalance(model: nn.Module, rate: float | Tensor = 1e-2) -> None:
    """Moves the bias of each router that has one by `rate` towards even loads; call it after the optimizer's step.

    Source: Wang et al. 2024, https://arxiv.org/abs/2408.15664, algorithm 1. With several processes loads are those of
    all of them.
    """
    for _, router in _routers(model):
        seen = router.latest or router.collected
        if router.bias is None or seen is None:
            continue
        load = _counts(seen.chosen, router.experts)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        router.bias += rate * (load.mean() - load).sign()


def _routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Router))


def _counts(index: Tensor, kinds: int) -> Tensor:
    """How often each number below `kinds` occurs, without waiting for the device."""
    flat = index.flatten()
    counts = torch.zeros(kinds + 1, device=index.device)
    return counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))[:kinds]


def _recomputing() -> bool:
    """Whether this forward pass is one of activation checkpointing, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
