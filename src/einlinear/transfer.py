"""Whether one learning rate serves all widths, measured: the coordinate check and the own-update check."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from einlinear.family import Family
from einlinear.layer import Linear
from einlinear.muon import Muon
from einlinear.optim import Group, parameter_groups
from einlinear.routing import Router

VOCABULARY = 64
"""Kinds of token that the default model reads and predicts."""

TOKENS = 8
"""Tokens in the default batch. Few: an update is the sum of one part for each token, and parts that
are not aligned with each other add up to less, the more so at small widths (slopes of BTT with rank 1
over 64 to 4096 under AdamW: -0.05 with 4 tokens, -0.12 with 16)."""

# Rates at which a step is small against the weights at every width, so that what is measured is linear in it.
OPTIMIZERS: Mapping[str, tuple[Callable[[list[Group]], torch.optim.Optimizer], float]] = {
    "adamw": (lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-16), 1e-4),
    "sgd": (lambda groups: torch.optim.SGD(groups), 1e-2),
    "muon": (lambda groups: Muon(groups, eps=1e-16), 1e-3),
}

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Slope:
    """How two sizes of one parameter's layer depend on the width, as exponents.

    `output` is that of the layer's output after training for a few steps, and `update` that of the
    change of the output when this parameter alone takes its step.
    """

    parameter: str
    output: float
    update: float


@dataclass(frozen=True)
class CheckReport:
    """The verdict of `check`; `str` is a table of it."""

    widths: tuple[int, ...]
    optimizer: str
    tolerance: float
    slopes: tuple[Slope, ...]
    unmeasured: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every measured parameter passes; false if none was measured."""
        return bool(self.slopes) and not any(self.fault(slope) for slope in self.slopes)

    def fault(self, slope: Slope) -> str | None:
        """What is wrong with a parameter, in words; None if nothing."""
        if not math.isfinite(slope.update + slope.output):
            return "no update, or not finite"
        if slope.update >= self.tolerance:
            return "its updates grow with the width"
        if slope.update <= -self.tolerance:
            bottleneck = ", and so do outputs: a bottleneck" if slope.output <= -self.tolerance else ""
            return f"its updates shrink with the width{bottleneck}"
        return "outputs grow with the width" if slope.output >= self.tolerance else None

    def __str__(self) -> str:
        rows = [(s.parameter, f"{s.output:+.2f}", f"{s.update:+.2f}", self.fault(s) or "ok") for s in self.slopes]
        table = [("parameter", "output", "own update", "verdict"), *rows]
        columns = [max(map(len, column)) for column in zip(*table, strict=True)]
        faults = sum(verdict != "ok" for *_, verdict in rows)
        verdict = (
            f"{faults} of {len(rows)} parameters do not keep their updates across widths"
            if faults
            else "one learning rate serves all these widths"
        )
        lines = [
            f"slopes of log size against log width, {self.optimizer}, widths {', '.join(map(str, self.widths))}",
            *("  ".join(map(str.ljust, row, columns)).rstrip() for row in table),
            *(f"not measured, for its module is not called: {name}" for name in self.unmeasured),
            f"{'ok' if self.ok else 'FAILED'}: {verdict} (tolerance {self.tolerance:g})",
        ]
        return "\n".join(lines)


def check(
    model_fn: Callable[[int], nn.Module],
    widths: Sequence[int] = (64, 256, 1024),
    *,
    optimizer: str = "adamw",
    lr: float | None = None,
    readout: str | Sequence[str] | None = "readout",
    groups_fn: Callable[[nn.Module, float], list[Group]] | None = None,
    batch_fn: Callable[[int], Batch] | None = None,
    steps: int = 3,
    seeds: int = 2,
    tolerance: float = 0.25,
) -> CheckReport:
    """Measures whether the learning rates of a model keep its updates the same size at all widths.

    The customary coordinate check sees only outputs that grow; rates that are too small pass it. So
    each parameter is also changed *alone* by the step that its optimizer takes, and the change of its
    layer's output, on the layer's own input, must not depend on the width: |slope| of
    log rms(Δy) against log width < `tolerance`.

    Args:
        model_fn: makes the model of one width, such as `default_model("btt(rank=4)")`.
        widths: at least two; the first is where the base rate counts as tuned. Powers of 4 suit
            structures that split the width into two equal parts.
        optimizer: "adamw", "sgd" or "muon".
        lr: the base rate; by default one that is small for the optimizer.
        readout: as in `parameter_groups`.
        groups_fn: `groups_fn(model, width_mult)`, the groups to check instead of those of
            `parameter_groups(model, lr, optimizer=optimizer, width_mult=width_mult, readout=readout)`.
        batch_fn: `batch_fn(width)`, a pair of the model's input and its targets: classes (integers,
            `[...]` for an output `[..., classes]`) or values. By default 32 random tokens of `VOCABULARY`.
        steps: optimizer steps; the last one is measured.
        seeds: models per width, whose logarithms are averaged.
        tolerance: of the slopes.

    Raises:
        ValueError: for fewer than two widths, an unknown optimizer, or models of different parameters.
    """
    if len(set(widths)) < 2 or steps < 1 or seeds < 1:
        raise ValueError(
            f"cannot fit slopes to widths={tuple(widths)} with steps={steps} and seeds={seeds}: "
            f"pass two or more different widths, and at least one step and seed"
        )
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"cannot check the optimizer '{optimizer}': known are {', '.join(OPTIMIZERS)}")
    make, small = OPTIMIZERS[optimizer]
    rate = small if lr is None else lr

    def groups(model: nn.Module, width_mult: float) -> list[Group]:
        return parameter_groups(model, rate, optimizer=optimizer, width_mult=width_mult, readout=readout)

    sizes: list[dict[str, tuple[float, float]]] = []
    skipped: dict[str, None] = {}
    with torch.random.fork_rng(devices=[]):
        for width in widths:
            for seed in range(seeds):
                torch.manual_seed(seed)
                model, batch = model_fn(width), (batch_fn or _tokens)(width)
                stepper = make((groups_fn or groups)(model, width / widths[0]))
                measured = _measure(model, stepper, batch, steps)
                sizes.append(measured)
                skipped |= {n: None for n, p in model.named_parameters() if p.requires_grad and n not in measured}
    if any(found.keys() != sizes[0].keys() for found in sizes):
        odd = next(name for found in sizes for name in found.keys() ^ sizes[0].keys())
        raise ValueError(
            f"cannot compare widths {tuple(widths)}: only some of the models have the parameter {odd}; "
            f"model_fn must change sizes alone, and the structure keep its number of factors"
        )
    log_widths = [math.log(width) for width in widths for _ in range(seeds)]
    slopes = tuple(
        Slope(name, *(_slope(log_widths, [found[name][kind] for found in sizes]) for kind in (0, 1)))
        for name in sizes[0]
    )
    return CheckReport(tuple(widths), optimizer, tolerance, slopes, tuple(skipped))


def default_model(structure: Family | str) -> Callable[[int], nn.Module]:
    """Makes small residual models whose hidden layers have the structure, one for each width; for `check`."""
    return lambda width: _Residual(width, structure)


class _Residual(nn.Module):
    """Tokens `[...]` to logits `[..., VOCABULARY]`, by two blocks that widen fourfold and narrow again."""

    def __init__(self, width: int, structure: Family | str) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up = nn.ModuleList(Linear(width, 4 * width, structure) for _ in range(2))
        self.down = nn.ModuleList(Linear(4 * width, width, structure) for _ in range(2))
        self.readout = nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.readout.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            # Norms without gains: each layer sees inputs of size 1, whatever a bottleneck before it does.
            middle = functional.gelu(up(functional.rms_norm(x, x.shape[-1:])))
            x = x + down(functional.rms_norm(middle, middle.shape[-1:]))
        logits: Tensor = self.readout(functional.rms_norm(x, x.shape[-1:]) * (VOCABULARY / self.width))
        return logits


def _tokens(width: int) -> Batch:
    return torch.randint(VOCABULARY, (TOKENS,)), torch.randint(VOCABULARY, (TOKENS,))


def _measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, steps: int
) -> dict[str, tuple[float, float]]:
    """For each parameter, the logarithms of its layer's output after `steps` and of its own last update."""
    layers = _layers(model)
    calls: dict[str, tuple[tuple[object, ...], dict[str, object], Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], options: dict[str, object], output: object) -> None:
            calls.setdefault(name, (args, options, _told(module, output)))

        return hook

    hooks = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in layers.items()]
    for _ in range(steps):
        calls.clear()
        optimizer.zero_grad()
        _loss(model, batch).backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    inputs = dict(calls)
    calls.clear()
    with torch.no_grad():
        model(batch[0])
    for hook in hooks:
        hook.remove()
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sizes: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        for layer, (args, options, output) in inputs.items():
            module = layers[layer]
            for local, parameter in module.named_parameters(recurse=isinstance(module, Linear)):
                name = f"{layer}.{local}".lstrip(".")
                if not parameter.requires_grad or (local.startswith("router.") and f"{layer}.router" in layers):
                    continue
                parameter.copy_(after[name])
                change = _told(module, module(*args, **options)) - output
                parameter.copy_(before[name])
                sizes[name] = (_log_rms(calls[layer][2]), _log_rms(change))
    return sizes


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters themselves, and `Linear`, which holds them in a list."""
    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: module for name, module in (owners | linears).items() if not isinstance(module, nn.ParameterList)}


def _told(module: nn.Module, output: object) -> Tensor:
    """What a call of a module is measured by: its output, and of a router its logits, as choices jump."""
    if isinstance(module, Router) and module.latest is not None:
        return module.latest.logits.detach()
    return _first(output).detach()


def _first(output: object) -> Tensor:
    """The tensor of an output that may be a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise ValueError(
            f"cannot measure an output of type {type(found).__name__}: a tensor is needed, or a tuple that begins "
            f"with one; let model_fn return a module whose forward gives that"
        )
    return found


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    output = _first(model(inputs))
    if targets.is_floating_point():
        return functional.mse_loss(output, targets)
    return functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def _log_rms(x: Tensor) -> float:
    size = float(x.double().square().mean().sqrt())
    return math.log(size) if size > 0 else -math.inf


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
