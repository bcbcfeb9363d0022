"""The figure of gp.md: a length scale and a noise learnt by the exact likelihood of 100 000 points.

python docs/guide/gp.py [gp.svg]
"""

import math
import sys
from pathlib import Path

import altair as alt
import torch
from torch import Tensor

import einlinear as el

la = el.linalg
FIGURE = Path(__file__).parents[1] / "img" / "gp.svg"
NOISE = 0.3


def features(x: Tensor, log_scale: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    return (2 / len(phase)) ** 0.5 * torch.cos(x[:, None] * frequency / log_scale.exp() + phase)


def main(path: Path = FIGURE, n: int = 100_000, rank: int = 30) -> None:
    torch.manual_seed(0)
    x = torch.rand(n, dtype=torch.float64)
    truth = torch.sin(12 * x) * torch.exp(-x)
    y = truth + NOISE * torch.randn(n, dtype=torch.float64)
    drawn = torch.randn(rank, dtype=torch.float64), 2 * math.pi * torch.rand(rank, dtype=torch.float64)
    log_scale = torch.tensor(math.log(0.1), dtype=torch.float64, requires_grad=True)
    log_noise = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    optimizer, steps = torch.optim.Adam([log_scale, log_noise], lr=0.2), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
    for step in range(24):
        left = features(x, log_scale, *drawn)
        inverse = la.inverse(la.LowRankUpdate(log_noise.exp() * la.Identity(n, dtype=torch.float64), left))
        loss = (y @ (inverse @ y) - la.logdet(inverse)) / (2 * n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for name, value in (("length scale", log_scale.exp()), ("noise", (log_noise / 2).exp())):
            steps.append({"step": step, "value": value.item(), "of": name})
    with torch.no_grad():
        left = features(x, log_scale, *drawn)
        inverse = la.inverse(la.LowRankUpdate(log_noise.exp() * la.Identity(n, dtype=torch.float64), left))
        at = torch.linspace(0, 1, 300, dtype=torch.float64)
        weights = inverse @ y
        mean = features(at, log_scale, *drawn) @ (left.mT @ weights)
    exact = torch.sin(12 * at) * torch.exp(-at)
    lines = [
        {"x": float(p), "y": float(v), "of": name}
        for name, curve in (("posterior mean", mean), ("truth", exact))
        for p, v in zip(at, curve, strict=True)
    ]
    dots = [{"x": float(p), "y": float(v)} for p, v in zip(x[:800], y[:800], strict=True)]
    cloud = alt.Chart(alt.Data(values=dots), width=300, height=220, title="800 of 100 000 points")
    curves = alt.Chart(alt.Data(values=lines)).mark_line().encode(x="x:Q", y="y:Q", color=alt.Color("of:N", title=None))
    left_panel = cloud.mark_circle(size=6, opacity=0.4, color="gray").encode(x="x:Q", y="y:Q") + curves
    right_panel = (
        alt.Chart(alt.Data(values=steps), width=280, height=220, title=f"learnt (true noise {NOISE})")
        .mark_line()
        .encode(
            alt.X("step:Q", title="steps of Adam"),
            alt.Y("value:Q", scale=alt.Scale(type="log"), title=None),
            alt.Color("of:N", title=None),
        )
    )
    (left_panel | right_panel).resolve_scale(color="independent").save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
