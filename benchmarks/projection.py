"""Errors and seconds of `einlinear.project`, beside preconditioned gradient descent, written as CSV.

    python benchmarks/projection.py [quality|speed|aware|table]

`quality`: BLAST of 4 and 8 blocks and ranks 8 and 32 on 256 × 256 matrices, against the factoriser of
the BLAST paper (Lee et al. 2024, https://arxiv.org/abs/2410.21262, algorithm 2: preconditioned gradient
descent, 300 steps), the best of three seeds. `speed`: 4096 × 4096 weights, and those of GPT-2. `aware`: errors on
correlated inputs, without and with their moments. Seconds are the thread's own CPU time, one thread.
`table` writes the results into docs/projection.md.
"""

import csv
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import einlinear as el

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "projection.md"
WIDTH = 256
STEPS = 300
SEEDS = (0, 1, 2)


def matrices(blocks: int, rank: int) -> dict[str, Tensor]:
    """The targets, in double precision."""
    draw = torch.Generator().manual_seed(2024)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    distance = (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs().double()
    member = el.BLAST(blocks=blocks, rank=rank)(WIDTH, WIDTH)
    return {
        "gaussian": normal(WIDTH, WIDTH),
        "1/(1+|i-j|)": 1 / (1 + distance),
        "low rank": normal(WIDTH, rank) @ normal(rank, WIDTH),
        "block-diagonal": torch.block_diag(*normal(blocks, WIDTH // blocks, WIDTH // blocks)),
        "BLAST": el.dense(member, [normal(*shape) for shape in member.factor_shapes]),
    }


def preconditioned_descent(weight: Tensor, blocks: int, rank: int, seed: int) -> float:
    """The relative error that the BLAST paper's factoriser reaches."""
    draw = torch.Generator().manual_seed(seed)
    size = WIDTH // blocks
    target = weight.reshape(blocks, size, blocks, size).transpose(1, 2) / weight.std()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    u, v = (1e-3 * normal(blocks, size, rank) / rank**0.5 for _ in "uv")
    s = normal(blocks, blocks, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    for step in range(STEPS):
        rate = 1 - step / STEPS

        def state(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            error = torch.einsum("ipr,ijr,jqr->ijpq", u, s, v) - target
            return error, 0.1 * error.norm() * eye

        error, ridge = state(u, s, v)
        vs = torch.einsum("ijr,jqr->ijqr", s, v)
        normals = torch.einsum("ijqr,ijqt->irt", vs, vs) + ridge
        u = u - rate * torch.linalg.solve(normals, torch.einsum("ijpq,ijqr->irp", error, vs)).mT
        error, ridge = state(u, s, v)
        us = torch.einsum("ijr,ipr->ijpr", s, u)
        normals = torch.einsum("ijpr,ijpt->jrt", us, us) + ridge
        v = v - rate * torch.linalg.solve(normals, torch.einsum("ijpq,ijpr->jrq", error, us)).mT
        error, ridge = state(u, s, v)
        normals = torch.einsum("irt,jrt->ijrt", u.mT @ u, v.mT @ v) + ridge
        s = s - rate * torch.linalg.solve(normals, torch.einsum("ijpq,ipr,jqr->ijr", error, u, v))
    return float((torch.einsum("ipr,ijr,jqr->ijpq", u, s, v) - target).norm() / target.norm())


def relative_error(weight: Tensor, structure: el.Structure, factors: list[Tensor]) -> float:
    return float((weight - el.dense(structure, factors)).norm() / weight.norm())


def quality() -> Iterator[dict[str, object]]:
    for blocks in (4, 8):
        for rank in (8, 32):
            structure = el.BLAST(blocks=blocks, rank=rank)(WIDTH, WIDTH)
            for name, weight in matrices(blocks, rank).items():
                ours, seconds = timed(lambda weight=weight, structure=structure: el.project(weight, structure))
                theirs, their_seconds = timed(
                    lambda weight=weight, b=blocks, r=rank: [preconditioned_descent(weight, b, r, k) for k in SEEDS]
                )
                short = [factor.bfloat16().double() for factor in ours]
                yield {
                    "matrix": name,
                    "blocks": blocks,
                    "rank": rank,
                    "error": f"{relative_error(weight, structure, ours):.4g}",
                    "error_bfloat16": f"{relative_error(weight, structure, short):.4g}",
                    "error_descent": f"{min(theirs):.4g}",
                    "seconds": f"{seconds:.2f}",
                    "seconds_descent": f"{their_seconds:.2f}",
                }


def speed() -> Iterator[dict[str, object]]:
    wide = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    families = (el.BTT(), el.BTT(rank=4), el.Monarch(blocks=16), el.Monarch(blocks=4), el.Kronecker())
    for family in families:
        yield measured("one weight 4096 × 4096", family, [wide])
    block = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in GPT2_BLOCK]
    for family in (el.BTT(rank=4), el.Monarch(blocks=16), el.LowRank(rank=128)):
        yield measured("12 blocks of GPT-2, 85 M parameters", family, block * 12)


GPT2_BLOCK = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
MINILM_LAYER = ((384, 384), (1536, 384), (384, 1536))


def aware() -> Iterator[dict[str, object]]:
    draw = torch.Generator().manual_seed(0)
    for d_out, d_in in MINILM_LAYER:
        weight = torch.randn(d_out, d_in, generator=draw)
        mixed = torch.randn(4096, d_in, generator=draw) * torch.logspace(0, -2, d_in)
        gram = el.Moments(d_in).update(mixed @ torch.randn(d_in, d_in, generator=draw)).matrix
        for family in (el.LowRank(rank=64), el.BTT(rank=2), el.Monarch(blocks=4), el.Kronecker(), el.BLAST(4, 64)):
            structure = family(d_in, d_out)
            plain, seconds = timed(lambda w=weight, s=structure: el.project(w, s))
            found, longer = timed(lambda w=weight, s=structure, g=gram: el.project(w, s, g))
            total = weighed(weight, gram)
            yield {
                "weight": f"{d_out} × {d_in}",
                "family": str(family),
                "error_plain": f"{weighed(weight - el.dense(structure, plain), gram) / total:.4g}",
                "error_aware": f"{weighed(weight - el.dense(structure, found), gram) / total:.4g}",
                "seconds_plain": f"{seconds:.2f}",
                "seconds_aware": f"{longer:.2f}",
            }


def weighed(matrix: Tensor, gram: Tensor) -> float:
    exact = matrix.double()
    return float((exact * (exact @ gram)).sum()) ** 0.5


def measured(task: str, family: el.Family, weights: list[Tensor]) -> dict[str, object]:
    structures = [family(weight.shape[1], weight.shape[0]) for weight in weights]
    found, seconds = timed(lambda: list(map(el.project, weights, structures)))
    made = zip(weights, structures, found, strict=True)
    lost = sum(float((weight - el.dense(structure, factors)).square().sum()) for weight, structure, factors in made)
    error = (lost / sum(float(weight.square().sum()) for weight in weights)) ** 0.5
    return {"task": task, "family": str(family), "error": f"{error:.4g}", "seconds": f"{seconds:.1f}"}


def table(name: str, columns: dict[str, str]) -> str:
    """Some columns of a result file, under other names, in Markdown."""
    with (RESULTS / name).open() as file:
        rows = [[row[column] for column in columns] for row in csv.DictReader(file)]
    lines = [[*columns.values()], ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(page: str) -> str:
    """The page of the docs with its tables made anew."""
    tables = {
        "table": table(
            "projection.csv",
            {
                "matrix": "matrix",
                "blocks": "blocks",
                "rank": "rank",
                "error": "project",
                "error_bfloat16": "in bfloat16",
                "error_descent": "descent",
                "seconds": "s",
                "seconds_descent": "s, descent",
            },
        ),
        "speed": table("projection_speed.csv", {"task": "task", "family": "family", "error": "error", "seconds": "s"}),
        "aware": table(
            "projection_aware.csv",
            {
                "weight": "weight",
                "family": "family",
                "error_plain": "plain",
                "error_aware": "aware",
                "seconds_plain": "s",
                "seconds_aware": "s, aware",
            },
        ),
    }
    for name, text in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{text}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def timed(call: Callable[[], list]) -> tuple[list, float]:
    start = time.thread_time()
    found = call()
    return found, time.thread_time() - start


def main(part: str = "quality") -> None:
    if part == "table":
        PAGE.write_text(written(PAGE.read_text()))
        return
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    where = {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "commit": commit.strip()}
    parts = {"quality": quality, "speed": speed, "aware": aware}
    name = "projection.csv" if part == "quality" else f"projection_{part}.csv"
    with (RESULTS / name).open("w", newline="") as file:
        writer: csv.DictWriter | None = None
        for row in parts[part]():
            writer = writer or csv.DictWriter(file, [*row, *where])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row | where)
            file.flush()
            print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
