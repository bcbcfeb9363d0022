"""Functions of one number, as they are taken of the eigenvalues of an operator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.operator import OperatorError, transformed


@dataclass(frozen=True)
class Function:
    """A function of one number, `of`, with its derivative, which is needed where eigenvalues coincide."""

    name: str
    of: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None = None
    domain: str = "all"
    """Where the value is real and finite: "all", "positive", "nonnegative" or "nonzero" numbers."""
    exponent: float | None = None
    """p, where the function is the power p."""

    def __call__(self, values: Tensor) -> Tensor:
        """The values, refused outside the domain; of complex numbers, 0 alone can be outside."""
        if self.domain != "all" and not transformed(values) and values.numel():
            if self.domain != "nonnegative" and bool((values == 0).any()):
                raise OperatorError(
                    f"cannot take the {self.name} of a singular operator: at its eigenvalue 0 there is no finite value"
                )
            low = 0.0 if values.is_complex() or self.domain == "nonzero" else float(values.detach().min())
            if low < 0:
                raise OperatorError(
                    f"cannot take the {self.name} of an operator with the eigenvalue {low:.3g}: the value is complex; "
                    f".to(torch.complex128) allows it"
                )
        if self.domain in ("positive", "nonnegative") and values.is_complex():
            values = values + 0  # −1 − 0i is −1: its argument is π
        return self.of(values)

    def at(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values at computed eigenvalues, `[..., n]`, of a matrix of this dtype."""
        return self(self.cleared(values, dtype))

    def cleared(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Computed eigenvalues of a matrix of this dtype, freed of what rounding alone made.

        Where there is a cut along the negative numbers, real ones that are negative to rounding count as zero, and
        complex ones beside the cut lie on it: the principal value there has the argument π.
        """
        if self.domain in ("positive", "nonnegative") and values.shape[-1]:
            rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.detach().abs().amax(-1, keepdim=True)
            real = values.real
            if values.is_complex():
                beside = (real < 0) & (values.imag.abs() <= rounding)
                values = torch.complex(real, torch.where(beside, 0.0, values.imag))
            else:
                values = torch.where((real < 0) & (real >= -rounding), 0, real)
                if dtype.is_complex and not transformed(values) and bool((values < 0).any()):
                    values = values.to(dtype)
        return values


EXP = Function("exp", torch.exp, torch.exp)
LOG = Function("log", torch.log, torch.reciprocal, "positive")
SQRT = Function("sqrt", torch.sqrt, lambda x: 0.5 * x.rsqrt(), "nonnegative", 0.5)


def power(p: float) -> Function:
    """x ↦ xᵖ."""
    whole = float(p).is_integer()
    domain = ("all" if p >= 0 else "nonzero") if whole else "nonnegative" if p >= 0 else "positive"
    return Function(f"power {p:g}", lambda x: x**p, lambda x: p * x ** (p - 1), domain, p)
