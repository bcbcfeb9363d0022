"""The figure of spectra.md: singular values of structured layers before and after they learn a teacher.

python docs/guide/spectra.py [spectra.svg]
"""

import sys
from pathlib import Path

import altair as alt
import torch

import einlinear as el

la = el.linalg
WIDTH, STEPS, BATCH = 128, 400, 256
FAMILIES = {
    "dense": el.Dense(),
    "BTT, rank 2": el.BTT(rank=2),
    "Monarch, 8 blocks": el.Monarch(8),
    "Kronecker": el.Kronecker(),
    "low rank, 16": el.LowRank(16),
}
FIGURE = Path(__file__).parents[1] / "img" / "spectra.svg"


def teacher() -> torch.Tensor:
    """A matrix with random vectors and the singular values 4/k."""
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] for _ in range(2))
    return (u * (4 / torch.arange(1, WIDTH + 1))) @ v.T


def train(family: el.Family, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Singular values before and after, and the last loss relative to that of predicting nothing."""
    layer = el.Linear(WIDTH, WIDTH, family, bias=False)
    before = la.svdvals(la.operator(layer)).detach()
    optimizer = torch.optim.Adam(el.parameter_groups(layer, lr=2.0**-7, readout=None))
    bases = [group["lr"] for group in optimizer.param_groups]
    loss = torch.zeros(())
    for step in range(STEPS):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * (1 - step / STEPS)
        x = torch.randn(BATCH, WIDTH)
        loss = (layer(x) - x @ target.T).square().mean() / target.square().sum() * WIDTH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, la.svdvals(la.operator(layer)).detach(), loss.item()


def main(path: Path = FIGURE) -> None:
    torch.manual_seed(0)
    target, rows = teacher(), []
    for name, family in FAMILIES.items():
        before, after, loss = train(family, target)
        print(f"{name:20} loss {loss:.3f}, largest singular value {before[0]:.2f} -> {after[0]:.2f}")
        for when, values in (("start", before), ("trained", after)):
            rows += [
                {"layer": name, "when": when, "k": k, "value": float(value)}
                for k, value in enumerate(values, 1)
                if value > 1e-3
            ]
    for name in FAMILIES:
        rows += [{"layer": name, "when": "teacher", "k": k, "value": 4 / k} for k in range(1, WIDTH + 1)]
    order, few = ["start", "trained", "teacher"], alt.Axis(values=[0.001, 0.01, 0.1, 1, 10, 100])
    chart = (
        alt.Chart(alt.Data(values=rows), width=170, height=170)
        .mark_line()
        .encode(
            alt.X("k:Q", scale=alt.Scale(type="log", domain=[1, WIDTH], nice=False), title="index", axis=few),
            alt.Y("value:Q", scale=alt.Scale(type="log"), title="singular value", axis=few),
            alt.Color("when:N", title=None, scale=alt.Scale(domain=order, range=["#888888", "#0072b2", "#e69f00"])),
            alt.StrokeDash("when:N", title=None, scale=alt.Scale(domain=order, range=[[4, 3], [1, 0], [1, 2]])),
            alt.Facet("layer:N", columns=3, title=None, sort=list(FAMILIES)),
        )
    )
    chart.save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
