"""The figure of hessian.md: the spectral density of a network's Hessian, by Lanczos and exact.

python docs/guide/hessian.py [hessian.svg]
"""

import sys
from pathlib import Path

import altair as alt
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.linalg.krylov.lanczos import Lanczos
from einlinear.linalg.stochastic.probes import probes

la = el.linalg
FIGURE = Path(__file__).parents[1] / "img" / "hessian.svg"


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(256, 4, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    layers = (nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return nn.Sequential(*layers).double(), x, y


def hessian(net: nn.Module, x: Tensor, y: Tensor) -> el.Operator:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(net, parameters, (x,)) - y).square().mean()

    return la.Hessian(*la.raveled(loss, {name: p.detach() for name, p in net.named_parameters()}))


def density(h: el.Operator, at: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """By ten probes of forty products, and by all eigenvalues; both smoothed alike."""
    z = probes((h.shape[-1], 10), kind="sphere", dtype=torch.float64)
    nodes, vectors = Lanczos(h.matmul, z).advance(40).eigh()
    exact = torch.linalg.eigvalsh(h.dense())
    flat = (
        (nodes.flatten(), vectors[..., 0, :].square().flatten() / 10),
        (exact, torch.full_like(exact, 1 / len(exact))),
    )
    curves = [
        (weights * torch.exp(-((at[:, None] - values) ** 2) / (2 * width**2))).sum(-1) / (width * (2 * torch.pi) ** 0.5)
        for values, weights in flat
    ]
    return curves[0], curves[1]


def main(path: Path = FIGURE) -> None:
    net, x, y = network()
    panels = []
    for title, steps in (("at the start", 0), ("after 2000 steps of Adam", 2000)):
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        h = hessian(net, x, y)
        top = float(torch.linalg.eigvalsh(h.dense())[-1])
        at = torch.linspace(-0.2 * top, 1.1 * top, 400, dtype=torch.float64)
        rows = [
            {"eigenvalue": float(position), "density": max(float(value), 1e-4), "by": name}
            for name, curve in zip(("Lanczos", "all eigenvalues"), density(h, at, top / 60), strict=True)
            for position, value in zip(at, curve, strict=True)
        ]
        panels.append(
            alt.Chart(alt.Data(values=rows), width=280, height=220, title=title)
            .mark_line()
            .encode(
                alt.X("eigenvalue:Q"),
                alt.Y("density:Q", scale=alt.Scale(type="log")),
                alt.Color("by:N", title=None),
                alt.StrokeDash("by:N", title=None),
            )
        )
    (panels[0] | panels[1]).save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
