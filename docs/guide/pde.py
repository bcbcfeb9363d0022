"""The figure of pde.md: the error of Poisson's equation on ever finer grids, and a cube that cools.

python docs/guide/pde.py [pde.svg]
"""

import math
import sys
from pathlib import Path

import altair as alt
import torch

import einlinear as el

la = el.linalg
FIGURE = Path(__file__).parents[1] / "img" / "pde.svg"


def laplacian(n: int) -> el.Operator:
    """−Δ on n³ points inside the unit cube, zero at its faces."""
    one = torch.ones(n, dtype=torch.float64)
    second = la.tridiagonal(-one[1:], 2 * one, -one[1:]).claim("psd") * (n + 1) ** 2
    return la.kronsum(second, second, second)


def errors() -> list[dict[str, float]]:
    """Largest deviation from sin πx sin πy sin πz, by points of a side."""
    rows = []
    for n in (7, 15, 31, 63, 127):
        sine = torch.sin(math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))
        exact = (sine[:, None, None] * sine[:, None] * sine).reshape(-1)
        found = la.solve(laplacian(n), 3 * math.pi**2 * exact)
        rows.append({"n": n, "error": float((found - exact).abs().max())})
    return rows


def cooling(n: int = 127) -> list[dict[str, object]]:
    """Temperature along the middle of a cube that was hot in its centre, at several times."""
    x = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    hot = (x - 0.5).abs() < 0.2
    start = (hot[:, None, None] & hot[:, None] & hot).to(torch.float64).reshape(-1)
    A, rows = laplacian(n), []
    for t in (0.0, 0.001, 0.005, 0.02, 0.05):
        line = (la.exp(-t * A) @ start).reshape(n, n, n)[n // 2, n // 2]
        rows += [
            {"x": float(at), "temperature": float(value), "t": f"{t:g}"} for at, value in zip(x, line, strict=True)
        ]
    return rows


def main(path: Path = FIGURE) -> None:
    left = (
        alt.Chart(alt.Data(values=errors()), width=260, height=220)
        .mark_line(point=True)
        .encode(
            alt.X("n:Q", scale=alt.Scale(type="log", base=2), title="points of a side"),
            alt.Y("error:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~e"), title="largest error"),
        )
    )
    right = (
        alt.Chart(alt.Data(values=cooling()), width=300, height=220)
        .mark_line()
        .encode(
            alt.X("x:Q", title="x"),
            alt.Y("temperature:Q", title="temperature"),
            alt.Color("t:N", title="time", scale=alt.Scale(scheme="viridis")),
        )
    )
    (left | right).resolve_scale(color="independent").save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
