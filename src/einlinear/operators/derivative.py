"""Derivatives of functions as operators, by automatic differentiation: never written out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from einlinear.operator import Dense, Operator, OperatorError, multiple, product, remembered

Function = Callable[[Tensor], Tensor]


@dataclass(eq=False, repr=False)
class Jacobian(Operator):
    """∂f/∂x at `x`, `[outputs, inputs]`, both flattened; f takes a tensor like `x` and returns one.

    Applied by forward-mode, transposed by reverse-mode differentiation, all columns at once.
    """

    function: Function
    x: Tensor
    transposed: bool = False
    outputs: int = -1

    def __post_init__(self) -> None:
        if self.outputs < 0:
            with torch.no_grad():
                self.outputs = self.function(self.x).numel()

    @remembered
    def shape(self) -> torch.Size:
        sides = (self.outputs, self.x.numel())
        return torch.Size(sides[::-1] if self.transposed else sides)

    def _matmul(self, v: Tensor) -> Tensor:
        def flat(x: Tensor) -> Tensor:
            return self.function(x.reshape(self.x.shape)).reshape(-1)

        point = self.x.reshape(-1)
        if self.transposed:
            pull = vjp(flat, point)[1]
            return _columns(lambda u: pull(u)[0], v)
        return _columns(lambda u: jvp(flat, (point,), (u,))[1], v)

    def _transpose(self) -> "Jacobian":
        return Jacobian(self.function, self.x, not self.transposed, self.outputs)


@dataclass(eq=False, repr=False)
class Hessian(Operator):
    """∂²f/∂x² at `x`, `[inputs, inputs]`, of a function to one number; forward over reverse mode."""

    function: Function
    x: Tensor

    @remembered
    def shape(self) -> torch.Size:
        return torch.Size((self.x.numel(), self.x.numel()))

    def _facts(self) -> set[str]:
        return {"hermitian"}

    def _matmul(self, v: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return grad(lambda point: self.function(point.reshape(self.x.shape)).sum())(x)

        return _columns(lambda u: jvp(slope, (self.x.reshape(-1),), (u,))[1], v)

    def _transpose(self) -> "Hessian":
        return self


def gauss_newton(function: Function, x: Tensor, curvature: Operator | Tensor | None = None) -> Operator:
    """Jᵀ C J: the Hessian of a loss of f without f's own curvature.

    `curvature` is the Hessian of the loss with respect to f's outputs, the unit where it is left
    out (half the squared error). With the Hessian of a negative log-likelihood this is the Fisher
    information (Martens 2020, https://arxiv.org/abs/1412.1193).
    """
    jacobian = Jacobian(function, x)
    if curvature is None:
        return product(jacobian.T, jacobian)
    middle = curvature if isinstance(curvature, Operator) else Dense(curvature)
    made = product(jacobian.T, middle, jacobian)
    return made.claim("psd") if "psd" in middle.properties else made


def fisher(log_likelihoods: Function, x: Tensor) -> Operator:
    """The empirical Fisher information, the mean of g gᵀ over the gradients of each log-likelihood.

    `log_likelihoods` takes parameters like `x` and returns one number for each sample.
    """
    jacobian = Jacobian(log_likelihoods, x)
    if jacobian.shape[-2] == 0:
        raise OperatorError("cannot make a Fisher operator of no samples: the function returned an empty tensor")
    return multiple(1 / jacobian.shape[-2], product(jacobian.T, jacobian))


def raveled(function: Callable[..., Tensor], parameters: dict[str, Tensor]) -> tuple[Function, Tensor]:
    """A function of a dictionary of tensors (a module's parameters) as one of a single flat vector, and that vector.

    With it the Hessian of a network is `Hessian(*raveled(lambda p: loss(functional_call(net, p, x)), dict(...)))`.
    """
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    sizes = [tensor.numel() for tensor in parameters.values()]

    def flat(x: Tensor) -> Tensor:
        parts = x.reshape(-1).split(sizes)
        return function({name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)})

    return flat, torch.cat([tensor.reshape(-1) for tensor in parameters.values()])


def _columns(apply: Callable[[Tensor], Any], v: Tensor) -> Tensor:
    """`apply` for every column of `v`, `[..., n, k]`."""
    rows = v.mT.reshape(-1, v.shape[-2])
    done: Tensor = vmap(apply)(rows)
    return done.reshape(*v.shape[:-2], v.shape[-1], -1).mT
