"""Swaps the linear layers of a model for structured ones, chosen by name."""

import difflib
import dis
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from einlinear.contract import dense
from einlinear.cost import flops, parameters
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.layer import Linear
from einlinear.structure import Structure, StructureError

ALL_LINEAR = "all-linear"
HEADS = frozenset({"classifier", "embed_out", "head", "lm_head", "readout", "score"})
"""Parts of a name that mark an output layer where the model does not tell (`get_output_embeddings`)."""

Rule = Family | Structure | None


@dataclass(frozen=True)
class Row:
    """One converted layer. Parameters are those of its weight, FLOPs are for one token."""

    name: str
    family: str
    structure: str
    d_in: int
    d_out: int
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    error: float | None  # ‖W − Ŵ‖ / ‖W‖ in Frobenius norm, None where nothing was projected

    @property
    def ratio(self) -> float:
        """FLOPs relative to the dense layer that was there."""
        return self.flops_after / self.flops_before


@dataclass(frozen=True)
class Report:
    """What `convert` did: a row for each converted layer, a reason for each skipped one. Prints as a table.

    `parameters_before` and `parameters_after` are those of the whole model, shared ones counted once.
    """

    rows: tuple[Row, ...]
    skipped: dict[str, str]
    parameters_before: int
    parameters_after: int

    @property
    def flops_before(self) -> int:
        """FLOPs per token of the converted layers, before."""
        return sum(row.flops_before for row in self.rows)

    @property
    def flops_after(self) -> int:
        """FLOPs per token of the converted layers, after."""
        return sum(row.flops_after for row in self.rows)

    def __str__(self) -> str:
        table = [["layer", "structure", "in -> out", "parameters", "FLOPs/token", "ratio", "error"]]
        for row in self.rows:
            cells = [row.name, row.family, f"{row.d_in} -> {row.d_out}"]
            cells += [_change(row.parameters_before, row.parameters_after), _change(row.flops_before, row.flops_after)]
            table.append([*cells, f"{row.ratio:.3g}", "-" if row.error is None else f"{row.error:.3g}"])
        name, family, *numbers = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(name), cells[1].ljust(family), *map(str.rjust, cells[2:], numbers)])
            for cells in table
        ]
        lines.append(
            f"{len(self.rows)} layers converted: {_change(self.flops_before, self.flops_after)} FLOPs per token; "
            f"whole model: {_change(self.parameters_before, self.parameters_after)} parameters"
        )
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped.items())])


def convert(
    model: nn.Module,
    rules: Mapping[str, Family | Structure | str | None],
    *,
    weights: Literal["project", "init"] = "project",
    exclude: str | Sequence[str] = (),
    progress: bool = False,
) -> Report:
    """Replaces linear layers of `model` by structured ones, in place.

    Each rule maps a pattern to a family, its short text (`"btt(rank=4)"`), a `Structure`, or None,
    which leaves what it matches as it is. The first rule that matches a layer decides. As in PEFT, a
    pattern matches the name it equals and every name it is a dotted suffix of, and `"all-linear"`
    means every linear layer but output layers and classification heads; `*`, `?` and `[...]` mean
    what they do in a shell, and `*` matches dots too.

    Layers are `torch.nn.Linear` and the `Conv1D` of transformers' GPT-2. One that cannot be converted
    is skipped, with its reason in the report, unless a pattern without wildcards names it: then it
    is an error. Whatever the error, the model is left as it was.

    Device, dtype, training mode and `requires_grad` are kept. Layers that share a weight go on sharing
    it where all of them are converted alike, and are not converted otherwise. Make the optimizer
    afterwards: the parameters are new ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = convert(model, {"0": "btt(rank=2)", "*": None})
        >>> report.rows[0].ratio
        0.375

    Args:
        model: any module.
        rules: what becomes of which layers.
        weights: "project" for the factors nearest to each weight (`einlinear.project`), the bias kept;
            "init" for newly drawn ones (`einlinear.spectral`) and a zero bias, to train from scratch.
        exclude: patterns of layers to leave as they are, before any rule.
        progress: whether to show a progress bar with the time left.

    Returns:
        A `Report`; `print` it.

    Raises:
        ValueError: for a pattern that matches no linear layer, or none that is still undecided.
        StructureError: for a rule that is no family, or a layer named without wildcards that cannot
            be converted.
    """
    if weights not in ("project", "init"):
        raise ValueError(f"cannot convert a model with weights={weights!r}: pass 'project' or 'init'")
    project = weights == "project"
    layers = _linear_layers(model)
    left: Mapping[str, None] = dict.fromkeys([exclude] if isinstance(exclude, str) else exclude)
    decisions = [*left.items(), *((pattern, _rule(pattern, rule)) for pattern, rule in rules.items())]
    chosen = _choose(model, layers, decisions)
    planned, refused = _plan(model, chosen, project)

    # Everything is made before anything is swapped, so that no error leaves the model half converted.
    size_before = _size(model)
    made: dict[Tensor, Linear] = {}
    rows: list[Row] = []
    swaps: list[tuple[str, Linear]] = []
    work: Iterable[tuple[_Layer, Structure]] = planned.items()
    if progress:
        from rich.progress import track

        work = track(work, description="Converting", total=len(planned))
    for layer, structure in work:
        new = _structured(layer, structure, made, project)
        rows.append(_row(layer, str(chosen[layer][1]), new, project))
        swaps += [(name, new) for name in layer.names]
    for name, new in swaps:
        model.set_submodule(name, new)
    if "transformers.modeling_utils" in sys.modules:  # else the model can be none of theirs
        from einlinear.hf.models import adopt

        adopt(model)
    return Report(tuple(rows), {layer.name: reason for layer, reason in refused.items()}, size_before, _size(model))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer as it stands in a model, under all its names."""

    module: nn.Module
    names: list[str]
    kind: type[nn.Module]  # the class whose computation it should have

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> Tensor:
        assert isinstance(self.module.weight, Tensor)
        return self.module.weight

    @property
    def linear(self) -> nn.Linear:
        """The layer itself, or a view of a Conv1D, which keeps its weight as `[d_in, d_out]`."""
        if isinstance(self.module, nn.Linear):
            return self.module
        d_in, d_out = self.weight.shape
        view = nn.Linear(d_in, d_out, device="meta")
        view.weight = nn.Parameter(self.weight.detach().mT)
        view.bias = self.module.bias  # type: ignore[assignment]
        return view


def _linear_layers(model: nn.Module) -> list[_Layer]:
    # A model that holds a Conv1D of transformers has had its module imported.
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds: list[type[nn.Module]] = [nn.Linear, Linear, *([] if transformers is None else [transformers.Conv1D])]
    found: dict[nn.Module, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for kind in kinds:
            if isinstance(module, kind):
                found.setdefault(module, _Layer(module, [], kind)).names.append(name)
    if model in found:
        raise ValueError(
            f"cannot convert a {type(model).__name__} in place: the model is itself a linear layer; "
            f"use einlinear.Linear.from_dense(model, family)"
        )
    return list(found.values())


def _rule(pattern: str, rule: object) -> Rule:
    found = family_of(rule) if isinstance(rule, str) else rule
    if not isinstance(found, Rule):
        raise StructureError(
            f"cannot follow the rule '{pattern}': {rule!r} is no family; pass one with its settings, such as "
            f"einlinear.BTT(rank=4) or 'btt(rank=4)', a Structure, or None to leave the layers as they are"
        )
    return found


def _choose(
    model: nn.Module, layers: list[_Layer], decisions: Iterable[tuple[str, Rule]]
) -> dict[_Layer, tuple[str, Rule]]:
    """For each layer that a pattern matches, in the model's order, the first such pattern and its rule."""
    deciding: dict[_Layer, tuple[str, Rule]] = {}
    for pattern, rule in decisions:
        matched = _matching(model, layers, pattern)
        if not matched:
            _reject(pattern, model, layers)
        if all(layer in deciding for layer in matched):
            raise ValueError(
                f"cannot follow the rule '{pattern}': every layer it matches is decided before, "
                f"'{matched[0].name}' by '{deciding[matched[0]][0]}'; put the more special rule first"
            )
        deciding = dict.fromkeys(matched, (pattern, rule)) | deciding
    return {layer: deciding[layer] for layer in layers if layer in deciding}


def _matching(model: nn.Module, layers: list[_Layer], pattern: str) -> list[_Layer]:
    if pattern != ALL_LINEAR:
        return [layer for layer in layers if any(_matches(name, pattern) for name in layer.names)]
    outputs = [getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules()]
    heads = {module for module in outputs if module is not None}
    named = {layer for layer in layers for name in layer.names if HEADS.intersection(name.split("."))}
    return [layer for layer in layers if layer.module not in heads and layer not in named]


def _matches(name: str, pattern: str) -> bool:
    # The dot in front lets "*.mlp.*" match an "mlp.0" at the top too.
    return fnmatchcase(f".{name}", f"*.{pattern}") or fnmatchcase(f".{name}", pattern)


def _reject(pattern: str, model: nn.Module, layers: list[_Layer]) -> NoReturn:
    """Refuses a pattern that matches nothing, and says what there would be to match."""
    if not layers:
        raise ValueError(f"cannot convert the {type(model).__name__}: it has no linear layers")
    # The blocks of a model differ by a number alone: "h.0.mlp.c_fc", "h.1.mlp.c_fc" ...
    known = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for layer in layers for name in layer.names))
    parts = {name.rsplit(".", depth)[-1] if depth else name for name in known for depth in (0, 1)}
    near = difflib.get_close_matches(pattern, sorted(parts), n=4)
    hint = f"near names are {', '.join(near)}" if near else f"its linear layers are {', '.join(known[:12])}"
    for name, module in model.named_modules():
        if name and _matches(name, pattern):
            hint = f"'{name}' is a {type(module).__name__}; {hint}"
            break
    raise ValueError(
        f"cannot follow the rule '{pattern}': it matches no linear layer of the {type(model).__name__}; {hint}"
    )


def _plan(
    model: nn.Module, chosen: Mapping[_Layer, tuple[str, Rule]], project: bool
) -> tuple[dict[_Layer, Structure], dict[_Layer, str]]:
    """The structure of each layer that can be converted, and the reason for each that cannot."""
    planned: dict[_Layer, Structure] = {}
    refused: dict[_Layer, str] = {}
    for layer, (_, family) in chosen.items():
        if family is None:
            continue
        if reason := _refusal(model, layer, project):
            refused[layer] = reason
            continue
        d_out, d_in = layer.linear.weight.shape
        try:
            planned[layer] = Linear(d_in, d_out, family, device="meta").structure
        except StructureError as error:
            refused[layer] = str(error)

    becomes = {layer.module: (structure, layer.kind) for layer, structure in planned.items()}
    holders: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append((name, module))
    for layer in list(planned):
        for name, other in holders[layer.weight]:
            if becomes.get(other) != becomes[layer.module]:
                refused[layer] = f"its weight is also that of '{name}' ({type(other).__name__}), not converted alike"
                planned.pop(layer, None)

    for layer, (pattern, family) in chosen.items():
        if family is None:
            refused[layer] = f"left as it is by the rule '{pattern}'"
        elif layer in refused and pattern != ALL_LINEAR and not set("*?[").intersection(pattern):
            raise StructureError(
                f"cannot convert '{layer.name}', which the rule '{pattern}' names: {refused[layer]}; "
                f"exclude it, or name it with a wildcard to have it skipped"
            )
    return planned, {layer: refused[layer] for layer in chosen if layer in refused}


def _refusal(model: nn.Module, layer: _Layer, project: bool) -> str | None:
    """Why a layer cannot be replaced, whatever the structure."""
    module = layer.module
    if isinstance(module, Linear):
        return "it is structured already"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    if type(module).forward is not layer.kind.forward or "forward" in vars(module):
        return f"{type(module).__name__} computes its output in a way of its own"
    weight = layer.weight
    if type(weight) is not nn.Parameter or not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain parameter of floating point"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks, which would be lost; remove them first and add them again afterwards"
    if project and weight.is_meta:
        return 'its weight is on the meta device, so there is nothing to project; load it, or pass weights="init"'
    if project and not torch.isfinite(weight).all():
        return "its weight has entries that are not finite"
    for name in layer.names:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.TransformerEncoderLayer):
            if torch.backends.mha.get_fastpath_enabled():
                return (
                    "torch.nn.TransformerEncoderLayer reads its weight where it takes its fast path; "
                    "turn that off first (torch.backends.mha.set_fastpath_enabled(False))"
                )
        elif _reads_weight(owner, attribute):
            return f"{type(owner).__name__}.forward reads its weight, which a structured layer does not have"
    return None


def _reads_weight(owner: nn.Module, attribute: str) -> bool:
    """Whether `owner.forward` has `self.<attribute>.weight` in it: MultiheadAttention's does, and T5's."""
    forward = inspect.unwrap(type(owner).forward)
    if not inspect.isfunction(forward):
        return False
    steps = [(step.opname, step.argval) for step in dis.get_instructions(forward)]
    return (("LOAD_ATTR", attribute), ("LOAD_ATTR", "weight")) in pairwise(steps)


def _structured(layer: _Layer, structure: Structure, made: dict[Tensor, Linear], project: bool) -> Linear:
    """The replacement of a layer; it shares the factors that were made for the same weight before."""
    old, weight = layer.linear, layer.weight
    first = made.get(weight)
    if project and first is None:
        new = Linear.from_dense(old, structure)
    else:
        bias = old.bias is not None
        new = Linear(structure.d_in, structure.d_out, structure, bias, device=weight.device, dtype=weight.dtype)
    if first is not None:
        new.factors = first.factors
    made.setdefault(weight, new)
    for factor in new.factors:
        factor.requires_grad_(weight.requires_grad)
    if new.bias is not None and project:
        new.bias = old.bias
    elif new.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new.train(layer.module.training)


def _row(layer: _Layer, family: str, new: Linear, project: bool) -> Row:
    structure, d_in, d_out = new.structure, new.in_features, new.out_features
    sizes = (d_in * d_out, parameters(structure), 2 * d_in * d_out, flops(structure))
    error = _relative_error(layer.linear.weight, new) if project else None
    return Row(layer.name, family, repr(structure), d_in, d_out, *sizes, error)


@torch.no_grad()
def _relative_error(weight: Tensor, new: Linear) -> float:
    """‖W − Ŵ‖ / ‖W‖ of the factors as they are stored, computed in float32 at least."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    approximation = dense(new.structure, [factor.to(exact.dtype) for factor in new.factors])
    return float((exact - approximation).norm() / exact.norm()) if exact.any() else 0.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
