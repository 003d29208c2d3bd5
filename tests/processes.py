"""Merges in processes of their own, to be killed, starved or counted.

A server that has torch loaded forks one process for each command line, so a run costs its work and not
two seconds of imports. Run as a script it is that server: one JSON request a line on stdin.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class Server:
    """The forking server, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({"ready": True})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, *args: Any, folder: Path, **how: Any) -> Run:
        """Start `mergebench ARGS` in `folder`.

        die_at: kill -9 (or the signal `by`) at the n-th change to the file system below `folder`. count:
        write the number of such changes to this file. largest_file: no file may grow beyond so many bytes.
        forked: do the work in forked processes, however small it is.
        """
        return Run(self, self._ask({"args": [*map(str, args)], "folder": str(folder), **how}), folder)

    def run(self, *args: Any, folder: Path, **how: Any) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); the code is negative for the signal that ended it."""
        return self.start(*args, folder=folder, **how).wait()

    def wait(self, number: int) -> int:
        return int(self._ask({"wait": number}))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Run:
    """One running command."""

    def __init__(self, server: Server, number: int, folder: Path) -> None:
        self._server, self._number = server, number
        self._texts = [folder.parent / f"{number}.{name}" for name in ("out", "err")]
        deadline = time.monotonic() + 60
        while not self._texts[1].exists():  # a merge may take less time than its process takes to begin
            assert time.monotonic() < deadline, "it never began"
            time.sleep(0.001)

    def signal(self, what: signal.Signals) -> None:
        os.kill(self._number, what)  # its server has not waited for it: the number is still its own

    def wait_until_stopped(self) -> None:
        """Wait until a SIGSTOP has come."""
        deadline = time.monotonic() + 60
        while "State:\tT" not in Path(f"/proc/{self._number}/status").read_text():
            assert time.monotonic() < deadline, "it never stopped"
            time.sleep(0.002)

    def wait(self) -> tuple[int, str, str]:
        status = self._server.wait(self._number)
        out, err = self._texts
        said = status, out.read_text(), err.read_text()
        out.unlink()
        err.unlink()
        return said


def changes(event: str, args: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is a change to the file system below `folder`."""
    if event == "open":
        path, _, flags = args
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        path, writes = args[0], True
    else:
        return False
    return writes and isinstance(path, (str, os.PathLike)) and Path(folder) in Path(path).absolute().parents


def watch(folder: str, die_at: int | None, by: int, count: str | None) -> None:
    seen, owner = 0, os.getpid()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes(event, args, folder) and os.getpid() == owner:
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), by)
            if count:
                with open(count, "w") as stream:
                    stream.write(str(seen))

    sys.addaudithook(hook)


def at_work(folder: Path) -> list[int]:
    """The processes whose working directory is `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (place / "cwd").readlink() == folder and "State:\tZ" not in (place / "status").read_text():
                found.append(int(place.name))
    return found


def check_at_work(folder: Path, count: int) -> None:
    """That many processes work in `folder`, now or in a moment."""
    deadline = time.monotonic() + 10
    while len(at_work(folder)) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(at_work(folder)) == count


def child(request: dict[str, Any], stdin: IO[str]) -> None:
    import mergebench.engine.executors
    from mergebench.cli import command

    stdin.close()
    folder = Path(request["folder"])
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder.parent / f"{os.getpid()}.{name}", os.O_CREAT | os.O_WRONLY, 0o666)
        os.dup2(file, number)
    os.chdir(folder)
    if "largest_file" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request.get("forked"):
        mergebench.engine.executors.FORK_FROM = 0
    if "die_at" in request or "count" in request:
        watch(str(folder), request.get("die_at"), request.get("by", signal.SIGKILL), request.get("count"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    sys.argv = ["mergebench", *request["args"]]
    try:
        command()
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # taking torch down politely takes a second


def serve() -> None:
    import transformers  # noqa: F401
    import typer._adapters  # noqa: F401

    import mergebench.adapters
    import mergebench.api
    import mergebench.methods.pcb
    import mergebench.methods.ties  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif "args" in request:
            answer = os.fork()
            if not answer:
                child(request, sys.stdin)
        else:
            answer = 0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
