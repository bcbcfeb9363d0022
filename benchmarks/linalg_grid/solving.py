"""Questions of products, systems, determinants, factors, norms and gradients."""

import math

import numpy as np
import torch
from case import Case, Wrong, adjoint, close, matrices, size, wide
from judging import condition, gap, hopeless, refused, singular_values, slack
from torch import Tensor

import einlinear as el

la = el.linalg


def matmul(case: Case) -> None:
    x = torch.randn(case.D.shape[-1], 2, dtype=case.A.dtype)
    scale = max(size(np.abs(case.D) @ np.abs(wide(x))), 1e-300) if case.D.size else 1.0
    close(case.A.matmul(x), case.D @ wide(x), slack(case), "A x", scale)
    close(case.A, case.D, slack(case), "A", size(case.D) or 1.0)
    y = torch.randn(case.D.shape[-2], 2, dtype=case.A.dtype)
    close(case.A.H.matmul(y), adjoint(case.D) @ wide(y), slack(case), "Aᴴ y", scale * 10 or 1.0)


def properties(case: Case) -> None:
    known, D = case.A.properties, case.D
    tiny = slack(case) * size(D)
    if "hermitian" in known and size(D - adjoint(D)) > tiny:
        raise Wrong("held to be Hermitian")
    if "psd" in known and D.size and np.linalg.eigvalsh((D + adjoint(D)) / 2).min() < -tiny * len(D):
        raise Wrong("held to be positive semi-definite")
    if "unitary" in known and size(D @ adjoint(D) - np.eye(D.shape[-1])) > slack(case):
        raise Wrong("held to be unitary")
    for name, part in (("lower", np.triu(D, 1)), ("upper", np.tril(D, -1))):
        if name in known and size(part) > tiny:
            raise Wrong(f"held to be {name}")


def solve(case: Case) -> None:
    if not case.square:
        return
    b = torch.randn(case.D.shape[-1], 2, dtype=case.A.dtype)
    found = refused(lambda: la.solve(case.A, b), hopeless(case, 1e-3), "solve")
    if found is not None and not hopeless(case, 1e-3):
        wanted = np.linalg.solve(case.D, np.broadcast_to(wide(b), (*case.D.shape[:-1], 2)))
        close(found, wanted, slack(case) * condition(case.D), "x")


def inverse(case: Case) -> None:
    if not case.square:
        return
    found = refused(lambda: la.inverse(case.A), hopeless(case, 1e-3), "inverse")
    if found is not None and not hopeless(case, 1e-3):
        wanted, near = np.linalg.inv(case.D), slack(case) * condition(case.D)
        close(found, wanted, near, "A⁻¹")
        close(found.H, adjoint(wanted), near, "A⁻ᴴ")
        close(la.slogdet(found).logabsdet, -np.linalg.slogdet(case.D)[1], near, "log |det A⁻¹|", 1.0)
        back = refused(lambda: la.inverse(found), True, "inverse of the inverse")
        if back is not None:
            close(back, case.D, near, "(A⁻¹)⁻¹")


def slogdet(case: Case) -> None:
    if not case.square:
        return
    sign, logarithm = la.slogdet(case.A)
    wanted_sign, wanted = np.linalg.slogdet(case.D)
    s = singular_values(case.D)
    usual = np.log(np.maximum(s, 1e-300)).sum(-1) if s.size else np.zeros(case.D.shape[:-2])
    for one, value, right_sign, right, values, _ in np.broadcast(
        wide(sign), wide(logarithm), wanted_sign, wanted, *[condition(case.D)] * 1, usual
    ):
        if values * case.eps * max(case.D.shape[-1], 1) > 1e-2:
            ceiling = float(np.log(np.maximum(s, case.eps * 1e3 * (s.max() or 1.0) * case.D.shape[-1])).sum(-1).max())
            if not (value == -math.inf or value < max(ceiling, right) + 1):
                raise Wrong(f"log |det| of a singular matrix: {value:.3g}, wanted {right:.3g}")
            if np.isnan(one):
                raise Wrong("sign is NaN")
        else:
            near = slack(case) * max(values, 1.0)
            if abs(value - right) > near * max(1, abs(right)) or abs(one - right_sign) > near:
                raise Wrong(f"{one:.6g}, {value:.8g}; wanted {right_sign:.6g}, {right:.8g}")


def logdet(case: Case) -> None:
    if not case.square or hopeless(case, 1e-3):
        return
    sign, wanted = np.linalg.slogdet(case.D)
    negative = not np.iscomplexobj(case.D) and bool((sign < 0).any())
    found = refused(lambda: la.logdet(case.A), negative, "logdet")
    if found is not None and not negative:
        near = slack(case) * condition(case.D) * max(1, size(wanted))
        close(found.real, wanted, near, "log det", 1.0)
        if (np.abs(wanted) < 80).all():
            close(found.exp(), sign * np.exp(wanted), near, "det")


def trace(case: Case) -> None:
    if case.square:
        wanted = np.trace(case.D, axis1=-2, axis2=-1)
        scale = size(case.D) * max(case.D.shape[-1], 1)
        close(la.trace(case.A), np.asarray(wanted), slack(case), "trace", scale or 1.0)


def diagonal_of(case: Case) -> None:
    close(la.diagonal(case.A), np.diagonal(case.D, 0, -2, -1), slack(case), "diagonal", size(case.D) or 1.0)


def pinv(case: Case) -> None:
    if not gap(case):
        return
    s = singular_values(case.D)
    kept = s[s > 1e3 * 2e-16 * s.max(initial=0.0)] if s.size else s
    k = float(kept.max() / kept.min()) if kept.size else 1.0
    rtol = 1e3 * 2e-16
    wanted = np.linalg.pinv(case.D, rcond=rtol) if case.D.size else np.swapaxes(case.D, -1, -2)
    close(la.pinv(case.A), wanted, slack(case) * k**2, "A⁺")
    b = torch.randn(case.D.shape[-2], dtype=case.A.dtype)
    found = la.lstsq(case.A, b)
    close(found, (wanted @ wide(b)[:, None])[..., 0], slack(case) * k**2, "A⁺ b", max(size(wanted), 1e-300))


def cholesky(case: Case) -> None:
    if not case.hermitian:
        return
    values = np.linalg.eigvalsh(case.D)
    definite = not values.size or bool((values > 1e3 * case.eps * np.abs(values).max(-1, keepdims=True)).all())
    doubtful = not definite and bool((values > -1e3 * case.eps * np.abs(values).max(-1, keepdims=True)).all())
    found = refused(lambda: la.cholesky(case.A), not definite, "cholesky")
    if found is not None:
        if not definite and not doubtful:
            raise Wrong("a Cholesky factor of an indefinite matrix")
        L = wide(found)
        if np.isnan(L).any():
            raise Wrong("a Cholesky factor that is NaN")
        close(torch.as_tensor(L @ adjoint(L)), case.D, slack(case), "L Lᴴ", size(case.D) * max(len(L), 1))
        if size(np.triu(L, 1)) > 0 and size(np.triu(L, 1)) > slack(case) * size(L):
            raise Wrong("a Cholesky factor that is not lower triangular")


def lu(case: Case) -> None:
    p, lower, upper = (wide(x) for x in la.lu(case.A))
    scale = size(case.D) * max(case.D.shape[-2:], default=1) or 1.0
    close(torch.as_tensor(p @ lower @ upper), case.D, slack(case), "P L U", scale)
    if size(np.triu(lower, 1)) > 0 or size(np.tril(upper, -1)) > 0:
        raise Wrong("lu: factors are not triangular")


def norm(case: Case) -> None:
    if case.D.size and 0 < size(case.D) < 1e-15:  # squares below float32
        return
    for kind in ("fro", "nuc", 2, -2, 1, -1, math.inf, -math.inf):
        wanted = np.linalg.norm(case.D, kind, axis=(-2, -1)) if case.D.size else np.zeros(case.D.shape[:-2])
        close(la.norm(case.A, kind), np.asarray(wanted), slack(case), f"norm {kind}", size(case.D) or 1.0)


def cond(case: Case) -> None:
    k = condition(case.D)
    found = wide(la.cond(case.A))
    if k * case.eps > 1e-4:
        if not found.max() > min(0.1 / case.eps, k / 2):
            raise Wrong(f"cond is {found.max():.3g}, wanted {k:.3g}")
        return
    if 0 < size(case.D) < 1e-15:
        return
    if case.D.size:
        s = singular_values(case.D)
        close(torch.as_tensor(found), s[..., 0] / s[..., -1], slack(case) * k, "cond")
        if case.square:
            for p in (1, -1, "fro", -2, "nuc", math.inf):
                wanted = np.asarray([np.linalg.cond(x, p) for x in matrices(case.D)]).reshape(case.D.shape[:-2])
                close(la.cond(case.A, p), wanted, slack(case) * k, f"cond {p}")


def gradient(case: Case) -> None:
    """Of a scalar by the leaves, against a central difference in a random direction."""
    A = case.A
    if A.dtype == torch.float32 or not A.tensors or not case.D.size or hopeless(case, 1e-7):
        return
    leaves = [t.detach().clone().requires_grad_() for t in A.tensors]
    direction = [torch.randn_like(t) for t in leaves]
    x = torch.randn(case.D.shape[-1], 1, dtype=A.dtype)

    def value(*tensors: Tensor) -> Tensor:
        B = A.with_tensors(*tensors)
        made = (B @ x).abs().square().sum() + la.norm(B).square().sum()
        if case.square:
            made = made + la.solve(B, x).abs().square().sum() + la.slogdet(B).logabsdet.sum()
        return made

    h = 1e-6
    if not 1e-3 < size(case.D) < 1e4:
        return
    if A.claims or "claim" in repr(A):  # a perturbation would break a claim
        return
    grads = torch.autograd.grad(value(*leaves), leaves, allow_unused=True)
    slope = sum(float((g.conj() * d).real.sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
    with torch.no_grad():
        ends = [value(*(t + s * h * d for t, d in zip(leaves, direction, strict=True))) for s in (1, -1)]
    wanted = float(ends[0] - ends[1]) / (2 * h)
    k = condition(case.D)
    if abs(slope - wanted) > 1e-4 * k**2 * (abs(wanted) + 1) + 1e-9 * float(ends[0].abs()) / h:
        raise Wrong(f"gradient {slope:.8g}, difference {wanted:.8g}")


QUESTIONS = (
    matmul,
    properties,
    solve,
    inverse,
    slogdet,
    logdet,
    trace,
    diagonal_of,
    pinv,
    cholesky,
    lu,
    norm,
    cond,
    gradient,
)
