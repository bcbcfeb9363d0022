"""Stochastic Lanczos quadrature: tr f(A) and log det A from products alone (Ubaru, Chen and Saad 2017)."""

import torch
from torch import Tensor

from einlinear.linalg.krylov.arnoldi import Arnoldi
from einlinear.linalg.krylov.lanczos import Function, Lanczos
from einlinear.linalg.krylov.system import Matmul
from einlinear.linalg.result import LinAlgError, Result
from einlinear.linalg.stochastic.probes import Kind, probes, spread


@torch.no_grad()
def slq(
    matmul: Matmul,
    shape: tuple[int, ...],
    function: Function,
    *,
    hermitian: bool = True,
    samples: int = 32,
    probe: Tensor | None = None,
    kind: Kind = "sphere",
    tolerance: float = 0.1,
    max_iterations: int | None = None,
    reorthogonalise: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Result[Tensor]:
    """tr f(A) for an elementwise `function` and A of `shape` [..., n, n]: value and standard error [...].

    All probes share every product. The Krylov spaces grow until quadrature changes the estimate by less than
    `tolerance` of its standard error (or by rounding alone): more would refine what the probes blur. Give `probe`
    [..., n, m] to share probes with a gradient, `max_iterations` to bound the steps. `hermitian=False` uses Arnoldi.
    Rademacher and sphere probes make the trace of a multiple of the identity exact.
    """
    *batch, n, m = shape
    if n != m:
        raise ValueError(f"slq takes the trace of a square matrix, not of {list(shape)}")
    if not n:
        return Result(torch.zeros(batch, dtype=dtype, device=device), 0, True, None, torch.zeros(batch, device=device))
    if probe is None:
        if samples < 1:
            raise ValueError(f"slq needs one probe or more, not {samples}")
        probe = probes((*batch, n, samples), kind=kind, dtype=dtype, device=device, generator=generator)
    probe = probe.expand(*batch, *probe.shape[-2:])
    limit = min(n, 1000) if max_iterations is None else max_iterations
    process = Lanczos(matmul, probe, reorthogonalise=reorthogonalise) if hermitian else Arnoldi(matmul, probe)
    before: Tensor | None = None
    converged = False
    while True:
        found = process.advance(min(max(10, process.steps // 2), limit - process.steps))
        value, error = spread(found.quadrature(function) * process.length.squeeze(-2) ** 2)
        converged = process.exhausted
        if before is not None and not converged:
            rounding = 10 * torch.finfo(error.dtype).eps * value.abs()
            converged = bool(((value - before).abs() <= torch.maximum(tolerance * error, rounding)).all())
        if converged or process.steps >= limit:
            break
        before = value
    note = "Allow more iterations: quadrature still moves the estimate."
    return Result(value, process.steps, converged, None, error).or_warn("slq", tolerance, note)


@torch.no_grad()
def slq_logdet(matmul: Matmul, shape: tuple[int, ...], **options: object) -> Result[Tensor]:
    """log det A of a Hermitian positive definite A of `shape` [..., n, n]; options as `slq` takes them.

    Every Ritz value lies within the spectrum, so one below zero proves A indefinite: LinAlgError.
    """

    def log(nodes: Tensor) -> Tensor:
        noise = torch.finfo(nodes.dtype).eps * nodes.shape[-1] * nodes.abs().amax(-1, keepdim=True)
        lowest = float(nodes.min())
        if bool((nodes < -noise).any()):
            raise LinAlgError(
                f"log det: the matrix is not positive definite, it has an eigenvalue {lowest:.3g} or below"
            )
        if bool((nodes <= noise).any()):
            raise LinAlgError(
                "log det: the matrix is singular to rounding, its log-determinant minus infinity or noise"
            )
        return nodes.log()

    return slq(matmul, shape, log, **options)  # type: ignore[arg-type]
