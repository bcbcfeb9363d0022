"""A GPT and an MLP in which every linear layer between the two ends may have any structure.

Shapes are written as suffixes: B sequences, T positions, D width, F hidden features, H heads, K features of a
head, V vocabulary; `x_BTD` is a tensor of shape [B, T, D].
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.cost import flops
from einlinear.expert_mlp import MixtureMLP
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.lab.data import Examples, Sequences, Task
from einlinear.layer import Linear
from einlinear.mlp import StructuredMLP
from einlinear.optim import Role
from einlinear.routing import Router
from einlinear.scaling import residual_scale
from einlinear.shared import Together
from einlinear.structure import Structure
from einlinear.structures.mixture import refuse_experts

EXPANSION = 4  # hidden features of a feed-forward block, in widths
SHARPNESS = 8.0  # largest attention logit: queries and keys have norm √K, and muP divides their product by K

EMBEDDING = 0.1  # standard deviation of the embedding's entries


@dataclass(frozen=True, repr=False)
class Moe(Family, listed=False):
    """The standard mixture of experts: layers of the family `of`, and feed-forward blocks that are mixtures of MLPs.

    Each token passes through `active` of `experts` MLPs. With experts in every linear layer instead, the family is
    `mixture(of='btt', experts=16, active=2)`.
    """

    experts: int
    active: int
    of: str = "dense"
    example: ClassVar = {"experts": 8, "active": 2}
    source: ClassVar = "Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_experts(self.of)

    def __call__(self, d_in: int, d_out: int) -> Structure:
        return family_of(self.of)(d_in, d_out)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a model, and that of the smaller one whose learning rate it takes over by muP.

    `family` is the short text of a structure ("btt(rank=2)"), with experts in every layer ("mixture(of='btt',
    experts=16, active=2)") or in feed-forward blocks ("moe(experts=8, active=2)"); a width is a multiple of `head`,
    the features of an attention head, which stays the same at every width.
    """

    family: str = "dense"
    width: int
    depth: int
    base_width: int
    base_depth: int
    head: int = 16

    @property
    def width_mult(self) -> float:
        """How many times as wide as the model whose rate was tuned."""
        return self.width / self.base_width

    @property
    def depth_mult(self) -> float:
        """How many times as deep as the model whose rate was tuned."""
        return self.depth / self.base_depth


def build(task: Task, architecture: Architecture) -> "GPT | MLP":
    """The model for a task: `GPT` for sequences, `MLP` for examples."""
    if isinstance(task, Sequences):
        return GPT(architecture, task.vocabulary, task.context)
    return MLP(architecture, task.d_in, task.d_out)


class GPT(nn.Module):
    """A causal transformer: pre-norm blocks, rotary positions, normed queries and keys, no biases or gains.

    Width by muP in the form of microsoft/mup (Tensor Programs V, https://arxiv.org/abs/2203.03466, table 8), depth
    by `einlinear.residual_scale`. The read-out and the last layer of each branch start at zero.

    Shape:
        Token indices `[B, T]`, T at most `context`, to logits `[B, T, V]`.

    Raises:
        ValueError: if the width is not a multiple of a head's.
    """

    roles: ClassVar[dict[str, Role]] = {}

    def __init__(self, architecture: Architecture, vocabulary: int, context: int) -> None:
        super().__init__()
        width = architecture.width
        if width % architecture.head:
            raise ValueError(
                f"Building a GPT of width {width}: it is not a multiple of {architecture.head}, the width of an "
                f"attention head; choose one that is, such as {-(-width // architecture.head) * architecture.head}."
            )
        self.token = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.token.weight, std=EMBEDDING)
        self.blocks = nn.ModuleList(Block(architecture, context) for _ in range(architecture.depth))
        self.readout = Readout(architecture, vocabulary)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.token(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.readout(x_BTD)
        return logits_BTV


class MLP(nn.Module):
    """A residual multilayer perceptron: feed-forward blocks between a dense input and a dense read-out.

    Shape:
        `[B, d_in]` to `[B, d_out]`.
    """

    roles: ClassVar[dict[str, Role]] = {"input.weight": "embedding"}  # from features whose number is fixed

    def __init__(self, architecture: Architecture, d_in: int, d_out: int) -> None:
        super().__init__()
        self.input = nn.Linear(d_in, architecture.width)
        self.blocks = nn.ModuleList(feed_forward(architecture) for _ in range(architecture.depth))
        self.branch = residual_scale(architecture.depth_mult)
        self.readout = Readout(architecture, d_out)

    def forward(self, x_BI: Tensor) -> Tensor:
        x_BD = self.input(x_BI)
        for block in self.blocks:
            x_BD = x_BD + self.branch * block(_normed(x_BD))
        y_BO: Tensor = self.readout(x_BD)
        return y_BO


class Block(nn.Module):
    """Attention and a feed-forward layer, each on its own branch beside the residual stream."""

    def __init__(self, architecture: Architecture, context: int) -> None:
        super().__init__()
        self.attention = Attention(architecture, context)
        self.feed_forward = feed_forward(architecture)
        self.branch = residual_scale(architecture.depth_mult)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.branch * self.attention(_normed(x_BTD))
        x_BTD = x_BTD + self.branch * self.feed_forward(_normed(x_BTD))
        return x_BTD


class Attention(nn.Module):
    """Causal self-attention; queries and keys are normed for each head, then turned by their positions.

    Sources: Dehghani et al. 2023, https://arxiv.org/abs/2302.05442 (norm); RoFormer, Su et al. 2021,
    https://arxiv.org/abs/2104.09864 (rotary positions, here with wavelengths up to 2π contexts).
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, architecture: Architecture, context: int) -> None:
        super().__init__()
        width, family = architecture.width, architecture.family
        self.head, self.context = architecture.head, context
        self.query = Linear(width, width, family, bias=False)
        self.key = Linear(width, width, family, bias=False, router=False)
        self.value = Linear(width, width, family, bias=False, router=False)
        self.output = Linear(width, width, family, bias=False, zero=True)
        self._together = Together.of(self.query, self.key, self.value)
        half = self.head // 2
        angle_TK = torch.arange(context)[:, None] * context ** (-torch.arange(half) / half).repeat(2)
        sign_K = torch.tensor([-1.0, 1.0]).repeat_interleave(half)
        self.register_buffer("cos_TK", angle_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", sign_K * angle_TK.sin(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        if self.query.router is None:
            three = self._together(x_BTD, *layers)
        else:  # one routing for all three: they read the same tokens
            routing = self.query.router(x_BTD)
            three = [layer(x_BTD, routing) for layer in layers]
        q_BHTK, k_BHTK, v_BHTK = (self._heads(y_BTD) for y_BTD in three)
        q_BHTK, k_BHTK = (self._turned(_normed(x_BHTK)) for x_BHTK in (q_BHTK, k_BHTK))
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=SHARPNESS / self.head)
        y_BTD: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(2))
        return y_BTD

    def _heads(self, x_BTD: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        return x_BTD.view(batch, length, -1, self.head).transpose(1, 2)

    def _turned(self, x_BHTK: Tensor) -> Tensor:
        """Feature k and feature k + K/2 are turned together, by an angle that grows with the position."""
        cos_TK, sin_TK = (table[: x_BHTK.shape[2]].to(x_BHTK.dtype) for table in (self.cos_TK, self.sin_TK))
        return x_BHTK * cos_TK + x_BHTK.roll(self.head // 2, -1) * sin_TK


def feed_forward(architecture: Architecture) -> "FeedForward | MixtureMLP":
    """The feed-forward block of a family: one MLP, or with `Moe` many."""
    family, width = family_of(architecture.family), architecture.width
    if isinstance(family, Moe):
        options = {"experts": family.experts, "active": family.active, "zero": True}
        return MixtureMLP(width, EXPANSION * width, family.of, "relu2", **options)  # type: ignore[arg-type]
    return FeedForward(architecture)


class FeedForward(StructuredMLP):
    """D to F features, squared ReLU, and back (Primer 2021, https://arxiv.org/abs/2109.08668)."""

    def __init__(self, architecture: Architecture) -> None:
        width, family = architecture.width, architecture.family
        super().__init__(width, EXPANSION * width, family, "relu2", bias=False, zero=True)


class Readout(nn.Linear):
    """Norm and a dense layer from zero, its input over the width multiplier: muP's rule for a finite output."""

    def __init__(self, architecture: Architecture, d_out: int) -> None:
        super().__init__(architecture.width, d_out, bias=False)
        self.multiplier = 1 / architecture.width_mult
        nn.init.zeros_(self.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTV: Tensor = F.linear(self.multiplier * _normed(x_BTD), self.weight)
        return y_BTV


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass, by part, for one token (or example).

    A multiply-add counts as two, padding of structures counts, embeddings, norms and activations do not.
    Attention counts the full T × T products, not the causal half; of experts those that are active, and routers.
    """

    linear: int  # the layers that a structure replaces
    attention: int
    ends: int  # the read-out, and the input of an MLP

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.ends


@lru_cache(maxsize=1024)
def counted(task: Task, architecture: Architecture) -> tuple[int, Flops]:
    """Parameters and FLOPs of the model that `build` would make, without the memory for it."""
    with torch.device("meta"):
        model = build(task, architecture)
    return sum(parameter.numel() for parameter in model.parameters()), forward_flops(model)


def forward_flops(model: GPT | MLP) -> Flops:
    """What one token (or example) costs, in sequences of full length."""
    linear = attention = ends = 0
    for module in model.modules():
        match module:
            case Linear():
                linear += flops(module.structure)
            case Router():
                linear += 2 * module.d_in * module.experts
            case nn.Linear():
                ends += 2 * module.in_features * module.out_features
            case Attention():
                attention += 4 * module.context * module.value.out_features
    return Flops(linear, attention, ends)


def _normed(x: Tensor) -> Tensor:
    """Root mean square one over the last axis, without gains."""
    return F.rms_norm(x, x.shape[-1:])


def loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The task's mean loss: nats per token (per example), or squared error per example."""
    if isinstance(task, Examples) and task.loss == "mean squared error":
        return F.mse_loss(outputs.float(), targets)
    return F.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())
