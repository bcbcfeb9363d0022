"""What rules ask of an operator, and the parts they pass on."""

from collections.abc import Callable

from einlinear.linalg.table import Parts
from einlinear.operator import Identity, Operator, Product, Scaled, Sum, adjoint
from einlinear.operators import BlockDiagonal, DirectSum, Kronecker, KroneckerSum


def has(*names: str) -> Callable[..., bool]:
    """Whether all these properties are known."""
    wanted = {*names}
    return lambda operator, *_: wanted <= operator.properties


def square_factors(operator: Product | Kronecker, *_: object) -> bool:
    """Whether every factor is square."""
    return all(factor.square for factor in operator.factors)


def square_blocks(operator: BlockDiagonal | DirectSum, *_: object) -> bool:
    """Whether every block is square."""
    blocks = operator.blocks if isinstance(operator, DirectSum) else (operator.of,)
    return all(block.square for block in blocks)


def conjugation(operator: Product, *_: object) -> bool:
    """Whether the product is Q B Qᴴ with Q unitary."""
    first, last = operator.factors[0], operator.factors[-1]
    return len(operator.factors) > 2 and "unitary" in first.properties and adjoint(first, last)


def shifted(operator: Sum, *_: object) -> bool:
    """Whether the sum is A + cI."""
    return len(operator.terms) == 2 and any(is_multiple_of_unit(term) for term in operator.terms)


def is_multiple_of_unit(operator: Operator) -> bool:
    """Whether this is cI."""
    return isinstance(operator, Identity) or (isinstance(operator, Scaled) and isinstance(operator.of, Identity))


def unshifted(operator: Sum) -> Parts:
    """A of A + cI."""
    return tuple(term for term in operator.terms if not is_multiple_of_unit(term))


def shift(operator: Sum) -> Operator:
    """cI of A + cI."""
    return next(term for term in operator.terms if is_multiple_of_unit(term))


def body(operator: Scaled | BlockDiagonal) -> Parts:
    """A of cA, or the blocks as a batch."""
    return (operator.of,)


def factors(operator: Product | Kronecker) -> Parts:
    return operator.factors


def terms(operator: Sum | KroneckerSum) -> Parts:
    return operator.terms


def blocks(operator: DirectSum) -> Parts:
    return operator.blocks


def middle(operator: Product) -> Parts:
    """B of Q B Qᴴ."""
    inner = operator.factors[1:-1]
    return (inner[0] if len(inner) == 1 else Product(inner),)
