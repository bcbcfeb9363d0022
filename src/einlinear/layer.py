"""`Linear`: a drop-in for `torch.nn.Linear` whose weight has a structure."""

import torch
from torch import Tensor, nn

from einlinear.contract import dense
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.kernels import plan
from einlinear.moments import Moments
from einlinear.projection import project
from einlinear.scaling import spectral
from einlinear.structure import Structure, StructureError


class Linear(nn.Module):
    """y = x Wᵀ + b, where W is an einsum over `factors`.

    All that is particular to a structure lives in `self.structure`; the parameters are plain
    tensors, so deepcopy, checkpoints, sharding and `torch.compile` need to know nothing of it.
    Factor k is stored as a contiguous `[slices, out, in]` stack of matrices
    (`structure.matrix_shapes[k]`).

    Args:
        d_in: features of the input.
        d_out: features of the output.
        family: a family, its short text (`"btt(rank=4)"`), or a `Structure` of these widths.
        bias: whether to add a learned `[d_out]` vector, zero at first (muP's rule).
        device: of the parameters.
        dtype: of the parameters.
        cap: whether each factor is scaled by a learned gain and, where its root mean square has
            grown beyond the initial one, back to that: a ceiling against blow-up at large rates
            (weight normalisation of docs/mathematics.md section 2; `_norm` in Searching for Efficient Linear Layers).
        zero: whether the layer starts at zero, as it should where it is the last of a residual branch. It is the
            first factor that does: zero in the last one trains much worse (benchmarks/zero_init.py).

    Shape:
        `[..., d_in]` to `[..., d_out]`.

    Raises:
        StructureError: where the family cannot be had at these widths, or an input does not fit.
    """

    structure: Structure

    def __init__(
        self,
        d_in: int,
        d_out: int,
        family: Family | Structure | str,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        cap: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.structure = _structure(d_in, d_out, family)
        self.in_features, self.out_features, self.zero = d_in, d_out, zero
        self._plan = plan(self.structure)
        self._ceilings = tuple(scale.std for scale in spectral(self.structure))
        shapes = self.structure.matrix_shapes
        self.factors = nn.ParameterList(torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
        self.gains = nn.Parameter(torch.empty(len(shapes), device=device, dtype=dtype)) if cap else None
        self.bias = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the factors anew (`einlinear.spectral`)."""
        for factor, std in zip(self.factors, self._ceilings, strict=True):
            nn.init.normal_(factor, std=std)
        if self.zero:
            nn.init.zeros_(self.factors[0])
        if self.gains is not None:
            nn.init.ones_(self.gains)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_factors(self) -> list[Tensor]:
        """The factors as they are applied: capped where the layer has a cap."""
        if self.gains is None:
            return list(self.factors)
        capped = zip(self.factors, self.gains, self._ceilings, strict=True)
        return [factor * (gain / _excess(factor, ceiling)).to(factor.dtype) for factor, gain, ceiling in capped]

    def forward(self, x: Tensor) -> Tensor:
        return self._plan(*self.operands(x)).contiguous()

    def operands(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The effective factors, `x` and the bias, in autocast's type where that is on."""
        factors = self.effective_factors()
        bias: Tensor | None = self.bias
        kind = x.device.type
        # Meta has no autocast and cannot be asked; torch.compile of torch 2.11 cannot trace is_autocast_available.
        if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point():
            dtype = torch.get_autocast_dtype(kind)
            x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
            bias = None if bias is None else bias.to(dtype)
        return factors, x, bias

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, family: Family | Structure | str, moments: Tensor | Moments | None = None
    ) -> "Linear":
        """The layer nearest to a dense one (`einlinear.project`), bias kept.

        Nearest in Frobenius norm or, given second moments of the inputs, in the mean square of the outputs.
        """
        weight = linear.weight
        options = {"device": weight.device, "dtype": weight.dtype}
        new = cls(linear.in_features, linear.out_features, family, linear.bias is not None, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for factor, value in zip(new.factors, project(weight, new.structure, moments), strict=True):
                factor.copy_(value.reshape(factor.shape))
            if new.bias is not None:
                new.bias.copy_(linear.bias)
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` that computes the same."""
        like = self.factors[0]
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=like.device, dtype=like.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(dense(self.structure, self.effective_factors()))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        options = {"bias": self.bias is not None, "cap": self.gains is not None, "zero": self.zero}
        return ", ".join([repr(self.structure), *(f"{name}={value}" for name, value in options.items())])


def _structure(d_in: int, d_out: int, family: Family | Structure | str) -> Structure:
    """What to build, with its factors stored as matrices."""
    if isinstance(family, str):
        family = family_of(family)
    found = family if isinstance(family, Structure) else family(d_in, d_out)
    if (found.d_in, found.d_out) != (d_in, d_out):
        raise StructureError(
            f"cannot make a layer from {d_in} to {d_out} features: {found!r} maps {found.d_in} to {found.d_out}; "
            f"pass its own widths, or declare padding by .pad(d_in=..., d_out=...)"
        )
    if found.routed:
        raise StructureError(
            f"cannot make a layer of {found!r}: a routed structure needs a gate for each token; "
            f"apply it by einlinear.apply(structure, factors, x, gate)"
        )
    return found.canonical


def _excess(factor: Tensor, ceiling: float) -> Tensor:
    """How far the root mean square lies above its ceiling, at least 1; no host sync.

    The constant inside the root keeps its derivative finite where a factor starts at zero.
    """
    mean_square = factor.to(torch.promote_types(factor.dtype, torch.float32)).square().mean()
    return ((mean_square + 1e-12 * ceiling**2).sqrt() / ceiling).clamp(min=1.0)
