"""A whole model within a budget: calibrate, draw error curves, allocate, convert; what is done is kept on the way."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from einlinear.compression.allocation import Allocation, Cost, Curve, Point, allocate
from einlinear.compression.calibration import Batch, calibrate, sensitivities
from einlinear.compression.curves import error_curve, layer_candidates
from einlinear.conversion.converting import convert
from einlinear.conversion.report import Report
from einlinear.conversion.rules import choose
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import project
from einlinear.structure import Structure, StructureError
from einlinear.structures import Dense
from einlinear.targeting import LinearLayer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


FLOOR = 0.7
"""Share of an even budget that every layer gets: sensitivities hold for small errors, and large ones add up."""
PROBED = 8
"""Batches at most from which it is estimated how much the model's output moves with a layer's."""


class Work:
    """What was found out about a model so far, in a folder, so that an interrupted compression goes on.

    Every result is a file that appears when it is complete. The folder belongs to one model and one
    calibration (`key`); budgets, structures and plans can change.

    Raises:
        StructureError: for a folder that holds the work on something else.
    """

    def __init__(self, folder: Path | None, key: str = "") -> None:
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        owner = folder / "key"
        if owner.exists() and owner.read_text() != key:
            raise StructureError(
                f"cannot go on in {folder}: it holds the work on another model, or with another calibration; "
                f"remove it, or compress to another place"
            )
        owner.write_text(key)

    def remove(self) -> None:
        """Deletes the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that were kept under a name, or newly made ones."""
        if self.folder is None:
            return dict(make())
        path = self._path(name, "safetensors")
        if not path.exists():
            made = {key: tensor.contiguous() for key, tensor in make().items()}
            self._write(path, lambda partial: save_file(made, partial))
        return load_file(path)

    def text(self, name: str, make: Callable[[], str]) -> str:
        """The text that was kept under a name, or a newly made one."""
        if self.folder is None:
            return make()
        path = self._path(name, "json")
        if not path.exists():
            made = make()
            self._write(path, lambda partial: partial.write_text(made))
        return path.read_text()

    def _path(self, name: str, kind: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.{kind}"

    @staticmethod
    def _write(path: Path, write: Callable[[Path], object]) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Survey:
    """What a model's layers could become: an error curve for each, the moments of their inputs, and who is left out."""

    curves: dict[str, Curve]
    moments: dict[str, Moments | Tensor]
    skipped: dict[str, str]
    sensitivities: dict[str, float] | None = None
    """What a layer's squared error counts for; None without calibration data, when its share of its output counts."""

    def allocate(self, budget: float, cost: Cost) -> Allocation:
        """The budget where it does the model's output most good, as far as is known."""
        if self.sensitivities is None:
            return allocate(self.curves, budget, cost, relative=True)
        return allocate(self.curves, budget, cost, weights=self.sensitivities, floor=FLOOR)


def survey(
    model: nn.Module,
    structure: str = "auto",
    *,
    calibration: Iterable[Batch] | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    work: Work | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> Survey:
    """The error curve of every layer that can be compressed; arguments and errors as in `compress`."""
    work = work or Work(None)
    if structure != "auto":
        family_of(structure)  # refuses what is none, and says what there is
    layers, skipped = _targets(model, target_modules, exclude_modules)
    moments: dict[str, Moments | Tensor] = {}
    weights = None
    if calibration is not None:
        few, calibration = _beginning(calibration)
        moments = _moments(model, layers, calibration, work, progress)
        weights = _sensitivities(model, {name: layers[name] for name in moments}, few, work)
        for name in [name for name in layers if name not in moments]:
            skipped[name] = "the calibration data never reached it"
            del layers[name]
    curves: dict[str, Curve] = {}
    for done, (name, layer) in enumerate(layers.items()):
        progress("error curves", done, len(layers))
        weight = layer.linear.weight
        try:
            offered = layer_candidates(structure, weight.shape[1], weight.shape[0])
        except StructureError as error:
            skipped[name] = str(error)
            continue
        if not any(isinstance(family, Dense) for family in offered):
            offered = (*offered, Dense())

        def drawn(weight: Tensor = weight, offered: Sequence[Family] = offered, name: str = name) -> str:
            return _written(error_curve(weight, offered, moments.get(name)))

        curves[name] = _read(work.text(f"curve {structure} {name}", drawn))
    progress("error curves", len(layers), len(layers))
    return Survey(curves, moments, skipped, weights)


def compress(
    model: nn.Module,
    structure: str = "auto",
    budget: float = 0.5,
    *,
    cost: Cost = "parameters",
    calibration: Iterable[Batch] | None = None,
    plan: Mapping[str, Family | None] | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    sweeps: int = 100,
    work: Work | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> tuple[Allocation | None, Report]:
    """Compresses a model to a share of what its linear layers cost, in place.

        allocation, report = el.compress(model, "btt", budget=0.5, calibration=batches)

    Every linear layer but output layers gets an error curve over the settings of the structure, a
    dense layer among them; the budget is allocated so that the summed error is least (`einlinear.allocate`); each
    weight is then projected. With calibration data, errors are those of the layers' outputs on it, each weighed by how
    much the model's output moves with the layer's (`sensitivities`; docs/guide/compress.md says what that gains),
    and no layer gets less than 0.7 of an even share.
    Without, they are those of the weights, each relative to its weight.

    Args:
        model: any module; as in `einlinear.convert`.
        structure: a family's name, which offers its ranks and blocks, one with settings, or "auto" for all families
            whose nearest member has a closed form.
        budget: share of the parameters or FLOPs of the layers that can be compressed, above 0 and at most 1.
        cost: what the budget counts: "parameters" or "flops".
        calibration: batches to run the model on: tensors, or dicts of keywords, or tuples of arguments.
        plan: what becomes of each layer, in place of an allocation (`einlinear.read_plan`).
        target_modules, exclude_modules: as in `einlinear.convert`.
        sweeps: rounds of alternating least squares at most, for each layer whose projection has no closed form.
        work: where to keep what is done, to go on after an interrupt.
        progress: called as the work goes on.

    Returns:
        The allocation, or None where there was a plan; and the report of the conversion.

    Raises:
        StructureError: for a budget outside (0, 1] or too small, no tokens to calibrate with, a plan whose layers the
            model has not, or where no layer can be compressed.
    """
    if plan is None and not 0 < budget <= 1:  # before hours of work, not after
        raise StructureError(f"cannot compress to a budget of {budget!r}: it is a share, above 0 and at most 1")
    work = work or Work(None)
    options = {"target_modules": target_modules, "exclude_modules": exclude_modules, "work": work}
    allocation, skipped = None, {}
    if plan is None:
        found = survey(model, structure, calibration=calibration, progress=progress, **options)  # type: ignore[arg-type]
        if not found.curves:
            reasons = "; ".join(f"{name}: {why}" for name, why in found.skipped.items())
            raise StructureError(f"cannot compress the {type(model).__name__}: none of its layers can be ({reasons})")
        allocation = found.allocate(budget, cost)
        plan, moments, skipped = allocation.rules, found.moments, found.skipped
    else:
        layers, _ = _targets(model, [*plan], ())
        wanted = {name: layer for name, layer in layers.items() if plan.get(name) is not None}
        moments = {} if calibration is None else _moments(model, wanted, calibration, work, progress)
    report = apply_plan(model, plan, moments, sweeps=sweeps, work=work, progress=progress)
    return allocation, replace(report, skipped={**report.skipped, **skipped})


def apply_plan(
    model: nn.Module,
    plan: Mapping[str, Family | None],
    moments: Mapping[str, Moments | Tensor],
    *,
    sweeps: int = 100,
    work: Work | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> Report:
    """Converts the layers that a plan names, in place, keeping each layer's factors as they are found."""
    work = work or Work(None)
    total, done = sum(family is not None for family in plan.values()), 0

    def nearest(name: str, weight: Tensor, structure: Structure) -> list[Tensor]:
        nonlocal done
        progress("projecting", done, total)

        def projected() -> dict[str, Tensor]:
            found = project(weight, structure, moments.get(name), sweeps=sweeps)
            return {str(k): factor for k, factor in enumerate(found)}

        kept = work.tensors(f"factors {name} {structure!r} {name in moments} {sweeps}", projected)
        done += 1
        return [kept[str(k)] for k in range(len(kept))]

    report = convert(model, plan, nearest=nearest)
    progress("projecting", total, total)
    return report


def _targets(
    model: nn.Module, target_modules: str | Sequence[str] | None, exclude_modules: str | Sequence[str]
) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """The layers that can be converted, and the reason for each that cannot."""
    _, planned, refused = choose(model, Dense(), target_modules, exclude_modules)
    owners: dict[Tensor, str] = {}
    skipped = {layer.name: why for layer, why in refused.items()}
    layers: dict[str, LinearLayer] = {}
    for layer in planned:
        first = owners.setdefault(layer.weight, layer.name)
        if first != layer.name:
            skipped[layer.name] = f"it shares its weight with '{first}'"
            layers.pop(first, None)
            skipped[first] = f"it shares its weight with '{layer.name}'"
        else:
            layers[layer.name] = layer
    return layers, skipped


def _moments(
    model: nn.Module, layers: Mapping[str, LinearLayer], batches: Iterable[Batch], work: Work, progress: Progress
) -> dict[str, Moments | Tensor]:
    """The mean second moments of the layers' inputs; layers that share theirs share a tensor."""

    def streamed() -> dict[str, Tensor]:
        total = len(batches) if isinstance(batches, Sequence) else 0

        def counted() -> Iterable[Batch]:
            for done, batch in enumerate(batches):
                progress("calibrating", done, total or done + 1)
                yield batch

        found = calibrate(model, {name: layer.module for name, layer in layers.items()}, counted())
        distinct = {id(moments): moments for moments in found.values() if moments.tokens}
        numbers = {key: str(number) for number, key in enumerate(distinct)}
        matrices = {numbers[key]: moments.matrix for key, moments in distinct.items()}
        readers = {f"of {name}": torch.tensor(int(numbers[id(m)])) for name, m in found.items() if m.tokens}
        return matrices | readers

    kept = work.tensors("moments", streamed)
    readers = [name for name in layers if f"of {name}" in kept]
    return {name: kept[str(int(kept[f"of {name}"]))] for name in readers}


def _beginning(batches: Iterable[Batch]) -> tuple[list[Batch], Iterable[Batch]]:
    """The first few of some batches, and all of them, also where they can be gone through but once."""
    if isinstance(batches, Sequence):
        return [*batches[:PROBED]], batches
    rest = iter(batches)
    few = [*islice(rest, PROBED)]
    return few, chain(few, rest)


def _sensitivities(
    model: nn.Module, layers: Mapping[str, LinearLayer], batches: Sequence[Batch], work: Work
) -> dict[str, float]:
    def probed() -> str:
        return json.dumps(sensitivities(model, {name: layer.module for name, layer in layers.items()}, batches))

    found: dict[str, float] = json.loads(work.text("sensitivities", probed))
    return found


def _written(curve: Curve) -> str:
    points = [(str(p.family), p.parameters, p.flops, p.error) for p in curve.points]
    return json.dumps({"d_in": curve.d_in, "d_out": curve.d_out, "total": curve.total, "points": points})


def _read(text: str) -> Curve:
    found = json.loads(text)
    points = tuple(Point(family_of(family), *numbers) for family, *numbers in found["points"])
    return Curve(found["d_in"], found["d_out"], found["total"], points)
