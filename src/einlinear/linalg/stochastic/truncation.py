"""Unbiased linear algebra by conjugate gradients that stop at random.

Stopping early biases every solve; a random stop with reweighted terms does not. From the mathematics of A.
Potapczynski, L. Wu, D. Biderman, G. Pleiss and J. P. Cunningham, "Bias-Free Scalable Gaussian Processes via Randomized
Truncations" (ICML 2021), sections 3 and 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.linalg.krylov.lanczos import Function, Lanczos
from einlinear.linalg.krylov.system import Matmul, System, divide, dot
from einlinear.linalg.result import LinAlgError, Result


@dataclass(frozen=True)
class Truncation:
    """The iteration J at which to stop: at least `first`, then on with a constant probability; `mean` on average.

    `single` weighs the last term alone instead of all of them (single sample against Russian roulette): fewer terms
    survive, at a higher variance. Variance is finite where the solver's terms fall faster than the probability to go
    on; the longer the mean, the smaller it is.
    """

    mean: float
    first: int = 1
    single: bool = False

    def __post_init__(self) -> None:
        if self.first < 1 or self.mean <= self.first:
            raise ValueError(f"a truncation needs 1 <= first < mean, not first {self.first} and mean {self.mean}")

    @property
    def on(self) -> float:
        """Probability to go on after an iteration from the `first`."""
        extra = self.mean - self.first
        return extra / (1 + extra)

    def draw(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        home = device if generator is None else generator.device
        uniform = torch.rand(shape, generator=generator, device=home, dtype=torch.float64).to(device)
        more = torch.log1p(-uniform) / torch.log(torch.tensor(self.on, dtype=torch.float64))
        return self.first + more.floor().long()

    def weight(self, iteration: int, stop: Tensor) -> Tensor:
        """What term `iteration` (from 1) counts where it stops at `stop`: expectation one."""
        survival = 1.0 if iteration <= self.first else self.on ** (iteration - self.first)
        if not self.single or iteration < self.first:
            return (stop >= iteration) / survival
        # The terms up to the first are summed exactly; of the others only the last one is taken.
        if iteration == self.first:
            return torch.ones_like(stop, dtype=torch.float64)
        return (stop == iteration) / (survival * (1 - self.on))


@torch.no_grad()
def truncated_cg(
    matmul: Matmul,
    rhs: Tensor,
    truncation: Truncation,
    *,
    preconditioner: Matmul | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """An unbiased estimate of A⁻¹ b for Hermitian positive definite A; every column of `rhs` [..., n, k] stops on its
    own.

    The expectation over stops is what CG converges to. One draw says nothing of its error: average several, repeat
    the column for that. `iterations` is that of the longest column.
    """
    system = System.of("truncated_cg", matmul, rhs, None, None, None)
    r = system.rhs
    stop = truncation.draw(tuple(system.scale.shape), r.device, generator)
    x, last = torch.zeros_like(r), int(stop.max()) if stop.numel() else 0
    z = r if preconditioner is None else preconditioner(r)
    p, rz, start = z, dot(r, z).real, dot(r, z).real
    eps, spent = torch.finfo(start.dtype).eps, 0
    for iteration in range(1, last + 1):
        q = system.product(p)
        curvature = dot(p, q).real
        # Converged to rounding: every later term is zero. A random matrix of rounding errors would not be.
        going = (stop >= iteration) & (rz > eps**2 * start)
        if not bool(going.any()):
            break
        if bool((going & (curvature <= 0)).any()):
            raise LinAlgError(
                "truncated_cg met a direction of no positive curvature: the matrix is not positive definite"
            )
        step = torch.where(going, divide(rz, curvature), 0)
        x = x + step * truncation.weight(iteration, stop).to(step.dtype) * p
        r = r - step * q
        z = r if preconditioner is None else preconditioner(r)
        rz, before = dot(r, z).real, rz
        p = z + torch.where(going, divide(rz, before), 0) * p
        spent = iteration
    return Result((x * system.scale).to(rhs.dtype), spent, True)


@torch.no_grad()
def truncated_trace(
    matmul: Matmul,
    probe: Tensor,
    function: Function,
    truncation: Truncation,
    *,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """An unbiased estimate of tr f(A) from `probe` [..., n, m], E[z zᴴ] = 1, and Lanczos spaces that stop at random.

    Section 4.2: the quadratures of successive steps form the series that is truncated. The standard error is that over
    probes, each with a stop of its own. log det A is f = log.
    """
    process = Lanczos(matmul, probe)
    stop = truncation.draw(tuple(process.length.shape), probe.device, generator)
    total, before = torch.zeros_like(process.length), torch.zeros_like(process.length)
    for step in range(1, int(stop.max()) + 1):
        if step > 1 and process.exhausted:
            break
        quadrature = process.advance(1).quadrature(function).unsqueeze(-2)
        total = total + truncation.weight(step, stop).to(total.dtype) * (quadrature - before)
        before = quadrature
    samples = (total * process.length**2).squeeze(-2)
    count = samples.shape[-1]
    error = samples.std(-1) / count**0.5 if count > 1 else torch.full_like(samples[..., 0], torch.inf)
    return Result(samples.mean(-1), process.steps, True, None, error)
