"""The command line: one thin verb for each public function. torch is imported by the verbs that need it."""

import sys
from typing import Annotated

import typer

import einlinear as el
from einlinear.cli.comparison import compare, write_again
from einlinear.cli.compression import compress
from einlinear.cli.laws import fit
from einlinear.cli.searching import search
from einlinear.cli.speed import bench
from einlinear.cli.structures import candidates, check, describe, table

app = typer.Typer(
    name="einlinear",
    help="Structured linear layers that turn saved FLOPs into saved seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESUMED = frozenset({"compare", "compress", "search"})
"""The verbs that keep what they have done."""


def main() -> None:
    """Runs the command line; what a user can mend ends in one sentence and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"einlinear: {error}")
    except RuntimeError as error:
        from einlinear.lab.failure import out_of_memory

        if not out_of_memory(error):
            raise
        found = str(error).splitlines()[0]
        sys.exit(f"einlinear: the device has too little memory ({found}); pass smaller widths or fewer tokens")
    except SystemExit as end:
        if end.code == 130:  # how typer ends what was interrupted, and says nothing
            told = "what was done is kept, and the same command goes on from there"
            told = told if RESUMED.intersection(sys.argv[1:2]) else "nothing was written"
            print(f"einlinear: interrupted; {told}", file=sys.stderr)  # noqa: T201
        raise


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        typer.echo(el.__version__)
        raise typer.Exit


# In the order of --help.
app.command()(table)
app.command()(candidates)
app.command()(describe)
app.command()(check)
app.command()(compare)
app.command()(search)
app.command("report")(write_again)
app.command()(fit)
app.command()(bench)
app.command()(compress)
