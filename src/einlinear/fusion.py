"""`fuse_mlps`: finds the MLPs of a model and puts `StructuredMLP` in their place."""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from einlinear.family import Family
from einlinear.layer import Linear
from einlinear.mlp import StructuredMLP
from einlinear.structure import StructureError

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""How models call the layers of a gated MLP, gate first: Llama and most of transformers; Meta's Llama."""

PLAIN = (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
"""How they call those of a plain one."""

ACTIVATIONS: Mapping[str, str] = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
    "Identity": "identity",
}
"""The activations that a fused MLP knows, by the class that computes them."""


@dataclass(frozen=True)
class Fusion:
    """What was done with one MLP: `why` it stayed, or None where it was replaced."""

    name: str
    activation: str
    why: str | None = None

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.activation}, {self.why or 'one StructuredMLP'}"


@dataclass(frozen=True)
class _Found:
    """An MLP of a model; in a `Sequential`, its three members from `start` on."""

    name: str
    module: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str
    gate: nn.Module | None = None
    start: int | None = None


def fuse_mlps(model: nn.Module, family: Family | str | None = None, only: str = "*") -> list[Fusion]:
    """Replaces, in place, the MLPs of `model` by `StructuredMLP`, which run as one where their blocks nest.

    Found are `nn.Sequential`s with Linear, activation, Linear in a row, and modules that call their
    layers as models do (`NAMES`, `PLAIN`), among them the gated MLP of Hugging Face's Llama.

    Args:
        model: with dense layers, or already converted (`einlinear.convert`).
        family: for layers that are still dense: they are projected (`Linear.from_dense`). None leaves
            MLPs of dense layers as they are.
        only: a pattern that names of MLPs must match, as in "model.layers.*.mlp".

    Returns:
        What became of every MLP found, in the model's order, with the reason where one stayed as it was: a
        dropout between its layers, an activation that is not known, dense layers and no family.
        A replacement that runs layer by layer says why in its `unfused`.
    """
    report: list[Fusion] = []
    for found in list(_mlps(model)):
        if not fnmatch.fnmatchcase(found.name, only):
            continue
        why = _refusal(found, family)
        if why is None:
            try:
                _replace(model, found, family)
            except StructureError as error:
                why = str(error)
        report.append(Fusion(found.name, found.activation, why))
    return report


def _mlps(model: nn.Module) -> Iterator[_Found]:
    for name, module in model.named_modules():
        if isinstance(module, StructuredMLP):
            continue
        if isinstance(module, nn.Sequential):
            yield from _in_sequential(name, module)
        elif found := _by_names(name, module):
            yield found


def _in_sequential(name: str, module: nn.Sequential) -> Iterator[_Found]:
    members, start = list(module), 0
    while start + 2 < len(members):
        up, act, down = members[start : start + 3]
        if _is_layer(up) and _is_layer(down) and not _is_layer(act):
            yield _Found(name, module, up, down, _activation(act), start=start)
            start += 3
        else:
            start += 1


def _by_names(path: str, module: nn.Module) -> _Found | None:
    act = next(
        (getattr(module, a) for a in ("act_fn", "activation_fn", "act", "activation") if hasattr(module, a)), None
    )
    for gate, up, down in NAMES:
        if all(_is_layer(getattr(module, part, None)) for part in (gate, up, down)):
            kind = "silu" if act is None else _activation(act)  # Meta's Llama calls F.silu
            return _Found(path, module, getattr(module, up), getattr(module, down), kind, getattr(module, gate))
    for up, down in PLAIN:
        if all(_is_layer(getattr(module, part, None)) for part in (up, down)) and act is not None:
            return _Found(path, module, getattr(module, up), getattr(module, down), _activation(act))
    return None


def _is_layer(module: object) -> bool:
    return isinstance(module, nn.Linear | Linear)


def _activation(act: object) -> str:
    """Its name in `ACTIVATIONS`, or the class that is not among them."""
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_tanh"
    kind = getattr(act, "__name__", type(act).__name__)
    return ACTIVATIONS.get(kind, {"silu": "silu", "gelu": "gelu", "relu": "relu"}.get(kind, kind))


def _refusal(found: _Found, family: Family | str | None) -> str | None:
    layers = [layer for layer in (found.gate, found.up, found.down) if layer is not None]
    if found.activation not in ACTIVATIONS.values():
        return f"its activation {found.activation} is none of {', '.join(sorted({*ACTIVATIONS.values()}))}"
    for name, module in found.module.named_modules():
        if found.start is None and isinstance(module, nn.Dropout) and module.p > 0:
            return f"it has a dropout '{name}' of {module.p}, which would be lost"
    if found.start is None and (hooked := next((m for m in (found.module, *layers) if _hooked(m)), None)):
        return f"its {type(hooked).__name__} has hooks, which would be lost"
    if family is None and any(isinstance(layer, nn.Linear) for layer in layers):
        return "its layers are dense; name a family, or convert them first"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _replace(model: nn.Module, found: _Found, family: Family | str | None) -> None:
    def structured(layer: nn.Module) -> Linear:
        if isinstance(layer, nn.Linear):
            assert family is not None
            return Linear.from_dense(layer, family)
        assert isinstance(layer, Linear)
        return layer

    gate = None if found.gate is None else structured(found.gate)
    mlp = StructuredMLP.of(structured(found.up), structured(found.down), found.activation, gate)
    mlp.train(found.module.training)
    if found.start is None:
        if not found.name:
            raise StructureError("it is the whole model, which cannot be replaced inside itself; use StructuredMLP.of")
        parent, _, child = found.name.rpartition(".")
        setattr(model.get_submodule(parent), child, mlp)
        return
    # In a Sequential the MLP takes the first place; what followed keeps its name, so that state dicts still fit.
    assert isinstance(found.module, nn.Sequential)
    names = list(found.module._modules)[found.start : found.start + 3]
    found.module._modules[names[0]] = mlp
    for name in names[1:]:
        found.module._modules[name] = nn.Identity()
