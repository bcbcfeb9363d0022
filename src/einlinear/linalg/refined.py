"""An inverse that is computed without gradients, and differentiated through the equation that it solves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import Operator, product, remembered, transformed

STEPS = 2


@dataclass(eq=False, repr=False)
class Refined(Operator):
    """A⁻¹, given by a constant `by` of the same value.

    x ← x + B (b − A x) with a constant B = A⁻¹ changes no value, and each step makes one more
    derivative exact (it is the chord form of Newton's method): after two, first and second ones
    with respect to A's tensors and to b are. So nothing is differentiated through the
    factorisation that B came from: eigenvectors of equal eigenvalues, a library without gradients.
    """

    of: Operator
    by: Operator

    @remembered
    def shape(self) -> torch.Size:
        return self.of.shape

    def _facts(self) -> set[str]:
        return {*self.of.properties & {"hermitian", "psd", "diagonal", "lower", "upper", "unitary"}}

    def _matmul(self, b: Tensor) -> Tensor:
        x = self.by.matmul(b)
        if torch.is_grad_enabled() and any(t.requires_grad or transformed(t) for t in self.of.tensors):
            x = x.detach()
            for _ in range(STEPS):
                x = x + self.by.matmul(b - self.of.matmul(x))
        return x

    def _transpose(self) -> "Refined":
        return Refined(self.of.T, self.by.T)

    def _conj(self) -> "Refined":
        return Refined(self.of.conj(), self.by.conj(), claims=self.claims)

    @property
    def flops(self) -> float:
        return self.by.flops

    def _text(self) -> str:
        return f"({self.of!r})⁻¹"


def detached(operator: Operator) -> Operator:
    """The operator on tensors that no gradient flows to."""
    return operator.with_tensors(*(tensor.detach() for tensor in operator.tensors))


def with_phase(sign: Tensor, logarithm: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and log |det| from a sign and a log det whose imaginary part carries the sign's derivative."""
    if not logarithm.is_complex():
        return sign, logarithm
    return sign * torch.exp(1j * (logarithm.imag - logarithm.imag.detach())), logarithm.real


def differentiable_logdet(operator: Operator, by: Operator, value: Tensor) -> Tensor:
    """log det A with gradients, for a `value` without them and a constant `by` = A⁻¹.

    To second order around E = BA − I = 0, log det A = value + tr E − tr E² / 2. Traces are summed over unit
    vectors, some at a time.
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad or transformed(t) for t in operator.tensors):
        return value
    n, both = operator.shape[-1], product(by, operator)
    linear = square = torch.zeros((), dtype=operator.dtype, device=operator.device)
    for start in range(0, n, 1024):
        unit = torch.eye(n, min(1024, n - start), dtype=operator.dtype, device=operator.device).roll(start, 0)
        once = both.matmul(unit)
        linear = linear + (unit * once).sum((-2, -1))
        square = square + (unit * both.matmul(once)).sum((-2, -1))
    changed = 2 * linear - square / 2
    return value + (changed - changed.detach())
