"""Every operator on a GPU in 16 bits against float64, forward and each gradient, on memory poisoned with NaN.

    python benchmarks/check.py [--only TEXT ...]

Continuous integration has no GPU, and runs the same kernels in Triton's interpreter. Here an error
must be within twice that of stock matmuls in the same type (`einlinear.apply` in 16 bits).
"""

import argparse
import copy
import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import einlinear as el
from einlinear.kernels import KERNELS, Routing
from einlinear.kernels.kernel import Target
from einlinear.kernels.reference import Reference
from einlinear.kernels.routed import ROUTED_KERNELS, everyone
from einlinear.mlp import GATED

FAMILIES = (
    el.BTT(),
    el.BTT(rank=3),
    el.BTT(rank=4),
    el.Monarch(blocks=16),
    el.LowRank(),
    el.LowRank(rank=45),
    el.Kronecker(),
)
Named = dict[str, Tensor]
Errors = tuple[str, dict[str, float], dict[str, float]]
"""The name of a case, and its relative errors beside those of stock matmuls."""

ROUTED = tuple(
    (family, width, tokens)
    for family in (el.BTT(), el.BTT(rank=2), el.LowRank(rank=16), el.Kronecker(), el.Monarch(blocks=16), el.Dense())
    for width, tokens in ((512, 1), (512, 333), (1024, 2047))
)
DEVICE = "cuda"

SHAPES = ((256, 33), (512, 1), (512, 1000), (768, 77), (1024, 2047), (1024, 16), (2048, 515))


def gradients(run: Callable[..., Tensor], leaves: Named, direction: Tensor, dtype: torch.dtype) -> Named:
    own = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    y = run(*own.values())
    made = torch.autograd.grad(y, list(own.values()), direction.to(dtype))
    return {"y": y, **dict(zip(own, made, strict=True))}


def errors(mine: Named, exact: Named) -> dict[str, float]:
    return {name: ((mine[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}


def layers(dtype: torch.dtype, *shapes: tuple[int, int]) -> Iterator[Errors]:
    for width, tokens in shapes:
        for family in FAMILIES:
            structure = family(width, width).canonical
            drawn = {"x": (tokens, width), "bias": (width,)}
            leaves = {name: torch.randn(shape, device="cuda", dtype=dtype) for name, shape in drawn.items()}
            for k, (shape, scale) in enumerate(zip(structure.matrix_shapes, el.spectral(structure), strict=True)):
                leaves[f"factor {k}"] = (torch.randn(shape, device="cuda") * scale.std).to(dtype)
            direction = torch.randn(tokens, width, device="cuda", dtype=dtype)

            def by(kernel: object, structure: el.Structure = structure) -> Callable[..., Tensor]:
                run = kernel.prepare(structure)
                return lambda x, bias, *factors: run(factors, x, bias)

            exact = gradients(by(Reference()), leaves, direction, torch.float64)
            stock = errors(gradients(by(Reference()), leaves, direction, dtype), exact)
            for kernel in KERNELS:
                if kernel.refuses(structure, Target.of("cuda", dtype)) is None and kernel.name != "reference":
                    found = errors(gradients(by(kernel), leaves, direction, dtype), exact)
                    yield f"{kernel.name} {family} {width} x {tokens}", found, stock


def mlps(dtype: torch.dtype, *activations: str) -> Iterator[Errors]:
    for activation in activations:
        for width, hidden, tokens, bias in (
            (512, 2048, 1001, True),
            (1024, 4096, 300, False),
            (4096, 11008, 77, False),
        ):
            mlp = el.StructuredMLP(width, hidden, el.BTT(), activation, bias, device="cuda", dtype=dtype)
            assert mlp.unfused is None, mlp.unfused
            x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
            direction = torch.randn_like(x)
            found = _of(mlp, x, direction)
            mlp._nested = None
            stock, exact = (
                _of(mlp, x, direction),
                _of(mlp.double(), x.double().detach().requires_grad_(), direction.double()),
            )
            yield (
                f"mlp {activation} {width}-{hidden} x {tokens} bias={bias}",
                errors(found, exact),
                errors(stock, exact),
            )


def shared(dtype: torch.dtype, *shapes: tuple[int, int]) -> Iterator[Errors]:
    for width, tokens in shapes:
        layers = [el.Linear(width, out, "btt", device="cuda", dtype=dtype) for out in (width, width // 4, width // 4)]
        x = torch.randn(tokens, width, device="cuda", dtype=dtype)
        module = torch.nn.ModuleList(layers)

        def run(share: bool, x: Tensor, module: torch.nn.ModuleList = module) -> Named:
            x = x.detach().requires_grad_()
            ys = el.shared_input(x, *module) if share else [layer(x) for layer in module]
            named = dict(module.named_parameters())
            torch.manual_seed(0)
            directions = [torch.randn(y.shape, device="cuda").to(y.dtype) for y in ys]
            made = torch.autograd.grad(ys, [x, *named.values()], directions)
            return {**{f"y {k}": y for k, y in enumerate(ys)}, **dict(zip(("x", *named), made, strict=True))}

        found, stock = run(True, x), run(False, x)
        exact = run(False, x.double()) if module.double() else {}
        yield f"shared {width} x {tokens}", errors(found, exact), errors(stock, exact)


EXPERTS = ((8, 2), (16, 2), (5, 1), (1, 1), (3, 3))
"""How many, and how many are active."""


def experts(dtype: torch.dtype, *cases: tuple[el.Family, int, int]) -> Iterator[Errors]:
    """Layers with routers of their own, by every kernel; losses are of the result and of the logits."""
    for (family, width, tokens), (count, active) in ((case, sizes) for case in cases for sizes in EXPERTS):
        layer = el.Linear(width, width, family, experts=count, active=active, device=DEVICE, dtype=dtype)
        torch.nn.init.normal_(layer.router.weight)
        x = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
        directions = torch.randn(tokens, width, device=DEVICE), torch.randn(tokens, count, device=DEVICE)
        target = Target.of(DEVICE, dtype)
        for kernel in ROUTED_KERNELS:
            if kernel.refuses(layer.structure, target) is not None or kernel.name == "all experts":
                continue
            mine = copy.deepcopy(layer)
            runner = ((math.inf, kernel.prepare(layer.structure)),)
            mine._routed_plan = replace(mine._routed_plan, cpu=runner, cuda=runner, cuda_half=runner)
            found = _routed(mine, x, directions, None)
            chosen = mine.router.latest.chosen
            stock = _routed(layer, x, directions, chosen)
            exact = _routed(copy.deepcopy(layer).double(), x.double(), directions, chosen)
            yield (
                f"{kernel.name} {family} {width} x {tokens}, {active} of {count}",
                errors(found, exact),
                errors(stock, exact),
            )


def _routed(layer: el.Linear, x: Tensor, directions: tuple[Tensor, Tensor], chosen: Tensor | None) -> Named:
    """The result, logits and all gradients; by all experts and given choices, or by the layer itself where None."""
    x, named = x.detach().requires_grad_(), dict(layer.named_parameters())
    if chosen is None:
        y = layer(x)
        logits = layer.router.latest.logits
    else:
        logits = layer.router._logits(x)
        routing = Routing(chosen, logits.gather(1, chosen).softmax(-1), logits.shape[1])
        y = everyone(layer.structure)(list(layer.factors), x, routing, layer.bias)
    made = torch.autograd.grad(
        [y, logits], [x, *named.values()], [d.to(v.dtype) for d, v in zip(directions, (y, logits), strict=True)]
    )
    return {"y": y, "logits": logits, **dict(zip(("x", *named), made, strict=True))}


def _of(module: torch.nn.Module, x: Tensor, direction: Tensor) -> Named:
    named = dict(module.named_parameters())
    y = module(x)
    made: Sequence[Tensor] = torch.autograd.grad(y, [x, *named.values()], direction)
    return {"y": y, **dict(zip(("x", *named), made, strict=True))}


Task = tuple[Callable[..., Iterator[Errors]], torch.dtype, tuple[object, ...]]


def told(task: Task) -> str:
    make, dtype, arguments = task
    return f"{make.__name__} {dtype} {arguments}"


def run(task: Task) -> tuple[str, float, int, int]:
    """What was checked, the worst error over that of stock matmuls, how many cases were above 2, and of how many."""
    make, dtype, arguments = task
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    worst, failed, count = 0.0, 0, 0
    try:
        for name, found, stock in make(dtype, *arguments):
            floor = torch.finfo(dtype).eps / 4
            ratios = {what: error / max(stock[what], floor) for what, error in found.items()}
            what = max(ratios, key=lambda name: float("inf") if ratios[name] != ratios[name] else ratios[name])
            worst, count = max(worst, ratios[what]), count + 1
            if not ratios[what] <= 2:
                failed += 1
                print(f"{dtype} {name}: {what} errs by {found[what]:.3g}, stock by {stock[what]:.3g}", flush=True)
    except Exception:
        print(f"{dtype} {arguments}: {traceback.format_exc()}", flush=True)
        failed += 1
    return told(task), worst, failed, count


def main(only: list[str], workers: int) -> None:
    tasks: list[Task] = []
    for dtype in (torch.bfloat16, torch.float16):
        tasks += [(layers, dtype, (shape,)) for shape in SHAPES]
        tasks += [(mlps, dtype, (activation,)) for activation in ("relu2", "gelu", "gelu_tanh", "silu", *GATED)]
        tasks += [(experts, dtype, (case,)) for case in ROUTED]
        tasks += [(shared, dtype, ((1024, 1), (2048, 8), (1024, 1001), (2048, 4097), (512, 300)))]
    tasks = [task for task in tasks if any(text in told(task) for text in only)]
    worsts, failures, counts = [0.0], [0], [0]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # compiling takes the time
        for name, worst, failed, count in pool.imap_unordered(run, tasks):
            print(f"{name}: {count} cases, worst error over stock {worst:.2f}, {failed} above 2", flush=True)
            worsts.append(worst), failures.append(failed), counts.append(count)
    print(f"{sum(counts)} cases, worst error over stock {max(worsts):.2f}, {sum(failures)} above 2", flush=True)
    sys.exit(sum(failures) > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[""], help="parts of what to check: mlps, bfloat16, (512, ...")
    parser.add_argument("--workers", type=int, default=12)
    main(**vars(parser.parse_args()))
