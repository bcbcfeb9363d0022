"""A trained model made smaller: `compress`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from einlinear.cli.options import can_be_written


def compress(
    model: Annotated[Path, typer.Argument(help="Directory with a model of transformers, as save_pretrained writes.")],
    out: Annotated[Path, typer.Option(help="Where to write the compressed model; must not exist.")],
    budget: Annotated[
        float, typer.Option(help="Share of what the linear layers cost dense, above 0, at most 1.")
    ] = 0.5,
    structure: Annotated[
        str, typer.Option("--structure", "-s", help="A family ('btt'), one with settings ('btt(rank=4)'), or auto.")
    ] = "auto",
    cost: Annotated[str, typer.Option(help="What the budget counts: parameters or flops (per token).")] = "parameters",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration", "-c", help="Text files or folders, or safetensors of inputs; errors are then the outputs'."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of text to calibrate with, about.")] = 100_000,
    plan: Annotated[
        Path | None, typer.Option(help="A plan to follow in place of a budget, as --write-plan writes.")
    ] = None,
    write_plan: Annotated[
        Path | None, typer.Option(help="Write the plan to this file, to edit and to follow, and stop.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Layers to compress: names, suffixes or patterns; all but heads if none.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave as they are.")] = None,
    finetune: Annotated[
        int, typer.Option(min=0, help="Steps of distillation from the dense model, on the calibration data.")
    ] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate of the distillation.")] = 1e-3,
    sweeps: Annotated[
        int, typer.Option(min=0, help="Rounds of alternating least squares at most, where a layer has no closed form.")
    ] = 100,
) -> None:
    """A dense model of transformers to a structured one within a budget, in a directory that loads like any other.

    Prints the plan and how near the outputs come on held-out data. What is found on the way is kept in OUT.work, and
    the same command goes on there after an interrupt; OUT appears when it is complete.
    """
    from einlinear.compression.directory import Settings, compress_checkpoint, plan_checkpoint

    can_be_written(write_plan)
    if cost not in ("parameters", "flops"):
        raise ValueError(f"cannot compress to a budget of '{cost}': it counts 'parameters' or 'flops'")
    if finetune and not calibration:
        raise ValueError("cannot fine-tune without data: pass --calibration FILE")
    settings = Settings(
        structure,
        budget,
        "flops" if cost == "flops" else "parameters",
        calibration or [],
        target or None,
        exclude or [],
        tokens,
        finetune=finetune,
        rate=rate,
        sweeps=sweeps,
    )
    with _stages() as progress:
        if write_plan:
            allocation = plan_checkpoint(model, out, settings, progress)
        else:
            compress_checkpoint(model, out, settings, plan, progress, tell=typer.echo)
    if write_plan:
        typer.echo(str(allocation))
        write_plan.write_text(allocation.plan)
        typer.echo(f"plan: {write_plan}; edit it, then: einlinear compress {model} --plan {write_plan} --out {out}")
    else:
        typer.echo(f"model: {out}; load it by AutoModel.from_pretrained with einlinear imported")


@contextmanager
def _stages() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar for what is being done, with the time left, in a terminal; elsewhere a line when something begins."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
                if bar.disable:
                    typer.echo(f"{doing} ({total})", err=True)
            bar.update(tasks[doing], completed=done, total=total)

        yield tell
