"""From a directory with a dense model of transformers to one with a compressed model: `einlinear compress`."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from einlinear.compression.allocation import Allocation, Cost, read_plan
from einlinear.compression.calibration import Batch
from einlinear.compression.pipeline import Progress, Work, compress, survey
from einlinear.compression.recovery import Fidelity, distil, fidelity, outputs
from einlinear.conversion.report import Report

HELD_OUT = 10
"""Of so many batches, one is held out to compare outputs on."""
CARRIED = ("*.txt", "*.json", "*.model", "*.jinja", "*.tiktoken")
"""What a model's directory holds beside the weights: tokenizers, processors and their settings."""


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is compressed; see `compress_checkpoint`."""

    structure: str = "auto"
    budget: float = 0.5
    cost: Cost = "parameters"
    calibration: Sequence[Path] = ()
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] = ()
    tokens: int = 100_000
    length: int = 256
    batch: int = 8
    finetune: int = 0
    rate: float = 1e-3
    sweeps: int = 100


@dataclass(frozen=True)
class Compressed:
    """What came of it: the plan as it was allocated, what was converted, and how near the outputs are."""

    allocation: Allocation | None
    report: Report
    before: Fidelity | None = None
    after: Fidelity | None = None


def compress_checkpoint(
    source: Path,
    out: Path,
    settings: Settings,
    plan: Path | None = None,
    progress: Progress = lambda doing, done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Compressed:
    """Compresses the model in a directory into another directory.

    What is found on the way is kept in `out` + `.work`, so the same command goes on after an interrupt; `out`
    appears when it is complete. With calibration files, a tenth of the batches is held out, and
    outputs are compared on it. Nothing is fetched from a network and no code beside the weights is run.

    Args:
        source: a directory that `save_pretrained` wrote.
        out: must not exist.
        settings: budget, structure, calibration and the rest.
        plan: a file with what becomes of each layer, in place of an allocation.
        progress: called as the work goes on.
        tell: called with lines for people to read.

    Raises:
        ValueError: for what cannot be read or compressed; nothing is left in `out`.
    """
    out = out.absolute()
    if out.exists():
        raise ValueError(f"cannot compress to {out}: it exists; remove it or choose another place")
    rules = None if plan is None else read_plan(plan)
    model, work = _opened(source, out, settings)
    batches = list(_batches(source, settings)) if settings.calibration else []
    held_out = batches[::HELD_OUT] if len(batches) > 1 else []
    kept = [batch for k, batch in enumerate(batches) if k % HELD_OUT or len(batches) == 1]
    expected = outputs(model, held_out)
    teacher = copy.deepcopy(model) if settings.finetune else None
    allocation, report = compress(
        model,
        settings.structure,
        settings.budget,
        cost=settings.cost,
        calibration=kept if settings.calibration else None,
        plan=rules,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        sweeps=settings.sweeps,
        work=work,
        progress=progress,
    )
    if allocation is not None:
        tell(str(allocation))
    tell(str(report))
    before = fidelity(expected, outputs(model, held_out), held_out) if held_out else None
    after = before
    if before is not None:
        tell(f"held-out {before}")
    if teacher is not None:
        losses = distil(model, teacher, kept, settings.finetune, settings.rate, progress)
        after = fidelity(expected, outputs(model, held_out), held_out) if held_out else None
        tell(f"after {len(losses)} steps of distillation, held-out {after}")
    _write(model, source, out, work)
    work.remove()
    return Compressed(allocation, report, before, after)


def plan_checkpoint(
    source: Path, out: Path, settings: Settings, progress: Progress = lambda doing, done, total: None
) -> Allocation:
    """What `compress_checkpoint` would do; what was found out is kept for it."""
    model, work = _opened(source, out.absolute(), settings)
    batches = list(_batches(source, settings)) if settings.calibration else []
    kept = [batch for k, batch in enumerate(batches) if k % HELD_OUT or len(batches) == 1]
    found = survey(
        model,
        settings.structure,
        calibration=kept if settings.calibration else None,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        work=work,
        progress=progress,
    )
    return found.allocate(settings.budget, settings.cost)


def _opened(source: Path, out: Path, settings: Settings) -> tuple[nn.Module, Work]:
    """The dense model in its own class, and the work on it."""
    try:
        import transformers
    except ImportError:
        raise ImportError("compressing a checkpoint needs transformers; pip install 'einlinear[hf]'") from None
    config = source / "config.json"
    if not config.is_file():
        raise ValueError(f"cannot compress {source}: it is no directory with a config.json, as save_pretrained writes")
    described = json.loads(config.read_text())
    names = described.get("architectures") or []
    if "einlinear" in described:
        raise ValueError(f"cannot compress {source}: its layers are structured already; start from the dense model")
    found = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if found is None:
        raise ValueError(f"cannot compress {source}: its class {names[0]} is not one of transformers")
    model = found.from_pretrained(source, local_files_only=True, use_safetensors=True)
    key = hashlib.sha256(json.dumps([settings.tokens, settings.length, settings.batch]).encode())
    for file in [*sorted(source.glob("*.safetensors")), config, *_files(settings.calibration)]:
        with file.open("rb") as opened:
            key.update(hashlib.file_digest(opened, "sha256").digest())
    return model.eval(), Work(out.with_name(f"{out.name}.work"), key.hexdigest())


def _files(paths: Sequence[Path]) -> list[Path]:
    files = [
        file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not file.is_dir()
    ]
    if paths and not files:
        raise ValueError(f"cannot calibrate on {', '.join(map(str, paths))}: there are no files")
    return files


def _batches(source: Path, settings: Settings) -> Iterator[Batch]:
    """Calibration inputs: texts by the model's tokenizer, or the tensors of safetensors files by their names."""
    files = _files(settings.calibration)
    tensors = [file for file in files if file.suffix == ".safetensors"]
    for file in tensors:
        named = load_file(file)
        sizes = {len(tensor) for tensor in named.values()}
        if len(sizes) != 1:
            raise ValueError(f"cannot calibrate on {file}: its tensors have no first dimension in common")
        for start in range(0, max(sizes), settings.batch):
            yield {name: tensor[start : start + settings.batch] for name, tensor in named.items()}
    texts = [file for file in files if file.suffix != ".safetensors"]
    if texts:
        yield from _tokens(source, texts, settings)


def _tokens(source: Path, files: Sequence[Path], settings: Settings) -> Iterator[Batch]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot calibrate on text: {source} has no tokenizer ({error})") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    length = min(settings.length, tokenizer.model_max_length)
    text = "\n".join(file.read_text(errors="replace") for file in files)
    # A piece of four characters a token is about as long as a sequence; what is longer is cut.
    pieces = [piece for k in range(0, len(text), 4 * length) if (piece := text[k : k + 4 * length].strip())]
    # From all over the text, in one order everywhere.
    wanted = max(1, settings.tokens // length)
    chosen = pieces[:: max(1, len(pieces) // wanted)]
    for start in range(0, min(len(chosen), wanted), settings.batch):
        few = list(islice(chosen, start, min(start + settings.batch, wanted)))
        yield dict(tokenizer(few, truncation=True, max_length=length, padding=True, return_tensors="pt"))


def _write(model: nn.Module, source: Path, out: Path, work: Work) -> None:
    """The model with what lay beside the dense one; `out` appears when all of it is written.

    Until then it lies in the folder of the work, which goes afterwards: a killed process leaves nothing else behind.
    """
    assert work.folder is not None
    partial = work.folder / f"model.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for pattern in CARRIED:
            for file in source.glob(pattern):
                if file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, partial / file.name)
        for folder in source.iterdir():  # such as the pooling of sentence-transformers
            if folder.is_dir() and (folder / "config.json").is_file():
                shutil.copytree(folder, partial / folder.name)
        model.save_pretrained(partial)  # type: ignore[operator]
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
