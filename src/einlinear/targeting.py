"""Which linear layers a model has, and which of them a pattern means."""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from einlinear.layer import Linear

ALL_LINEAR = "all-linear"
REGEX = "re:"
"""What a pattern starts with that is a regular expression; it must match the whole name."""
HEADS = frozenset({"classifier", "embed_out", "head", "lm_head", "readout", "score"})
"""Parts of a name that mark an output layer where the model does not tell (`get_output_embeddings`)."""


@dataclass(frozen=True, eq=False)
class LinearLayer:
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


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """The linear layers of a model in its order, structured ones among them.

    Raises:
        ValueError: for a model that is one itself.
    """
    found: dict[nn.Module, LinearLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for kind in linear_kinds():
            if isinstance(module, kind):
                found.setdefault(module, LinearLayer(module, [], kind)).names.append(name)
    if model in found:
        raise ValueError(
            f"cannot convert a {type(model).__name__} in place: the model is itself a linear layer; "
            f"use einlinear.Linear.from_dense(model, family)"
        )
    return list(found.values())


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """The classes of linear layers."""
    # A model that holds a Conv1D of transformers has had its module imported.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, Linear, *([] if transformers is None else [transformers.Conv1D]))


def loose_weights(model: nn.Module) -> dict[str, str]:
    """Weights that belong to no layer, each with the reason: stacks of them, as of experts, and attention's own.

    Their owner multiplies by them in a way of its own.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | nn.ParameterList | _ConvNd):
            continue
        kind = type(module).__name__
        for local, weight in module.named_parameters(recurse=False):
            at = f"{name}.{local}".lstrip(".")
            if isinstance(module, nn.MultiheadAttention) and local.endswith("proj_weight"):
                found[at] = f"{kind}.forward multiplies by it itself; it belongs to no layer that could be replaced"
            elif not is_lazy(weight) and weight.ndim == 3 and min(weight.shape) > 1:
                found[at] = (
                    f"it is a stack of {len(weight)} matrices that {kind}.forward multiplies by itself, and belongs "
                    f"to no layer that could be replaced"
                )
    return found


def peft_patterns(modules: str | Sequence[str]) -> list[str]:
    """`target_modules` or `exclude_modules` of PEFT as patterns: names, a regular expression, or "all-linear"."""
    if isinstance(modules, str):
        return [modules if modules == ALL_LINEAR else REGEX + modules]
    return list(modules)


def matching(model: nn.Module, layers: list[LinearLayer], pattern: str) -> list[LinearLayer]:
    """The layers that a pattern means.

    As in PEFT, a pattern matches the name it equals and every name it is a dotted suffix of, and
    `"all-linear"` means every linear layer but output layers and classification heads. `*`, `?` and
    `[...]` mean what they do in a shell, and `*` matches dots too. What follows `"re:"` is a
    regular expression that matches the whole name.
    """
    if pattern != ALL_LINEAR:
        return [layer for layer in layers if any(matches(name, pattern) for name in layer.names)]
    outputs = [getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules()]
    heads = {module for module in outputs if module is not None}
    named = {layer for layer in layers for name in layer.names if HEADS.intersection(name.split("."))}
    return [layer for layer in layers if layer.module not in heads and layer not in named]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern other than "all-linear" matches a name."""
    if pattern.startswith(REGEX):
        try:
            return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
        except re.error as error:
            raise ValueError(f"cannot read the regular expression '{pattern.removeprefix(REGEX)}': {error}") from None
    # The dot in front lets "*.mlp.*" match an "mlp.0" at the top too.
    return fnmatchcase(f".{name}", f"*.{pattern}") or fnmatchcase(f".{name}", pattern)


def reject(pattern: str, model: nn.Module, layers: list[LinearLayer]) -> NoReturn:
    """Refuses a pattern that matches nothing, and says what there would be to match."""
    if not layers:
        raise ValueError(f"cannot convert the {type(model).__name__}: it has no linear layers")
    # The blocks of a model differ by a number alone: "h.0.mlp.c_fc", "h.1.mlp.c_fc" ...
    known = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for layer in layers for name in layer.names))
    parts = {name.rsplit(".", depth)[-1] if depth else name for name in known for depth in (0, 1)}
    near = difflib.get_close_matches(pattern, sorted(parts), n=4)
    hint = f"near names are {', '.join(near)}" if near else f"its linear layers are {', '.join(known[:12])}"
    for name, why in loose_weights(model).items():
        if matches(name, pattern):
            raise ValueError(f"cannot convert '{name}' of the {type(model).__name__}: {why}")
    for name, module in model.named_modules():
        if name and matches(name, pattern):
            hint = f"'{name}' is a {type(module).__name__}; {hint}"
            break
    raise ValueError(
        f"cannot follow the rule '{pattern}': it matches no linear layer of the {type(model).__name__}; {hint}"
    )
