"""`fuse_mlps`: finds the MLPs of a model by what they compute, and puts `StructuredMLP` in their place."""

import copy
import fnmatch
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from einlinear.conversion.converting import convert
from einlinear.conversion.rules import choose
from einlinear.family import Family
from einlinear.family import structure as family_of
from einlinear.kernels.junction import ACTIVATIONS
from einlinear.layer import Linear
from einlinear.mlp import StructuredMLP
from einlinear.structure import StructureError
from einlinear.targeting import REGEX, linear_kinds

TOLERANCE = 2e-5
"""Relative to the norm, in float32: GELU and its tanh form differ by more, two ways to write one of them by less."""


@dataclass(frozen=True)
class Fusion:
    """What was done with one MLP: `why` it stayed, or None where it was replaced."""

    name: str
    activation: str
    why: str | None = None

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.activation}, {self.why or 'one StructuredMLP'}"


@dataclass(frozen=True)
class _Suspect:
    """What may be an MLP: a module of a model under all its names, or members of a `Sequential` in a row."""

    names: list[str]
    module: nn.Module
    layers: dict[str, nn.Module]
    """The linear layers in it, by their names in it."""
    row: tuple[str, ...] = ()
    """The names of those members in the `Sequential` that `names` are of."""

    def path(self, layer: str) -> str:
        """The name of a layer in the model."""
        return f"{self.names[0]}.{layer}".lstrip(".")


@dataclass(frozen=True)
class _Form:
    """What an MLP is made of: names of its layers, and of the activation between."""

    up: str
    down: str
    gate: str | None
    activation: str


def fuse_mlps(model: nn.Module, family: Family | str | None = None, only: str = "*") -> list[Fusion]:
    """Replaces, in place, the MLPs of `model` by `StructuredMLP`, which run as one where their blocks nest.

    An MLP is what computes `down(activation(up(x)))` or `down(activation(gate(x)) * up(x))`, whatever its class and
    its layers are called: every module of two or three linear layers, and every row Linear, activation, Linear in a
    `nn.Sequential`, is tried, as a copy with random weights on a few random vectors.

    Layers keep their names, so that checkpoints fit as before (in a `Sequential` alone they move into its first one).

    Args:
        model: with dense layers, or already converted (`einlinear.convert`).
        family: for layers that are still dense: they are projected, as by `einlinear.convert`. None leaves
            MLPs of dense layers as they are.
        only: a pattern that names of MLPs must match, as in "model.layers.*.mlp".

    Returns:
        What became of every MLP found, and of what looks like one, in the model's order, with the reason where it
        stayed as it was: a dropout between its layers, hooks, an activation that is not known, a layer that
        `einlinear.convert` refuses, dense layers and no family.
        A replacement that runs layer by layer says why in its `unfused`.

    Raises:
        StructureError: for a family that is none.
    """
    family = family_of(family) if isinstance(family, str) else family
    if not isinstance(family, Family | None):
        raise StructureError(f"cannot fuse MLPs to {family!r}: it is no family; pass one, as in einlinear.BTT(rank=4)")
    report: list[Fusion] = []
    for suspect in list(_suspects(model)):
        if not any(fnmatch.fnmatchcase(name, only) for name in suspect.names):
            continue
        form, kind = _form_of(suspect), _activation(suspect.module)
        if isinstance(form, _Form):
            why = _refusal(model, suspect, family)
            if why is None:
                _replace(model, suspect, form, family)
            report.append(Fusion(suspect.names[0], form.activation, why))
        elif kind is not None:
            report.append(Fusion(suspect.names[0], kind, form))
    return report


def _suspects(model: nn.Module) -> Iterator[_Suspect]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, called in names.items():
        if type(module).forward is nn.Sequential.forward:
            yield from _rows(called, module)
        elif not isinstance(module, StructuredMLP):
            layers = _layers(module)
            if 2 <= len(layers) <= 3:
                yield _Suspect(called, module, layers)


def _rows(names: list[str], module: nn.Module) -> Iterator[_Suspect]:
    """From each linear layer to the next one, if all between has no parameters."""
    members, start = list(module._modules), 0
    while start < len(members):
        stop = start + 1
        while stop < len(members) and _plain(module._modules[members[stop]]):
            stop += 1
        row = tuple(members[start : stop + 1])
        run = nn.Sequential(OrderedDict((name, module.get_submodule(name)) for name in row))
        if len(row) > 2 and len(layers := _layers(run)) == 2:
            yield _Suspect(names, run, layers, row)
            stop += 1
        start = stop


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if isinstance(child, linear_kinds())}


def _plain(module: nn.Module | None) -> bool:
    """Whether it has nothing to learn or to remember, as an activation."""
    return module is not None and not [*module.parameters(), *module.buffers()]


def _activation(module: nn.Module) -> str | None:
    """The name of what looks like an activation in it."""
    for child in module.children():
        if _plain(child) and not isinstance(child, _DropoutNd | nn.Identity | nn.Sequential):
            return type(child).__name__
    functions = (value for value in vars(module).values() if inspect.isroutine(value))
    return next((getattr(function, "__name__", None) for function in functions), None)


def _form_of(suspect: _Suspect) -> _Form | str:
    """What MLP it is, or why it is none."""
    module, layers = suspect.module, suspect.layers
    others = [name for name, child in module.named_children() if name not in layers and not _plain(child)]
    if others := others + [name for name, _ in module.named_parameters(recurse=False)]:
        return f"it holds more than an MLP: {', '.join(others)}"
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    if len(taken) != 1 or taken[0].kind == taken[0].VAR_POSITIONAL:
        return "its forward takes more than its input"
    try:
        twin = _twin(module)
    except Exception as error:  # classes of users may do whatever they like
        return f"it cannot be copied to be tried ({type(error).__name__}: {error})"
    return _tried(twin, tuple(layers))


def _twin(module: nn.Module) -> nn.Module:
    """A copy of it in training, without hooks and dropouts, with random weights in float32 on the CPU."""
    source = torch.Generator().manual_seed(0)
    drawn: dict[int, object] = {}
    for parameter in module.parameters():
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 1.0
        drawn[id(parameter)] = nn.Parameter(torch.randn(parameter.shape, generator=source) * scale)
    for buffer in module.buffers():
        drawn[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    twin = copy.deepcopy(module, drawn).train()
    for part in twin.modules():
        for hooks in (value for name, value in vars(part).items() if name.endswith("_hooks")):
            hooks.clear()
        if isinstance(part, _DropoutNd):
            part.p = 0.0
    return twin


@torch.no_grad()
def _tried(twin: nn.Module, names: Sequence[str]) -> _Form | str:
    """The form that computes what it does."""
    layers = {name: twin.get_submodule(name) for name in names}
    computed: dict[int, Tensor | str] = {}
    found: dict[_Form, float] = {}
    for up, down, *gate in permutations(names):
        (d_in, hidden), (d_hidden, _) = _widths(layers[up]), _widths(layers[down])
        if hidden != d_hidden or any(_widths(layers[name]) != (d_in, hidden) for name in gate):
            continue
        x = 2 * torch.randn(2, 3, d_in, generator=torch.Generator().manual_seed(1))
        wanted = computed[d_in] = computed[d_in] if d_in in computed else _computed(twin, x)
        if isinstance(wanted, str):
            continue
        for activation, apply in ACTIVATIONS.items():
            state = apply(layers[gate[0] if gate else up](x))
            made = layers[down](state * layers[up](x) if gate else state)
            if made.shape == wanted.shape:
                form = _Form(up, down, gate[0] if gate else None, activation)
                found[form] = float((made - wanted).norm() / made.norm())
    if found and min(found.values()) <= TOLERANCE:
        return min(found, key=lambda form: found[form])
    failures = [failure for failure in computed.values() if isinstance(failure, str)]
    if failures and len(failures) == len(computed):
        return f"it cannot be tried by itself ({failures[0]})"
    shape = "down(a(up(x)))" if len(names) == 2 else "down(a(gate(x)) * up(x))"
    return f"it does not compute {shape} with an activation a among {', '.join(ACTIVATIONS)}"


def _computed(twin: nn.Module, x: Tensor) -> Tensor | str:
    """What it makes of `x`, or why nothing: classes of users may do whatever they like."""
    try:
        with torch.random.fork_rng(devices=[]):
            made = twin(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return made if isinstance(made, Tensor) else f"it returns a {type(made).__name__}"


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Features of its input and output; Conv1D of transformers has other names for them."""
    names = ("nx", "nf") if hasattr(layer, "nx") else ("in_features", "out_features")
    d_in, d_out = (getattr(layer, name) for name in names)
    return d_in, d_out


def _refusal(model: nn.Module, suspect: _Suspect, family: Family | None) -> str | None:
    """Why an MLP stays as it is."""
    if not suspect.row and "" in suspect.names:
        return "it is the whole model, which cannot be replaced inside itself; use StructuredMLP.of"
    for name, module in suspect.module.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return f"it has a dropout '{name}' of {module.p}, which would be lost"
        if any(value for key, value in vars(module).items() if key.endswith("_hooks")):
            return f"its {type(module).__name__} has hooks, which would be lost"
        if "forward" in vars(module):
            return f"the forward of its {type(module).__name__} was replaced by another one, which would be lost"
    dense = [name for name, layer in suspect.layers.items() if not isinstance(layer, Linear)]
    for layer in suspect.layers.values():
        if isinstance(layer, Linear) and type(layer).forward is not Linear.forward:
            return f"its {type(layer).__name__} computes its output in a way of its own"
    if dense and family is None:
        return "its layers are dense; name a family, or convert them first"
    if dense and family is not None:
        _, _, refused = choose(model, {_pattern(suspect, dense): family})
        for refused_layer, reason in refused.items():
            return f"its layer '{refused_layer.name}': {reason}"
    return None


def _pattern(suspect: _Suspect, layers: Sequence[str]) -> str:
    """A rule of `convert` for these layers alone."""
    return REGEX + "|".join(re.escape(suspect.path(layer)) for layer in layers)


def _replace(model: nn.Module, suspect: _Suspect, form: _Form, family: Family | None) -> None:
    dense = [name for name, layer in suspect.layers.items() if not isinstance(layer, Linear)]
    if dense and family is not None:
        convert(model, {_pattern(suspect, dense): family})
    up, down = (model.get_submodule(suspect.path(name)) for name in (form.up, form.down))
    gate = None if form.gate is None else model.get_submodule(suspect.path(form.gate))
    names = None if suspect.row else {"up": form.up, "down": form.down, "gate": form.gate or ""}
    mlp = StructuredMLP.of(up, down, form.activation, gate, names=names)  # type: ignore[arg-type]
    mlp.train(suspect.module.training)
    if not suspect.row:
        for name in suspect.names:
            model.set_submodule(name, mlp)
        return
    # In a Sequential the MLP takes the first place; what followed keeps its name, so that state dicts still fit.
    holder = model.get_submodule(suspect.names[0])
    for name in suspect.row:
        holder._modules[name] = mlp if name == suspect.row[0] else nn.Identity()
