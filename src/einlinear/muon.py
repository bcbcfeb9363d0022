"""Muon for stacks of matrices."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def orthogonalize(update: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, nearly: all of them end in about [0.7, 1.2].

    Five Newton-Schulz steps; in bfloat16 on accelerators. Zero slices stay zero.

    Args:
        update: `[..., out, in]`; each slice is a matrix of its own.

    Source: Jordan et al. 2024 (Muon), https://kellerjordan.github.io/posts/muon.
    """
    tall: bool = update.shape[-2] > update.shape[-1]
    x: Tensor = (update.mT if tall else update).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if x.device.type != "cpu":
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised slice by slice, for hidden weights; AdamW for everything else.

        groups = el.parameter_groups(model, lr=0.02, adamw_lr=3e-3, optimizer="muon", readout="lm_head")
        optimizer = el.Muon(groups)

    Unlike `torch.optim.Muon`, it takes stacks of matrices, `[slices, out, in]`, and it applies the
    rate as it is: the dependence on shape, sqrt(out/in) of each slice, is in the groups. Sharded by
    their first dimension, factors of several slices are orthogonalised where they lie.

    Args:
        params: groups of `parameter_groups`, or parameters, which are then all "hidden".
        lr: the rate of groups that have none.
        weight_decay: the decay of groups that have none, applied as in AdamW.
        momentum: of hidden weights.
        nesterov: whether the momentum looks ahead.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: if a hidden parameter is not a matrix or a stack of matrices.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {**options, "betas": betas, "eps": eps, "role": "hidden"})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["role"] == "hidden" and parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"cannot orthogonalise a parameter of shape {tuple(parameter.shape)}: Muon takes [out, in] "
                        f"or [slices, out, in]; give it another role, or leave it to another optimizer"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters; returns what `closure`, which may recompute the loss, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["role"] == "hidden":
                self._orthogonal_step(group, trained)
            elif trained:
                self._adamw_step(group, trained)
        return loss

    def _orthogonal_step(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in trained]
        if not trained:
            return
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(trained, _orthogonalized(ahead), alpha=-group["lr"])

    def _adamw_step(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for parameter in trained:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in trained]
        adamw(
            trained,
            [parameter.grad for parameter in trained if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # of AMSGrad
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _orthogonalized(updates: Sequence[Tensor]) -> list[Tensor]:
    """Each update by `orthogonalize`, all matrices of one shape together: a few launches, however many layers."""
    made = list(updates)
    alike: dict[object, list[int]] = {}
    for position, update in enumerate(updates):
        # Sharded ones stay where they lie.
        kind = position if isinstance(update, DTensor) else (update.shape[-2:], update.dtype, update.device)
        alike.setdefault(kind, []).append(position)
    for positions in alike.values():
        stacks = [updates[position].reshape(-1, *updates[position].shape[-2:]) for position in positions]
        joint = orthogonalize(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
        for position, stack in zip(positions, joint.split([len(stack) for stack in stacks]), strict=True):
            made[position] = stack.reshape(updates[position].shape)
    return made
