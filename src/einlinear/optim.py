"""Learning rates for whole models: parameter groups for any torch optimizer, and a table that explains them."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import AdamW, Optimizer

from einlinear.kernels import explain
from einlinear.layer import Linear
from einlinear.routing import Router
from einlinear.scaling import rule, spectral
from einlinear.structure import Structure
from einlinear.structures import Dense

Role = Literal["hidden", "embedding", "readout", "vector", "scalar", "gain", "router"]
"""What a parameter is to the width: `hidden` maps width to width, `embedding` a fixed number of
features to width, `readout` width to a fixed number; a `vector` grows with the width, a `scalar`
does not, a `gain` is a scalar that is never decayed, and a `router` chooses among experts."""

Group = dict[str, Any]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that torch.compile, FSDP and activation checkpointing put in."""


@dataclass(frozen=True)
class _Use:
    """A parameter as one module uses it.

    A matrix has the `structure` of its layer; where the layer is an `einlinear.Linear`, it is its
    factor `index`.
    """

    module: str
    local: str
    parameter: Tensor
    role: Role | None
    structure: Structure | None = None
    index: int | None = None
    in_block: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.local}".lstrip(".")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    readout: str | Sequence[str] | None,
    optimizer: str = "adamw",
    width_mult: float = 1.0,
    depth_mult: float = 1.0,
    depth_alpha: float = 1.0,
    roles: Mapping[str, Role] | None = None,
    structure_aware: bool = True,
    decoupled: bool = False,
    decay_vectors: bool = True,
    eps: float | None = None,
    adamw_lr: float | None = None,
) -> list[Group]:
    """Parameter groups under which one learning rate serves every structure, width and depth.

        groups = el.parameter_groups(model, lr=3e-3, weight_decay=0.1, width_mult=4, readout="lm_head")
        optimizer = torch.optim.AdamW(groups, fused=True)

    Factors of `einlinear.Linear` take the rate of the dense layer they replace times that of
    `spectral(structure, optimizer)`; on dense models rates and decays are those of microsoft/mup.
    Groups are plain dicts, merged by role, rate and decay, with the keys `params`, `lr`,
    `weight_decay`, `lr_mult` (the rate over the base rate), `role`, `param_names`, and `eps` if
    asked for. Nothing is attached to tensors: a copy, a sharded or a materialised model has the same
    groups. Call this after `fully_shard` or `to_empty`, which put new parameters in place.

    A schedule must multiply each group's own rate, as `LambdaLR` does. A loop that sets one
    `group["lr"]` for all groups erases the multipliers in silence, and so do a cosine with a floor
    (`eta_min`) and `OneCycleLR` with one `max_lr`; write `group["lr"] = lr * group["lr_mult"]`.

    Args:
        model: any module; `nn.Linear`, transformers' `Conv1D`, `nn.Embedding`, `nn.MultiheadAttention`
            and `einlinear.Linear` are known, and what has one dimension is a vector.
        lr: the base learning rate, as tuned at `width_mult = depth_mult = 1`.
        weight_decay: the base weight decay. torch's optimizers multiply decay by the rate, so each
            group's is divided by its multiplier: all parameters decay alike.
        readout: qualified name (or names) of the last layer, or None if there is none; shapes cannot
            tell. The model must divide the input of that layer by `width_mult`.
        optimizer: "adamw" (and Adam, Lion: all whose update has entries of size 1), "sgd", or "muon"
            for `einlinear.Muon`.
        width_mult: width over the width at which `lr` was tuned.
        depth_mult: depth over the tuned depth. The model must multiply residual branches by
            `residual_scale(depth_mult, depth_alpha)`; blocks are what an `nn.ModuleList` or
            `nn.Sequential` holds.
        depth_alpha: α of CompleteP.
        roles: roles of parameters by patterns of their names, where modules are of a kind not known
            or to overrule: `{"*.positions": "embedding"}`. The `nn.Linear` that reads pixels is an
            "embedding" too.
        structure_aware: False gives each factor the rate of the dense layer that it replaces, whatever its fans:
            the naive rule, to compare with.
        decoupled: leave decay undivided, for optimizers that do not multiply it by the rate.
        decay_vectors: whether vectors and scalars are decayed too.
        eps: Adam's ε at the tuned size; each group's is scaled as its gradients are.
        adamw_lr: with "muon", the base rate of all that is not hidden, which Muon leaves to AdamW;
            None for `lr`.

    Raises:
        ValueError: for a readout, role, pattern or optimizer that does not exist, for a parameter of
            unknown role, and for a tied parameter whose uses ask for different rates.

    Sources: Tensor Programs V, https://arxiv.org/abs/2203.03466, table 8 (width); CompleteP,
    https://arxiv.org/abs/2505.01618, table 1 (depth and ε); Compute Better Spent,
    https://arxiv.org/abs/2406.06248, section 4 (structures).
    """
    rule(optimizer)
    for option, value in (("width_mult", width_mult), ("depth_mult", depth_mult)):
        if not value > 0:
            raise ValueError(f"cannot scale learning rates for {option}={value}: pass a positive ratio of sizes")
    for option, value in (("lr", lr), ("weight_decay", weight_decay), ("adamw_lr", adamw_lr or 0.0)):
        if not 0 <= value < math.inf:  # torch checks an optimizer's defaults, and not those of its groups
            raise ValueError(f"cannot make parameter groups with {option}={value}: pass a number of at least 0")
    merged: dict[tuple[object, ...], Group] = {}
    seen: dict[int, tuple[str, float]] = {}
    for use in _resolved(model, readout, roles or {}):
        # Muon orthogonalises what maps width to width; AdamW updates the rest.
        by = "adamw" if optimizer == "muon" and use.role != "hidden" else optimizer
        depth = depth_mult if use.in_block and use.role not in ("embedding", "readout", "gain", "router") else 1.0
        known_as = use if structure_aware else replace(use, index=None)
        mult = _width_rate(known_as, by, width_mult) * _depth_rate(by, depth, depth_alpha)
        first, known = seen.setdefault(id(use.parameter), (use.name, mult))
        if known != mult:
            raise ValueError(
                f"cannot choose one learning rate for the tied parameter {first} = {use.name}: its uses ask for "
                f"{known:g} and {mult:g} times the base rate; if one of them is the last layer, name it by "
                f"readout=, else give both the same role by roles="
            )
        if first != use.name or not use.parameter.requires_grad:
            continue
        base = lr if by == optimizer or adamw_lr is None else adamw_lr
        undecayed = use.role == "gain" or (use.role in ("vector", "scalar") and not decay_vectors)
        decay = 0.0 if undecayed else weight_decay if decoupled else weight_decay / mult
        settings: Group = {"lr": base * mult, "weight_decay": decay, "lr_mult": mult, "role": use.role}
        if eps is not None:
            settings["eps"] = eps * _gradient_size(use, width_mult) * depth**-depth_alpha
        group = merged.setdefault(tuple(settings.values()), {"params": [], **settings, "param_names": []})
        group["params"].append(use.parameter)
        group["param_names"].append(use.name)
    return list(merged.values())


def _width_rate(use: _Use, optimizer: str, width_mult: float) -> float:
    """The multiplier of the base rate: that of the dense layer, times that of the factor in it."""
    of = rule(optimizer)
    if use.role in ("scalar", "gain"):
        return 1.0
    if use.role != "hidden":
        dense = of.of_vector(width_mult)
    elif optimizer == "muon" and use.structure:
        # An orthogonal update has a size of its own, so this is absolute: no tuned width comes in.
        dense = of.of_matrix(use.structure.d_in, use.structure.d_out, 1)
    else:
        dense = of.of_matrix(width_mult, width_mult, 1)
    if use.structure is None or use.index is None:
        return dense
    return dense * spectral(use.structure, optimizer)[use.index].lr


def _depth_rate(optimizer: str, depth_mult: float, alpha: float) -> float:
    """Blocks may move the stream by 1/depth each, and the branch gives depth^-α of that.

    Only SGD feels that the gradient of a branch is smaller by depth^-α as well.
    """
    return float(depth_mult ** (2 * alpha - 1 if optimizer == "sgd" else alpha - 1))


def _gradient_size(use: _Use, width_mult: float) -> float:
    """How the gradient's entries scale: the loss is shared out over the outputs of a layer, or of a factor."""
    if use.role in ("scalar", "gain"):
        return 1.0
    if use.structure is None or use.index is None:
        return 1 / width_mult
    scale = spectral(use.structure)[use.index]  # of one expert, where there are several
    return use.structure.d_out / (scale.slices * scale.fan_out) / width_mult


def _resolved(model: nn.Module, readout: str | Sequence[str] | None, roles: Mapping[str, Role]) -> Iterator[_Use]:
    """Every use of every parameter, with its role: as the user says, or else as its module tells."""
    uses = list(_uses(model))
    names = [use.name for use in uses]
    layers = {use.module for use in uses if use.structure}
    last = [readout] if isinstance(readout, str) else list(readout or ())
    for layer in last:
        if layer not in layers:
            raise ValueError(
                f"cannot find the readout '{layer}': no linear layer of the model has that name; "
                f"{_nearest(layer, layers)}, or pass readout=None if there is none"
            )
    for pattern, role in roles.items():
        if role not in get_args(Role):
            raise ValueError(f"cannot give '{pattern}' the role '{role}': roles are {', '.join(get_args(Role))}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"cannot give '{pattern}' a role: no parameter has that name; {_nearest(pattern, names)}")
    for use in uses:
        guess = use.role
        if use.module in last:
            guess = "readout" if use.structure else "scalar" if guess == "vector" else guess
        given = (said for pattern, said in roles.items() if fnmatchcase(use.name, pattern))
        settled = next(given, guess)
        if settled is None:
            raise ValueError(
                f"cannot choose a learning rate for {use.name} of shape {tuple(use.parameter.shape)}: its module is of "
                f"no known kind, and shapes do not tell what grows with the width; pass "
                f"roles={{'{use.name}': 'hidden'}}, or 'embedding', 'readout', 'vector', 'scalar'"
            )
        yield replace(use, role=settled)


def _uses(model: nn.Module) -> Iterator[_Use]:
    """Every use of every parameter, in the order of the modules; names are those of the model without wrappers."""
    # AveragedModel, DistributedDataParallel: what holds nothing but the model.
    while [name for name, _ in model.named_children()] == ["module"] and not [*model.parameters(recurse=False)]:
        model = model.get_submodule("module")
    blocks: set[str] = set()
    factors: set[nn.Module] = set()
    for path, module in model.named_modules():
        parts = path.split(".")
        in_block = any(".".join(parts[:end]) in blocks for end in range(1, len(parts) + 1))
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks |= {f"{path}.{child}".lstrip(".") for child, _ in module.named_children()}
        if isinstance(module, Linear):
            factors.add(module.factors)
        if module not in factors:
            name = ".".join(part for part in parts if part not in WRAPPERS)
            for use in _own(name, module):
                yield replace(use, in_block=in_block)


def _own(name: str, module: nn.Module) -> Iterator[_Use]:
    """The parameters that one module holds itself, with the roles that its kind tells."""
    if isinstance(module, Linear):
        for index, factor in enumerate(module.factors):
            yield _Use(name, f"factors.{index}", factor, "hidden", module.structure, index)
    conv1d = type(module).__name__ == "Conv1D"  # transformers' GPT-2, whose weight is [in, out]
    for local, parameter in module.named_parameters(recurse=False):
        if is_lazy(parameter):
            raise ValueError(
                f"cannot choose a learning rate for {name}.{local}: it is not there yet; call the model once first"
            )
        if local == "_flat_param":
            raise ValueError(
                f"cannot see the parameters inside {name}.{local}: FullyShardedDataParallel has flattened them; "
                f"shard by fully_shard instead, or make the groups before"
            )
        if isinstance(module, Linear) and local == "gains":
            yield _Use(name, local, parameter, "gain")
        elif isinstance(module, Router):
            yield _Use(name, local, parameter, "router")
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield _Use(name, local, parameter, "embedding")
        elif parameter.ndim <= 1 or local in ("bias_k", "bias_v"):
            yield _Use(name, local, parameter, "scalar" if parameter.numel() == 1 else "vector")
        else:
            role: Role | None = "hidden" if conv1d or isinstance(module, (nn.Linear, nn.MultiheadAttention)) else None
            shape = parameter.shape
            d_out, d_in = shape[-2:] if parameter.ndim <= 3 else (shape[0], math.prod(shape[1:]))
            yield _Use(name, local, parameter, role, Dense()(d_out, d_in) if conv1d else Dense()(d_in, d_out))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"near are {', '.join(near)}" if near else f"there are {', '.join(sorted(known)[:10])}"


@explain.register
def _(model: nn.Module, groups: Sequence[Group]) -> str:
    """One line for each kind of parameter; numbers of blocks are left out where their lines are equal."""
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    first_use: dict[int, _Use] = {}
    for use in _uses(model):
        first_use.setdefault(id(use.parameter), use)
    lines: Counter[tuple[str, ...]] = Counter()
    for use in first_use.values():
        fans = std = ""
        if use.structure:
            scale = spectral(use.structure)[use.index or 0]
            fans = f"{scale.slices} x {scale.fan_in} -> {scale.fan_out}"
            std = "" if use.index is None else f"{scale.std:.3g}"
        group = group_of.get(id(use.parameter))
        rates = ["not trained", "", "", ""]
        if group:
            rates = [group["role"], *(f"{group[key]:.3g}" for key in ("lr_mult", "lr", "weight_decay"))]
        lines[(re.sub(r"(?<![^.])\d+(?=\.)", "*", use.name), rates[0], fans, std, *rates[1:])] += 1
    head = ("parameter", "role", "slices x in -> out", "std", "rate mult", "rate", "decay", "count")
    rows = [head, *((*line, str(count)) for line, count in lines.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class TrainerOptimizer:
    """Has transformers' `Trainer` train with `parameter_groups`.

        settings = {"lr": 3e-3, "weight_decay": 0.1}
        Trainer(model, arguments, optimizer_cls_and_kwargs=(el.TrainerOptimizer, settings))

    Settings are the arguments of `parameter_groups`, and `make`, the optimizer's class (AdamW if
    there is none) or whatever makes one of parameter groups. Without `readout` it is the model's
    output layer, `get_output_embeddings`. The rate and decay in `TrainingArguments` play no part;
    its schedule multiplies each group's own rate.
    """

    def __call__(
        self, model: nn.Module, *, make: Callable[[list[Group]], Optimizer] = AdamW, **settings: Any
    ) -> Optimizer:
        if "readout" not in settings:
            output = getattr(model, "get_output_embeddings", lambda: None)()
            settings["readout"] = next((name for name, module in model.named_modules() if module is output), None)
        return make(parameter_groups(model, **settings))
