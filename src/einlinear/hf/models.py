"""The structured counterpart of every model of transformers: made when asked for, saved with its own code.

A converted model changes its class, from `LlamaForCausalLM` to `EinlinearLlamaForCausalLM`, and its config
with it. Everything that writes checkpoints (`save_pretrained`, `Trainer`, `push_to_hub`) then writes ones
that say what they are: transformers without einlinear refuses them, or runs the code beside them if it is
trusted, and never fills them with random weights.
"""

import copy
import inspect
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from einlinear.hf import portable
from einlinear.hf.registration import PREFIX
from einlinear.layer import Linear
from einlinear.storage import KEY, VERSION, LayerSpec, align, aligned, layer_specs, made_layer

AUTO_CLASSES: dict[str, Any] = {
    name: value
    for name, value in vars(modeling_auto).items()
    if inspect.isclass(value)
    and issubclass(value, _BaseAutoModelClass)
    and getattr(value, "_model_mapping", None) is not None
}


class NativeModel(portable.StructuredModel):
    """As what is saved beside the weights, with einlinear's own layers."""

    layer_class: type[nn.Module] = Linear

    def __init__(self, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        _change(self, _parts(self))

    @classmethod
    def make_layer(cls, spec: LayerSpec, device: Any = None, dtype: torch.dtype | None = None) -> Linear:
        return made_layer(spec, device, dtype)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        loaded = super().from_pretrained(*args, **options)
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            parameter.data = aligned(parameter.data)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        setattr(self.config, KEY, described(self))  # type: ignore[attr-defined,arg-type]
        super().save_pretrained(save_directory, *args, **options)
        for file in Path(save_directory).glob("model*.safetensors"):
            align(file)

    def modeling_source(self) -> str:
        return modeling_source(type(self))


def described(model: nn.Module) -> dict[str, Any]:
    """What the config of a structured model holds under `einlinear`."""
    return {"version": VERSION, "layers": layer_specs(model)}


@cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class of the structured models of a type of transformers, such as "llama"; registers all its models.

    Raises:
        KeyError: for a type that transformers does not know.
    """
    base = CONFIG_MAPPING[model_type]
    structured_type = PREFIX + model_type
    counterparts = {name: found for name in AUTO_CLASSES if (found := _auto_model(name, base)) is not None}
    module = f"modeling_{structured_type.replace('-', '_')}"
    auto_map = {"AutoConfig": f"{module}.{_named(base)}"}
    auto_map |= {name: f"{module}.{_named(found)}" for name, found in counterparts.items()}
    made: Any = type(
        _named(base),
        (portable.StructuredConfig, base),
        {"__module__": __name__, "model_type": structured_type, "AUTO_MAP": auto_map, "GUARD": _guard(base)},
    )
    for name, found in counterparts.items():
        AUTO_CLASSES[name].register(made, model_class(found, made), exist_ok=True)
    return made  # type: ignore[no-any-return]


@cache
def model_class(base: Any, config: Any) -> type[PreTrainedModel]:
    """The structured counterpart of a model class."""
    return type(_named(base), (NativeModel, base), {"__module__": __name__, "config_class": config})


def adopt(model: nn.Module) -> None:
    """Gives every transformers model within `model` that has structured layers the class that saves and loads them.

    One whose structured layers are all gone gets its dense class back.
    """
    seen: list[PreTrainedModel] = []
    for root in model.modules():
        if not isinstance(root, PreTrainedModel) or any(root is part for part in seen):
            continue
        parts = _parts(root)
        seen += parts
        structured = any(isinstance(module, Linear) for module in root.modules())
        native = isinstance(root, NativeModel)
        if structured and not native:
            _change(root, parts)
        elif native and not structured:
            _change_back(root, parts)
        if structured:
            setattr(root.config, KEY, described(root))


def _parts(root: PreTrainedModel) -> list[PreTrainedModel]:
    """The models within a model that go by the same config: with its head, and without."""
    return [part for part in root.modules() if isinstance(part, PreTrainedModel) and part.config is root.config]


def _own_config(root: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's config in its place, wherever its modules keep it: others may go by the same object."""
    old, own = root.config, copy.deepcopy(root.config)
    for module in root.modules():
        if vars(module).get("config") is old:
            module.config = own
    return own


def _change(root: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    config: Any = type(root.config)
    if not issubclass(config, portable.StructuredConfig):
        config = _own_config(root).__class__ = config_class(root.config.model_type)
    for part in parts:
        if not isinstance(part, NativeModel):
            dense: Any = type(part)
            part.__class__ = model_class(dense, config)
            # What was renamed or merged when it was loaded is saved as it stands: the new type has no such rules.
            part._weight_conversions = None


def _change_back(root: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    _own_config(root).__class__ = _dense(type(root.config))
    delattr(root.config, KEY)
    for part in parts:
        part.__class__ = _dense(type(part))
    with torch.device("meta"):
        skeleton = type(root)(root.config)
    for name, module in skeleton.named_modules():
        if isinstance(module, Conv1D) and isinstance(linear := root.get_submodule(name), nn.Linear):
            module.weight = nn.Parameter(linear.weight.detach().mT.contiguous(), linear.weight.requires_grad)
            assert linear.bias is not None
            module.bias = linear.bias
            root.set_submodule(name, module.train(linear.training))


def modeling_source(model: type[PreTrainedModel]) -> str:
    """The code that loads a saved model without einlinear: `portable.py`, and a class for each auto class.

    Raises:
        ValueError: for a model whose dense class is not one of transformers.
    """
    config = model.config_class
    bases = {_dense(model), *(m for name in AUTO_CLASSES if (m := _auto_model(name, _dense(config))) is not None)}
    names = sorted(base.__name__ for base in bases)
    if foreign := [base for base in bases if not base.__module__.startswith("transformers.")]:
        raise ValueError(
            f"cannot save a {foreign[0].__name__} by itself: its code is in {foreign[0].__module__}, not in "
            f"transformers; save its tensors by einlinear.save"
        )
    dense = _dense(config).__name__
    lines = [
        inspect.getsource(portable),
        f"\nfrom transformers import {', '.join([dense, *names])}  # noqa: E402\n",
        f"\nclass {config.__name__}(StructuredConfig, {dense}):",
        f"    model_type = {config.model_type!r}",
        f"    AUTO_MAP = {json.dumps(config.AUTO_MAP, indent=8)}",
        f"    GUARD = {config.GUARD!r}\n",
    ]
    for name in names:
        lines += [f"\nclass {PREFIX.capitalize().rstrip('_')}{name}(StructuredModel, {name}):"]
        lines += [f"    config_class = {config.__name__}\n"]
    # Models with a head may make their body by AutoModel.
    lines += [
        f"\nAutoModel.register({config.__name__}, {config.AUTO_MAP['AutoModel'].partition('.')[2]}, exist_ok=True)\n"
    ]
    return "\n".join(lines)


def _guard(config: type[PreTrainedConfig]) -> str:
    """The first size of a type of models that `PreTrainedConfig` itself does not read, as `Trainer` has it do."""
    common = {field.name for field in fields(PreTrainedConfig)} | {"vocab_size", "num_hidden_layers"}
    return next((f.name for f in fields(config) if f.type in (int, "int") and f.name not in common), "")


def _named(base: type) -> str:
    return f"{PREFIX.capitalize().rstrip('_')}{base.__name__}"


def _dense(structured: type) -> Any:
    """The class that a class of ours is the counterpart of."""
    return structured.__bases__[1]


def _auto_model(auto: str, config: type[PreTrainedConfig]) -> Any:
    found = AUTO_CLASSES[auto]._model_mapping.get(config, None)
    return found[0] if isinstance(found, tuple) else found
