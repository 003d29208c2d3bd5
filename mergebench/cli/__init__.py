"""The command line: parse, call one function, print. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mergebench import __version__
from mergebench.cli import inspect, merge, task_vector
from mergebench.errors import MergebenchError

app = typer.Typer(
    name="mergebench",
    help="Merge, edit and measure model checkpoints: exactly, in bounded memory, at the speed of the disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergebench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.command("merge")(merge.merge)
app.command("plan")(merge.plan)
app.command("task-vector")(task_vector.task_vector)
app.command("inspect")(inspect.inspect)
app.command("diff")(inspect.diff)
app.command("methods")(inspect.methods)


def main() -> None:
    """Run the command line; a user's mistake is one line and a hint, never a traceback."""
    try:
        app()
    except MergebenchError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: what is complete is kept; go on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `mergebench ... | head`
        sys.stderr.close()
        sys.exit(0)
