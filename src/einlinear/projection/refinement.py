"""Alternating least squares for any einsum: one factor at a time, solved exactly with the others held.

docs/mathematics.md section 3. Everything is derived from the axes; nothing here knows a family.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from einlinear.contract import Factors, check, shaped
from einlinear.projection.moments import Moments, second_moments
from einlinear.projection.network import contract
from einlinear.projection.solving import conjugate_gradients, inverse, solve, square_root
from einlinear.structure import Axes, Structure, StructureError

FORMED = 2**27
"""Entries of the normal equations of one factor that are formed at most; beyond, conjugate gradients do without."""
CHEAP = 2**20
"""The same where a preconditioner is at hand, so that ten or so steps do as well."""
Step = Callable[[Tensor], Tensor]
"""From one tensor like a factor to another."""
PATIENCE = 4
"""Sweeps over which progress is measured."""


def refine(
    weight: Tensor,
    structure: Structure,
    factors: Factors,
    sweeps: int = 100,
    tolerance: float | None = None,
    moments: Tensor | Moments | None = None,
) -> list[Tensor]:
    """Lowers the error of `factors` by solving for one factor at a time with the others held.

    The matrix is linear in each factor, so each solve is a linear least-squares problem, and the error
    never rises but for rounding to the weight's dtype. Between sweeps the factors are extrapolated along
    their last move, which is taken back where it does not pay (Ang and Gillis 2019, HER). Padding has no
    weight. Factors come out balanced, so that they survive a short dtype.

    Args:
        weight: `[d_out, d_in]`, real or complex; computed in double precision.
        structure: an unrouted structure of these widths.
        factors: where to start.
        sweeps: rounds over all factors at most.
        tolerance: the round after which the error falls by less than this share per round is the last;
            None for 1e-4, or 5e-4 with moments, whose solves are dearer.
        moments: second moments of inputs, `[d_in, d_in]` or `Moments`: the error is then
            √E‖(W − Ŵ) x‖², the Frobenius norm of W − Ŵ otherwise.

    Returns:
        A tensor for each factor, shaped `structure.factor_shapes`, in the weight's dtype.

    Raises:
        StructureError: as `project`, and for factors that are not those of the structure.
    """
    target = Target(weight, structure, moments)
    check(structure, factors, torch.empty(0, structure.d_in))
    start = [factor.detach().to(target.weight) for factor in shaped(structure, factors)]
    found, _ = descend(target, start, sweeps, tolerance)
    return [factor.to(weight.dtype) for factor in found]


class Target:
    """A weight as a structure's factors approximate it, and how its errors are weighed.

    `norm` weighs a residual `[d_out, d_in]`: its Frobenius norm, or √E‖residual · x‖² given moments.
    """

    def __init__(self, weight: Tensor, structure: Structure, moments: Tensor | Moments | None = None) -> None:
        self.weight = checked(weight, structure)
        self.structure = structure
        self.gram = None if moments is None else second_moments(moments, self.weight)
        x, y = structure.x, structure.y
        self._masks: list[tuple[Axes, Tensor]] = []
        """Operands beside the squared error: zero on padding, one along the axes that no factor carries."""
        self._masks += [((axis,), torch.ones(structure.sizes[axis]).to(self.weight)) for axis in uncarried(structure)]
        for axes, kept, pad in ((y, structure.d_out, structure.pad_out), (x, structure.d_in, structure.pad_in)):
            if pad and not (axes == x and self.gram is not None):
                mask = torch.arange(kept + pad, device=weight.device) < kept
                self._masks.append((axes, mask.to(self.weight).reshape(structure.shape(axes))))
        if self.gram is not None:
            padded = torch.nn.functional.pad(self.gram, (0, structure.pad_in, 0, structure.pad_in))
            self._gram = padded.reshape(structure.shape(x) * 2)
            ends = (0, structure.pad_in, 0, structure.pad_out)
            self._weighed = torch.nn.functional.pad(self.weight @ self.gram, ends).reshape(structure.shape(y + x))

    def single(self) -> "Target":
        """The same in single precision, several times as fast; moments are scaled to a mean of 1."""
        short = copy(self)
        (short.weight,) = single([self.weight])
        short._masks = [(axes, single([mask])[0]) for axes, mask in self._masks]
        if self.gram is not None:
            mean = self.gram.diagonal().real.mean()
            scaled = [tensor / mean for tensor in (self.gram, self._gram, self._weighed)]
            short.gram, short._gram, short._weighed = single(scaled)
        return short

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """The matrix of `factors`, `[d_out, d_in]`."""
        s = self.structure
        common = [axis for axis in s.x if axis in s.y]
        # An axis that input and output share stands for a diagonal of blocks, zero elsewhere.
        eyes = [torch.eye(s.sizes[axis]).to(self.weight) for axis in common]
        links = [(axis, _prime(axis)) for axis in common]
        ends = s.y + tuple(_prime(axis) if axis in common else axis for axis in s.x)
        matrix = contract([*s.factors, *links], [*factors, *eyes], ends)
        return matrix.reshape(s.size(s.y), s.size(s.x))[: s.d_out, : s.d_in]

    def blocks(self) -> tuple[Axes, Tensor]:
        """The weight with an axis for each end, those common to both taken once: elsewhere the structure has zeros.

        Along axes that no factor carries the structure has the same everywhere: the mean of the weight stands for it.
        """
        s = self.structure
        alike = uncarried(s)
        padded = torch.nn.functional.pad(self.weight, (0, s.pad_in, 0, s.pad_out)).reshape(s.shape(s.y + s.x))
        axes = tuple(axis for axis in dict.fromkeys(s.y + s.x) if axis not in alike)
        return axes, contract([s.y + s.x], [padded], axes) / s.size(alike)

    def whitened(self) -> tuple[int, Tensor] | None:
        """The factor that reads every input, if one does, and the weight times a root of the moments of what it mixes.

        Moments between its blocks are left out: the structure could not undo a root of those.
        """
        s = self.structure
        assert self.gram is not None
        position = next((k for k, factor in enumerate(s.factors) if {*s.x} <= {*factor}), None)
        if position is None:
            return None
        others = {axis for k, axes in enumerate(s.factors) if k != position for axis in axes}
        groups = tuple(axis for axis in s.x if axis in others or axis in s.y)
        own = tuple(axis for axis in s.x if axis not in groups)
        ends = tuple(axis if axis in groups else _prime(axis) for axis in s.x) + s.x
        gram = contract([ends], [self._gram], groups + own + tuple(map(_prime, own)))
        roots = square_root(gram.reshape(-1, s.size(own), s.size(own))).reshape(gram.shape)
        padded = torch.nn.functional.pad(self.weight, (0, s.pad_in)).reshape(s.d_out, *s.shape(s.x))
        rows = tuple(_prime(axis) if axis in own else axis for axis in s.x)
        white = contract([("", *rows), groups + tuple(map(_prime, own)) + own], [padded, roots], ("", *s.x))
        return position, white.reshape(s.d_out, -1)[:, : s.d_in]

    def norm(self, residual: Tensor) -> float:
        weighed = residual if self.gram is None else residual @ self.gram
        return math.sqrt(max(0.0, float((weighed * residual.conj()).real.sum())))

    def error(self, factors: Sequence[Tensor]) -> float:
        return self.norm(self.weight - self.dense(factors))

    def improved(self, factors: Sequence[Tensor], position: int) -> Tensor:
        """The factor at `position` that is best with the others held, or a step towards it where that is dear.

        A correction, not a new factor: what the weight does not determine stays as it is.
        """
        s, weighed = self.structure, self.gram is not None
        factor, now = s.factors[position], factors[position]
        ends = {*s.x, *s.y}
        mixed = {*s.x} - {*s.y} if weighed else set()  # axes along which moments correlate errors
        others = [axes for k, axes in enumerate(s.factors) if k != position]
        tensors = [tensor for k, tensor in enumerate(factors) if k != position]
        around = {axis for axes in others for axis in axes}
        inner = tuple(axis for axis in factor if axis not in around and axis not in ends)
        outer = tuple(axis for axis in factor if axis not in inner)
        solved = tuple(axis for axis in outer if axis not in ends or axis in mixed)

        def twin(axes: Axes) -> Axes:
            """The axes of the factor that errors are compared with, at the other end of the moments."""
            return tuple(_prime(axis) if axis not in ends or axis in mixed else axis for axis in axes)

        conjugate = [tensor.conj() for tensor in tensors]
        network = [*others, *map(twin, others), *(axes for axes, _ in self._masks)]
        parts = [*conjugate, *tensors, *(mask for _, mask in self._masks)]
        if weighed:
            network.append(twin(s.x) + s.x)
            parts.append(self._gram)
        if not network:
            network, parts = [()], [now.new_ones(())]
        present = tuple(axis for axis in outer if axis not in solved and any(axis in axes for axes in network))
        rows = tuple(axis for axis in outer if axis not in solved and axis not in present)
        if s.size(present) * s.size(solved) ** 2 <= (CHEAP if weighed and {*s.x} <= {*factor} else FORMED):
            shape = (s.size(present), s.size(solved), s.size(solved))
            normal = contract(network, parts, present + solved + twin(solved)).reshape(shape)
            ordered = present + solved + rows

            def formed(act: Callable[[Tensor], Tensor]) -> Step:
                def on_factor(step: Tensor) -> Tensor:
                    columns = _arrange(step, outer, ordered).reshape(*shape[:2], -1)
                    return _arrange(act(columns).reshape(s.shape(ordered)), ordered, outer)

                return on_factor

            apply, answer = formed(lambda step: normal @ step), formed(lambda right: solve(normal, right))
        else:
            apply, answer = self._unformed(network, parts, outer, twin(outer))
        whole = s.y + s.x
        if weighed:
            # What there is goes through the factors, far cheaper than the matrix they make.
            asked = contract([whole, *others], [self._weighed, *conjugate], outer)
            gradient = asked - apply(now.sum([k for k, axis in enumerate(factor) if axis in inner]) if inner else now)
        else:  # the residual, exact to more digits where it vanishes
            gradient = contract([whole, *others], [self._residual(factors), *conjugate], outer)
        # An axis of this factor alone sums entries: they share the step evenly.
        step = answer(gradient).reshape([s.sizes[axis] if axis in outer else 1 for axis in factor]) / s.size(inner)
        return now + step

    def _unformed(self, network: Sequence[Axes], parts: Sequence[Tensor], outer: Axes, twin: Axes) -> tuple[Step, Step]:
        """The normal equations applied, and a step along conjugate gradients, where they are too many to be formed.

        Only moments make them so. Around a factor that reads every input, the rest is contracted once, the moments
        last. Around any other that would have the features of the rest twice, more entries than the matrix: the step
        goes through one tensor after the other instead.
        """
        precondition: Step
        if not {*self.structure.x} <= {*outer}:

            def apply(step: Tensor) -> Tensor:
                return contract([*network, twin], [*parts, step], outer)

            def precondition(step: Tensor) -> Tensor:
                return step
        else:
            x = (*self.structure.x, *map(_prime, self.structure.x))
            *network, ends = network
            *parts, gram = parts
            if not network:  # one factor alone
                network, parts = [()], [gram.new_ones(())]
            around = tuple(a for a in dict.fromkeys(a for axes in network for a in axes) if a in {*outer, *twin, *x})
            held = contract(network, parts, around)
            precondition = self._preconditioner(around, held, outer, twin)

            def apply(step: Tensor) -> Tensor:
                return contract([around, ends, twin], [held, gram, step], outer)

        return apply, lambda right: conjugate_gradients(apply, precondition, right)

    def _preconditioner(self, around: Axes, held: Tensor, outer: Axes, twin: Axes) -> Step:
        """Solves the equations of a factor that reads every input, without moments between its blocks."""
        s = self.structure
        mixed = [axis for axis, other in zip(outer, twin, strict=True) if axis != other and axis in s.x]
        blocks = tuple(axis for axis in mixed if axis in around)
        own = tuple(axis for axis in mixed if axis not in around)
        bonds = tuple(axis for axis, other in zip(outer, twin, strict=True) if axis != other and axis not in s.x)
        unprimed = {_prime(axis): axis for axis in blocks}
        merged = tuple(unprimed.get(axis, axis) for axis in around)
        batch = tuple(axis for axis in dict.fromkeys(merged) if axis in outer and axis not in bonds)
        common = tuple(axis for axis in s.x if axis in s.y)
        groups = (*blocks, *common)
        bond = contract([merged], [held], batch + bonds + tuple(map(_prime, bonds)))
        ends = tuple(axis if axis in groups else _prime(axis) for axis in s.x) + s.x
        gram = contract([ends], [self._gram], groups + own + tuple(map(_prime, own)))
        inverse_bond = inverse(bond.reshape(-1, s.size(bonds), s.size(bonds))).reshape(bond.shape)
        inverse_gram = inverse(gram.reshape(-1, s.size(own), s.size(own))).reshape(gram.shape)
        operands = [batch + bonds + tuple(map(_prime, bonds)), groups + own + tuple(map(_prime, own))]
        primed = {*bonds, *own}
        step_axes = tuple(_prime(axis) if axis in primed else axis for axis in outer)

        def precondition(step: Tensor) -> Tensor:
            return contract([*operands, step_axes], [inverse_bond, inverse_gram, step], outer)

        return precondition

    def _residual(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.structure
        residual = torch.nn.functional.pad(self.weight - self.dense(factors), (0, s.pad_in, 0, s.pad_out))
        return residual.reshape(s.shape(s.y + s.x))


def single(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Real or complex tensors in single precision."""
    return [tensor.to(torch.complex64 if tensor.is_complex() else torch.float32) for tensor in tensors]


def descend(
    target: Target, factors: Sequence[Tensor], sweeps: int, tolerance: float | None = None
) -> tuple[list[Tensor], float]:
    """Balanced factors of less error than `factors`, and that error. Arguments as in `refine`."""
    if tolerance is None:
        tolerance = 1e-4 if target.gram is None else 5e-4
    best = balanced(target.structure, factors)
    error = target.error(best)
    # Rounding of the weight itself: nothing to gain below.
    floor = 4 * torch.finfo(target.weight.dtype).eps * target.norm(target.weight)
    guess, reach, limit = best, 0.5, 1.0
    history = [error]
    for _ in range(sweeps):
        if error <= floor:
            break
        found = list(guess)
        for position in range(len(found)):
            found[position] = target.improved(found, position)
        found = balanced(target.structure, found)
        after = target.error(found)
        if after <= error:
            guess = [new + reach * (new - old) for new, old in zip(found, best, strict=True)]
            best, error = found, after
            limit = min(1.0, 1.01 * limit)
            reach = min(limit, 1.05 * reach)
        elif guess is best:
            break  # rounding alone
        else:
            # Extrapolated too far: again from the best, and not so far next time.
            guess, limit, reach = best, reach, reach / 1.5
            continue
        history.append(error)
        if len(history) > PATIENCE and error > history[-1 - PATIENCE] * (1 - tolerance) ** PATIENCE:
            break
    return best, error


def balanced(structure: Structure, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same matrix by factors of equal norm, along each bond and as wholes."""
    found = list(factors)
    ends = {*structure.x, *structure.y}
    for bond in dict.fromkeys(axis for axes in structure.factors for axis in axes if axis not in ends):
        found = _even(structure, found, bond)
    return _even(structure, found, None)


def _even(structure: Structure, factors: list[Tensor], bond: str | None) -> list[Tensor]:
    """Scales the factors that carry `bond`, or all, so that each has the same norm for every entry of it."""
    carriers = [k for k, axes in enumerate(structure.factors) if bond is None or bond in axes]
    norms = []
    for k in carriers:
        along = [d for d, axis in enumerate(structure.factors[k]) if axis != bond]
        squares = factors[k].abs().square()
        norms.append((squares.sum(along) if along else squares).sqrt())
    logs = torch.stack(norms).log()
    wanted = logs.mean(0)
    found = list(factors)
    for k, log in zip(carriers, logs, strict=True):
        scale = torch.where(wanted.isfinite(), (wanted - log).exp(), 1.0)
        shape = [-1 if axis == bond else 1 for axis in structure.factors[k]]
        found[k] = factors[k] * scale.reshape(shape)
    return found


def checked(weight: Tensor, structure: Structure) -> Tensor:
    """The weight without its history, in double precision."""
    if not isinstance(structure, Structure):
        raise StructureError(
            f"cannot project onto {structure!r}, which is not a Structure: make one of the weight's widths, as in "
            f"einlinear.structure('btt(rank=2)')(d_in, d_out)"
        )
    if weight.shape != (structure.d_out, structure.d_in):
        raise StructureError(
            f"cannot project a weight of shape {tuple(weight.shape)} onto {structure!r}: "
            f"it needs [d_out, d_in] = [{structure.d_out}, {structure.d_in}]"
        )
    if structure.routed:
        raise StructureError(
            f"cannot project onto {structure!r}: a routed structure has no single matrix; project onto "
            f"structure.expert, the map of one expert"
        )
    if weight.is_meta or not projectable(weight):
        raise StructureError(
            f"cannot project a weight of {weight.dtype} ({weight.layout}) on the device '{weight.device}': it needs "
            f"entries of floating point, of 16 bits or more; load, dequantise or densify the weight first"
        )
    if not torch.isfinite(weight).all():
        raise StructureError("cannot project a weight with entries that are not finite; mend NaN or infinity first")
    return weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)


def projectable(weight: Tensor) -> bool:
    """Whether a weight is written out in real or complex numbers that torch computes with, 16 bits and more."""
    numbers = weight.is_complex() or (weight.is_floating_point() and weight.itemsize > 1)
    return numbers and weight.layout is torch.strided


def uncarried(structure: Structure) -> Axes:
    """The axes that pass from input to output by no factor: the map is the same for all of their entries."""
    return tuple(axis for axis in structure.x if not any(axis in factor for factor in structure.factors))


def _prime(axis: str) -> str:
    return axis + "'"


def _arrange(tensor: Tensor, have: Axes, want: Axes) -> Tensor:
    return tensor.permute([have.index(axis) for axis in want])
