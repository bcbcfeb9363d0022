"""When two einsums are the same map in other words."""

from itertools import permutations

from einlinear.structure import Structure

Form = tuple[tuple[tuple[tuple[int, ...], int], ...], int, int, tuple[object, ...]]


def canonical(structure: Structure) -> Form:
    """A form that two structures share if they can be the same matrices, whatever their factors hold.

    Names and order of axes do not matter, nor does the order of factors (it is a matter of cost). Axes of size 1 are
    dropped, axes that always occur together are one, and a factor whose axes another factor all has is dropped, since
    the other can hold its product; so are axes of one factor alone, which are sums of weights. Features are compared
    up to their order: block i may read every ninth input or nine in a row.
    """
    routed = structure.routed
    axes = {axis for axis, size in structure.sizes.items() if size > 1}
    x, y = frozenset(structure.x) & axes, frozenset(structure.y) & axes
    factors = _needed([frozenset(factor) & axes for factor in structure.factors], x | y, routed)
    held = frozenset().union(*factors) | x | y
    forms = []
    for order in permutations(factors):
        together: dict[tuple[int, ...], int] = {}
        for axis in held:
            where = tuple(place for place, operand in enumerate((x, *order, y)) if axis in operand)
            together[where] = together.get(where, 1) * structure.sizes[axis]
        gate = tuple(place for place, operand in enumerate((x, *order, y)) if routed in operand)
        forms.append((tuple(sorted(together.items())), gate))
    best, gate = min(forms)
    return best, structure.pad_in, structure.pad_out, (gate, structure.active) if routed else ()


def _needed(factors: list[frozenset[str]], features: frozenset[str], routed: str | None) -> list[frozenset[str]]:
    """The factors without what another can hold."""
    while True:
        alone = [
            axis for factor in factors for axis in factor
            if axis not in features and axis != routed and sum(axis in other for other in factors) == 1
        ]  # fmt: skip
        factors = [factor - frozenset(alone) for factor in factors]
        spare = next(
            (n for n, factor in enumerate(factors)
             if any(factor <= other for m, other in enumerate(factors) if m != n)),
            None,
        )  # fmt: skip
        if spare is None:
            return factors
        factors = factors[:spare] + factors[spare + 1 :]
