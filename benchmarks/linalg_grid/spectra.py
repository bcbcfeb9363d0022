"""Questions of eigenvalues, singular values and functions of a matrix."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from case import Array, Case, Wrong, adjoint, close, matrices, size, wide
from judging import condition, hopeless, refused, same_set, singular_values, slack, spread

import einlinear as el

la = el.linalg


def eigvals(case: Case) -> None:
    if case.square:
        tolerance = spread(case.D, case.eps) * size(case.D) * max(case.D.shape[-1], 1)
        same_set(wide(la.eigvals(case.A)), np.linalg.eigvals(case.D).astype(complex), tolerance, "eigenvalues")


def eig(case: Case) -> None:
    if not case.square or not case.D.shape[-1]:
        return
    n, wanted = case.D.shape[-1], np.linalg.eigvals(case.D)
    tolerance = spread(case.D, case.eps) * size(case.D) * n
    w, v = np.linalg.eig(case.D)  # badly scaled matrices are balanced by LAPACK, at the cost of backward error
    tolerance = max(tolerance, 20 * size(case.D @ v - v * w[..., None, :]) * case.eps / 2e-16)
    for k, which in ((None, "LM"), (1, "LM"), (min(2, n), "SM"), (1, "LR"), (1, "SR")):
        values, vectors = la.eig(case.A, k, which)
        v, w = wide(vectors), wide(values)
        if w.shape != (*case.D.shape[:-2], k or n):
            raise Wrong(f"eig: values of shape {w.shape}")
        close(torch.as_tensor(case.D @ v), v * w[..., None, :], tolerance, "A V", 1.0)
        lengths = np.linalg.norm(v, axis=-2)
        if not ((lengths > 0.3) & (lengths < 3)).all():
            raise Wrong(f"eig: vectors of length {lengths.min():.2g} to {lengths.max():.2g}")
        if k is not None:
            key = {"LM": lambda x: -abs(x), "SM": abs, "LR": lambda x: -x.real, "SR": lambda x: x.real}[which]
            near = np.sort(key(w), -1), np.sort(key(wanted), -1)[..., :k]
            close(torch.as_tensor(near[0]), near[1], tolerance, f"eig {k} {which}", 1.0)


def eigh(case: Case) -> None:
    n = case.D.shape[-1]
    if not case.hermitian:
        far = case.square and n and size(case.D - adjoint(case.D)) > 0.1 * size(case.D)
        if far and refused(lambda: la.eigvalsh(case.A), True, "eigvalsh") is not None:
            raise Wrong("eigenvalues of a Hermitian matrix, of one that is not")
        return
    wanted = np.linalg.eigvalsh(case.D)
    scale = size(case.D) * max(n, 1)
    close(la.eigvalsh(case.A), wanted, slack(case), "eigvalsh", scale)
    for k, which in ((None, "LA"), (min(1, n), "LA"), (min(1, n), "SA"), (min(2, n), "LM"), (min(2, n), "SM")):
        values, vectors = la.eigh(case.A, k, which)
        v, w = wide(vectors), wide(values)
        close(torch.as_tensor(case.D @ v), v * w[..., None, :], slack(case), "A V", scale)
        unit = np.broadcast_to(np.eye(w.shape[-1]), (*v.shape[:-2], w.shape[-1], w.shape[-1]))
        close(torch.as_tensor(adjoint(v) @ v), unit, slack(case), "Vᴴ V", 1.0)
        if n:
            key = {"LM": -np.abs(wanted), "SM": np.abs(wanted), "LA": -wanted, "SA": wanted}[which]
            mine = {"LM": -np.abs(w), "SM": np.abs(w), "LA": -w, "SA": w}[which]
            close(torch.as_tensor(np.sort(mine, -1)), np.sort(key, -1)[..., : w.shape[-1]], slack(case), which, scale)
            if (np.diff(w, axis=-1) < 0).any():
                raise Wrong("eigh: values are not ascending")


def svd(case: Case) -> None:
    s, scale = singular_values(case.D), size(case.D) * max(case.D.shape[-2:], default=1) or 1.0
    close(la.svdvals(case.A), s, slack(case), "svdvals", scale)
    for k in (None, 1):
        if k is not None and not min(case.D.shape[-2:]):
            continue
        u, values, vh = la.svd(case.A, k)
        close(values, s[..., :k], slack(case), "singular values", scale)
        x, y = wide(u), wide(vh)
        count = values.shape[-1]
        unit = np.broadcast_to(np.eye(count), (*x.shape[:-2], count, count))
        close(torch.as_tensor(adjoint(x) @ x), unit, slack(case), "Uᴴ U", 1.0)
        close(torch.as_tensor(y @ adjoint(y)), np.broadcast_to(np.eye(count), (*y.shape[:-2], count, count)),
              slack(case), "V Vᴴ", 1.0)  # fmt: skip
        if k is None:
            close(torch.as_tensor(x @ (wide(values)[..., None] * y)), case.D, slack(case), "U S Vᴴ", scale)


def exp(case: Case) -> None:
    if not case.square or size(case.D) * max(case.D.shape[-1], 1) > (60 if case.eps > 1e-10 else 200):
        return
    wanted = np.stack([scipy.linalg.expm(x) for x in matrices(case.D)]) if case.D.size else case.D
    wanted = wanted.reshape(case.D.shape)
    longest = float(np.linalg.norm(case.D, 2, axis=(-2, -1)).max()) if case.D.size else 0.0
    scale, near = math.sqrt(math.exp(longest) * max(size(wanted), 1.0)), slack(case) * max(1, 20 * size(case.D))
    close(la.exp(case.A), wanted, near, "exp A", scale)
    traces = np.trace(wanted, axis1=-2, axis2=-1)
    close(la.trace(case.A, la.exp), traces, near, "tr exp A", scale * max(case.D.shape[-1], 1))


def _dependent(D: Array) -> bool:
    return any(condition(np.linalg.eig(x)[1]) > 1e4 for x in matrices(D)) if D.shape[-1] else False


def _principal(case: Case, ask: Callable[[Any], Any], f: Callable[[Array], Array], what: str, singular: bool) -> None:
    """A function with a cut, by its eigenvalues; refused where real matrices have complex values, or none at all."""
    n = case.D.shape[-1]
    if not case.square:
        return
    if not n:
        close(ask(case.A), case.D, 0.0, what)
        return
    values = np.linalg.eigvals(case.D)
    top = np.abs(values).max(-1, keepdims=True)
    rounding = spread(case.D, case.eps) * size(case.D) * n
    zeros = bool((np.abs(values) <= rounding).any())
    cut = bool(((values.real < 0) & (np.abs(values.imag) <= rounding)).any())
    bad = hopeless(case, 1e-3)
    real = not np.iscomplexobj(case.D)
    found = refused(lambda: ask(case.A), (cut and real) or zeros or bad, what)
    if found is None:
        return
    F = wide(found)
    if not np.isfinite(F).all():
        raise Wrong(f"{what} is not finite, and nothing said so")
    if not singular and condition(case.D) == math.inf and rounding < 1e-2 * size(case.D):
        raise Wrong(f"{what} of a singular matrix, and nothing said so")
    beside = (values.real < 0) & (np.abs(values.imag) < 1e-6 * top) & (np.abs(values.imag) > 100 * case.eps * top)
    if zeros or bad or beside.any() or _dependent(case.D):  # to be judged by its definition alone, where it has one
        return
    for x, y in zip(matrices(case.D), matrices(F), strict=True):
        w, v = np.linalg.eig(x)
        w = np.where(np.abs(w.imag) <= 100 * case.eps * top.max(), w.real + 0j, w)
        wanted = (v * f(w)) @ np.linalg.inv(v)
        low = np.abs(w).min() / top.max()
        near = slack(case) * condition(v) ** 2 / max(low, case.eps)
        close(torch.as_tensor(y), wanted, min(near, 1e-2), what, max(size(wanted), 1.0 if f is np.log else 1e-300))


def log(case: Case) -> None:
    _principal(case, la.log, np.log, "log", singular=False)


def sqrt(case: Case) -> None:
    _principal(case, la.sqrt, np.sqrt, "sqrt", singular=True)
    values = np.linalg.eigvalsh(case.D) if case.hermitian else np.zeros(0)
    if values.size and bool((values >= -1e-12 * np.abs(values).max()).all()):
        root = wide(refused(lambda: la.sqrt(case.A), False, "root of a semi-definite matrix"))
        close(torch.as_tensor(root @ root), case.D, 1e3 * slack(case), "√A √A", size(case.D) * len(root) or 1.0)


def power(case: Case) -> None:
    if not case.square:
        return
    _principal(case, lambda A: la.pow(A, 0.3), lambda w: w**0.3, "A^0.3", singular=True)
    _principal(case, lambda A: la.pow(A, -0.5), lambda w: w**-0.5, "A^-0.5", singular=False)
    for p in (0, 1, 2, 3):
        wanted = np.linalg.matrix_power(case.D, p)
        scale = (size(case.D) * max(case.D.shape[-1], 1)) ** p or 1.0
        if not 1e-37 < scale < 1e37:  # beyond float32
            continue
        close(la.pow(case.A, p), wanted, slack(case), f"A^{p}", scale)
    bad = hopeless(case, 1e-5)
    found = refused(lambda: la.pow(case.A, -2), bad, "A^-2")
    if found is not None and not bad:
        wanted = np.linalg.matrix_power(np.linalg.inv(case.D), 2) if case.D.size else case.D
        close(found, wanted, slack(case) * condition(case.D) ** 2, "A^-2")


def apply(case: Case) -> None:
    if not case.square or _dependent(case.D) or not case.D.shape[-1] or size(case.D) > 1e3:
        return
    wanted = np.stack([v @ np.diag(np.cos(w)) @ np.linalg.inv(v) for w, v in map(np.linalg.eig, matrices(case.D))])
    wanted = wanted.reshape(case.D.shape)
    near = slack(case) * max(1, size(case.D)) * max(condition(np.linalg.eig(x)[1]) for x in matrices(case.D)) ** 2
    worst = max(float(np.abs(np.cos(np.linalg.eigvals(case.D))).max()), 1.0)
    doubtful = any(condition(np.linalg.eig(x)[1]) > 0.3 * case.eps**-0.35 for x in matrices(case.D))
    w, v = np.linalg.eig(case.D)
    near += 100 * size(case.D @ v - v * w[..., None, :]) * case.eps / 2e-16 * condition(v)
    found = refused(lambda: la.apply(case.A, torch.cos), doubtful, "cos")
    if found is not None:
        close(found, wanted, near, "cos A", worst)


QUESTIONS = (eigvals, eig, eigh, svd, exp, log, sqrt, power, apply)
