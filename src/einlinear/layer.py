"""`Linear`: a drop-in for `torch.nn.Linear` whose weight has a structure."""

import torch
from torch import Tensor, nn

from einlinear.contract import dense
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.kernels import Routing, plan, routed_plan
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import project
from einlinear.routing import Router
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
        experts: how many maps of the family the layer holds; each token passes through those that a
            router chooses (docs/experts.md). None where the family is all there is.
        active: how many experts each token passes through.
        router: of a layer with experts: None for a new `Router(d_in, experts, active)`, a router made
            with other options, or False where its choices come from elsewhere, as `layer(x, routing)`:
            layers that read the same input, such as queries, keys and values, share one routing so.
        shared: whether a layer with experts has one more map of the family, for every token.

    Shape:
        `[..., d_in]` to `[..., d_out]`.

    Raises:
        StructureError: where the family cannot be had at these widths, an input does not fit, or a layer
            without a router is applied without a routing.
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
        experts: int | None = None,
        active: int | None = None,
        router: Router | bool | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.structure = _structure(d_in, d_out, family, experts, active, shared)
        self.in_features, self.out_features, self.zero = d_in, d_out, zero
        self._plan = None if self.structure.routed else plan(self.structure)
        self._routed_plan = routed_plan(self.structure) if self.structure.routed else None
        self.router = _router(self.structure, router, device, dtype)
        one = alone(self.structure) if shared else None
        self.shared = Linear(d_in, d_out, one, False, device, dtype, cap=cap, zero=zero) if one else None
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
        for module in (self.router, self.shared):
            if module is not None:
                module.reset_parameters()

    def effective_factors(self) -> list[Tensor]:
        """The factors as they are applied: capped where the layer has a cap."""
        if self.gains is None:
            held = self.factors._parameters  # asking the list for each of them takes as long as a small matmul
            return [*held.values()] if len(held) == len(self.factors) else [*self.factors]  # type: ignore[list-item]
        capped = zip(self.factors, self.gains, self._ceilings, strict=True)
        return [factor * (gain / _excess(factor, ceiling)).to(factor.dtype) for factor, gain, ceiling in capped]

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        if self._routed_plan is None:
            if routing is not None:
                raise StructureError(f"cannot apply a layer of {self.structure!r} with a routing: it has no experts")
            assert self._plan is not None
            return self._plan(*self.operands(x)).contiguous()
        if routing is not None and not isinstance(routing, Routing):
            raise StructureError(
                f"cannot apply a layer of {self.structure!r} with a routing of type {type(routing).__name__}: pass "
                f"what a Router returned; einlinear.apply(structure, factors, x, gate) takes weights of all experts"
            )
        factors, tokens, bias = self.operands(x)
        if routing is None:
            y = self._routed(x, factors, tokens, bias)
        else:
            y = self._routed_plan(factors, tokens, routing, bias)
        return (y if self.shared is None else y + self.shared(x)).contiguous()

    def _routed(self, x: Tensor, factors: list[Tensor], tokens: Tensor, bias: Tensor | None) -> Tensor:
        """By the layer's own router, in one operator with it where there is such a one."""
        assert self._routed_plan is not None
        if self.router is None:
            raise StructureError(
                f"cannot apply a layer of {self.structure!r} without a gate: it was made with router=False, so "
                f"pass layer(x, routing) with the routing that a Router made of the same tokens"
            )
        if tokens.dtype == x.dtype and self.router.joins(tokens):
            router = self.router
            made = self._routed_plan.with_router(factors, tokens, router.weight, router.scale, router.bias, bias)
            if made is not None:
                y, logits, chosen = made
                self.router.record(logits, chosen)
                return y
        return self._routed_plan(factors, tokens, self.router(x), bias)

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
        cls,
        linear: nn.Linear,
        family: Family | Structure | str,
        moments: Tensor | Moments | None = None,
        *,
        experts: int | None = None,
        active: int | None = None,
    ) -> "Linear":
        """The layer nearest to a dense one (`einlinear.project`), bias kept.

        Nearest in Frobenius norm or, given second moments of the inputs, in the mean square of the outputs.
        Each of its experts is that map, and weights of experts sum to one: the layer starts as without experts
        (sparse upcycling, Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055).
        """
        weight = linear.weight
        options = {"device": weight.device, "dtype": weight.dtype, "experts": experts, "active": active}
        new = cls(linear.in_features, linear.out_features, family, linear.bias is not None, **options)  # type: ignore[arg-type]
        one = alone(new.structure)
        with torch.no_grad():
            for factor, value in zip(new.factors, project(weight, one, moments), strict=True):
                factor.view(-1, *value.shape).copy_(value)
            if new.bias is not None:
                new.bias.copy_(linear.bias)
        return new

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` that computes the same.

        Raises:
            StructureError: for a layer with experts: it is no linear map.
        """
        if self.structure.routed:
            raise StructureError(
                f"cannot make a dense layer of {self.structure!r}: with experts it is another map for each token; "
                f"einlinear.dense(structure, factors, gate) is the matrix of one gate"
            )
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


def alone(structure: Structure) -> Structure:
    """The map that stands for all experts of a structure: a shared one, or the one that all of them start as.

    Raises:
        StructureError: where an expert is no map of the layer's widths.
    """
    one = structure.expert
    if (one.d_in, one.d_out) != (structure.d_in, structure.d_out):
        raise StructureError(
            f"cannot take one expert of {structure!r} for a map from {structure.d_in} to {structure.d_out} features: "
            f"its routed axis '{structure.routed}' is one of the input or output; route another, or add one by "
            f".mixture(experts, active=...)"
        )
    return one


def _structure(
    d_in: int, d_out: int, family: Family | Structure | str, experts: int | None, active: int | None, shared: bool
) -> Structure:
    """What to build, with its factors stored as matrices."""
    if isinstance(family, str):
        family = family_of(family)
    if not isinstance(family, Structure) and (isinstance(family, type) or not callable(family)):
        raise StructureError(
            f"cannot make a layer of {family!r}: it is no family; pass one with its settings, such as "
            f"einlinear.BTT(rank=4) or 'btt(rank=4)', or a Structure"
        )
    found = family if isinstance(family, Structure) else family(d_in, d_out)
    if (found.d_in, found.d_out) != (d_in, d_out):
        raise StructureError(
            f"cannot make a layer from {d_in} to {d_out} features: {found!r} maps {found.d_in} to {found.d_out}; "
            f"pass its own widths, or declare padding by .pad(d_in=..., d_out=...)"
        )
    if (experts is None) != (active is None):
        raise StructureError(f"cannot make a layer with {experts=} and {active=}: pass both, or neither")
    if experts is not None and active is not None:
        found = found.mixture(experts, active=active)
    if shared and not found.routed:
        raise StructureError(f"cannot make a layer of {found!r} with a shared expert: pass experts= and active= too")
    return found.canonical


def _router(
    structure: Structure, router: Router | bool | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> Router | None:
    if not isinstance(router, Router | bool | None):
        raise StructureError(
            f"cannot make a layer of {structure!r} with router={router!r}: pass None for a new Router, one made with "
            f"other options, or False where its choices come from elsewhere"
        )
    if structure.routed is None:
        if router:
            raise StructureError(f"cannot make a layer of {structure!r} with a router: pass experts= and active= too")
        return None
    experts, active = structure.sizes[structure.routed], structure.active
    if isinstance(router, Router):
        if (router.d_in, router.experts, router.active) != (structure.d_in, experts, active):
            raise StructureError(
                f"cannot make a layer of {structure!r} with {router}: it needs one of {structure.d_in} features "
                f"for {active} of {experts} experts"
            )
        return router
    return None if router is False else Router(structure.d_in, experts, active, device=device, dtype=dtype)


def _excess(factor: Tensor, ceiling: float) -> Tensor:
    """How far the root mean square lies above its ceiling, at least 1; no host sync.

    The constant inside the root keeps its derivative finite where a factor starts at zero.
    """
    sizes = factor.abs() if factor.is_complex() else factor
    mean_square = sizes.to(torch.promote_types(sizes.dtype, torch.float32)).square().mean()
    return ((mean_square + 1e-12 * ceiling**2).sqrt() / ceiling).clamp(min=1.0)
