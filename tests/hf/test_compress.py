"""`einlinear compress`: whole checkpoints, plans, interrupts, and what is refused."""

import importlib
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import einlinear as el
from einlinear.cli import main
from einlinear.compression.allocation import read_plan

from .conftest import example, tiny

TEXT = "structured layers spend compute better than dense ones, says the paper; the table says so too.\n"


def run(*arguments: object) -> tuple[int, str, str]:
    out, err, code = StringIO(), StringIO(), 0
    argv, sys.argv = sys.argv, ["einlinear", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        err.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of letters, and a text beside it."""
    folder = tmp_path_factory.mktemp("dense")
    tiny("bert").save_pretrained(folder / "bert")
    letters = sorted({*TEXT.lower()} - {" ", "\n"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "bert")
    (folder / "text.txt").write_text("".join(TEXT[k % 40 :] for k in range(120)))
    return folder


def test_a_compressed_checkpoint_is_complete_and_within_budget(dense: Path, tmp_path: Path):
    command = ["compress", dense / "bert", "--out", tmp_path / "small", "--structure", "btt", "--budget", 0.4]
    code, out, err = run(*command, "--calibration", dense / "text.txt", "--tokens", 4000, "--finetune", 3)
    assert code == 0, err
    assert "encoder.layer.1.output.dense" in out and "held-out outputs: cosine" in out
    assert "after 3 steps of distillation" in out
    assert {p.name for p in tmp_path.iterdir()} == {"small"}, "neither a work folder nor a half-written one is left"
    model = transformers.AutoModel.from_pretrained(tmp_path / "small")
    layers = [module for module in model.modules() if isinstance(module, el.Linear)]
    assert layers
    before = sum(p.numel() for p in tiny("bert").parameters())
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64
    after = sum(p.numel() for p in model.parameters())
    assert 0.99 * 0.4 < 1 - (before - after) / linear <= 0.4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert model(**tokenizer("structured", return_tensors="pt"))[0].isfinite().all()


def test_more_sweeps_come_nearer(dense: Path, tmp_path: Path):
    (tmp_path / "plan.toml").write_text('[layers]\n"encoder.layer.0.output.dense" = "blast(blocks=4, rank=8)"\n')
    weight = tiny("bert").encoder.layer[0].output.dense.weight
    errors = []
    for sweeps in (0, 4):
        out = tmp_path / f"after-{sweeps}"
        common = ["compress", dense / "bert", "--out", out, "--plan", tmp_path / "plan.toml"]
        code, _, err = run(*common, "--sweeps", sweeps)
        assert code == 0, err
        found = transformers.AutoModel.from_pretrained(out).encoder.layer[0].output.dense
        errors.append(float((el.dense(found.structure, list(found.factors)) - weight).detach().norm()))
    assert errors[1] < 0.99 * errors[0]


def test_a_plan_is_written_edited_and_followed(dense: Path, tmp_path: Path):
    common = ["compress", dense / "bert", "--out", tmp_path / "small", "-s", "low_rank"]
    plan = tmp_path / "plan.toml"
    code, out, err = run(*common, "--write-plan", plan)
    assert code == 0, err
    assert str(plan) in out and not (tmp_path / "small").exists()
    rules = read_plan(plan)
    assert len(rules) == 13
    text = plan.read_text()
    name = next(name for name, family in rules.items() if family is not None)
    line = next(line for line in text.splitlines() if line.startswith(f'"{name}"'))
    plan.write_text(text.replace(line, f'"{name}" = "monarch(blocks=4)"'))
    code, out, err = run(*common, "--plan", plan)
    assert code == 0, err
    model = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert (
        model.get_submodule(name).structure
        == el.Monarch(blocks=4)(*_widths(tiny("bert").get_submodule(name))).canonical
    )
    for other, family in rules.items():
        assert isinstance(model.get_submodule(other), el.Linear) == (family is not None)


def _widths(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


@pytest.mark.parametrize(
    "stage",
    [
        "einlinear.compression.pipeline.error_curve",
        "einlinear.compression.pipeline.project",
        "einlinear.hf.models.align",
    ],
)
def test_an_interrupt_leaves_no_model_and_is_gone_on_from(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    command = ["compress", dense / "bert", "--out", tmp_path / "small", "-s", "low_rank(rank=9)", "--budget", 0.5,
               "-c", dense / "text.txt", "--tokens", 2000]  # fmt: skip
    module, _, name = stage.rpartition(".")
    real, calls = getattr(importlib.import_module(module), name), []

    def at_the_fifth(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == (5 if "compression" in stage else 1):
            assert {p.name for p in tmp_path.iterdir()} == {"small.work"}, "as kill -9 would leave it"
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stage, at_the_fifth)
        code, _, err = run(*command)
        assert code == 130 and "the same command goes on" in err
    assert {p.name for p in tmp_path.iterdir()} == {"small.work"}
    seen = len(calls)

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stage, counted)
        if "compression" in stage:
            patched.setattr("einlinear.compression.pipeline.calibrate", lambda *_: pytest.fail("calibrated again"))
        code, _, err = run(*command)
    assert code == 0, err
    model = transformers.AutoModel.from_pretrained(tmp_path / "small")
    if "compression" in stage:
        layers = 13 if stage.endswith("curve") else sum(isinstance(module, el.Linear) for module in model.modules())
        assert len(calls) - seen == layers - 4, "what was done is not done again"
    assert {p.name for p in tmp_path.iterdir()} == {"small"}
    whole = tmp_path / "whole"
    assert run(*[whole if argument == tmp_path / "small" else argument for argument in command])[0] == 0
    one, other = (
        transformers.AutoModel.from_pretrained(path)(**example("bert"))[0] for path in (tmp_path / "small", whole)
    )
    assert torch.equal(one, other)


def test_the_work_on_something_else_is_not_gone_on_with(dense: Path, tmp_path: Path):
    common = ["compress", dense / "bert", "--out", tmp_path / "small", "-s", "low_rank", "--write-plan", tmp_path / "p"]
    assert run(*common)[0] == 0
    code, _, err = run(*common, "-c", dense / "text.txt")
    assert code == 1 and "with another calibration" in err


def test_inputs_other_than_text_calibrate_too(tmp_path: Path):
    tiny("vit").save_pretrained(tmp_path / "vit")
    save_file({"pixel_values": torch.randn(20, 3, 32, 32)}, tmp_path / "images.safetensors")
    code, out, err = run("compress", tmp_path / "vit", "--out", tmp_path / "small", "-s", "monarch", "--budget", 0.7,
                         "--calibration", tmp_path / "images.safetensors")  # fmt: skip
    assert code == 0, err
    assert "held-out outputs" in out
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "classifier" not in config["einlinear"]["layers"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "1.5"], "a budget of 1.5"),
        (["--budget", "0"], "a budget of 0"),
        (["--budget", "0.0001"], "the cheapest candidates"),
        (["-s", "btttt"], "did you mean 'btt'"),
        (["-s", "monarch(blocks=77)"], "none of its layers can be"),
        (["--cost", "watts"], "'parameters' or 'flops'"),
        (["--calibration", "nothing.txt"], "nothing.txt"),
        (["--calibration", "empty.txt"], "zero tokens"),
        (["--plan", "nothing.toml"], "nothing.toml"),
        (["--plan", "plan.toml"], "'nowhere'"),
        (["--finetune", "5"], "cannot fine-tune without data"),
        (["--target", "nowhere"], "'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_a_sentence(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "plan.toml").write_text('[layers]\n"nowhere" = "btt"\n')
    base = [] if "-s" in arguments else ["-s", "low_rank"]
    code, _, err = run("compress", dense / "bert", "--out", "small", *base, *arguments)
    assert code == 1
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "small").exists()


def test_what_is_no_dense_model_is_refused(dense: Path, tmp_path: Path):
    code, _, err = run("compress", tmp_path, "--out", tmp_path / "small")
    assert code == 1 and "no directory with a config.json" in err
    (tmp_path / "small").mkdir()
    code, _, err = run("compress", dense / "bert", "--out", tmp_path / "small")
    assert code == 1 and "it exists" in err
    model = tiny("bert")
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    code, out, err = run("compress", tmp_path / "nan", "--out", tmp_path / "small2", "-s", "low_rank")
    assert code == 0 and "skipped pooler.dense: its weight has entries that are not finite" in out
    code, _, err = run(
        "compress", tmp_path / "nan", "--out", tmp_path / "small3", "-s", "low_rank", "--target", "pooler.dense"
    )
    assert code == 1 and "not finite" in err
