"""Linear algebra on operators against the same mathematics written by hand, and against peers, as CSV.

    python benchmarks/linalg.py [results.csv]

One process, one thread; the runs of all that answer one question are interleaved, and times are medians of the
thread's own CPU time. CoLA and linear_operator are timed where they can be imported (install them in an environment
of their own; they are no dependencies), scipy always. `error` is the largest deviation from the answer by hand,
relative to it. The dispatch rows count the microseconds from a question and an operator to the rule that runs.
"""

import csv
import importlib
import itertools
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import einlinear as el
from einlinear.lab.bench import provenance
from einlinear.linalg.normal import normal
from einlinear.linalg.rules.inverse import INVERSE

la = el.linalg
RESULTS = Path(__file__).parent / "results" / "linalg.csv"
ROUNDS = 7
Way = Callable[[], Tensor]


def compare(question: str, size: int, ways: dict[str, Way], rounds: int = ROUNDS) -> list[dict[str, object]]:
    """Times every way, interleaved; the first is the one by hand."""
    answers = {name: way() for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            taken[name].append(1e3 * (time.thread_time() - start))
    hand, wanted = next(iter(ways)), next(iter(answers.values()))
    rows = []
    for name, times in taken.items():
        ms = statistics.median(times)
        ratio = ms / statistics.median(taken[hand])
        error = float((answers[name] - wanted).abs().max() / wanted.abs().max())
        rows.append(
            {
                "question": question,
                "n": size,
                "by": name,
                "ms": f"{ms:.4g}",
                "ratio": f"{ratio:.3g}",
                "error": f"{error:.1e}",
            }
        )
        print(f"{question:34} n={size:8} {name:18} {ms:10.3f} ms  {ratio:7.2f}  {error:.1e}", flush=True)
    return rows


def poisson(n: int) -> Tensor:
    """The second difference, written out."""
    off = torch.ones(n - 1, dtype=torch.float64)
    return 2 * torch.eye(n, dtype=torch.float64) - torch.diag(off, 1) - torch.diag(off, -1)


def peer(name: str) -> object | None:
    """A library, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed here: not timed")
        return None


def kronecker_sum() -> list[dict[str, object]]:
    """The 2-D Laplacian on 400 × 500: n = 2·10⁵."""
    a, b = poisson(400), poisson(500)
    A = la.kronsum(la.Dense(a).claim("psd"), la.Dense(b).claim("psd"))
    n, rhs = A.shape[-1], torch.randn(A.shape[-1], dtype=torch.float64)

    def solve() -> Tensor:
        (x, u), (y, v) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        return (u @ ((u.T @ rhs.reshape(400, 500) @ v) / (x[:, None] + y)) @ v.T).reshape(-1)

    def logdet() -> Tensor:
        return (torch.linalg.eigvalsh(a)[:, None] + torch.linalg.eigvalsh(b)).log().sum()

    def trace_exp() -> Tensor:
        return torch.linalg.eigvalsh(-a).exp().sum() * torch.linalg.eigvalsh(-b).exp().sum()

    def eig() -> Tensor:
        (x, u), (y, v) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        values, order = (x[:, None] + y).flatten().sort()
        column = order[-1]
        return torch.cat([values, torch.kron(u[:, column // 500], v[:, column % 500]).abs()])

    def our_eig() -> Tensor:
        values, vectors = la.eigh(A)
        last = torch.zeros(n, 1, dtype=torch.float64)
        last[-1] = 1
        return torch.cat([values, (vectors @ last)[:, 0].abs()])

    solvers: dict[str, Way] = {"by hand": solve, "einlinear": lambda: la.solve(A, rhs)}
    if (library := peer("linear_operator")) is not None:
        operators = importlib.import_module("linear_operator.operators")
        one = [operators.to_linear_operator(torch.eye(k, dtype=torch.float64)) for k in (400, 500)]
        both = operators.SumKroneckerLinearOperator(
            operators.KroneckerProductLinearOperator(operators.to_linear_operator(a), one[1]),
            operators.KroneckerProductLinearOperator(one[0], operators.to_linear_operator(b)),
        )
        solvers["linear_operator"] = lambda: both.solve(rhs[:, None])[:, 0]
        print(library.__version__)
    rows = compare("Kronecker sum: solve", n, solvers)
    rows += compare("Kronecker sum: logdet", n, {"by hand": logdet, "einlinear": lambda: la.logdet(A)})
    rows += compare("Kronecker sum: trace of exp", n, {"by hand": trace_exp, "einlinear": lambda: la.trace(-A, la.exp)})
    rows += compare("Kronecker sum: eigenpairs", n, {"by hand": eig, "einlinear": our_eig})
    if (cola := peer("cola")) is not None:
        theirs = cola.PSD(la.to_cola(A))  # type: ignore[attr-defined]
        way = {"by hand": solve, "CoLA": lambda: cola.inv(theirs, cola.Auto(tol=1e-8)) @ rhs}  # type: ignore[attr-defined]
        rows += compare("Kronecker sum: solve", n, way, rounds=1)[1:]
    return rows


def grid() -> list[dict[str, object]]:
    """Poisson's and the heat equation on 128³ points, in float64."""
    one = poisson(128)
    A = la.kronsum(*3 * [la.Dense(one).claim("psd")])
    n, rhs = A.shape[-1], torch.randn(A.shape[-1], dtype=torch.float64)

    def rotate(x: Tensor, matrix: Tensor) -> Tensor:
        for _ in range(3):
            x = (x.reshape(-1, 128) @ matrix).reshape(128, 128, 128).permute(2, 0, 1)
        return x

    def by_eigenvectors(f: Callable[[Tensor], Tensor]) -> Tensor:
        values, vectors = torch.linalg.eigh(one)
        spectrum = values[:, None, None] + values[:, None] + values
        return rotate(f(spectrum) * rotate(rhs.reshape(128, 128, 128), vectors), vectors.T).reshape(-1)

    def heat() -> Tensor:
        step = torch.linalg.matrix_exp(-one)
        return rotate(rhs.reshape(128, 128, 128), step.T).reshape(-1)

    rows = compare(
        "Poisson on 128³: solve",
        n,
        {"by hand": lambda: by_eigenvectors(torch.reciprocal), "einlinear": lambda: la.solve(A, rhs)},
        5,
    )
    return rows + compare("heat on 128³: exp(-A) b", n, {"by hand": heat, "einlinear": lambda: la.exp(-A) @ rhs}, 5)


def low_rank() -> list[dict[str, object]]:
    """Gaussian marginal likelihood y′K⁻¹y + log det K with its gradient; K = diagonal + rank 50, n = 10⁵."""
    n, r = 100_000, 50
    u, d = torch.randn(n, r, dtype=torch.float64), torch.rand(n, dtype=torch.float64) + 0.5
    y = torch.randn(n, 1, dtype=torch.float64)

    def leaves() -> tuple[Tensor, Tensor]:
        return u.clone().requires_grad_(), d.clone().requires_grad_()

    def by_hand() -> Tensor:
        u, d = leaves()
        scaled = u / d[:, None]
        lower = torch.linalg.cholesky(torch.eye(r, dtype=u.dtype) + u.T @ scaled)
        inner = torch.linalg.solve_triangular(lower, scaled.T @ y, upper=False)
        value = (y[:, 0] ** 2 / d).sum() - inner.square().sum() + d.log().sum() + 2 * lower.diagonal().log().sum()
        return torch.cat([value.detach()[None], *(g.flatten() for g in torch.autograd.grad(value, (u, d)))])

    def ours() -> Tensor:
        u, d = leaves()
        inverse = la.inverse(la.LowRankUpdate(la.Diagonal(d), u))
        value = (y * (inverse @ y)).sum() - la.logdet(inverse)
        return torch.cat([value.detach()[None], *(g.flatten() for g in torch.autograd.grad(value, (u, d)))])

    return compare("low rank + diagonal: likelihood, gradient", n, {"by hand": by_hand, "einlinear": ours})


def monarch() -> list[dict[str, object]]:
    """A square Monarch matrix: solve for 16 right-hand sides, and the determinant."""
    rows = []
    for dtype, (width, blocks) in itertools.product(
        (torch.float32, torch.float64), ((1024, 32), (4096, 64), (16384, 128))
    ):
        spec = el.Monarch(blocks)(width, width)
        factors = [torch.randn(shape, dtype=dtype) for shape in spec.matrix_shapes]
        A, rhs = la.operator(spec, factors), torch.randn(width, 16, dtype=dtype)

        def by_hand(
            factors: list[Tensor] = factors, rhs: Tensor = rhs, width: int = width, blocks: int = blocks
        ) -> Tensor:
            x, logarithm = rhs, rhs.new_zeros(())
            for factor in reversed(factors):
                lu, pivots = torch.linalg.lu_factor(factor)
                x = torch.linalg.lu_solve(lu, pivots, x.reshape(blocks, -1, 16))
                x = x.transpose(0, 1).reshape(width, 16) if factor is factors[1] else x.reshape(width, 16)
                logarithm = logarithm + lu.diagonal(0, -2, -1).abs().log().sum()
            return torch.cat([x.flatten(), logarithm[None]])

        def ours(A: el.Operator = A, rhs: Tensor = rhs) -> Tensor:
            inverse = la.inverse(A)
            return torch.cat([(inverse @ rhs).flatten(), -la.slogdet(inverse).logabsdet[None]])

        def dense(A: el.Operator = A, rhs: Tensor = rhs) -> Tensor:
            lu, pivots = torch.linalg.lu_factor(A.dense())
            x = torch.linalg.lu_solve(lu, pivots, rhs)
            return torch.cat([x.flatten(), lu.diagonal().abs().log().sum()[None]])

        ways = {"by hand": by_hand, "einlinear": ours} | ({"dense": dense} if width < 10_000 else {})
        rows += [
            row | {"dtype": str(dtype).removeprefix("torch.")}
            for row in compare("Monarch: solve 16, logdet", width, ways, 15 if width < 2000 else 5)
        ]
    return rows


def dispatch() -> list[dict[str, object]]:
    """From an operator of 3 × 3 parts to its rule; the normal form is found once and for all at the first question."""
    a, d = torch.randn(3, 3), la.Diagonal(torch.ones(9))
    layer = el.Linear(16, 16, el.Monarch(4))
    cases = {
        "dense": la.Dense(a),
        "Kronecker": la.kron(a, a),
        "Kronecker sum": la.kronsum(a, a),
        "sum": la.kron(a, a) + 0.1 * la.Identity(9),
        "low rank": la.Dense(torch.randn(9, 2)) @ la.Dense(torch.randn(2, 9)) + d,
        "Monarch": la.operator(layer.structure, [factor.detach() for factor in layer.factors]),
        "Monarch, with gradients": la.operator(layer),
        "low rank, with gradients": la.Dense(torch.randn(9, 2).requires_grad_()) @ la.Dense(torch.randn(2, 9)) + d,
        "multiple, with gradients": 2 * la.Dense(a.clone().requires_grad_()),
    }
    rows = []
    for name, A in cases.items():
        INVERSE.rule(normal(A))
        us = min(timeit.repeat(lambda A=A: INVERSE.rule(normal(A)), number=500, repeat=5)) / 500 * 1e6
        rows.append(
            {
                "question": f"dispatch: {name}",
                "n": A.shape[-1],
                "by": "einlinear",
                "ms": f"{us / 1e3:.4g}",
                "ratio": "",
                "error": "",
                "dtype": "float32",
            }
        )
        print(f"dispatch: {name:20} {us:8.2f} µs")
    return rows


def main(path: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for measure in (kronecker_sum, grid, low_rank, monarch, dispatch) for row in measure()]
    here = provenance(torch.device("cpu"), torch.float64)
    rows = [here | row for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
