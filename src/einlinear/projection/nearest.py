"""The factors whose structure lies nearest to a given dense weight.

docs/mathematics.md section 3. Splitting by singular value decomposition is the global optimum for nested structures,
all two-factor ones among them; alternating least squares, from the best of several starts, lowers the error of every
other, of those that padding or the moments of inputs take out of the closed form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from einlinear.projection.diagonalisation import diagonalised
from einlinear.projection.moments import Moments
from einlinear.projection.network import contract
from einlinear.projection.refinement import Target, balanced, descend, single, uncarried
from einlinear.structure import Axes, Structure

RACE = (6, 24)
"""Sweeps after which half of the starts drop out, each time."""
ROUGH = 1e-2
"""Relative error above which single precision will do for alternating least squares with moments."""
CLEAR = 0.99
"""Of the error without moments, what a start that heeds them must get below, or the former goes all the way."""
TIE = 1e-6
"""Relative error at which a start has arrived: among several such, the first has the better conditioned factors."""


def project(
    weight: Tensor,
    structure: Structure,
    moments: Tensor | Moments | None = None,
    *,
    sweeps: int = 100,
    tolerance: float | None = None,
) -> list[Tensor]:
    """The nearest matrix of a structure.

    Two factors: the global optimum, by batched truncated SVDs. It specialises to the methods known by other
    names: truncated SVD (low rank), Van Loan and Pitsianis (Kronecker and sums of such), the Monarch
    projection (BTT of rank 1), with any widths and block counts. With more factors, one is split off at a time: TT-SVD
    (Oseledets 2011), which recovers chains such as a tensor train or a butterfly, and whose error is at most
    √(factors − 1) times the least; alternating least squares (`refine`) lower it from there.

    Anything else (BLAST, user-made einsums, a padded Kronecker product) goes from the best of several starts (splits
    from either end, simultaneous diagonalisation, a random one) by alternating least squares.

    With `moments`, what is minimised is √E‖(W − Ŵ) x‖² over inputs x: exactly for low rank, whatever the rank of the
    moments; elsewhere by alternating least squares, from the better of two starts, one of them without moments.

    Args:
        weight: `[d_out, d_in]`, real or complex. The computation is in double precision.
        structure: an unrouted structure of these widths.
        moments: second moments of inputs, `[d_in, d_in]` or `Moments`; None for the Frobenius norm.
        sweeps: rounds of alternating least squares at most, where they are needed.
        tolerance: the round after which the error falls by less than this share per round is the last;
            None for 1e-4, or 5e-4 with moments.

    Returns:
        A tensor for each factor, shaped `structure.factor_shapes`, in the weight's dtype.

    Raises:
        StructureError: if the widths differ, the structure is routed, or the weight is not finite
            or not of floating point; for moments that do not fit or are none.
    """
    target = Target(weight, structure)
    short = torch.finfo(weight.dtype).bits < 64
    if moments is None:
        found = _nearest(target, sweeps, tolerance, short)
    else:
        found = _weighted(target, Target(weight, structure, moments), sweeps, tolerance, short)
    return [factor.to(weight.dtype) for factor in found]


def _nearest(target: Target, sweeps: int, tolerance: float | None, short: bool) -> list[Tensor]:
    """Without moments."""
    axes, blocks = target.blocks()
    first = split(target.structure, axes, blocks, short)
    if closed_form(target.structure):
        return first
    starts = [balanced(target.structure, first), *_other_starts(target, axes, blocks, short)]
    return _race(target, starts, sweeps, tolerance)


def _weighted(plain: Target, target: Target, sweeps: int, tolerance: float | None, short: bool) -> list[Tensor]:
    """With moments: from the better of two starts, one of them what there is without."""
    s, few = target.structure, min(sweeps, RACE[0])
    best = _nearest(plain, few, tolerance, short)
    white = target.whitened()
    if white is not None:
        reader, weight = white
        guess = _nearest(Target(weight, s), few, tolerance, short)
        # The other factors are right for moments within blocks; the one that reads the inputs then follows from the
        # weight itself, with no root to be inverted: W ≈ U (Uᴴ W), U orthonormal, where W S ≈ U (Uᴴ W S) is best.
        guess[reader] = torch.zeros_like(guess[reader])
        for _ in range(2):  # the second takes back the first one's ridge
            guess[reader] = plain.improved(guess, reader)
        if closed_form(s) and not _blocks_of_inputs(s, reader):
            return balanced(s, guess)
        if target.error(guess) < CLEAR * target.error(best):
            best = guess
        elif not closed_form(s):  # moments that matter little
            best = min((best, _nearest(plain, sweeps, tolerance, short)), key=target.error)
    if short:
        # Most of the way in single precision; double goes on where rounding would show.
        ahead, _ = descend(target.single(), single(best), sweeps, tolerance)
        best = min((best, [factor.to(target.weight) for factor in ahead]), key=target.error)
        if target.error(best) > ROUGH * target.norm(target.weight):
            return best
    return descend(target, best, sweeps, tolerance)[0]


def _other_starts(target: Target, axes: Axes, blocks: Tensor, short: bool) -> Iterator[list[Tensor]]:
    """Where descent may start, besides a split from the first factor on."""
    s = target.structure
    if len(s.factors) > 2:
        yield split(s.T, axes, blocks, short)[::-1]
    if nested(s):
        return
    for position, factor in enumerate(s.factors):
        # A factor without an axis of its own, such as BLAST's weights of blocks, may be all ones.
        rest = s.factors[:position] + s.factors[position + 1 :]
        if all(any(axis in other for other in rest) for axis in factor):
            found = split(replace(s, factors=rest), axes, blocks, short)
            yield [*found[:position], blocks.new_ones(s.shape(factor)), *found[position:]]
    if (guess := diagonalised(s, axes, blocks)) is not None:
        yield guess
    generator = torch.Generator().manual_seed(7919)
    drawn = [torch.randn(shape, generator=generator, dtype=blocks.dtype).to(blocks.device) for shape in s.factor_shapes]
    aim = float(target.weight.norm() / target.dense(drawn).norm())
    yield [factor * aim ** (1 / len(drawn)) for factor in drawn]


def _race(target: Target, starts: Sequence[list[Tensor]], sweeps: int, tolerance: float | None) -> list[Tensor]:
    """The best that descent makes of `starts`: all go a few sweeps, the better half some more, one to the end."""
    tie = TIE * target.norm(target.weight)

    def error(runner: tuple[list[Tensor], float]) -> float:
        return max(runner[1], tie)

    field = [descend(target, start, 0, tolerance) for start in starts]
    for leg in RACE:
        if len(field) == 1 or min(map(error, field)) <= tie:
            break
        field = [descend(target, factors, min(leg, sweeps), tolerance) for factors, _ in field]
        field = sorted(field, key=error)[: (len(field) + 1) // 2]
    return descend(target, min(field, key=error)[0], sweeps, tolerance)[0]


def closed_form(structure: Structure) -> bool:
    """Whether splitting is the global optimum: one factor, or two whose every block padding leaves a rectangle."""
    if len(structure.factors) > 2:
        return False
    if (structure.pad_in or structure.pad_out) and uncarried(structure):
        return False
    for axes, pad in ((structure.x, structure.pad_in), (structure.y, structure.pad_out)):
        owners = [[k for k, factor in enumerate(structure.factors) if axis in factor] for axis in axes]
        if pad and len({k for (k, *more) in owners if not more}) > 1:
            return False
    return True


def nested(structure: Structure) -> bool:
    """Whether splitting recovers members: each factor's bonds lead to one later factor."""
    ends = {*structure.x, *structure.y}
    for position, factor in enumerate(structure.factors):
        later = structure.factors[position + 1 :]
        bonds = {axis for axis in factor if axis not in ends and any(axis in other for other in later)}
        if len({k for k, other in enumerate(later) if bonds & {*other}}) > 1:
            return False
    return True


def _blocks_of_inputs(structure: Structure, reader: int) -> bool:
    """Whether the factor `reader` keeps some inputs apart: moments between those have no closed form."""
    elsewhere = (structure.y, *structure.factors[:reader], *structure.factors[reader + 1 :])
    return any(axis in axes for axes in elsewhere for axis in structure.x)


def discarded(target: Target) -> tuple[Tensor | None, bool]:
    """The squared errors of the nearest matrices of each rank, from 0 on, and whether that is what they are.

    None where splitting is not the optimum even without moments. With moments that have no closed form, the errors
    are those that there would be without moments between blocks of inputs, or without any.
    """
    s = target.structure
    if len(s.factors) != 2 or not closed_form(s):
        return None, False
    exact = True
    if target.gram is not None:
        white = target.whitened()
        exact = white is not None and not _blocks_of_inputs(s, white[0])
        target = Target(target.weight if white is None else white[1], s)
    axes, blocks = target.blocks()
    groups, _ = _parting(s, 0, axes)
    matrix = _unfolded(s, axes, blocks, groups)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mH
    squares = torch.linalg.eigvalsh(matrix @ matrix.mH).clamp_min(0).sum(0) * s.size(uncarried(s))
    outside = target.norm(target.weight) ** 2 - float(squares.sum())
    return torch.cat([squares.cumsum(0).flip(0), squares.new_zeros(1)]) + max(outside, 0.0), exact


def split(structure: Structure, axes: Axes, rest: Tensor, short: bool = False) -> list[Tensor]:
    """Splits off one factor at a time by a batched truncated SVD.

    Args:
        structure: the structure.
        axes, rest: the matrix with an axis for each end of the structure, those at both ends once.
        short: whether half of double precision will do, which is cheaper.
    """
    factors: list[Tensor] = []
    for position, factor in enumerate(structure.factors[:-1]):
        groups, bond = _parting(structure, position, axes)
        batch, rows, columns = groups
        left, right = _truncate(_unfolded(structure, axes, rest, groups), structure.size(bond), short)
        factors.append(_spread(structure, left, batch + rows + bond, factor))
        axes = batch + bond + columns
        rest = right.reshape(structure.shape(axes))
    factors.append(_spread(structure, rest, axes, structure.factors[-1]))
    return factors


def _parting(structure: Structure, position: int, axes: Axes) -> tuple[tuple[Axes, Axes, Axes], Axes]:
    """How a factor parts the axes of what is left: those shared, its own, the others'; and the bond."""
    factor = structure.factors[position]
    later = {axis for other in structure.factors[position + 1 :] for axis in other}
    batch = tuple(axis for axis in factor if axis in later and axis in axes)
    rows = tuple(axis for axis in factor if axis not in later and axis in axes)
    columns = tuple(axis for axis in axes if axis not in factor)
    return (batch, rows, columns), tuple(axis for axis in factor if axis in later and axis not in axes)


def _unfolded(structure: Structure, axes: Axes, tensor: Tensor, groups: tuple[Axes, Axes, Axes]) -> Tensor:
    """`tensor` as a batch of matrices."""
    batch, rows, columns = groups
    return contract([axes], [tensor], batch + rows + columns).reshape([structure.size(group) for group in groups])


def _truncate(matrix: Tensor, rank: int, short: bool) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of rank `rank`, filled up with zeros beyond full rank."""
    keep = min(rank, *matrix.shape[-2:])
    if short:
        left, right = _leading(matrix, keep)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        root = s[..., :keep].sqrt()
        left, right = u[..., :keep] * root[..., None, :], root[..., None] * vh[..., :keep, :]
    missing = rank - keep
    return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))


def _leading(matrix: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """As `_truncate`, from the eigenvectors of the Gram matrix: to half the digits, several times as fast."""
    if matrix.shape[-2] > matrix.shape[-1]:
        left, right = _leading(matrix.mT, keep)
        return right.mT, left.mT
    _, vectors = torch.linalg.eigh(matrix @ matrix.mH)
    basis = vectors[..., -keep:].flip(-1)
    right = basis.mH @ matrix
    root = right.norm(dim=-1).sqrt()
    return basis * root[..., None, :], right / root.clamp_min(torch.finfo(root.dtype).tiny)[..., None]


def _spread(structure: Structure, tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    """`tensor` with one dimension for each axis, in the order `want`; an axis it lacks is a sum of equal parts."""
    spread = contract([have], [tensor.reshape(structure.shape(have))], tuple(axis for axis in want if axis in have))
    for position, axis in enumerate(want):
        if axis not in have:
            size = structure.sizes[axis]
            spread = spread.unsqueeze(position).expand(*spread.shape[:position], size, *spread.shape[position:]) / size
    return spread.contiguous()
