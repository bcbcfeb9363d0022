"""Fast contractions behind one interface, and the choice between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch

import torch
from torch import Tensor
from torch.autograd import forward_ad

from einlinear.contract import check, pad_last
from einlinear.kernels.chain import Chain, Tiles
from einlinear.kernels.kernel import CPU, CUDA, CUDA_HALF, Runner, Target
from einlinear.kernels.kernel import Kernel as Kernel
from einlinear.kernels.pair import Pair
from einlinear.kernels.reference import Materialised, MatmulRunner, Reference
from einlinear.structure import Structure

KERNELS: tuple[Kernel, ...] = (Pair(), Tiles(), Chain(), Reference(), Materialised())


@dataclass(frozen=True)
class Choice:
    """By `few` up to `threshold` tokens, by `many` beyond."""

    few: Runner
    many: Runner
    threshold: float


@dataclass(frozen=True)
class Plan:
    """How one structure is run on each kind of machine, as modelled costs say.

    `plain` is made of torch's own operators, for any number of tokens; it serves where custom ones cannot: under
    `torch.func`, and in what is exported for other runtimes.
    """

    structure: Structure
    d_in: int
    d_out: int
    pad_in: int
    pad_out: int
    cpu: Choice
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
        tokens = pad_last(x, self.pad_in).reshape(-1, self.d_in + self.pad_in)
        choice = (self.cuda_half if x.element_size() == 2 else self.cuda) if x.is_cuda else self.cpu
        # Of torch.compile too, torch says that it is exporting.
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        if exporting or transformed(x, *factors):
            run = self.plain
        elif choice.few is choice.many or tokens.shape[0] <= choice.threshold:
            run = choice.few
        else:
            run = choice.many
        y = run(factors, tokens, None if bias is None else pad_last(bias, self.pad_out))
        return y[:, : self.d_out].reshape(*x.shape[:-1], self.d_out)


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> Plan:
    """The plan of an unrouted, canonical structure."""
    cpu, cuda, cuda_half = (_choice(structure, target) for target in (CPU, CUDA, CUDA_HALF))
    return Plan(
        structure,
        d_in=structure.d_in,
        d_out=structure.d_out,
        pad_in=structure.pad_in,
        pad_out=structure.pad_out,
        cpu=cpu,
        cuda=cuda,
        cuda_half=cuda_half,
        plain=MatmulRunner(structure),
    )


def _choice(structure: Structure, target: Target) -> Choice:
    fitting = [kernel for kernel in KERNELS if kernel.refuses(structure, target) is None]
    few, many = (_cheapest(fitting, structure, tokens, target) for tokens in (1, 10**12))
    threshold = math.inf
    if few is not many:
        # Costs are affine in the number of tokens: a gentler slope pays off from one number on.
        fixed = many.cost(structure, 0, target) - few.cost(structure, 0, target)
        threshold = fixed / (_slope(few, structure, target) - _slope(many, structure, target))
    runners = {kernel: kernel.prepare(structure) for kernel in (few, many)}
    return Choice(runners[few], runners[many], threshold)


def _cheapest(kernels: Sequence[Kernel], structure: Structure, tokens: int, target: Target) -> Kernel:
    return min(kernels, key=lambda kernel: kernel.cost(structure, tokens, target))


def _slope(kernel: Kernel, structure: Structure, target: Target) -> float:
    return kernel.cost(structure, 1, target) - kernel.cost(structure, 0, target)


def transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives or a `torch.func` transform are at work: custom ops know neither."""
    if torch.compiler.is_compiling():
        return False
    dual = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    return dual or torch._C._are_functorch_transforms_active()


@singledispatch
def explain(subject: object, *args: object, **options: object) -> str:
    """Says what will be done with `subject` and why, as text to print.

    * `explain(structure, tokens=1024, device="cpu", dtype=torch.float32)`: the kernel that runs it,
      and each kernel's modelled cost or refusal.
    * `explain(model, groups)`: initialisation, learning rate and decay of every parameter.
    """
    raise TypeError(f"cannot explain a {type(subject).__name__}: pass a Structure, or a model and its parameter groups")


@explain.register
def _(structure: Structure, tokens: int = 1024, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    if structure.routed:
        return f"{structure!r}\nruns by the reference contraction, einlinear.apply: no kernel takes a gate"
    canonical, dense, target = structure.canonical, 2 * structure.d_in * structure.d_out, Target.of(device, dtype)
    refusals = {kernel: kernel.refuses(canonical, target) for kernel in KERNELS}
    fitting = [kernel for kernel in KERNELS if refusals[kernel] is None]
    chosen = _cheapest(fitting, canonical, tokens, target)
    lines = [f"{structure!r}", f"runs {tokens} tokens by '{chosen.name}' on {device} in {dtype}"]
    for kernel, refusal in refusals.items():
        cost = kernel.cost(canonical, tokens, target) / (tokens * dense)
        lines.append(f"  {kernel.name:13} {refusal or f'fits, modelled cost {cost:.4g} of dense'}")
    return "\n".join(lines)
