"""Progress on stderr: a bar with GB/s and time left on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0  # seconds between plain lines


def note(text: str, quiet: bool = False) -> None:
    """A message for people, on stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def human(size: float) -> str:
    """Bytes in words: `91 kB`, `4.41 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError


@contextmanager
def byte_bar(label: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress display over `total` bytes; yields a function to call with bytes done, from any thread."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        yield from _bar(label, total)
    else:
        yield from _lines(label, total)


def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


def _lines(label: str, total: int) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    seen, lock = 0, threading.Lock()

    def advance(done: int) -> None:
        nonlocal seen, last
        with lock:
            seen += done
            now = time.monotonic()
            if now - last < EVERY:
                return
            last, speed = now, seen / (now - started)
            left = max(total - seen, 0) / speed
        note(f"{label}: {seen / total:.0%} of {human(total)}, {speed / 1e9:.2f} GB/s, {left:.0f} s left")

    yield advance
