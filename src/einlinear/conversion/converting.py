"""Puts the new layers into a model."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from einlinear.contract import Factors
from einlinear.conversion.report import Report, Row, converted, reversed_row
from einlinear.conversion.rules import Rules, choose, wild, with_experts
from einlinear.fast_path import leave_fast_path
from einlinear.layer import Linear, alone
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import project
from einlinear.structure import Structure
from einlinear.targeting import (
    LinearLayer,
    linear_layers,
    loose_weights,
)

Nearest = Callable[[str, Tensor, Structure], Factors]
"""Called with the name of a layer, its weight and a structure, gives the factors to put in its place."""


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
        rules = with_experts(rules, experts, active)
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
            rows.append(reversed_row(layer))
        else:
            finder = None if weights == "init" else nearest or by_moments
            new = structured(layer, structure, made, finder)
            rows.append(converted(layer, str(chosen[layer][1]), new, finder is not None))
        swaps += [(name, new) for name in layer.names]
    for name, new in swaps:
        model.set_submodule(name, new)
    leave_fast_path(model)
    if "transformers.modeling_utils" in sys.modules:  # else the model can be none of theirs
        from einlinear.hf.models import adopt

        adopt(model)
    skipped = {layer.name: reason for layer, reason in refused.items()}
    if weights != "reverse" and any(wild(pattern) for pattern, _ in chosen.values()):
        skipped |= loose_weights(model)
    return Report(tuple(rows), skipped, size_before, _size(model))


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
            one = alone(new.structure)  # what every expert starts as
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


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
