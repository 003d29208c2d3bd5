"""The command line: parse, call one function, print. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from mergebench import __version__
from mergebench.cli import (
    adapters,
    cil,
    compare,
    compress,
    doctor,
    edit,
    evaluate,
    explain,
    inspect,
    mask,
    merge,
    options,
    patch,
    port,
    probe,
    report,
    search,
    task_vector,
)
from mergebench.errors import DiskFull, MergebenchError

INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # what ends a program politely

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
app.command("explain")(explain.explain)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("search")(search.search)
app.command("report")(report.report)
app.add_typer(probe.app, name="probe")
app.command("edit", cls=edit.EditCommand)(edit.edit)
app.add_typer(patch.app, name="patch")
app.add_typer(adapters.app, name="adapters")
app.add_typer(mask.app, name="mask")
app.add_typer(cil.app, name="cil")
app.command("compress", cls=compress.Compress)(compress.compress)
app.command("port")(port.port)
app.command("task-vector")(task_vector.task_vector)
app.command("inspect")(inspect.inspect)
app.command("diff")(inspect.diff)
app.command("methods")(inspect.methods)
app.command("doctor")(doctor.doctor)


def command() -> NoReturn:
    """The program `mergebench`: `main`, a third of a second faster.

    Torch's hundred thousand objects are not searched for garbage again and again while they are imported,
    and not taken down one by one at the end.
    """
    gc.set_threshold(100_000, 20, 100)
    code: int | str | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Run the command line; a user's mistake is one line and a hint, never a traceback."""
    try:
        with _stopped_by_signals():
            app()
    except DiskFull as error:
        _fail(error.message, f"{error.hint}, then {'go on with --resume' if _resumes() else 'run it again'}", 1)
    except MergebenchError as error:
        _fail(error.message, error.hint, error.exit_code)
    except OSError as error:  # a disk that fails, a file taken away
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part), None, 1)
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) else INTERRUPTED  # as typer turns Ctrl-C into one
        if code not in (INTERRUPTED, *(128 + number for number in _SIGNALS)):
            raise
        kept = ": what is complete is kept; go on with --resume" if _resumes() else ": no result was written"
        print(f"interrupted{kept}", file=sys.stderr)
        sys.exit(code)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Signals to end run the exits of all contexts, which take temporary files away; a second one ends at once."""

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number in _SIGNALS if main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _resumes() -> bool:
    """Whether the command that was called takes --resume."""
    command: Any = typer.main.get_command(app)
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    return any("--resume" in option.opts for option in command.params)


def _fail(message: str, hint: str | None, code: int) -> None:
    print(f"error: {options.printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {options.printable(hint)}", file=sys.stderr)
    sys.exit(code)
