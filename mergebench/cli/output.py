"""All that commands print: results on stdout, messages and progress on stderr.

Only this file prints. Names come from files, so a line is printed as `shown` makes it, in tables too, and what is left
is up to the streams (`streams.py`).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergebench.errors import escaped, human, shown

if TYPE_CHECKING:
    from mergebench.evaluation import Step
    from mergebench.evaluation.search.history import History, Point

EVERY = 10.0  # seconds between plain lines


def note(text: str, quiet: bool = False) -> None:
    """A message for people: one line on stderr."""
    if not quiet:
        print(shown(text), file=sys.stderr, flush=True)


class Warnings(logging.Handler):
    """Shows the library's warnings; what else it logs is for programs."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"warning: {record.getMessage()}")


def say(text: str = "") -> None:
    """One line of a result, on stdout."""
    print(escaped(text), flush=True)


def say_text(text: str) -> None:
    """Lines whose names are `shown` already, styled or not, on stdout."""
    print(text, flush=True)


def say_part(text: str) -> None:
    """A piece of a text of several lines, on stdout as it comes."""
    print("\n".join(map(escaped, text.split("\n"))), end="", flush=True)


def say_json(document: Any) -> None:
    """One JSON document, on stdout."""
    print(json.dumps(document).replace("\x7f", "\\u007f"), flush=True)


def say_out(out: Any, made: Any, json_: bool) -> None:
    """Where the result lies, whole, or what is known of it as JSON."""
    say_json({"out": str(out), **made}) if json_ else say(str(out))


def was_there(already: bool, out: Any, quiet: bool) -> bool:
    """Whether a result was complete before the command began, which is said."""
    note(f"{out}: already finished, nothing to resume", quiet or not already)
    return already


def say_left(provenance: Mapping[str, Any], quiet: bool) -> None:
    """What lay beside the base's weights and is not in the result."""
    left = provenance.get("left_behind", [])
    more = f" and {len(left) - 6} more" if len(left) > 6 else ""
    note(f"not copied from the base: {', '.join(left[:6])}{more}", quiet or not left)


def counted(number: int, what: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {what}{'s' * (number != 1)}"


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
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from mergebench.cli import terminal

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal.err(), transient=True) as progress:
        task = progress.add_task(shown(label), total=total)
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
    """A progress display over an evaluation's steps: a bar on a terminal, a line per model and every 10 s otherwise."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _item_bar(label) as update:
            yield lambda step: update(f"{label} {step.model}, task {step.task}", step.done, step.total)
    else:
        named, last = set[str](), time.monotonic()

        def line(step: Step) -> None:
            nonlocal last
            if step.known:
                return
            if step.model not in named:
                named.add(step.model)
                note(f"{label}: {step.model}")
            elif time.monotonic() - last < EVERY:
                return
            else:
                note(f"{label}: {step.model}, task {step.task}: {step.done} of {step.total} in all")
            last = time.monotonic()

        yield line


@contextmanager
def search_bar(budget: int, quiet: bool) -> Iterator[tuple[Callable[[Point, History], None], Callable[[Step], None]]]:
    """A display over a search's points, then over the evaluation of what was found: one bar, or lines."""

    def line(point: Point, history: History) -> None:
        values = ", ".join(f"{name} {value}" for name, value in point.values.items())
        got = point.error if point.objective is None else history.said(point)
        best = "" if history.best is None else f" (best {history.said(history.best)}, point {history.best.number})"
        note(f"searching: point {point.number} ({point.number + 1} of {budget}): {values}: {got}{best}")

    if quiet or not sys.stderr.isatty():
        with item_bar("evaluating", quiet) as step:
            yield (lambda point, history: None) if quiet else line, step
        return
    with _item_bar("searching") as update:

        def searched(point: Point, history: History) -> None:
            best = "" if history.best is None else f": best {history.said(history.best)}"
            update(f"searching{best}", point.number + 1, budget)

        yield searched, lambda step: update(f"evaluating {step.model}, task {step.task}", step.done, step.total)


@contextmanager
def check_bar(label: str, quiet: bool) -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar over checks where there is a terminal; yields a function of the method, check, checks done and of all."""
    if quiet or not sys.stderr.isatty():
        yield lambda method, check, done, total: None
    else:
        with _item_bar(label) as update:
            yield lambda method, check, done, total: update(f"{label} {method}: {check}", done, total)


@contextmanager
def work_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress display over work of several sorts; yields a function of what is done, how many and of how many."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _item_bar("starting") as update:
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
def _item_bar(label: str) -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mergebench.cli import terminal

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.err(), transient=True) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda text, done, total: progress.update(bar, description=shown(text), completed=done, total=total)


def print_table(table: Any) -> None:
    """A table on stdout, as wide as it needs to be."""
    from mergebench.cli import terminal

    terminal.out().print(table)
