"""Compression while a dense model of transformers is loaded: each weight is projected as it arrives from its file."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.converting import structured
from einlinear.conversion.rules import Rules, choose
from einlinear.fast_path import leave_fast_path
from einlinear.projection.moments import Moments
from einlinear.projection.nearest import project
from einlinear.structure import Structure
from einlinear.targeting import LinearLayer


def compress_at_load(
    rules: Rules,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    moments: Mapping[str, Tensor | Moments] | None = None,
) -> Any:
    """A `quantization_config` for transformers' `from_pretrained` that converts a dense checkpoint as it is loaded.

        config = el.compress_at_load({"*.mlp.*": "btt(rank=4)"})
        model = AutoModelForCausalLM.from_pretrained("path/of/a/dense/model", quantization_config=config)

    Arguments, and what becomes of which layer, are those of `einlinear.convert`. Only one dense
    weight at a time is held beside the factors. The model is then an ordinary structured one:
    nothing about it is quantized, and `save_pretrained` writes what `from_pretrained` reads.
    """
    return _config_class()(rules, target_modules, exclude_modules, moments)


@cache
def _config_class() -> type[Any]:
    """Registers with transformers, which is imported here and not before: that takes seconds."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from einlinear.hf.models import adopt

    @register_quantization_config("einlinear")
    class CompressAtLoad(QuantizationConfigMixin):
        def __init__(self, rules: Rules, target_modules: Any, exclude_modules: Any, moments: Any) -> None:
            self.quant_method = "einlinear"
            self.rules, self.target_modules, self.exclude_modules = rules, target_modules, exclude_modules
            self.moments = moments or {}

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method, "rules": str(self.rules)}

    @register_quantizer("einlinear")
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: nn.Module, **options: object) -> nn.Module:
            wanted = self.quantization_config
            with torch.no_grad():
                _, planned, _ = choose(model, wanted.rules, wanted.target_modules, wanted.exclude_modules, "init")
            self.planned = {f"{name}.weight": (layer, s) for layer, s in planned.items() for name in layer.names}
            return model

        def param_needs_quantization(self, model: nn.Module, param_name: str, **options: object) -> bool:
            return param_name in self.planned

        def get_quantize_ops(self) -> ConversionOps:
            return Projection(self.planned, self.quantization_config.moments)

        def _process_model_after_weight_loading(self, model: nn.Module, **options: object) -> nn.Module:
            self.remove_quantization_config(model)
            for module in model.modules():
                if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                    del module.config._is_quantized
            leave_fast_path(model)
            adopt(model)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    class Projection(ConversionOps):
        """Puts a structured layer where the dense one stands whose weight has arrived."""

        def __init__(self, planned: Mapping[str, tuple[LinearLayer, Structure]], moments: Mapping[str, Any]) -> None:
            self.planned, self.moments = planned, moments

        @torch.no_grad()
        def convert(
            self, input_dict: dict[str, Any], *patterns: object, full_layer_name: str, model: nn.Module, **options: Any
        ) -> dict[str, Any]:
            (arrived,) = input_dict.values()
            weight = arrived[0] if isinstance(arrived, list) else arrived
            layer, structure = self.planned[full_layer_name]
            setattr(layer.module, "weight", nn.Parameter(weight))  # noqa: B010
            new = structured(layer, structure, {}, lambda name, w, s: project(w, s, self.moments.get(name)))
            for name in layer.names:
                model.set_submodule(name, new)
                options["missing_keys"].discard(f"{name}.weight")
                # What is not marked would be drawn anew, by code that may look for the weight of a layer within.
                _mark(model, name)
            for factor in new.factors:
                factor._is_hf_initialized = True
            return {}

    def _mark(model: nn.Module, name: str) -> None:
        while name := name.rpartition(".")[0]:
            module = model.get_submodule(name)
            if next(module.parameters(recurse=False), None) is None:
                setattr(module, "_is_hf_initialized", True)  # noqa: B010

    return CompressAtLoad
