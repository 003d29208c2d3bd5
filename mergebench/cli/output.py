"""Progress on stderr: a bar with GB/s and time left on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergebench.evaluation import Step
    from mergebench.evaluation.search.history import History, Point

EVERY = 10.0  # seconds between plain lines


def note(text: str, quiet: bool = False) -> None:
    """A message for people, on stderr."""
    if not quiet:
        print(text, file=sys.stderr)


def say_left(provenance: Mapping[str, Any], quiet: bool) -> None:
    """What lay beside the base's weights and is not in the result."""
    left = provenance.get("left_behind", [])
    more = f" and {len(left) - 6} more" if len(left) > 6 else ""
    note(f"not copied from the base: {', '.join(left[:6])}{more}", quiet or not left)


def human(size: float) -> str:
    """Bytes in words: `91 kB`, `4.41 GB`."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 999.5 else f"{size:.0f} GB"


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
            last, speed = now, seen / max(now - started, 1e-9)
            left = f", {max(total - seen, 0) / speed:.0f} s left" if speed else ""
            note(f"{label}: {seen / max(total, 1):.0%} of {human(total)}, {speed / 1e9:.2f} GB/s{left}")

    yield advance


@contextmanager
def item_bar(label: str, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A progress display over an evaluation's steps: a bar on a terminal, a line a model otherwise."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _item_bar() as update:
            yield lambda step: update(f"{label} {step.model} on {step.task}", step.done, step.total)
    else:
        named: set[str] = set()

        def line(step: Step) -> None:
            if step.model not in named:
                named.add(step.model)
                note(f"{label}: {step.model}")

        yield line


@contextmanager
def search_bar(budget: int, quiet: bool) -> Iterator[tuple[Callable[[Point, History], None], Callable[[Step], None]]]:
    """A display over a search's points, then over the evaluation of what was found: one bar, or lines."""

    def line(point: Point, history: History) -> None:
        values = ", ".join(f"{name} {value}" for name, value in point.values.items())
        got = point.error if point.objective is None else f"{point.objective:.4g}"
        best = "" if history.best is None else f" (best {history.best.objective:.4g})"
        note(f"searching: {point.number + 1} of {budget}: {values}: {got}{best}")

    if quiet or not sys.stderr.isatty():
        with item_bar("evaluating", quiet) as step:
            yield (lambda point, history: None) if quiet else line, step
        return
    with _item_bar() as update:

        def searched(point: Point, history: History) -> None:
            best = "" if history.best is None else f": best {history.best.objective:.4g}"
            update(f"searching{best}", point.number + 1, budget)

        yield searched, lambda step: update(f"evaluating {step.model} on {step.task}", step.done, step.total)


@contextmanager
def check_bar(label: str, quiet: bool) -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar over checks where there is a terminal; yields a function of the method, check, checks done and of all."""
    if quiet or not sys.stderr.isatty():
        yield lambda method, check, done, total: None
    else:
        with _item_bar() as update:
            yield lambda method, check, done, total: update(f"{label} {method}: {check}", done, total)


@contextmanager
def work_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress display over work of several sorts; yields a function of what is done, how many and of how many."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _item_bar() as update:
            yield update
    else:
        last = time.monotonic()

        def line(what: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                note(f"{what}: {done / max(total, 1):.0%}")

        yield line


@contextmanager
def count_bar(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """As `work_bar`, over one sort of work."""
    with work_bar(quiet) as update:
        yield lambda done, total: update(label, done, total)


@contextmanager
def _item_bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda text, done, total: progress.update(bar, description=text, completed=done, total=total)


def print_table(table: Any) -> None:
    """A table on stdout, as wide as it needs to be."""
    import sys

    from rich.console import Console

    # a pipe has no width, so tables take the room they need. Brackets and colons in names are literal.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
