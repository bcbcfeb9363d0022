"""Fast contractions behind one interface, and the choice between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch

import torch
from torch import Tensor
from torch.autograd import forward_ad

from einlinear.contract import check, pad_last
from einlinear.kernels.chain import Chain
from einlinear.kernels.kernel import Kernel as Kernel
from einlinear.kernels.kernel import Runner
from einlinear.kernels.reference import Materialised, Reference
from einlinear.structure import Structure

KERNELS: tuple[Kernel, ...] = (Chain(), Reference(), Materialised())


@dataclass(frozen=True)
class Plan:
    """How one structure is run: by `few` up to `threshold` tokens, by `many` beyond, as modelled costs say.

    `plain` is made of torch's own operators; it serves where custom ones cannot.
    """

    structure: Structure
    d_in: int
    d_out: int
    pad_in: int
    few: Runner
    many: Runner
    plain: Runner
    threshold: float

    def __call__(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Applies the map to `x`, `[..., d_in]`; returns `[..., d_out]`.

        Raises:
            StructureError: if the last dimension of `x` is not `d_in`.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            check(self.structure, factors, x)
        tokens = pad_last(x, self.pad_in).reshape(-1, self.d_in + self.pad_in)
        if _transformed(x, *factors):
            run = self.plain
        elif self.few is self.many or tokens.shape[0] <= self.threshold:
            run = self.few
        else:
            run = self.many
        return run(factors, tokens)[:, : self.d_out].reshape(*x.shape[:-1], self.d_out)


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> Plan:
    """The plan of an unrouted, canonical structure."""
    fitting = [kernel for kernel in KERNELS if kernel.refuses(structure) is None]
    few, many = (_cheapest(fitting, structure, tokens) for tokens in (1, 10**12))
    threshold = math.inf
    if few is not many:
        # Costs are affine in the number of tokens: a gentler slope pays off from one number on.
        fixed, slope = (
            many.cost(structure, 0) - few.cost(structure, 0),
            _slope(few, structure) - _slope(many, structure),
        )
        threshold = fixed / slope
    runners = {kernel: kernel.prepare(structure) for kernel in (few, many)}
    plain = Reference().prepare(structure)
    ends = (structure.d_in, structure.d_out, structure.pad_in)
    return Plan(structure, *ends, runners[few], runners[many], plain, threshold)


def _cheapest(kernels: Sequence[Kernel], structure: Structure, tokens: int) -> Kernel:
    return min(kernels, key=lambda kernel: kernel.cost(structure, tokens))


def _slope(kernel: Kernel, structure: Structure) -> float:
    return kernel.cost(structure, 1) - kernel.cost(structure, 0)


def _transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives or a `torch.func` transform are at work: custom ops know neither."""
    if torch.compiler.is_compiling():
        return False
    dual = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    return dual or torch._C._are_functorch_transforms_active()


@singledispatch
def explain(subject: object, *args: object, **options: object) -> str:
    """Says what will be done with `subject` and why, as text to print.

    * `explain(structure, tokens=1024)`: the kernel that runs it, and each kernel's cost or refusal.
    * `explain(model, groups)`: initialisation, learning rate and decay of every parameter.
    """
    raise TypeError(f"cannot explain a {type(subject).__name__}: pass a Structure, or a model and its parameter groups")


@explain.register
def _(structure: Structure, tokens: int = 1024) -> str:
    canonical, dense = structure.canonical, 2 * structure.d_in * structure.d_out
    refusals = {kernel: kernel.refuses(canonical) for kernel in KERNELS}
    chosen = _cheapest([kernel for kernel in KERNELS if refusals[kernel] is None], canonical, tokens)
    lines = [f"{structure!r}", f"runs {tokens} tokens by '{chosen.name}'"]
    for kernel, refusal in refusals.items():
        cost = kernel.cost(canonical, tokens) / (tokens * dense)
        lines.append(f"  {kernel.name:13} {refusal or f'fits, modelled cost {cost:.4g} of dense'}")
    return "\n".join(lines)
