"""Random probe vectors and what their spread says."""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["rademacher", "gaussian", "sphere"]


def probes(
    shape: tuple[int, ...],
    *,
    kind: Kind = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Columns z with E[z zᴴ] = 1, `shape` [..., n, m]; real signs serve complex Hermitian matrices too.

    `sphere` is uniform of norm sqrt(n). Drawn where the generator lives, then moved to `device`.
    """
    home = generator.device if generator is not None else device
    drawn = dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
    if kind == "rademacher":
        signs = torch.randint(0, 2, shape, generator=generator, device=home)
        return (2 * signs - 1).to(device=device, dtype=dtype)
    z = torch.randn(shape, generator=generator, device=home, dtype=drawn)
    if kind == "sphere":
        z = z * (shape[-2] ** 0.5 / torch.linalg.vector_norm(z, dim=-2, keepdim=True))
    return z.to(device=device, dtype=dtype)


def spread(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last dimension and its standard error, infinite for a single sample."""
    count = samples.shape[-1]
    mean = samples.mean(-1)
    if count == 1:
        return mean, torch.full_like(mean.real, torch.inf)
    return mean, (samples - mean.unsqueeze(-1)).abs().square().sum(-1).div(count * (count - 1)).sqrt()
