"""The figure of waves.md: frequencies that the likelihood of the source learnt, and errors by the grid's side.

python docs/guide/waves.py [waves.svg]
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import altair as alt
import torch
from torch import Tensor

import einlinear as el
from einlinear.linalg import implicit

la = el.linalg
FIGURE = Path(__file__).parents[1] / "img" / "waves.svg"
PARTS = ((1.0, 2, 3), (0.3, 20, 16), (0.2, 27, 24))
FREQUENCIES = torch.arange(0, 33, dtype=torch.float64)
Kernel = Callable[[Tensor], Tensor]


def problem(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distances along a side, the solution and the source -Δu on the grid."""
    t = torch.linspace(0, 1, side, dtype=torch.float64)
    waves = [
        torch.sin(2 * math.pi * a * t)[:, None]
        * torch.cos(2 * math.pi * b * t)
        * torch.tensor([c, c * (a * a + b * b)])[:, None, None]
        for c, a, b in PARTS
    ]
    u, f = torch.stack(waves).sum(0)
    return t[:, None] - t, u, 4 * math.pi**2 * f


def mixture(weights: Tensor, length: Tensor) -> Kernel:
    def kernel(r: Tensor) -> Tensor:
        waves = torch.cos(2 * math.pi * FREQUENCIES * r[..., None])
        return torch.exp(-(r**2) / (2 * length**2)) * (waves * weights).sum(-1)

    return kernel


def learnt(side: int, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Weights of the frequencies, [2, q], and lengths [2], by the likelihood of the source on the grid."""
    r, _, f = problem(side)
    logs = torch.full((2, len(FREQUENCIES)), -3.0, dtype=torch.float64, requires_grad=True)
    log_lengths = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    data, optimizer = (f / f.std()).reshape(-1, 1), torch.optim.Adam([logs, log_lengths], lr=0.3)
    for _ in range(steps):
        k = la.kron(
            *(la.Dense(mixture(w, s)(r)).claim("psd") for w, s in zip(logs.exp(), log_lengths.exp(), strict=True))
        )
        a = k + 1e-4 * la.Identity(side**2, dtype=torch.float64)
        optimizer.zero_grad()
        (implicit.quadratic(a, data, la.solve).sum() + la.logdet(a)).backward()
        optimizer.step()
    return logs.detach().exp(), log_lengths.detach().exp()


def derivative(kernel: Kernel, r: Tensor) -> Tensor:
    """The matrix of the second derivative along a side, K″ K⁻¹."""
    one = torch.ones_like(r)

    def slope(s: Tensor) -> Tensor:
        return torch.func.jvp(kernel, (s,), (one,))[1]

    k = kernel(r)
    k = k + 1e-10 * k[0, 0] * torch.eye(len(r), dtype=r.dtype)
    return torch.linalg.solve(k, torch.func.jvp(slope, (r,), (one,))[1].mT).mT


def error(d1: Tensor, d2: Tensor, u: Tensor, f: Tensor) -> float:
    inner = slice(1, -1)
    edges = u.clone()
    edges[inner, inner] = 0
    rhs = f[inner, inner] + (d1 @ edges + edges @ d2.mT)[inner, inner]
    found = la.solve(la.kronsum(-d1[inner, inner], -d2[inner, inner]), rhs.reshape(-1))
    return float((found - u[inner, inner].reshape(-1)).norm() / u.norm())


def main(path: Path = FIGURE) -> None:
    weights, lengths = learnt(72)
    bars = [
        {"frequency": float(q), "weight": float(w), "direction": name}
        for name, row in zip("xy", weights, strict=True)
        for q, w in zip(FREQUENCIES, row, strict=True)
    ]
    rows = []
    for side in (58, 64, 72):
        r, u, f = problem(side)
        one, unit = torch.ones(side - 1, dtype=torch.float64), torch.eye(side, dtype=torch.float64)
        second = (torch.diag(one, 1) + torch.diag(one, -1) - 2 * unit) * (side - 1) ** 2
        smooth = derivative(lambda s: torch.exp(-(s**2) / (2 * 0.03**2)), r)
        learnt_pair = [derivative(mixture(w, s), r) for w, s in zip(weights, lengths, strict=True)]
        for name, pair in {
            "differences": (second, second),
            "squared exponential": (smooth, smooth),
            "spectral mixture, learnt": learnt_pair,
        }.items():
            rows.append({"side": side, "error": error(*pair, u, f), "by": name})
    left = (
        alt.Chart(alt.Data(values=bars), width=300, height=220, title="weights learnt; true: x 2, 20, 27, y 3, 16, 24")
        .mark_bar(width=4)
        .encode(
            alt.X("frequency:Q"),
            alt.Y("weight:Q", scale=alt.Scale(type="sqrt")),
            alt.Color("direction:N"),
            alt.XOffset("direction:N"),
        )
    )
    right = (
        alt.Chart(alt.Data(values=rows), width=260, height=220, title="relative error of the solution")
        .mark_line(point=True)
        .encode(
            alt.X("side:Q", scale=alt.Scale(zero=False), title="points of a side"),
            alt.Y("error:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~e"), title=None),
            alt.Color("by:N", title=None),
        )
    )
    (left | right).resolve_scale(color="independent").save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
