"""The normal form of a composition: what it is, however it was written.

A⊗I + I⊗B         =  A ⊕ B
diagonal + U Vᴴ   =  a low-rank update
cI + Toeplitz     =  Toeplitz       (and so for every kind that a multiple of the unit stays within)
an einsum         =  a Kronecker product, or blocks and permutations
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from einlinear.operator import (
    Dense,
    Identity,
    Operator,
    Product,
    Scaled,
    Sum,
    Zero,
    multiple,
    product,
    total,
    transformed,
)
from einlinear.operators import (
    Banded,
    BlockDiagonal,
    Circulant,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRankUpdate,
    Structured,
    Toeplitz,
    kron,
    kronsum,
)


def normal(operator: Operator) -> Operator:
    """The normal form; the operator itself, at the cost of one look-up, where it has no other.

    It is kept with the operator until a tensor changes in place. Where a tensor has a gradient it is kept if autograd
    saved no values on the way to it: through views and sums one may differentiate as often as one likes, through a
    product only once, so that such a form is made anew each time.
    """
    rewrite = REWRITES.get(type(operator))
    if rewrite is None:
        return operator
    state = _state(operator)
    before, kept = operator.__dict__.get("_normal", (None, None))
    known = before is not None and before == state
    if known and kept is not None:
        form: Operator = kept
        return form
    form = _keeping(operator, rewrite(operator))
    if state is not None and not known:
        keep = form is operator or _saves_nothing(form, operator)
        operator.__dict__["_normal"] = (state, form if keep else None)
    return form


def _state(operator: Operator) -> tuple[object, ...] | None:
    """How often each tensor has been changed in place, and whether gradients flow to it; None where no form may be
    kept."""
    if transformed() or torch.is_inference_mode_enabled():
        return None
    tensors = operator.tensors
    if any([tensor.is_inference() for tensor in tensors]):
        return None
    state: list[object] = [tensor._version for tensor in tensors]
    return (*state, torch.is_grad_enabled(), *[tensor.requires_grad for tensor in tensors])


def _saves_nothing(form: Operator, operator: Operator) -> bool:
    """Whether autograd saved no tensor between the operator's tensors and those of its form."""
    ends = {tensor.grad_fn for tensor in operator.tensors}
    queue: list[Any] = [tensor.grad_fn for tensor in form.tensors]
    seen: set[Any] = {None, *ends}
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(isinstance(getattr(node, name), Tensor) for name in dir(node) if name.startswith("_saved_")):
            return False
        if getattr(node, "saved_tensors", ()):  # of a torch.autograd.Function
            return False
        queue += [before for before, _ in node.next_functions]
    return True


def _keeping(old: Operator, new: Operator) -> Operator:
    """What was claimed of the old form holds for the new one."""
    return new if new is old or not old.claims - new.claims else new.claim(*old.claims)


def _sum(operator: Sum) -> Operator:
    terms = [normal(term) for term in operator.terms]
    terms = [term for term in terms if not isinstance(_body(term), Zero)] or terms[:1]
    others = [term for term in terms if _unit(term) is None]
    if len(others) > 1 and operator.square and (joined := _kronecker_sum(others)) is not None:
        units = [term for term in terms if _unit(term) is not None]
        return normal(total(joined, *units)) if units else joined
    merged: list[Operator] = []
    for term in terms:
        for place, other in enumerate(merged):
            if (both := _merge(other, term)) is not None:
                merged[place] = both
                break
        else:
            merged.append(term)
    if len(merged) > 1 and operator.square and (updated := _low_rank(merged)) is not None:
        return updated
    if merged == list(operator.terms):
        return operator
    return merged[0] if len(merged) == 1 else total(*merged)


def _merge(a: Operator, b: Operator) -> Operator | None:
    """a + b as one operator of the kind of either, where that is one."""
    for one, other in ((a, b), (b, a)):
        c, d = _unit(other), _unit(one)
        if c is not None and d is not None:
            return multiple(c + d, Identity(one.shape[-1], dtype=one.dtype, device=one.device))
        if c is not None and (shifted := _shift(one, c)) is not None:
            return shifted
    x, y = _absorbed(a), _absorbed(b)
    if isinstance(x, Diagonal) and isinstance(y, Diagonal):
        return Diagonal(x.values + y.values)
    if isinstance(x, Circulant) and isinstance(y, Circulant):
        return Circulant(x.column + y.column)
    if isinstance(x, Dense) or isinstance(y, Dense):
        return _hermitian_if_both(a, b, Dense(x.dense() + y.dense()))
    return None


def _hermitian_if_both(a: Operator, b: Operator, joined: Operator) -> Operator:
    shared = a.properties & b.properties & {"hermitian", "psd"}
    return joined.claim(*shared) if shared else joined


def _shift(operator: Operator, c: Tensor) -> Operator | None:
    """A + cI as an operator of A's kind."""
    shifted: Operator
    match _absorbed(operator):
        case Diagonal(values=values):
            return Diagonal(values + c[..., None])
        case Circulant(column=column):
            shifted = Circulant(_first_plus(column, c))
        case Toeplitz(column=column, row=row):
            shifted = Toeplitz(_first_plus(column, c), row)
        case Banded(bands=bands, offsets=offsets) if 0 in offsets:
            main = torch.zeros(len(offsets), dtype=bands.dtype, device=bands.device)
            main[offsets.index(0)] = 1
            shifted = Banded(bands + c[..., None, None] * main[:, None], offsets)
        case KroneckerSum(terms=(first, *rest)):
            unit = Identity(first.shape[-1], dtype=first.dtype, device=first.device)
            return KroneckerSum((normal(total(first, multiple(c, unit))), *rest))
        case LowRankUpdate(base=base, left=left, right=right, core=core):
            unit = Identity(base.shape[-1], dtype=base.dtype, device=base.device)
            return LowRankUpdate(normal(total(base, multiple(c, unit))), left, right, core)
        case Dense(matrix=matrix):
            shifted = Dense(matrix + torch.diag_embed(c[..., None].expand(*c.shape, matrix.shape[-1])))
        case BlockDiagonal(of=of) if isinstance(of, Dense):
            inner = _shift(of, c[..., None])
            return None if inner is None else BlockDiagonal(inner)
        case _:
            return None
    real = not c.is_complex()
    return shifted.claim("hermitian") if real and "hermitian" in operator.properties else shifted


def _first_plus(column: Tensor, c: Tensor) -> Tensor:
    unit = torch.zeros(column.shape[-1], dtype=column.dtype, device=column.device)
    unit[:1] = 1
    return column + c[..., None] * unit


def _low_rank(terms: list[Operator]) -> Operator | None:
    """A + U Vᴴ, where one term is a product through few dimensions and the others are one operator."""
    for place, term in enumerate(terms):
        thin = thin_factors(term)
        if thin is not None:
            rest = [other for k, other in enumerate(terms) if k != place]
            base = rest[0] if len(rest) == 1 else normal(total(*rest))
            return LowRankUpdate(base, *thin)
    return None


def thin_factors(operator: Operator) -> tuple[Tensor, Tensor | None] | None:
    """U and V, `[n, r]`, of a product U Vᴴ through r ≤ n/2 dimensions; V is None where it is U."""
    body, c = _body(operator), operator.c if isinstance(operator, Scaled) else None
    if not isinstance(body, Product):
        return None
    cut = min(range(1, len(body.factors)), key=lambda k: body.factors[k].shape[-2])
    if 2 * body.factors[cut].shape[-2] > min(body.shape[-2:]):
        return None
    left, right = product(*body.factors[:cut]).dense(), product(*body.factors[cut:])
    if c is None and "psd" in body.properties and len(body.factors) % 2 == 0 and cut == len(body.factors) // 2:
        return left, None
    return (left if c is None else c[..., None, None] * left), right.H.dense()


def _kronecker_sum(terms: list[Operator]) -> Operator | None:
    """A⊗I + I⊗B + … as A ⊕ B ⊕ …, if each term acts on one part of the index and no two parts overlap."""
    placed: dict[tuple[int, int], list[Operator]] = {}
    for term in terms:
        body, c = _body(term), term.c if isinstance(term, Scaled) else None
        if not isinstance(body, Kronecker) or not all(factor.square for factor in body.factors):
            return None
        acting = [k for k, factor in enumerate(body.factors) if not isinstance(factor, Identity)]
        if not acting or acting[-1] - acting[0] + 1 > len(acting):
            return None
        inside = kron(*body.factors[acting[0] : acting[-1] + 1])
        before = math.prod([factor.shape[-1] for factor in body.factors[: acting[0]]])
        place = (before, before * inside.shape[-1])
        placed.setdefault(place, []).append(inside if c is None else multiple(c, inside))
    n, end, parts = terms[0].shape[-1], 1, []
    for (before, after), acting_here in sorted(placed.items()):
        if before % end:
            return None
        if before > end:
            parts.append(_nothing(before // end, terms[0]))
        parts.append(normal(total(*acting_here)))
        end = after
    if end < n:
        parts.append(_nothing(n // end, terms[0]))
    return kronsum(*parts) if len(parts) > 1 else None


def _nothing(n: int, like: Operator) -> Operator:
    return Zero(n, n, dtype=like.dtype, device=like.device)


def _product(operator: Product) -> Operator:
    factors = [normal(factor) for factor in operator.factors]
    joined: list[Operator] = []
    for factor in factors:
        previous = joined[-1] if joined else None
        if isinstance(previous, Diagonal) and isinstance(factor, Diagonal):
            joined[-1] = Diagonal(previous.values * factor.values)
        elif isinstance(previous, Circulant) and isinstance(factor, Circulant):
            joined[-1] = Circulant(previous.matmul(factor.column[..., None])[..., 0])
        elif (
            isinstance(previous, Kronecker)
            and isinstance(factor, Kronecker)
            and [a.shape[-1] for a in previous.factors] == [b.shape[-2] for b in factor.factors]
            and all(part.square for part in (*previous.factors, *factor.factors))
        ):
            joined[-1] = kron(*(product(a, b) for a, b in zip(previous.factors, factor.factors, strict=True)))
        else:
            joined.append(factor)
    return operator if joined == list(operator.factors) else product(*joined)


def _scaled(operator: Scaled) -> Operator:
    of, c = normal(operator.of), operator.c
    if isinstance(of, KroneckerSum):
        scaled = {id(term): multiple(c, term) for term in of.terms}  # equal sides stay one object
        return KroneckerSum(tuple(scaled[id(term)] for term in of.terms))
    if isinstance(of, Scaled):
        return multiple(c, of)
    if isinstance(of, LowRankUpdate):
        return LowRankUpdate(multiple(c, of.base), c[..., None, None] * of.left, of.V, of.core)
    if isinstance(of, Diagonal | Dense | Circulant | Banded):
        kept = of.properties & {"hermitian"} if not c.is_complex() else frozenset()
        shifted = _absorbed(Scaled(c, of))
        return shifted.claim(*kept) if kept - shifted.properties else shifted
    return operator if of is operator.of else multiple(c, of)


def _absorbed(operator: Operator) -> Operator:
    """cA as an operator of A's kind, where that is cheap."""
    if not isinstance(operator, Scaled):
        return operator
    c = operator.c
    match operator.of:
        case Diagonal(values=values):
            return Diagonal(c[..., None] * values)
        case Circulant(column=column):
            return Circulant(c[..., None] * column)
        case Dense(matrix=matrix):
            return Dense(c[..., None, None] * matrix)
        case Banded(bands=bands, offsets=offsets):
            return Banded(c[..., None, None] * bands, offsets)
        case Toeplitz(column=column, row=row):
            hermitian = row is None and not c.is_complex()
            across = None if hermitian else c[..., None] * (column.conj() if row is None else row)
            return Toeplitz(c[..., None] * column, across)
    return operator


def _kronecker(operator: Kronecker) -> Operator:
    factors = [normal(factor) for factor in operator.factors]
    if all(isinstance(factor, Identity) for factor in factors):
        return Identity(operator.shape[-1], dtype=operator.dtype, device=operator.device)
    if all(isinstance(factor, Diagonal) for factor in factors):
        values = [factor.values for factor in factors if isinstance(factor, Diagonal)]
        return Diagonal(reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), values))
    same = all(new is old for new, old in zip(factors, operator.factors, strict=True))
    return operator if same else kron(*factors)


def _structured(operator: Structured) -> Operator:
    expanded = operator.expanded()
    return operator if expanded is None else normal(expanded)


def _body(operator: Operator) -> Operator:
    return operator.of if isinstance(operator, Scaled) else operator


def _unit(operator: Operator) -> Tensor | None:
    """c, where the operator is cI."""
    if isinstance(operator, Identity):
        return torch.ones((), dtype=operator.dtype, device=operator.device)
    return operator.c if isinstance(operator, Scaled) and isinstance(operator.of, Identity) else None


REWRITES: dict[type[Operator], Callable[[Any], Operator]] = {
    Sum: _sum,
    Product: _product,
    Scaled: _scaled,
    Kronecker: _kronecker,
    Structured: _structured,
}
