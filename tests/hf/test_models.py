"""Models of transformers: saved, found and loaded like any other, and never dense or random in silence."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import einlinear as el
from einlinear.hf import portable
from einlinear.storage import layer_spec

from .conftest import MODELS, Saved, example, tiny


def test_converted_layers_and_reasons(saved: Saved):
    layers = {"llama": 14, "gpt2": 8, "bert": 13, "vit": 12, "mixtral": 8}
    assert len(saved.report.rows) == layers[saved.name]
    assert isinstance(saved.model, getattr(transformers, MODELS[saved.name][0]))
    if saved.name == "mixtral":
        assert len(saved.report.skipped) == 4
        assert "a stack of 4 matrices that MixtralExperts.forward" in str(saved.report)
    head = saved.model.get_output_embeddings() or getattr(saved.model, "classifier", None)
    assert head is None or type(head) is nn.Linear


def test_a_saved_model_loads_without_remote_code_to_the_same_bits(saved: Saved):
    model = saved.auto.from_pretrained(saved.path)
    assert type(model).__name__ == f"Einlinear{MODELS[saved.name][0]}"
    assert type(model).__module__.startswith("einlinear.")
    with torch.no_grad():
        assert torch.equal(model(**example(saved.name))[0], saved.output)
    # Without its head, and whatever the class that asks.
    base = transformers.AutoModel.from_pretrained(saved.path)
    inner = getattr(model, model.base_model_prefix, model)
    for one, other in zip(base.parameters(), inner.parameters(), strict=False):
        assert torch.equal(one, other)
    assert any(isinstance(module, el.Linear) for module in base.modules())


def test_what_is_saved_stands_by_itself(saved: Saved):
    config = json.loads((saved.path / "config.json").read_text())
    assert config["model_type"] == f"einlinear_{saved.name}"
    assert {row.name for row in saved.report.rows} == {*config["einlinear"]["layers"]}
    assert {"AutoConfig", "AutoModel", MODELS[saved.name][1]} <= {*config["auto_map"]}
    code = (saved.path / f"modeling_einlinear_{saved.name}.py").read_text()
    assert not re.search(r"^\s*(import|from) einlinear", code, re.MULTILINE)
    tensors = load_file(saved.path / "model.safetensors")
    assert not any(f"{row.name}.weight" in tensors for row in saved.report.rows)
    assert sum(t.numel() for t in tensors.values()) == saved.report.parameters_after


def test_a_body_loads_under_a_head_and_a_head_without_one(tmp_path: Path):
    model = tiny("bert")
    el.convert(model, "btt")
    model.save_pretrained(tmp_path)
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(headed.bert(**example("bert"))[0], model(**example("bert"))[0])
    model = tiny("llama")
    el.convert(model, "btt")
    model.save_pretrained(tmp_path / "llama")
    # This class makes its body by AutoModel.from_config.
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama")
    assert torch.equal(headed.model(**example("llama"))[0], model.model(**example("llama"))[0])


def test_the_config_of_other_models_stays_as_it_is():
    dense = tiny("bert")
    other = type(dense)(dense.config)
    el.convert(other, "btt")
    assert type(dense.config) is transformers.BertConfig and not hasattr(dense.config, "einlinear")
    assert other.encoder.layer[0].attention.self.config is other.config


ELSEWHERE = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["einlinear"] = None  # importing it fails
import torch, transformers

torch.set_num_threads(1)
for name, (dense, auto) in json.loads(sys.argv[2]).items():
    path = f"{sys.argv[1]}/{name}"
    for how, load in [("untrusted", getattr(transformers, auto)), ("dense", getattr(transformers, dense))]:
        try:
            load.from_pretrained(path, **({"trust_remote_code": False} if how == "untrusted" else {}))
        except Exception as error:
            assert ("trust_remote_code=True" in str(error)), (how, error)
        else:
            raise AssertionError(f"{name} was loaded {how}")
    model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
    inputs, output = torch.load(f"{path}/example.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], output)
    model.save_pretrained(f"{path}/again")
    again = getattr(transformers, auto).from_pretrained(f"{path}/again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], again(**inputs)[0])
    print(name, "loaded")
"""


def test_without_einlinear_it_is_trusted_or_refused(tmp_path: Path):
    """In a process where einlinear cannot be imported: untrusted and asked for as dense, it is an error."""
    asked = {}
    for name in ("llama", "gpt2", "bert", "vit"):
        model = tiny(name)
        # A padded width, a cap, and a structure of three factors.
        el.convert(model, {"*.0.*": "monarch(blocks=3)", "all-linear": "tensor_train(rank=2, cores=3)"})
        layer = [module for module in model.modules() if isinstance(module, el.Linear)][-1]
        layer.gains = nn.Parameter(torch.full((len(layer.factors),), 1.1))
        model.save_pretrained(tmp_path / name)
        torch.save((example(name), model(**example(name))[0].detach()), tmp_path / name / "example.pt")
        asked[name] = MODELS[name][:2]
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [word for name in asked for word in (name, "loaded")]


def test_experts_load_with_einlinear_alone(tmp_path: Path):
    model = tiny("bert")
    el.convert(model, {"*.intermediate.dense": "btt(rank=2)"}, experts=4, active=2)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**example("bert"))[0], again(**example("bert"))[0])
    layer = model.encoder.layer[0].intermediate.dense
    with pytest.raises(ValueError, match="import einlinear"):
        portable.StructuredLinear(layer_spec(layer))


def test_einlinear_may_be_imported_after_transformers(saved: Saved):
    if saved.name != "bert":
        return
    code = """
    import sys, transformers, einlinear
    assert "einlinear.layer" not in sys.modules
    print(type(transformers.AutoModel.from_pretrained(sys.argv[1])).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(saved.path)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "EinlinearBertModel", done.stderr[-2000:]


# What is damaged is refused, with the name of the tensor


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    model = tiny("bert")
    el.convert(model, "btt")
    model.save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


FACTOR = "encoder.layer.1.output.dense.factors.0"


def damage(path: Path, how: str) -> None:
    file, config = path / "model.safetensors", path / "config.json"
    tensors, described = load_file(file), json.loads(config.read_text())
    if how == "shape":
        tensors[FACTOR] = tensors[FACTOR][:-1].contiguous()
    elif how == "missing":
        del tensors[FACTOR]
    elif how == "forgotten":
        del described["einlinear"]["layers"][FACTOR.removesuffix(".factors.0")]
    elif how == "undescribed":
        described["hidden_size"] = described.pop("einlinear")["guarded"]["hidden_size"]
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(described))
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "header":
        file.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", f"the tensor '{FACTOR}' has the shape"),
        ("missing", f"no tensor '{FACTOR}'"),
        ("forgotten", "no tensor 'encoder.layer.1.output.dense.weight'"),
        ("undescribed", "its config says nothing of its layers"),
        ("truncated", "its safetensors are damaged"),
        ("header", "its safetensors are damaged"),
    ],
)
def test_what_does_not_match_its_spec_is_refused(copy: Path, how: str, says: str):
    damage(copy, how)
    with pytest.raises(ValueError, match="cannot") as raised:
        transformers.AutoModel.from_pretrained(copy)
    assert says in str(raised.value)


# Loading without ever holding the dense model


def test_layers_are_made_on_the_meta_device(copy: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    draw = el.Linear.reset_parameters

    def noticed(layer: el.Linear) -> None:
        made.append({parameter.device.type for parameter in layer.parameters()})
        draw(layer)

    monkeypatch.setattr(el.Linear, "reset_parameters", noticed)
    transformers.AutoModel.from_pretrained(copy)
    assert len(made) == 13 and all(devices == {"meta"} for devices in made)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_compressed_at_load_is_loaded_and_converted(name: str, tmp_path: Path):
    dense = tiny(name)
    dense.save_pretrained(tmp_path / "dense")
    auto = getattr(transformers, MODELS[name][1])
    rules = {"*.1.*": "monarch(blocks=4)", "all-linear": "btt(rank=2)"}
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=el.compress_at_load(rules))
    el.convert(dense, rules)
    assert type(model) is type(dense)
    with torch.no_grad():
        torch.testing.assert_close(model(**example(name))[0], dense(**example(name))[0])
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "structured")
    again = auto.from_pretrained(tmp_path / "structured")
    assert torch.equal(again(**example(name))[0], model(**example(name))[0])
    model.half()


# Back to dense


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reversed_models_are_dense_models_again(name: str, tmp_path: Path):
    model = tiny(name)
    dense = type(model)
    kinds = {key: type(module) for key, module in model.named_modules()}
    el.convert(model, "btt(rank=3)")
    with torch.no_grad():
        structured = model(**example(name))[0]
    report = el.convert(model, "dense", weights="reverse")
    assert len(report.rows) in (8, 14) and report.parameters_after == sum(
        p.numel() for p in dense(model.config).parameters()
    )
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    with torch.no_grad():
        torch.testing.assert_close(model(**example(name))[0], structured)
        assert torch.equal(dense.from_pretrained(tmp_path)(**example(name))[0], model(**example(name))[0])


# Training


def test_trainer_takes_the_parameter_groups_and_resumes(tmp_path: Path):
    def trainer(steps: int, folder: str, model: nn.Module) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, logging_steps=1,
            report_to=[], use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": torch.arange(k, k + 8), "labels": torch.arange(k, k + 8)} for k in range(1, 13)]
        factory = (el.TrainerOptimizer, {"lr": 1e-3, "weight_decay": 0.1})
        return transformers.Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=factory)

    def fresh() -> nn.Module:
        model = tiny("llama")
        el.convert(model, "btt(rank=2)", weights="init")
        return model

    torch.manual_seed(0)
    model = fresh()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    whole = trainer(4, "whole", model)
    whole.train()
    expected = el.parameter_groups(fresh(), lr=1e-3, weight_decay=0.1, readout="lm_head")
    assert [group["lr"] for group in whole.optimizer.param_groups] == [group["lr"] for group in expected]
    assert len({group["lr"] for group in expected}) > 1
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == {*start}

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "modeling_einlinear_llama.py").exists()
    other = fresh()
    resumed = trainer(4, "resumed", other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), msg=name)
    shutil.rmtree(tmp_path / "whole")
