"""Swaps the linear layers of a model for structured ones, chosen by name."""

import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from einlinear.contract import Factors, dense
from einlinear.cost import flops, parameters
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.fast_path import leave_fast_path
from einlinear.layer import Linear
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import project
from einlinear.projection.refinement import projectable
from einlinear.structure import Structure, StructureError
from einlinear.structures import Dense, Mixture
from einlinear.targeting import (
    ALL_LINEAR,
    REGEX,
    LinearLayer,
    linear_layers,
    loose_weights,
    matching,
    peft_patterns,
    reject,
)

Rule = Family | Structure | None
Rules = Mapping[str, Family | Structure | str | None] | Family | Structure | str
Nearest = Callable[[str, Tensor, Structure], Factors]
"""Called with the name of a layer, its weight and a structure, gives the factors to put in its place."""


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
    rules: Rules,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    weights: Literal["project", "init", "reverse"] = "project",
    moments: Mapping[str, Tensor | Moments] | None = None,
    nearest: Nearest | None = None,
    progress: bool = False,
    experts: int | None = None,
    active: int | None = None,
) -> Report:
    """Replaces linear layers of `model` by structured ones, in place.

    Each rule maps a pattern to a family, its short text (`"btt(rank=4)"`), a `Structure`, or None,
    which leaves what it matches as it is. The first rule that matches a layer decides. As in PEFT, a
    pattern matches the name it equals and every name it is a dotted suffix of, and `"all-linear"`
    means every linear layer but output layers and classification heads; `*`, `?` and `[...]` mean
    what they do in a shell, and `*` matches dots too; after `"re:"` stands a regular expression
    that must match the whole name. One family alone, in place of rules, becomes of `target_modules`.

    Layers are `torch.nn.Linear` and the `Conv1D` of transformers' GPT-2. One that cannot be converted
    is skipped, with its reason in the report, unless a pattern without wildcards names it: then it
    is an error. Whatever the error, the model is left as it was. A `torch.nn.TransformerEncoderLayer` that gets
    structured layers no longer takes its fast path, which multiplies by dense weights itself.

    Device, dtype, training mode and `requires_grad` are kept. Layers that share a weight go on sharing
    it where all of them are converted alike, and are not converted otherwise. Make the optimizer
    afterwards: the parameters are new ones. A model of transformers changes its class too (from
    `LlamaForCausalLM` to its subclass `EinlinearLlamaForCausalLM`): what `save_pretrained` then writes
    is loaded by `AutoModelForCausalLM.from_pretrained` wherever einlinear is imported or the code beside
    the weights is trusted, and by nothing else.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = convert(model, {"0": "btt(rank=2)", "*": None})
        >>> report.rows[0].ratio
        0.375
        >>> convert(model, "dense", weights="reverse").rows[0].structure
        'dense'

    Args:
        model: any module.
        rules: what becomes of which layers; or what becomes of all `target_modules`.
        target_modules: as in PEFT, where `rules` is one family: a list of names, suffixes or patterns; or a text,
            which is `"all-linear"` (what None means) or a regular expression that matches the whole name.
        exclude_modules: as in PEFT: layers to leave as they are, before any rule; a list, or a regular expression.
        weights: "project" for the factors nearest to each weight (`einlinear.project`), the bias kept;
            "init" for newly drawn ones (`einlinear.spectral`) and a zero bias, to train from scratch;
            "reverse" to multiply structured layers back to `torch.nn.Linear` (`Conv1D` in a GPT-2), where the
            rules' family is "dense": train structured, finish dense. None as `target_modules` then means all.
        moments: second moments of layers' inputs by the layers' names: projection then minimises the error of the
            outputs (`einlinear.project`).
        nearest: finds the factors in place of `einlinear.project`, called with a layer's name, weight and structure.
        progress: whether to show a progress bar with the time left.
        experts: how many maps of its family each layer gets, with a router of its own (docs/experts.md); projected,
            each is the nearest to the weight, and the model computes what it does without experts.
        active: how many of them each token passes through.

    Returns:
        A `Report`; `print` it.

    Raises:
        ValueError: for a pattern that matches no linear layer, or none that is still undecided.
        StructureError: for a rule that is no family, or a layer named without wildcards that cannot
            be converted.
    """
    if weights not in ("project", "init", "reverse"):
        raise ValueError(f"cannot convert a model with weights={weights!r}: pass 'project', 'init' or 'reverse'")
    if (experts is None) != (active is None) or (experts and weights == "reverse"):
        raise ValueError(
            f"cannot convert a model with {experts=}, {active=} and weights={weights!r}: pass both or neither"
        )
    if experts is not None and active is not None:
        rules = _with_experts(rules, experts, active)
    chosen, planned, refused = choose(model, rules, target_modules, exclude_modules, weights)
    unknown = {*(moments or {})} - {name for layer in linear_layers(model) for name in layer.names}
    if unknown:
        raise ValueError(f"cannot weigh by the moments of '{min(unknown)}': the model has no linear layer of that name")

    def by_moments(name: str, weight: Tensor, structure: Structure) -> Factors:
        return project(weight, structure, (moments or {}).get(name))

    # Everything is made before anything is swapped, so that no error leaves the model half converted.
    size_before = _size(model)
    made: dict[Tensor, nn.Module] = {}
    rows: list[Row] = []
    swaps: list[tuple[str, nn.Module]] = []
    work: Iterable[tuple[LinearLayer, Structure]] = planned.items()
    if progress:
        from rich.progress import track

        work = track(work, description="Converting", total=len(planned))
    for layer, structure in work:
        if isinstance(layer.module, Linear):
            new: nn.Module = _dense_again(layer.module, made)
            rows.append(_reversed_row(layer))
        else:
            finder = None if weights == "init" else nearest or by_moments
            new = structured(layer, structure, made, finder)
            rows.append(_row(layer, str(chosen[layer][1]), new, finder is not None))
        swaps += [(name, new) for name in layer.names]
    for name, new in swaps:
        model.set_submodule(name, new)
    leave_fast_path(model)
    if "transformers.modeling_utils" in sys.modules:  # else the model can be none of theirs
        from einlinear.hf.models import adopt

        adopt(model)
    skipped = {layer.name: reason for layer, reason in refused.items()}
    if weights != "reverse" and any(_wild(pattern) for pattern, _ in chosen.values()):
        skipped |= loose_weights(model)
    return Report(tuple(rows), skipped, size_before, _size(model))


def choose(
    model: nn.Module,
    rules: Rules,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    weights: str = "project",
) -> tuple[dict[LinearLayer, tuple[str, Rule]], dict[LinearLayer, Structure], dict[LinearLayer, str]]:
    """What `convert` would do, its arguments and errors: the pattern and rule that decide each layer, the structure of
    each that can be converted, and the reason for each that cannot."""
    if not isinstance(rules, Mapping):
        everything = ["*"] if weights == "reverse" else [ALL_LINEAR]
        rules = dict.fromkeys(everything if target_modules is None else peft_patterns(target_modules), rules)
    elif target_modules is not None:
        raise ValueError("cannot follow rules and target_modules at once: pass one family with target_modules")
    layers = linear_layers(model)
    left: Mapping[str, None] = dict.fromkeys(peft_patterns(exclude_modules))
    decisions = [*left.items(), *((pattern, _rule(pattern, rule)) for pattern, rule in rules.items())]
    if weights == "reverse" and any(not isinstance(rule, Dense | None) for _, rule in decisions):
        raise StructureError("cannot reverse to a structure: with weights='reverse' every rule is 'dense' or None")
    chosen = _choose(model, layers, decisions)
    return chosen, *_plan(model, chosen, weights)


def _with_experts(rules: Rules, experts: int, active: int) -> Rules:
    """The same rules for mixtures of their families."""

    def mixture(rule: Family | Structure | str | None) -> Family | Structure | None:
        if isinstance(rule, Structure):
            return rule.mixture(experts, active=active)
        return None if rule is None else Mixture(str(rule), experts, active)

    if isinstance(rules, Mapping):
        return {pattern: mixture(rule) for pattern, rule in rules.items()}
    mixed = mixture(rules)
    assert mixed is not None
    return mixed


def _rule(pattern: str, rule: object) -> Rule:
    found = family_of(rule) if isinstance(rule, str) else rule
    if not isinstance(found, Rule):
        raise StructureError(
            f"cannot follow the rule '{pattern}': {rule!r} is no family; pass one with its settings, such as "
            f"einlinear.BTT(rank=4) or 'btt(rank=4)', a Structure, or None to leave the layers as they are"
        )
    return found


def _choose(
    model: nn.Module, layers: list[LinearLayer], decisions: Iterable[tuple[str, Rule]]
) -> dict[LinearLayer, tuple[str, Rule]]:
    """For each layer that a pattern matches, in the model's order, the first such pattern and its rule."""
    deciding: dict[LinearLayer, tuple[str, Rule]] = {}
    for pattern, rule in decisions:
        matched = matching(model, layers, pattern)
        if not matched:
            reject(pattern, model, layers)
        if all(layer in deciding for layer in matched):
            raise ValueError(
                f"cannot follow the rule '{pattern}': every layer it matches is decided before, "
                f"'{matched[0].name}' by '{deciding[matched[0]][0]}'; put the more special rule first"
            )
        deciding = dict.fromkeys(matched, (pattern, rule)) | deciding
    return {layer: deciding[layer] for layer in layers if layer in deciding}


def _plan(
    model: nn.Module, chosen: Mapping[LinearLayer, tuple[str, Rule]], weights: str
) -> tuple[dict[LinearLayer, Structure], dict[LinearLayer, str]]:
    """The structure of each layer that can be converted, and the reason for each that cannot."""
    planned: dict[LinearLayer, Structure] = {}
    refused: dict[LinearLayer, str] = {}
    for layer, (_, family) in chosen.items():
        if family is None:
            continue
        if weights == "reverse":
            if isinstance(layer.module, Linear) and layer.module.structure.routed:
                refused[layer] = "with experts it is another map for each token"
            elif isinstance(layer.module, Linear):
                planned[layer] = layer.module.structure
            else:
                refused[layer] = "it is dense already"
            continue
        if reason := _refusal(model, layer, weights == "project"):
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
        for name, other in holders[layer.weight] if weights != "reverse" else ():
            if becomes.get(other) != becomes[layer.module]:
                refused[layer] = f"its weight is also that of '{name}' ({type(other).__name__}), not converted alike"
                planned.pop(layer, None)

    for layer, (pattern, family) in chosen.items():
        if family is None:
            refused[layer] = f"left as it is by the rule '{pattern}'"
        elif layer in refused and not _wild(pattern):
            raise StructureError(
                f"cannot convert '{layer.name}', which the rule '{pattern}' names: {refused[layer]}; "
                f"exclude it, or name it with a wildcard to have it skipped"
            )
    return planned, {layer: refused[layer] for layer in chosen if layer in refused}


def _refusal(model: nn.Module, layer: LinearLayer, project: bool) -> str | None:
    """Why a layer cannot be replaced, whatever the structure."""
    module = layer.module
    if isinstance(module, Linear):
        return "it is structured already"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    if type(module).forward is not layer.kind.forward or "forward" in vars(module):
        return f"{type(module).__name__} computes its output in a way of its own"
    weight = layer.weight
    if is_lazy(weight):
        return "its weight is not there yet; call the model once first"
    if type(weight) is not nn.Parameter or not projectable(weight):
        return (
            f"its weight is a {type(weight).__name__} of {weight.dtype} ({weight.layout}), not a plain parameter of "
            f"floating point"
        )
    if weight._backward_hooks or any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks, which would be lost; remove them first and add them again afterwards"
    if project and weight.is_meta:
        return 'its weight is on the meta device, so there is nothing to project; load it, or pass weights="init"'
    if project and not torch.isfinite(weight).all():
        return "its weight has entries that are not finite"
    for name in layer.names:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        # The encoder layer of torch reads weights on its fast path alone, which it leaves (`leave_fast_path`).
        if not isinstance(owner, nn.TransformerEncoderLayer) and _reads_weight(owner, attribute):
            return f"{type(owner).__name__}.forward reads its weight, which a structured layer does not have"
    return None


def _reads_weight(owner: nn.Module, attribute: str) -> bool:
    """Whether `owner.forward` has `self.<attribute>.weight` in it: MultiheadAttention's does, and T5's."""
    forward = inspect.unwrap(type(owner).forward)
    if not inspect.isfunction(forward):
        return False
    steps = [(step.opname, step.argval) for step in dis.get_instructions(forward)]
    return (("LOAD_ATTR", attribute), ("LOAD_ATTR", "weight")) in pairwise(steps)


def _wild(pattern: str) -> bool:
    """Whether a pattern means whatever it finds, and not a layer by its name."""
    return pattern == ALL_LINEAR or pattern.startswith(REGEX) or bool(set("*?[").intersection(pattern))


def structured(
    layer: LinearLayer, structure: Structure, made: dict[Tensor, nn.Module], nearest: Nearest | None
) -> Linear:
    """The replacement of a layer; it shares the factors that were made for the same weight before."""
    old, weight = layer.linear, layer.weight
    first = made.get(weight)
    bias = old.bias is not None
    new = Linear(structure.d_in, structure.d_out, structure, bias, device=weight.device, dtype=weight.dtype)
    if isinstance(first, Linear):
        new.factors = first.factors
    elif nearest is not None:
        with torch.no_grad():
            one = new.structure.expert  # what every expert starts as
            for factor, value in zip(new.factors, nearest(layer.name, old.weight, one), strict=True):
                factor.view(-1, *value.shape).copy_(value)
    made.setdefault(weight, new)
    for factor in new.factors:
        factor.requires_grad_(weight.requires_grad)
    if new.bias is not None and nearest is not None:
        new.bias = old.bias
    elif new.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new.train(layer.module.training)


def _dense_again(old: Linear, made: dict[Tensor, nn.Module]) -> nn.Linear:
    """The dense layer that computes the same; those that shared their factors share its weight."""
    new = old.to_dense()
    first = made.setdefault(old.factors[0], new)
    assert isinstance(first, nn.Linear)
    new.weight = first.weight.requires_grad_(old.factors[0].requires_grad)
    if old.bias is not None:
        new.bias = old.bias
    return new.train(old.training)


def _row(layer: LinearLayer, family: str, new: Linear, project: bool) -> Row:
    structure, d_in, d_out = new.structure, new.in_features, new.out_features
    routing = 0 if new.router is None else new.router.weight.numel()
    sizes = (d_in * d_out, parameters(structure) + routing, 2 * d_in * d_out, flops(structure) + 2 * routing)
    error = _relative_error(layer.linear.weight, new) if project else None
    return Row(layer.name, family, repr(structure), d_in, d_out, *sizes, error)


def _reversed_row(layer: LinearLayer) -> Row:
    old = layer.module
    assert isinstance(old, Linear)
    d_in, d_out = old.in_features, old.out_features
    sizes = (parameters(old.structure), d_in * d_out, flops(old.structure), 2 * d_in * d_out)
    return Row(layer.name, "dense", "dense", d_in, d_out, *sizes, None)


@torch.no_grad()
def _relative_error(weight: Tensor, new: Linear) -> float:
    """‖W − Ŵ‖ / ‖W‖ of the factors as they are stored, computed in float32 at least."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    one = new.structure.expert  # of experts the first: they start alike
    first = [factor[: shape[0]] for factor, shape in zip(new.factors, one.matrix_shapes, strict=True)]
    approximation = dense(one, [factor.to(exact.dtype) for factor in first])
    return float((exact - approximation).norm() / exact.norm()) if exact.any() else 0.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
