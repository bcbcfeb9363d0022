"""Tiny random models of transformers, and where they are saved once they are converted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import einlinear as el

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": ("LlamaForCausalLM", "AutoModelForCausalLM", "LlamaConfig", {**SIZES, **TEXT, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "AutoModelForCausalLM", "GPT2Config", {**GPT2, **TEXT}),
    "bert": ("BertModel", "AutoModel", "BertConfig", {**SIZES, "vocab_size": 99}),
    "vit": ("ViTForImageClassification", "AutoModelForImageClassification", "ViTConfig",
            {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 10}),
    "mixtral": ("MixtralForCausalLM", "AutoModelForCausalLM", "MixtralConfig",
                {**SIZES, **TEXT, "num_key_value_heads": 2, "num_local_experts": 4}),
}  # fmt: skip


def tiny(name: str) -> transformers.PreTrainedModel:
    """A random model, its biases too."""
    torch.manual_seed(0)
    model_class, _, config_class, options = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def example(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": torch.arange(1, 21).reshape(2, 10)}


@dataclass
class Saved:
    name: str
    path: Path
    model: transformers.PreTrainedModel
    report: el.Report
    output: Tensor

    @property
    def auto(self) -> type:
        return getattr(transformers, MODELS[self.name][1])


@pytest.fixture(scope="session", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """A converted model and where it is saved."""
    model = tiny(request.param)
    report = el.convert(model, "btt(rank=2)")
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    with torch.no_grad():
        output = model(**example(request.param))[0]
    yield Saved(request.param, path, model, report, output)
