"""Gaussian likelihoods at 10^5 and 10^6 points, unbiased truncation, 16-bit matrices, memory of gradients.

    python benchmarks/krylov.py [woodbury grid sparse truncation hyperparameters precision memory]

Rows of benchmarks/results/krylov.csv, on one CPU thread. Times are medians of the thread's own CPU time, ours and
hand-written code alternating, so that their ratio holds on a machine that others use. A peer is measured where it can
be imported (`linear_operator`; put its folder on PYTHONPATH).
"""

import csv
import importlib.util
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import einlinear as el
from einlinear.linalg import implicit
from einlinear.linalg.krylov.cg import cg
from einlinear.linalg.refinement import refine, widening
from einlinear.linalg.result import LinAlgError, NotConverged
from einlinear.linalg.stochastic.probes import probes
from einlinear.linalg.stochastic.slq import slq_logdet
from einlinear.linalg.stochastic.truncation import Truncation, truncated_cg

RESULTS = Path(__file__).parent / "results" / "krylov.csv"
FIELDS = ("part", "case", "n", "quantity", "value", "unit", "device", "torch", "commit")
la = el.linalg
Row = tuple[str, int, str, float, str]
Parts = tuple[torch.Tensor, ...]


def seconds(runs: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Medians of CPU seconds, the runs alternating."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return {name: sorted(spent)[repeats // 2] for name, spent in times.items()}


def gradient(likelihood: Callable[..., torch.Tensor], tensors: Parts) -> tuple[torch.Tensor, Parts]:
    value = likelihood(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors)


def deviation(found: tuple[torch.Tensor, Parts], exact: tuple[torch.Tensor, Parts]) -> float:
    """The largest relative error, of the value and of each gradient."""
    pairs = [(found[0], exact[0]), *zip(found[1], exact[1], strict=True)]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def dense_likelihood(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky(a)
    return (y * torch.cholesky_solve(y, factor)).sum() + 2 * factor.diagonal().log().sum()


def woodbury() -> list[Row]:
    """Low rank plus diagonal: y' A^-1 y + log det A and its gradient by U, log d and y."""

    def ours(u: torch.Tensor, log_d: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = la.LowRankUpdate(la.Diagonal(log_d.exp()).claim("psd"), u)
        inverse = la.inverse(a)
        return (y * (inverse @ y)).sum() - la.logdet(inverse)

    def by_hand(u: torch.Tensor, log_d: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        d = log_d.exp()
        scaled = u / d[:, None]
        factor = torch.linalg.cholesky(torch.eye(u.shape[1], dtype=u.dtype) + u.mT @ scaled)
        inner = torch.linalg.solve_triangular(factor, scaled.mT @ y, upper=False)
        return (y * y / d[:, None]).sum() - inner.square().sum() + log_d.sum() + 2 * factor.diagonal().log().sum()

    def draw(n: int, r: int = 50) -> Parts:
        generator = torch.Generator().manual_seed(0)
        shapes = ((n, r), (n,), (n, 1))
        u, log_d, y = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
        return (u / r**0.5).requires_grad_(), (0.3 * log_d - 1).requires_grad_(), y.requires_grad_()

    small = draw(5000)
    exact = gradient(lambda u, log_d, y: dense_likelihood(u @ u.mT + log_d.exp().diag(), y), small)
    rows: list[Row] = [
        ("low rank + diagonal", 5000, "error against Cholesky", deviation(gradient(ours, small), exact), "")
    ]
    large = draw(100_000)
    runs = {"einlinear": lambda: gradient(ours, large), "by hand": lambda: gradient(by_hand, large)}
    if importlib.util.find_spec("linear_operator"):
        import linear_operator.operators as lo

        def peer(u: torch.Tensor, log_d: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            a = lo.LowRankRootAddedDiagLinearOperator(
                lo.LowRankRootLinearOperator(u), lo.DiagLinearOperator(log_d.exp())
            )
            form, logdet = a.inv_quad_logdet(inv_quad_rhs=y, logdet=True)
            return form.sum() + logdet

        runs["linear_operator"] = lambda: gradient(peer, large)
    return rows + timed("low rank + diagonal", 100_000, runs)


def timed(case: str, n: int, runs: dict[str, Callable[[], object]], repeats: int = 7) -> list[Row]:
    spent = seconds(runs, repeats)
    rows: list[Row] = [(case, n, f"value and gradient, {name}", 1000 * t, "ms") for name, t in spent.items()]
    return [*rows, (case, n, "ratio to by hand", spent["einlinear"] / spent["by hand"], "")]


def rbf(side: int, log_scale: torch.Tensor) -> torch.Tensor:
    x = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.exp(-((x[:, None] - x) ** 2) / (2 * torch.exp(2 * log_scale)))


def grid() -> list[Row]:
    """A product kernel on a 3-D grid plus noise: Kronecker plus a multiple of the unit."""

    def ours(scales: torch.Tensor, log_noise: torch.Tensor, y: torch.Tensor, side: int) -> torch.Tensor:
        k = la.kron(*(la.Dense(rbf(side, s)).claim("psd") for s in scales))
        a = k + log_noise.exp() * la.Identity(side**3, dtype=torch.float64)
        return implicit.quadratic(a, y, la.solve).sum() + la.logdet(a)

    def by_hand(scales: torch.Tensor, log_noise: torch.Tensor, y: torch.Tensor, side: int) -> torch.Tensor:
        values, vectors = zip(*(torch.linalg.eigh(rbf(side, s)) for s in scales), strict=True)
        a, b, c = values
        spectrum = a[:, None, None] * b[:, None] * c + log_noise.exp()
        t = y.view(side, side, side)
        for q in vectors:
            t = torch.tensordot(t, q, dims=([0], [0]))
        return (t * t / spectrum).sum() + spectrum.log().sum()

    def draw(side: int) -> Parts:
        y = torch.randn(side**3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        scales = torch.tensor([-3.2, -3.0, -2.8], dtype=torch.float64) + math.log(100 / side)
        return scales.requires_grad_(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True), y.requires_grad_()

    def cholesky(scales: torch.Tensor, log_noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second, third = (rbf(17, s) for s in scales)
        k = torch.kron(torch.kron(first, second), third)
        return dense_likelihood(k + log_noise.exp() * torch.eye(17**3, dtype=torch.float64), y)

    small, large = draw(17), draw(100)
    error = deviation(gradient(lambda *t: ours(*t, 17), small), gradient(cholesky, small))
    runs = {
        "einlinear": lambda: gradient(lambda *t: ours(*t, 100), large),
        "by hand": lambda: gradient(lambda *t: by_hand(*t, 100), large),
    }
    rows: list[Row] = [("grid + noise", 17**3, "error against Cholesky", error, "")]
    return rows + timed("grid + noise", 10**6, runs)


def neighbours(points: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of points of the plane closer than the radius."""
    from scipy.spatial import cKDTree

    pairs = torch.as_tensor(cKDTree(points.numpy()).query_pairs(radius, output_type="ndarray")).long()
    itself = torch.arange(len(points))
    return torch.cat([pairs[:, 0], pairs[:, 1], itself]), torch.cat([pairs[:, 1], pairs[:, 0], itself])


def wendland(points: torch.Tensor, pairs: Parts, log_scale: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
    """Entries (1 - d)^4 (4 d + 1), d the distance over the scale: definite in the plane; noise on the diagonal."""
    row, column = pairs
    square = (points[row] - points[column]).square().sum(-1)
    d = torch.where(square > 0, square, 1).sqrt() * (square > 0) / log_scale.exp()
    return (1 - d).clamp_min(0) ** 4 * (4 * d + 1) + torch.where(row == column, log_noise.exp(), 0)


def sparse() -> list[Row]:
    """Points anywhere in the plane, a kernel of compact support: CG and Lanczos quadrature, nothing factorised."""
    rows: list[Row] = []
    for n in (5000, 100_000):
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(n, 2, dtype=torch.float64, generator=generator)
        y = torch.randn(n, 1, dtype=torch.float64, generator=generator).requires_grad_()
        radius = (20 / (math.pi * n)) ** 0.5  # some 20 neighbours
        pairs = neighbours(points, radius)
        log_scale = torch.tensor(math.log(radius), dtype=torch.float64, requires_grad=True)
        log_noise = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
        probe = probes((n, 8), dtype=torch.float64, generator=generator)
        steps = []

        def solver(a: object, b: torch.Tensor) -> torch.Tensor:
            found = cg(a.matmul, b, tolerance=1e-11)  # type: ignore[attr-defined]
            steps.append(found.iterations)  # noqa: B023
            return found.value

        start = time.thread_time()
        entries = wendland(points, pairs, log_scale, log_noise)
        a = la.Sparse(entries, *pairs, (n, n)).claim("psd")
        value = slq_logdet(a.matmul, (n, n), probe=probe, dtype=torch.float64)
        form, logdet = implicit.quadratic_and_logdet(value.value, a, y, probe, solver)
        grads = torch.autograd.grad(form.sum() + logdet, (log_scale, log_noise, y))
        spent = time.thread_time() - start
        case = "compact kernel"
        rows += [
            (case, n, "value and gradient", spent, "s"),
            (case, n, "CG iterations", steps[0], ""),
            (case, n, "log-determinant, standard error relative", float(value.standard_error / value.value.abs()), ""),
        ]
        if n == 5000:
            dense = torch.zeros(n, n, dtype=torch.float64).index_put(pairs, entries)
            factor = torch.linalg.cholesky(dense)
            exact = torch.cholesky_solve(y, factor).detach()
            rows.append(
                (
                    case,
                    n,
                    "quadratic form, error against Cholesky",
                    float(((form - (y * exact).sum()).abs() / form).detach()),
                    "",
                )
            )
            z = (value.value - 2 * factor.diagonal().log().sum()) / value.standard_error
            rows.append((case, n, "log-determinant, z against Cholesky", float(z), ""))
            rows.append(
                (
                    case,
                    n,
                    "gradient by y, error against Cholesky",
                    float(((grads[2] - 2 * exact).norm() / grads[2].norm()).detach()),
                    "",
                )
            )
    return rows


def truncation() -> list[Row]:
    """y' K^-1 y by CG that stops at random: 20000 stops against the exact value, and CG stopped at the mean."""
    n, draws = 1000, 20_000
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    k = torch.exp(-torch.cdist(x, x).square() / 0.02) + 0.1 * torch.eye(n, dtype=torch.float64)
    y = torch.linalg.cholesky(k) @ torch.randn(n, 1, dtype=torch.float64, generator=generator)
    exact = float((y * torch.linalg.solve(k, y)).sum())
    # Every draw follows one and the same trajectory: its terms are found once, 20000 stops weigh them.
    forms = [0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        for stop in range(1, 260):
            found = cg(lambda v: k @ v, y, max_iterations=stop, tolerance=1e-15)
            forms.append(float((y * found.value).sum()))
    terms = torch.tensor(forms, dtype=torch.float64).diff()
    rows: list[Row] = []
    for mean in (20, 10):
        rows.append(("truncation", n, f"CG stopped at {mean}, bias", 100 * (forms[mean] - exact) / exact, "%"))
        for single in (False, True):
            rule = Truncation(mean, first=mean // 4, single=single)
            stops = rule.draw((draws,), torch.device("cpu"), generator)
            estimates = torch.zeros(draws, dtype=torch.float64)
            for j, term in enumerate(terms.tolist(), 1):
                estimates += rule.weight(j, stops) * term
            z = (float(estimates.mean()) - exact) / (float(estimates.std()) / draws**0.5)
            kind = "single sample" if single else "Russian roulette"
            rows += [
                ("truncation", n, f"{kind}, mean {mean}: mean iterations", float(stops.double().mean()), ""),
                ("truncation", n, f"{kind}, mean {mean}: z of {draws} draws", z, ""),
                ("truncation", n, f"{kind}, mean {mean}: std over value", float(estimates.std()) / exact, ""),
            ]
    # That this is what the function does: fifty columns of its own.
    rule = Truncation(20, first=5)
    found = truncated_cg(
        lambda v: k @ v, y.expand(n, 50).contiguous(), rule, generator=torch.Generator().manual_seed(1)
    )
    stops = rule.draw((1, 50), torch.device("cpu"), torch.Generator().manual_seed(1))
    weighed = sum(rule.weight(j, stops) * term for j, term in enumerate(terms.tolist(), 1))
    gap = float(((y * found.value).sum(0) - weighed).abs().max()) / exact
    return [*rows, ("truncation", n, "truncated_cg against the terms weighed", gap, "")]


def hyperparameters() -> list[Row]:
    """Length scale and noise of a Gaussian process by gradients of 10 iterations: stopped, random, and by Cholesky."""
    n, steps = 300, 150
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, dtype=torch.float64, generator=generator).sort(0).values
    truth = {"scale": 0.05, "noise": 0.02}

    def kernel(log_scale: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        k = torch.exp(-((x - x.mT) ** 2) / (2 * (2 * log_scale).exp()))
        return k + log_noise.exp() * torch.eye(n, dtype=torch.float64)

    true = [torch.tensor(value, dtype=torch.float64).log() for value in truth.values()]
    y = torch.linalg.cholesky(kernel(*true)) @ torch.randn(n, 1, dtype=torch.float64, generator=generator)
    rule = Truncation(10, first=5)

    def exact(k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(k, b)

    def stopped(k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return cg(lambda v: k @ v, b, max_iterations=10, tolerance=1e-12).value

    def random(k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return truncated_cg(lambda v: k @ v, b, rule, generator=generator).value

    rows: list[Row] = []
    for name, solve in (("Cholesky", exact), ("CG stopped at 10", stopped), ("random stops, mean 10", random)):
        parameters = [torch.tensor(v, dtype=torch.float64).log().requires_grad_() for v in (0.15, 0.2)]
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        tail = []
        for step in range(steps):
            k = kernel(*parameters)
            z = probes((n, 32), dtype=torch.float64, generator=generator)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", NotConverged)
                # Two independent solves for y: a product of two unbiased estimates is unbiased only then.
                copies = y.expand(n, 32).contiguous()
                both = torch.cat([solve(k, copies).mean(-1, keepdim=True) for _ in range(2)], -1)
                w = solve(k, z)
            # The gradient of y' K^-1 y + log det K, as a linear form of K.
            loss = -(both[:, :1] * (k @ both[:, 1:])).sum() + (w * (k @ z)).sum() / 32
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 50.0)
            optimizer.step()
            schedule.step()
            if step >= steps - 30:
                tail.append(torch.stack([p.detach().exp() for p in parameters]))
        found = torch.stack(tail).mean(0)
        for (what, value), estimate in zip(truth.items(), found.tolist(), strict=True):
            rows.append(("hyperparameters", n, f"{name}: {what}, true {value}", estimate, ""))
    return rows


def precision() -> list[Row]:
    """A matrix stored in 16 bits, vectors in 32, residuals in 64; and what re-orthogonalisation does."""
    n = 1000
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    b = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    rows: list[Row] = []
    for dtype in (torch.float16, torch.bfloat16):
        for kappa in (1e2, 1e4, 1e6):
            a = (q * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ q.mT
            a = a.to(dtype).double()
            a = (a + max(0.0, 1 / kappa - float(torch.linalg.eigvalsh(a)[0])) * torch.eye(n)).to(dtype)
            values = torch.linalg.eigvalsh(a.double())
            case = f"{str(dtype).removeprefix('torch.')}, kappa {float(values[-1] / values[0]):.1e}"
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    found = refine(widening(a, torch.float64), b, low=widening(a, torch.float32))
                except LinAlgError:
                    rows.append((case, n, "refused: not positive definite as stored", 1, ""))
                    continue
            rows += [
                (case, n, "residual", float(found.residual.max()), ""),  # type: ignore[union-attr]
                (case, n, "inner iterations", found.iterations, ""),
                (case, n, "flagged as not converged", float(bool(said)), ""),
            ]
    a = ((q * torch.logspace(0, -4, n, dtype=torch.float64)) @ q.mT).float()
    for keep in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            found = cg(lambda v: a @ v, b.float(), tolerance=1e-3, reorthogonalise=keep)
        rows.append((f"float32, kappa 1e4, reorthogonalised {keep}", n, "CG iterations", found.iterations, ""))
    return rows


CHILD = """
import resource, sys, torch, einlinear as el
from einlinear.linalg import implicit
from einlinear.linalg.krylov.cg import cg
torch.set_num_threads(1)
limit, unrolled = int(sys.argv[1]), sys.argv[2] == "unrolled"
n = 200_000
d = torch.linspace(1, 1e6, n, dtype=torch.float64).requires_grad_()
b = torch.ones(n, 1, dtype=torch.float64, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import warnings; warnings.simplefilter("ignore")
if unrolled:
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(limit):
        q = d[:, None] * p
        step = (r * r).sum() / (p * q).sum()
        x, new = x + step * p, r - step * q
        p, r = new + (new * new).sum() / (r * r).sum() * p, new
else:
    def solver(a, b):
        return cg(a.matmul, b, max_iterations=limit, tolerance=1e-14).value
    x = implicit.solve(el.linalg.Diagonal(d), b, solver)
x.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory() -> list[Row]:
    """Peak memory of a solve and its gradient by A and b, in processes of their own; beside it, autograd through CG."""
    rows: list[Row] = []
    for how, limits in (("implicit", (20, 200, 600)), ("unrolled", (20, 200))):
        for limit in limits:
            out = subprocess.run(
                [sys.executable, "-c", CHILD, str(limit), how], capture_output=True, text=True, check=True
            )
            rows.append(
                ("peak memory of solve and gradient", 200_000, f"{how}, {limit} iterations", float(out.stdout), "MB")
            )
    return rows


PARTS = (woodbury, grid, sparse, truncation, hyperparameters, precision, memory)


def main(*names: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    kept = []
    if RESULTS.exists() and names:
        with RESULTS.open() as file:
            kept = [row for row in csv.DictReader(file) if row["part"] not in names]
    for part in PARTS:
        if names and part.__name__ not in names:
            continue
        for case, n, quantity, value, unit in part():
            print(f"{part.__name__:16} {case:34} n={n:<8} {quantity:45} {value:.4g} {unit}", flush=True)
            row = (part.__name__, case, n, quantity, f"{value:.4g}", unit, "CPU, one thread", torch.__version__, commit)
            kept.append(dict(zip(FIELDS, map(str, row), strict=True)))
        order = [part.__name__ for part in PARTS]
        with RESULTS.open("w", newline="") as file:  # after every part, so that a later one loses nothing
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(sorted(kept, key=lambda row: order.index(row["part"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
