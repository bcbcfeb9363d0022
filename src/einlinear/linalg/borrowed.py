"""What is borrowed from scipy (the extra `lab`): functions of defective matrices, banded and sparse factorisations."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def scipy(module: str, doing: str) -> Any:
    """A module of scipy, or a sentence where there is none."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'cannot {doing} without scipy, which is not installed: pip install "einlinear[lab]"', name=error.name
        ) from error


def has_scipy() -> bool:
    """Whether scipy is there."""
    return importlib.util.find_spec("scipy") is not None


def matrix_function(matrix: Tensor, name: str, p: float | None) -> Tensor:
    """log, or the power p, of each matrix `[..., n, n]` by its Schur form; complex where it must be."""
    linalg = scipy("linalg", f"take the {name} of a matrix with dependent eigenvectors")
    numpy = importlib.import_module("numpy")

    def one(a: Any) -> Any:
        if name == "log":
            return linalg.logm(a)
        return linalg.sqrtm(a) if p == 0.5 else linalg.fractional_matrix_power(a, p)

    flat = matrix.detach().cpu().reshape(-1, *matrix.shape[-2:]).numpy()
    with numpy.errstate(all="ignore"):
        made = torch.as_tensor(numpy.stack([numpy.asarray(one(a)) for a in flat]))
    made = made.reshape(matrix.shape).to(matrix.device)
    if made.is_complex() and not matrix.is_complex() and bool(made.imag.abs().max() <= 1e-10 * made.abs().max()):
        made = made.real
    return made.to(matrix.dtype.to_complex() if made.is_complex() else matrix.dtype)
