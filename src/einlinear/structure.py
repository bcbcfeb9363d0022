"""The one central noun: a linear map written as an Einstein summation over factors.

Pure Python: nothing here needs a tensor, so costs and scaling rules can be worked out for a
trillion-parameter layer on a laptop.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NoReturn

Axes = tuple[str, ...]

PADDING_TOLERANCE = 0.15
"""The largest share of a width that padding may add (`Structure.pad`)."""


class StructureError(ValueError):
    """Anything a user can get wrong about a structure: its expression, sizes, widths or settings."""


def no_structure(doing: str, given: object) -> NoReturn:
    """Refuses what is not a `Structure` where one is needed, and names what to pass."""
    if isinstance(given, str):
        remedy = f"a text; name a family and give it widths, as in el.structure({given!r})(512, 512)"
    elif callable(given):
        name = given.__name__ + "()" if isinstance(given, type) else f"{given!r}"
        remedy = f"a family; give it widths, as in {name}(512, 512)"
    else:
        remedy = f"of type {type(given).__name__}; pass a Structure, as in el.BTT(rank=2)(512, 512)"
    raise StructureError(f"cannot {doing} {given!r}: it is {remedy}")


@dataclass(frozen=True)
class Step:
    """Applying one factor to the running state.

    Every axis of the factor plays exactly one part:

    - `batch`: in the state too, and still needed (block-diagonal repetition);
    - `new`: not in the state, and needed later (an axis the factor makes);
    - `summed`: in the state too, and not needed afterwards (a contraction);
    - `inner`: in this factor alone. Such an axis is a sum of weights, of use only when routed.

    `passive` are the state's axes that the factor does not carry: it is applied to all of their
    entries alike (weight sharing).
    """

    state: Axes
    factor: Axes
    result: Axes
    batch: Axes
    new: Axes
    summed: Axes
    inner: Axes
    passive: Axes


@dataclass(frozen=True)
class Structure:
    """A linear map from `d_in` to `d_out` features, as an einsum over factors.

    `"i, r i, o r -> o"` reads: the input has the axis `i`; the factors with axes `r i` and
    `o r` are applied in that order; the output has the axis `o`. The order of the factors is the
    contraction path: it decides fans, cost and scaling. Two structures with the same expression
    and sizes are equal, hash alike and print alike.

    Example:
        >>> low_rank = Structure.parse("i, r i, o r -> o", i=768, r=64, o=3072)
        >>> low_rank
        Structure.parse('i, r i, o r -> o', i=768, r=64, o=3072)
        >>> low_rank.factor_shapes
        ((64, 768), (3072, 64))
        >>> low_rank.T
        Structure.parse('o, o r, r i -> i', o=3072, r=64, i=768)
    """

    x: Axes
    factors: tuple[Axes, ...]
    y: Axes
    axis_sizes: tuple[tuple[str, int], ...]
    pad_in: int = 0
    pad_out: int = 0
    routed: str | None = None
    active: int = 0

    @classmethod
    def parse(cls, expression: str, /, **sizes: int) -> "Structure":
        """Reads an expression such as `"i, r i, o r -> o"` with one size for each axis.

        Raises:
            StructureError: with a caret under the fault.
        """
        left, arrow, right = expression.partition("->")
        if not arrow:
            _reject(expression, len(expression), "expected '-> output axes' at the end")
        for token in re.finditer(r"[^\s,]+", left + "  " + right):
            if bad := re.search(r"\W", token.group()) or re.match(r"\d", token.group()):
                _reject(expression, token.start() + bad.start(), f"'{bad.group()}' is not part of an axis name")
        x, *factors = (tuple(operand.split()) for operand in left.split(","))
        y = tuple(right.replace(",", " , ").split())
        if "," in y:
            _reject(expression, expression.index(",", len(left)), "only one output may follow '->'")
        if not factors:
            _reject(expression, len(left.rstrip()), "expected ', factor axes' after the input")
        _check(expression, x, factors, y, sizes)
        return cls(x, tuple(factors), y, tuple(sizes.items()))

    def __post_init__(self) -> None:
        """Puts the sizes in order of first use, so that equal structures compare equal."""
        order = {axis: rank for rank, axis in enumerate(_axes_of(self.operands))}
        ranked = sorted(self.axis_sizes, key=lambda pair: order[pair[0]])
        object.__setattr__(self, "axis_sizes", tuple(ranked))

    def pad(self, *, d_in: int, d_out: int) -> "Structure":
        """Declares the widths of the map where the axes' products only come near them.

        Inputs are filled up with zeros to the product of their axes, and outputs beyond `d_out`
        are cut off; both are counted in the cost.

        Raises:
            StructureError: if padding would add more than `PADDING_TOLERANCE` of a width, or would
                leave an input that no output reads or an output that is always zero.
        """
        for side, width, axes in (("input", d_in, self.x), ("output", d_out, self.y)):
            have = self.size(axes)
            if width < 1 or have < width or have - width > PADDING_TOLERANCE * width:
                raise StructureError(
                    f"cannot fit the {side} width {width} into {self}: its {side} axes {self.describe(axes)} "
                    f"hold {have}, and padding may add at most {PADDING_TOLERANCE:.0%} of a width; choose sizes "
                    f"(blocks, cores) whose product is {width} or slightly more"
                )
        padded = replace(self, pad_in=self.size(self.x) - d_in, pad_out=self.size(self.y) - d_out)
        if dead := padded._dead_slice():
            raise StructureError(
                f"cannot pad {self} to the widths {d_in} -> {d_out}: at {dead} one side of the map would be "
                f"padding alone, so an input would be ignored or an output always zero; choose fewer blocks"
            )
        return padded

    def route(self, axis: str, *, active: int) -> "Structure":
        """Gates `axis` per token so that only `active` of its entries take part.

        Any structure with an axis to spare becomes a mixture of experts: route the rank of a
        BTT and it is BTT-MoE; route an axis that a dense map's factor has to itself
        (`"i, e o i -> o"`) and it is a plain mixture of experts. docs/mathematics.md section 4.
        """
        if axis not in self.sizes:
            raise StructureError(f"cannot route axis '{axis}' of {self}: it has only {', '.join(self.sizes)}")
        if self.routed not in (None, axis):
            raise StructureError(
                f"cannot route axis '{axis}' of {self!r}: its axis '{self.routed}' is routed already, and a map "
                f"has one such; route one axis of the structure without a gate"
            )
        if not any(axis in factor for factor in self.factors):
            raise StructureError(
                f"cannot route axis '{axis}' of {self}: no factor carries it, so a gate would choose nothing; "
                f"route an axis of a factor"
            )
        if not is_count(active) or active > self.sizes[axis]:
            raise StructureError(
                f"cannot route axis '{axis}' of {self} with {active!r} active entries: "
                f"it has {self.sizes[axis]}; choose active between 1 and {self.sizes[axis]}"
            )
        return replace(self, routed=axis, active=active)

    def mixture(self, experts: int, *, active: int) -> "Structure":
        """So many maps of this structure, the experts, of which each token passes through `active`.

        One more axis, carried by every factor and routed: factor k of all experts is one tensor, and
        the experts of a BTT, a low-rank or a dense map are the same code. docs/mathematics.md section 4.
        """
        if self.routed:
            raise StructureError(
                f"cannot make experts of {self!r}: its axis '{self.routed}' is routed already, and a map has one such"
            )
        if not is_count(experts):
            raise StructureError(f"cannot make {experts!r} experts of {self}: pass an integer of at least 1")
        axis = next(
            name for name in ("expert", *(f"expert{k}" for k in range(len(self.sizes)))) if name not in self.sizes
        )
        factors = tuple((axis, *axes) for axes in self.factors)
        whole = replace(self, factors=factors, axis_sizes=(*self.axis_sizes, (axis, experts)))
        return whole.route(axis, active=active)

    @property
    def expert(self) -> "Structure":
        """The map of a single entry of the routed axis."""
        left = tuple(tuple(axis for axis in axes if axis != self.routed) for axes in self.operands)
        sizes = tuple(pair for pair in self.axis_sizes if pair[0] != self.routed)
        return replace(self, x=left[0], factors=left[1:-1], y=left[-1], axis_sizes=sizes, routed=None, active=0)

    @property
    def operands(self) -> tuple[Axes, ...]:
        """The axes of the input, of each factor and of the output."""
        return (self.x, *self.factors, self.y)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each axis, in order of first use."""
        return dict(self.axis_sizes)

    @property
    def d_in(self) -> int:
        """Features of the input, padding excluded."""
        return self.size(self.x) - self.pad_in

    @property
    def d_out(self) -> int:
        """Features of the output, padding excluded."""
        return self.size(self.y) - self.pad_out

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each factor, one dimension for each of its axes, in the order written."""
        return tuple(self.shape(axes) for axes in self.factors)

    @property
    def T(self) -> "Structure":
        """The transposed map: the same factors, applied in reverse from output to input."""
        return replace(self, x=self.y, factors=self.factors[::-1], y=self.x, pad_in=self.pad_out, pad_out=self.pad_in)

    @property
    def canonical(self) -> "Structure":
        """The same map with each factor's axes in the order batch, new, summed.

        In this order a factor is a stack of `[slices, out, in]` matrices (`matrix_shapes`), which
        batched matmuls read without a copy, slice-wise optimizers update and sharding by the first
        dimension keeps whole. The named families are written this way. A routed axis comes first in
        every factor that carries it: the factor is one stack for each expert.
        """
        written = ((*s.inner, *s.batch, *s.new, *s.summed) for s in self.steps)
        return replace(self, factors=tuple(tuple(sorted(axes, key=lambda a: a != self.routed)) for axes in written))

    @property
    def matrix_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """`(slices, out, in)` of each factor: how often, to what and from what it maps; experts are slices."""
        shapes = []
        for step in self.steps:
            out, width = (self.size(axis for axis in axes if axis != self.routed) for axes in (step.new, step.summed))
            shapes.append((self.size(step.factor) // (out * width), out, width))
        return tuple(shapes)

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The sizes of `axes`."""
        return tuple(self.sizes[axis] for axis in axes)

    def size(self, axes: Iterable[str]) -> int:
        """The product of the sizes of `axes`."""
        return math.prod(self.sizes[axis] for axis in axes)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What each factor does to the running state, in the order they are applied."""
        steps: list[Step] = []
        state = self.x
        last_use = {axis: position for position, axes in enumerate((*self.factors, self.y)) for axis in axes}
        for position, factor in enumerate(self.factors):
            inside, carried = {*state}, {*factor}
            later = {axis for axis in inside | carried if last_use[axis] > position}
            own = tuple(axis for axis in factor if axis not in inside)
            shared = tuple(axis for axis in factor if axis in inside)
            new = tuple(axis for axis in own if axis in later)
            kept = tuple(axis for axis in (*state, *new) if axis in later)
            steps.append(
                Step(
                    state=state,
                    factor=factor,
                    result=self.y if position == len(self.factors) - 1 else kept,
                    batch=tuple(axis for axis in shared if axis in later),
                    new=new,
                    summed=tuple(axis for axis in shared if axis not in later),
                    inner=tuple(axis for axis in own if axis not in later),
                    passive=tuple(axis for axis in state if axis not in carried),
                )
            )
            state = steps[-1].result
        return tuple(steps)

    def describe(self, axes: Axes) -> str:
        """Axes with their sizes, as in `g=24 a=32`."""
        return " ".join(f"{axis}={self.sizes[axis]}" for axis in axes)

    def _dead_slice(self) -> str | None:
        """Where, on the axes that input and output share, only one side is padding alone."""
        shared = tuple(axis for axis in self.x if axis in self.y)
        if not (self.pad_in or self.pad_out) or not shared:
            return None
        for index in product(*map(range, self.shape(shared))):
            first = dict(zip(shared, index, strict=True))
            ends = [(self.x, self.d_in), (self.y, self.d_out)]
            dead_in, dead_out = (self._position(axes, first) >= width for axes, width in ends)
            if dead_in != dead_out:
                return " ".join(f"{axis}={at}" for axis, at in first.items())
        return None

    def _position(self, axes: Axes, first: dict[str, int]) -> int:
        position = 0
        for axis in axes:
            position = position * self.sizes[axis] + first.get(axis, 0)
        return position

    def __str__(self) -> str:
        operands = ", ".join(" ".join(axes) for axes in (self.x, *self.factors))
        return f"{operands} -> {' '.join(self.y)}"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        pad = f".pad(d_in={self.d_in}, d_out={self.d_out})" if self.pad_in or self.pad_out else ""
        gate = f".route({self.routed!r}, active={self.active})" if self.routed else ""
        return f"Structure.parse({str(self)!r}, {sizes}){pad}{gate}"


def is_count(value: object) -> bool:
    """Whether it counts something: an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _axes_of(operands: Iterable[Axes]) -> Axes:
    """Every axis of `operands` once, in order of first use."""
    return tuple(dict.fromkeys(axis for axes in operands for axis in axes))


def _check(expression: str, x: Axes, factors: list[Axes], y: Axes, sizes: dict[str, int]) -> None:
    operands = (x, *factors, y)
    carriers = Counter(axis for axes in operands for axis in {*axes})
    pieces = re.finditer(r"(?:^|,|->)((?:(?!->)[^,])*)", expression)
    for axes, piece in zip(operands, pieces, strict=True):
        if not axes:
            _reject(expression, piece.end(), "an operand without axes; each needs at least one")
        seen: set[str] = set()
        for token in re.finditer(r"\w+", piece.group(1)):
            axis, place = token.group(), piece.start(1) + token.start()
            if axis in seen:
                _reject(expression, place, f"axis '{axis}' appears twice in one operand")
            seen.add(axis)
            if carriers[axis] == 1 and axes is x:
                _reject(expression, place, f"axis '{axis}' of the input is neither summed nor kept; add it to a factor")
            if carriers[axis] == 1 and axes is y:
                _reject(expression, place, f"axis '{axis}' of the output comes from nowhere; add it to a factor")
            if axis not in sizes:
                _reject(expression, place, f"axis '{axis}' has no size; pass {axis}=...")
            size = sizes[axis]
            if not is_count(size):
                _reject(expression, place, f"axis '{axis}' has size {size!r}; pass an integer of at least 1")
    if unused := sorted(set(sizes) - set(carriers)):
        raise StructureError(
            f"cannot read the structure '{expression}': sizes were given for {', '.join(unused)}, "
            f"which it does not name; leave them out or add the axes"
        )


def _reject(expression: str, position: int, why: str) -> NoReturn:
    raise StructureError(f"cannot read the structure\n    {expression}\n    {' ' * position}^ {why}")
