"""One finished measurement: what was trained, under which conditions, and what came out."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the store: a model trained to one horizon and evaluated after its cooldown.

    The first block identifies the run: two runs with equal `key` are the same experiment, and a
    sweep that finds the key in its store does not train it again. All counts are exact, from the
    specs of the model's layers; FLOPs count a multiply-add as two.
    """

    task: str  # "bytes", "text", "pixels", "images", "teacher"
    fingerprint: str  # of the data; runs of different fingerprints are never fitted together
    family: str  # short text of the structure: "dense", "btt(rank=2)"
    width: int
    depth: int
    tokens: int  # horizon: training tokens (or examples) seen
    rate: float  # base learning rate, before every multiplier
    seed: int
    purpose: str = "measure"  # "tune" while the base rate is chosen, "measure" for the law
    setup: str = "{}"  # JSON of every other setting that changes the outcome (batch, context, schedule, ...)

    status: str = "done"  # "done", "diverged", "out of memory"; all of them are results
    reason: str = ""  # why it is not "done"
    loss: float | None = None  # validation loss in nats per token (per example), None when not done
    spec: str = ""  # the structure of its square layers, as a Structure's repr
    parameters: int = 0
    flops: int = 0  # training FLOPs of the whole model: forward and backward, attention and head included
    linear_flops: int = 0  # the part of `flops` spent in the replaceable linear layers
    seconds: float = 0.0  # wall time of the training steps alone, evaluation excluded
    trunk: str = ""  # runs that share a trunk are horizons of one training run, hence dependent
    curve: str = "[]"  # JSON list of [tokens, training loss]
    routers: str = "{}"  # JSON: what `health.Health` tells of each routed layer; {} without experts

    device: str = ""
    versions: str = "{}"  # JSON: einlinear, torch, python
    commit: str = ""
    created: str = field(default="", compare=False)  # UTC, ISO 8601

    identity: ClassVar[tuple[str, ...]] = (
        "task", "fingerprint", "family", "width", "depth", "tokens", "rate", "seed", "purpose", "setup",
    )  # fmt: skip

    @property
    def size(self) -> tuple[int | float, ...]:
        """Runs of one family, size and horizon differ only in their seed."""
        return (self.width, self.depth, self.rate)

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """What makes this run the same experiment as another."""
        return tuple(getattr(self, name) for name in self.identity)
