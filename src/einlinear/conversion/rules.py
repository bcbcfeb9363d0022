"""What becomes of which layer: the rules that a user gives, held against a model."""

import dis
import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.layer import Linear, alone
from einlinear.projection.refinement import projectable
from einlinear.structure import Structure, StructureError
from einlinear.structures import Dense, Mixture
from einlinear.targeting import (
    ALL_LINEAR,
    REGEX,
    LinearLayer,
    linear_layers,
    matching,
    peft_patterns,
    reject,
)

Rule = Family | Structure | None
Rules = Mapping[str, Family | Structure | str | None] | Family | Structure | str


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


def with_experts(rules: Rules, experts: int, active: int) -> Rules:
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
            structure = Linear(d_in, d_out, family, device="meta").structure
            if weights == "project":
                alone(structure)
            planned[layer] = structure
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
        elif layer in refused and not wild(pattern):
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


def wild(pattern: str) -> bool:
    """Whether a pattern means whatever it finds, and not a layer by its name."""
    return pattern == ALL_LINEAR or pattern.startswith(REGEX) or bool(set("*?[").intersection(pattern))
