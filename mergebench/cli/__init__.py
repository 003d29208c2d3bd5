"""How the program begins and ends: signals, streams, errors.

The commands are imported by the functions, so that a Ctrl-C meanwhile ends it as any other does.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from mergebench.cli.lazy import say_loading

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MEMORY = "/dev/shm"
_reserve = mmap.mmap(-1, 8 << 20)  # addresses, no memory: given back to say that there is no more
_signals: list[int] = []  # that have come


def command() -> NoReturn:
    """The program `mergebench`: `main`, a third of a second faster, which a signal ends as Ctrl-C does.

    Torch's hundred thousand objects are not searched for garbage again and again while they are imported,
    and not taken down one by one at the end.
    """
    owner = os.getpid()

    def stop(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a worker: the process that it works for tells of it
            os._exit(128 + number)
        _signals.append(number)
        if len(_signals) == 1:
            raise KeyboardInterrupt
        if len(_signals) == 2:  # whoever asks twice does not wait for the tidying up
            os.write(2, b"\x1b[?25h\n" * os.isatty(2))  # a bar hides the cursor
            _say_ended()
        os._exit(128 + number)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    gc.set_threshold(100_000, 20, 100)
    plots = os.environ.get("MPLCONFIGDIR")
    code: int | str | None = 0
    say_loading()
    try:
        main()
    except SystemExit as end:
        code = end.code
    if "mergebench.engine.cluster" in sys.modules:
        sys.modules["mergebench.engine.cluster"].leave()
    if (made := os.environ.get("MPLCONFIGDIR")) is not None and made != plots:
        import shutil

        shutil.rmtree(made, ignore_errors=True)  # matplotlib's, where the home may not be written
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Run the command line; a user's mistake is one line and a hint, never a traceback."""
    try:
        from mergebench.cli import streams

        streams.open_closed()
        with streams.guarded():
            _run()
    except KeyboardInterrupt:
        _say_ended()
        sys.exit(_code())
    except MemoryError:  # not even for the error's words
        os.write(2, b"error: out of memory\n")
        sys.exit(1)


def _run() -> None:
    from mergebench.cli.app import app
    from mergebench.cli.output import Warnings
    from mergebench.errors import DiskFull, MergebenchError, in_words, out_of_memory

    logging.getLogger("mergebench").handlers = [Warnings(logging.WARNING)]
    if "mergebench.checkpoint.staging" in sys.modules:  # the program is called as a function, perhaps again
        sys.modules["mergebench.checkpoint.staging"].begun.clear()
    try:
        _check_temporary()
        app(prog_name="mergebench")
    except DiskFull as error:
        then = "continue with --resume" if _takes("--resume") else "run it again"
        _fail(error.message, f"{error.hint}, then {then}", 1)
    except MergebenchError as error:
        _fail(error.message, error.hint, error.exit_code)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt from None
        if end.code == 2 and "--json" in sys.argv:  # typer has said what is wrong with the options, on stderr
            said = getattr(end.__context__, "format_message", lambda: "the command line is not valid")()
            _say_error(said, None, 2)
        raise
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if out_of_memory(error):
            _reserve.close()
            _fail(f"{_called()[0]}: out of memory", _smaller(isinstance(error, ImportError)), 1)
        if not isinstance(error, OSError):
            raise
        # a disk that fails, a file taken away
        _fail(in_words(error), None, 1)


def _check_temporary() -> None:
    """Where no folder for temporary files may be written, take memory: libraries want one when they are imported."""
    if os.access(os.environ.get("TMPDIR", "/tmp"), os.W_OK):
        return
    import tempfile

    from mergebench.errors import RunError

    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(MEMORY, os.W_OK):
            what, hint = "no folder for temporary files may be written", "set TMPDIR to one; docker run --tmpfs /tmp"
            raise RunError(what, hint) from None
        os.environ["TMPDIR"] = tempfile.tempdir = MEMORY


def _code() -> int:
    return 128 + (_signals[0] if _signals else signal.SIGINT)


def _say_ended() -> None:
    left = _left_behind()
    if _takes("--resume"):
        kept = f"what is complete is kept; continue with {_again()}"
    elif _takes("--results"):
        kept = "what was measured is kept; the same command continues"
    else:
        kept = "no result was written"
    print("\n".join([f"interrupted{f': {kept}' * (not left)}", *left]), file=sys.stderr, flush=True)


def _again() -> str:
    return "--resume" + " --overwrite" * ("--overwrite" in sys.argv)


def _left_behind() -> list[str]:
    """A line for each directory that this run did not finish: where it is, its size, what can be done with it."""
    staging = sys.modules.get("mergebench.checkpoint.staging")
    if staging is None:
        return []
    from mergebench.errors import human, shown

    lines = []
    for place, size, resumable in staging.left_behind():
        way = f"continue with {_again()}, or delete it" if resumable and _takes("--resume") else "delete it"
        here = os.path.relpath(place) if place.is_relative_to(Path.cwd()) else place
        lines.append(shown(f"left: {here} ({human(size)}); {way}"))
    return lines


def _smaller(starting: bool) -> str:
    """The hint where memory ran out, in a command or before it began."""
    ways = [f"{option} {less}" for option, less in (("--memory", "100MB"), ("--workers", "1")) if _takes(option)]
    if starting or not ways:
        return "free some, or raise the limit (ulimit -v); torch alone takes 700 MB of addresses"
    return f"ask for less: {' '.join(ways)}" + ", and continue with --resume" * _takes("--resume")


def _takes(option: str) -> bool:
    """Whether the command that was called takes an option; False before the commands are imported."""
    return any(option in one.opts for one in getattr(_called()[1], "params", ()))


def _called() -> tuple[str, Any]:
    """The command that was called: its words, and itself."""
    app = getattr(sys.modules.get("mergebench.cli.app"), "app", None)
    if app is None:
        return "mergebench", None
    import typer

    command: Any = typer.main.get_command(app)
    words = ["mergebench"]
    for word in sys.argv[1:]:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            words.append(word)
    return " ".join(words), command


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    from mergebench.cli.output import note

    note(f"error: {message}")
    note(f"hint: {hint}", hint is None)
    for line in _left_behind():
        note(line)
    if "--json" in sys.argv and code != 4:  # a gate's document has been printed
        _say_error(message, hint, code)
    sys.exit(code)


def _say_error(message: str, hint: str | None, code: int) -> None:
    """The document of a command that failed: what is wrong, where it stands in a file, what to do."""
    from mergebench.cli.output import say_json

    place = re.match(r"(.+?):(\d+):(\d+): ", message)
    where = None if place is None else {"file": place[1], "line": int(place[2]), "column": int(place[3])}
    say_json({"error": {"message": message, "hint": hint, "place": where, "exit_code": code}})
