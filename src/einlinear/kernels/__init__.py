"""Fast contractions behind one interface, and the choice between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch

import torch
from torch import Tensor

from einlinear.clock import seconds
from einlinear.contract import check, pad_last
from einlinear.kernels.blocked import Blocked, Turned
from einlinear.kernels.bottleneck import Bottleneck
from einlinear.kernels.chain import Chain, Columns, Tiles
from einlinear.kernels.cluster import Cluster
from einlinear.kernels.kernel import CPU, CPU_HALF, CUDA, CUDA_HALF, Runner, Target
from einlinear.kernels.kernel import Kernel as Kernel
from einlinear.kernels.native import Native
from einlinear.kernels.pair import Pair
from einlinear.kernels.reference import Materialised, Reference, Rows
from einlinear.kernels.routed import Routing as Routing
from einlinear.kernels.routed import explain_routed
from einlinear.kernels.routed import routed_plan as routed_plan
from einlinear.kernels.transforms import exported
from einlinear.kernels.transforms import hooked as hooked
from einlinear.kernels.transforms import ordinary as ordinary
from einlinear.kernels.transforms import transformed as transformed
from einlinear.structure import Structure, is_count

KERNELS: tuple[Kernel, ...] = (
    Pair(),
    Bottleneck(),
    Cluster(),
    Tiles(),
    Rows(),
    Columns(),
    Blocked(),
    Turned(),
    Native(),
    Chain(),
    Reference(),
    Materialised(),
)


@dataclass(frozen=True)
class Choice:
    """Up to each number of tokens, in rising order, the runner that is modelled fastest; the last has no limit."""

    forward: tuple[tuple[float, Runner], ...]
    training: tuple[tuple[float, Runner], ...]

    def __call__(self, tokens: int, training: bool) -> Runner:
        *limited, (_, last) = self.training if training else self.forward
        for limit, run in limited:
            if tokens <= limit:
                return run
        return last


@dataclass(frozen=True)
class Plan:
    """How one structure is run on each kind of machine, as modelled times say.

    `plain` is made of torch's own operators, for any number of tokens; it serves where custom ones cannot: under
    `torch.func`, and in what is exported for other runtimes.
    """

    structure: Structure
    d_in: int
    d_out: int
    pad_in: int
    pad_out: int
    cpu: Choice
    cpu_half: Choice
    cuda: Choice
    cuda_half: Choice
    plain: Runner

    def __call__(self, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the map to `x`, `[..., d_in]`, and adds `bias`, `[d_out]`; returns `[..., d_out]`.

        Raises:
            StructureError: if the last dimension of `x` is not `d_in`.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            check(self.structure, factors, x)
        tokens = pad_last(x, self.pad_in)
        if x.ndim != 2:  # every view takes a microsecond
            tokens = tokens.reshape(-1, self.d_in + self.pad_in)
        single, halved = (self.cuda, self.cuda_half) if x.is_cuda else (self.cpu, self.cpu_half)
        choice = halved if x.element_size() == 2 else single
        if exported() or not ordinary(x, *factors) or transformed(x, *factors):
            run = self.plain
        else:
            records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *factors))
            run = choice(tokens.shape[0], records)
        y = run(factors, tokens, None if bias is None else pad_last(bias, self.pad_out))
        if self.pad_out:
            y = y[:, : self.d_out]
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.d_out)


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> Plan:
    """The plan of an unrouted, canonical structure."""
    cpu, cpu_half, cuda, cuda_half = (_choice(structure, target) for target in (CPU, CPU_HALF, CUDA, CUDA_HALF))
    return Plan(
        structure,
        d_in=structure.d_in,
        d_out=structure.d_out,
        pad_in=structure.pad_in,
        pad_out=structure.pad_out,
        cpu=cpu,
        cpu_half=cpu_half,
        cuda=cuda,
        cuda_half=cuda_half,
        plain=Rows().prepare(structure),
    )


LIMITS = tuple(2**k for k in range(22))
"""Numbers of tokens between which the choice may change; it is made for the larger one."""


def _choice(structure: Structure, target: Target) -> Choice:
    fitting = [kernel for kernel in KERNELS if kernel.refuses(structure, target) is None]
    runners: dict[Kernel, Runner] = {}
    choices: list[tuple[tuple[float, Runner], ...]] = []
    for training in (False, True):
        limits: list[tuple[float, Runner]] = []
        for limit in (*LIMITS, math.inf):
            kernel = _fastest(fitting, structure, _judged(limit), target, training)
            run = runners.setdefault(kernel, kernel.prepare(structure))
            if limits and limits[-1][1] is run:
                limits.pop()
            limits.append((limit, run))
        choices.append(tuple(limits))
    return Choice(*choices)


def _judged(tokens: float) -> int:
    """The number of tokens by which the choice for so many is made: their limit, as most often it is a limit."""
    return int(next((limit for limit in LIMITS if tokens <= limit), 2 * LIMITS[-1]))


def _fastest(
    kernels: Sequence[Kernel], structure: Structure, tokens: int, target: Target, training: bool = False
) -> Kernel:
    return min(kernels, key=lambda kernel: kernel.seconds(structure, tokens, target, training))


@singledispatch
def explain(subject: object, *args: object, **options: object) -> str:
    """Says what will be done with `subject` and why, as text to print.

    * `explain(structure, device="cpu", dtype=torch.float32, tokens=1024, training=False)`: the kernel that
      runs it, and each kernel's modelled time (`einlinear.seconds`) or refusal.
    * `explain(model, groups)`: initialisation, learning rate and decay of every parameter.
    """
    raise TypeError(f"cannot explain a {type(subject).__name__}: pass a Structure, or a model and its parameter groups")


@explain.register
def _(
    structure: Structure,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 1024,
    training: bool = False,
) -> str:
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"cannot explain how a structure runs in {dtype!r}: pass a torch.dtype, as torch.bfloat16")
    if not (tokens == 0 or is_count(tokens)):
        raise ValueError(f"cannot explain how a structure runs {tokens!r} tokens: pass a whole number")
    if structure.routed:
        return explain_routed(structure, tokens, device, dtype)
    canonical, target, judged = structure.canonical, Target.of(device, dtype), _judged(tokens)
    refusals = {kernel: kernel.refuses(canonical, target) for kernel in KERNELS}
    fitting = [kernel for kernel in KERNELS if refusals[kernel] is None]
    chosen = _fastest(fitting, canonical, judged, target, training)
    mode = "forward and backward" if training else "forward"
    plain = Structure.parse("i, o i -> o", i=structure.d_in, o=structure.d_out)
    dense = seconds(plain, tokens, target.device, dtype, "training" if training else "forward")
    bound = "" if judged == tokens else f", as up to {judged}"
    lines = [
        f"{structure!r}",
        f"runs {tokens} tokens{bound} by '{chosen.name}' on {device} in {dtype}, {mode}; "
        f"modelled: {target.machine.name}",
    ]
    for kernel, verdict in refusals.items():
        if verdict is None:
            time = kernel.seconds(canonical, tokens, target, training)
            verdict = f"fits, modelled {_units(time)}, {time / dense:.3g} of dense"
        lines.append(f"  {kernel.name:13} {verdict}")
    return "\n".join(lines)


def _units(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
