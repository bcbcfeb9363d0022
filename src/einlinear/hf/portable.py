"""What a saved model needs to load: structured linear layers in plain torch, and what transformers must know of them.

This file is copied into every checkpoint (`einlinear.hf.models.modeling_source`), so it imports torch,
safetensors and transformers alone. einlinear itself uses all of it but `StructuredLinear`, in whose place it puts
`einlinear.Linear`.
"""

import inspect
import json
import math
import string
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel  # noqa: F401 - for what is written after this

REFUSAL = "none (its layers are structured: load it by AutoModel..., with einlinear imported or trust_remote_code=True)"


class StructuredLinear(nn.Module):
    """y = x Wᵀ + b, where W is an einsum over `factors`, each stored as a `[slices, out, in]` stack of matrices."""

    def __init__(self, spec, device=None, dtype=None):
        super().__init__()
        if spec.get("routed"):
            raise ValueError(
                "cannot make a layer with experts in plain torch: its router is einlinear's; import einlinear, then "
                "load the model by AutoModel... as before"
            )
        inputs, *factors = (operand.split() for operand in spec["expression"].split("->")[0].split(","))
        outputs, sizes = spec["expression"].split("->")[1].split(), spec["sizes"]
        letter = dict(zip(sizes, string.ascii_letters, strict=False))
        self.in_features, self.out_features = spec["d_in"], spec["d_out"]
        self.pad = math.prod(sizes[axis] for axis in inputs) - self.in_features
        self.input_shape = [sizes[axis] for axis in inputs]
        self.steps, shapes, state = [], [], inputs
        for position, factor in enumerate(factors):
            later = {axis for axes in (*factors[position + 1 :], outputs) for axis in axes}
            result = [axis for axis in dict.fromkeys((*state, *factor)) if axis in later]
            result = outputs if position == len(factors) - 1 else result
            named = ["".join(letter[axis] for axis in axes) for axes in (state, factor, result)]
            self.steps.append((f"...{named[0]},{named[1]}->...{named[2]}", [sizes[axis] for axis in factor]))
            kinds = [
                [
                    axis
                    for axis in factor
                    if (axis in state or axis not in later) and (axis in later or axis not in state)
                ],
                [axis for axis in factor if axis not in state and axis in later],
                [axis for axis in factor if axis in state and axis not in later],
            ]
            shapes.append([math.prod(sizes[axis] for axis in kind) for kind in kinds])
            state = result
        self.std = spec["std"]
        self.factors = nn.ParameterList(torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
        self.gains = nn.Parameter(torch.empty(len(shapes), device=device, dtype=dtype)) if spec["cap"] else None
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if spec["bias"] else None
        self.reset_parameters()

    def reset_parameters(self):
        for factor, std in zip(self.factors, self.std, strict=True):
            nn.init.normal_(factor, std=std)
        if self.gains is not None:
            nn.init.ones_(self.gains)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        state = nn.functional.pad(x, (0, self.pad)).reshape(*x.shape[:-1], *self.input_shape)
        for position, (equation, shape) in enumerate(self.steps):
            factor = self.factors[position]
            if self.gains is not None:  # a ceiling on the root mean square, and a learned gain
                square = factor.float().square().mean() + 1e-12 * self.std[position] ** 2
                excess = (square.sqrt() / self.std[position]).clamp(min=1.0)
                factor = factor * (self.gains[position] / excess).to(factor.dtype)
            state = torch.einsum(equation, state, factor.reshape(shape))
        y = state.reshape(*x.shape[:-1], -1)[..., : self.out_features]
        return y if self.bias is None else y + self.bias


class StructuredConfig:
    """What the config of a structured model adds to that of its dense one: `einlinear`, the layers' specs by name."""

    AUTO_MAP: ClassVar = {}
    GUARD: ClassVar = ""

    def to_dict(self):
        # transformers would write the auto class in use alone; vLLM asks for AutoModel.
        return {**super().to_dict(), "auto_map": dict(self.AUTO_MAP)}

    def to_json_string(self, *args, **options):
        # A dense class, asked for by its name, would read all that it knows of this and draw what it misses: one of
        # its sizes is kept with the specs, and a text in its place, so that it refuses.
        written = json.loads(super().to_json_string(*args, **options))
        if self.GUARD in written and "einlinear" in written:
            written["einlinear"] = {**written["einlinear"], "guarded": {self.GUARD: written[self.GUARD]}}
            written[self.GUARD] = REFUSAL
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict, **options):
        described = config_dict.get("einlinear")
        if isinstance(described, dict) and "guarded" in described:
            plain = {name: value for name, value in described.items() if name != "guarded"}
            config_dict = {**config_dict, **described["guarded"], "einlinear": plain}
        return super().from_dict(config_dict, **options)


class StructuredModel:
    """What a structured model adds to its dense one: its layers as they are made, saved and loaded."""

    layer_class: type[nn.Module] = StructuredLinear

    @classmethod
    def make_layer(cls, spec, device=None, dtype=None):
        return StructuredLinear(spec, device, dtype)

    def __init__(self, config, *args, **options):
        super().__init__(config, *args, **options)
        described = getattr(config, "einlinear", None)
        if not isinstance(described, dict) or described.get("version") != 1 or not described.get("layers"):
            raise ValueError(
                f"cannot make a {type(self).__name__}: its config says nothing of its layers under 'einlinear' "
                f"that this version can read; save the model again by model.save_pretrained"
            )
        modules, made = dict(self.named_modules(remove_duplicate=False)), {}
        for name, spec in described["layers"].items():
            # A layer goes by the name it had in the model that was saved, with a head or without one.
            prefix = f"{self.base_model_prefix}."
            found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
            if found is None or isinstance(modules[found], self.layer_class):  # of another head, or done by the base
                continue
            old = modules[found]
            if old not in made:
                like = next(old.parameters())
                made[old] = self.make_layer(spec, like.device, like.dtype)
            self.set_submodule(found, made[old])

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info=False, ignore_mismatched_sizes=False, **options):
        """As of every model, but that a factor which is missing or of another shape is an error, never drawn anew."""
        try:
            model, told = super().from_pretrained(
                source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except SafetensorError as error:
            raise ValueError(
                f"cannot load {cls.__name__} from '{source}': its safetensors are damaged ({error})"
            ) from None
        layers = [name for name, module in model.named_modules() if isinstance(module, cls.layer_class)]
        ours = tuple(f"{name}." for name in layers)
        for name, found, wanted in told["mismatched_keys"]:
            if name.startswith(ours) or not ignore_mismatched_sizes:
                raise ValueError(
                    f"cannot load {cls.__name__} from '{source}': the tensor '{name}' has the shape {tuple(found)}, "
                    f"and its config asks for {tuple(wanted)}"
                )
        for name in told["missing_keys"]:
            dense = name.rpartition(".")[0]
            if name.startswith(ours) or any(key.startswith(f"{dense}.factors.") for key in told["unexpected_keys"]):
                raise ValueError(
                    f"cannot load {cls.__name__} from '{source}': its files have no tensor '{name}', "
                    f"which its config asks for"
                )
        return (model, told) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **options):
        """As of every model, and the code beside the weights that loads them without einlinear."""
        source = self.modeling_source()
        super().save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True):
            module = self.config.AUTO_MAP["AutoConfig"].partition(".")[0]
            Path(save_directory, f"{module}.py").write_text(source)

    def modeling_source(self):
        return Path(inspect.getfile(type(self))).read_text()
