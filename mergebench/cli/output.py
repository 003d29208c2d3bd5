"""All that commands print: results on stdout, messages and progress on stderr.

Only this file prints. Names come from files, so a line is printed as `shown` makes it, in tables too, and what is left
is up to the streams (`streams.py`).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mergebench.cli.streams import columns
from mergebench.errors import counted as counted
from mergebench.errors import cut, escaped, human, shown

if TYPE_CHECKING:
    from mergebench.evaluation import Step
    from mergebench.evaluation.search.history import History, Point

_NUMBER = r"[\d.,]+ (?:ms|s|[kMG]?B|%|M)(?!\w)\S*"  # with its unit
EVERY = 10.0  # seconds between plain lines
WIDEST_BAR = 100  # columns that a bar takes, with all that is beside it
BESIDE = 38  # columns that the shortest bar and its numbers take
_seen = ""  # the last message on a terminal


def note(text: str, quiet: bool = False) -> None:
    """A message for people: a line on stderr, wrapped on a terminal."""
    global _seen
    if not quiet:
        _seen = text if columns(sys.stderr) else ""
        print(wrapped(shown(text), columns(sys.stderr)), file=sys.stderr, flush=True)


class Warnings(logging.Handler):
    """Shows the library's warnings; what else it logs is for programs."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"warning: {record.getMessage()}")


def say(text: str = "") -> None:
    """A line of a result on stdout, wrapped on a terminal."""
    print(wrapped(escaped(text), width()), flush=True)


def say_prose(text: str) -> None:
    """Paragraphs on stdout, whose lines a terminal may break elsewhere; indented lines stay."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        flows = width() is not None and not any(line.startswith(" ") for line in lines)
        for line in [" ".join(lines)] if flows else lines:
            print(wrapped(escaped(line), width(), hang=""), flush=True)
        say()


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
    if json_:
        say_json({"out": str(out), **made})
    elif not (width() and re.search(rf"\bwrote {re.escape(str(out))}(?!\S)", _seen)):  # else it is to be seen already
        say(str(out))


def was_there(already: bool, out: Any, quiet: bool) -> bool:
    """Whether a result was complete before the command began, which is said."""
    note(f"{out}: already finished, nothing to resume", quiet or not already)
    return already


def say_left(provenance: Mapping[str, Any], quiet: bool) -> None:
    """What lay beside the base's weights and is not in the result."""
    left = provenance.get("left_behind", [])
    more = f" and {len(left) - 6} more" if len(left) > 6 else ""
    note(f"not copied from the base: {', '.join(left[:6])}{more}", quiet or not left)


def wrapped(line: str, most: int | None, hang: str | None = None) -> str:
    """A line broken at spaces to fit; what follows hangs below the text after its label, or by two.

    A number stays with its unit.
    """
    if most is None:
        return line
    from rich.cells import cell_len

    if cell_len(line) <= most:
        return line
    label = re.match(r" *\S+(?: \S+)* {2,}(?=\S)", line)
    indent = len(line) - len(line.lstrip(" ")) + 2
    hang = " " * (label.end() if label and label.end() <= most // 2 else indent) if hang is None else hang
    lines = [""]
    for word in re.findall(rf" *(?:{_NUMBER}|\S+)", line):
        if lines[-1].strip() and cell_len(lines[-1] + word) > most:
            lines.append(hang + word.lstrip(" "))
        else:
            lines[-1] += word
    return "\n".join(lines)


def width() -> int | None:
    """How wide the terminal is that results go to; None of a pipe or a file."""
    return columns(sys.stdout)


@contextmanager
def byte_bar(
    label: str, total: int, quiet: bool, steps: Sequence[tuple[str, int]] = ()
) -> Iterator[Callable[[int], None]]:
    """A progress display over `total` bytes; yields a function to call with bytes done, from any thread.

    steps: what is done with how many of the bytes, in order, such as ("sweep 1 of 2", 4096).
    """
    if quiet:
        yield lambda _: None
        return
    ends = list(accumulate(size for _, size in steps))
    seen, lock = 0, threading.Lock()
    with _byte_bar(label, total) if sys.stderr.isatty() else _byte_lines(total) as update:

        def advance(done: int) -> None:
            nonlocal seen
            with lock:
                seen += done
                step = f", {steps[min(bisect_right(ends, seen), len(ends) - 1)][0]}" if steps else ""
                update(f"{label}{step}", seen)

        yield advance


@contextmanager
def _byte_bar(label: str, total: int) -> Iterator[Callable[[str, int], None]]:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(label, total, DownloadColumn(), _unless_unknown(TransferSpeedColumn, "speed")) as update:
        yield lambda text, seen: update(text, seen, total)


@contextmanager
def _byte_lines(total: int) -> Iterator[Callable[[str, int], None]]:
    started = last = time.monotonic()

    def line(text: str, seen: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < EVERY:
            return
        last, speed = now, seen / max(now - started, 1e-9)
        left = f", {max(total - seen, 0) / speed:.0f} s left" if speed else ""
        note(f"{text}: {seen / max(total, 1):.0%} of {human(total)}, {speed / 1e9:.2f} GB/s{left}")

    yield line


@contextmanager
def item_bar(label: str, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A progress display over an evaluation's steps: a bar on a terminal, a line per model and every 10 s otherwise."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _item_bar(label, "items") as update:
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
        got = point.error if point.objective is None else history.all_said(point)
        best = "" if history.best is None else f" (best {history.said(history.best)}, point {history.best.number})"
        best = f" (a front of {len(history.front)})" if history.several else best
        note(f"searching: point {point.number} ({point.number + 1} of {budget}): {values}: {got}{best}")

    if quiet or not sys.stderr.isatty():
        with item_bar("evaluating", quiet) as step:
            yield (lambda point, history: None) if quiet else line, step
        return
    with _item_bar("searching: measuring the recipe as given") as update:

        def searched(point: Point, history: History) -> None:
            best = "" if history.best is None else f": best {history.all_said(history.best)}"
            update(f"searching{best}", point.number + 1, budget)

        yield searched, lambda step: update(f"evaluating {step.model}, task {step.task}", step.done, step.total)


@contextmanager
def check_bar(label: str, quiet: bool) -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar over checks where there is a terminal; yields a function of the method, check, checks done and of all."""
    if quiet or not sys.stderr.isatty():
        yield lambda method, check, done, total: None
    else:
        with _item_bar(label, "checks") as update:
            yield lambda method, check, done, total: update(f"{label} {method}: {check}", done, total)


@contextmanager
def work_bar(quiet: bool, label: str = "starting") -> Iterator[Callable[[str, int, int], None]]:
    """A progress display over work of several sorts; yields a function of what is done, how many and of how many."""
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _item_bar(label) as update:
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
    with work_bar(quiet, label) as update:
        yield lambda done, total: update(label, done, total)


@contextmanager
def _item_bar(label: str, unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A bar of items, counted in the unit, or in percent."""
    from rich.progress import TextColumn

    counted_in = "{task.completed}/{task.total} " + unit if unit else "{task.percentage:.0f}%"
    with _bar(label, None, _unless_unknown(TextColumn, "total", counted_in)) as update:
        yield update


@contextmanager
def _bar(label: str, total: int | None, *columns: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar after a label, which is cut to leave it room; the time left is by the speed of the last minutes."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mergebench.cli import terminal

    console = terminal.err(WIDEST_BAR)
    described, left = (
        TextColumn("{task.description}", markup=False),
        _unless_unknown(TimeRemainingColumn, "time_remaining"),
    )
    parts = (described, BarColumn(None), *columns, left)

    def fits(text: str) -> str:
        return cut(shown(text), max(console.width - BESIDE, 12))

    with Progress(*parts, console=console, transient=True, speed_estimate_period=300) as progress:
        bar = progress.add_task(fits(label), total=total)
        yield lambda text, done, total: progress.update(bar, description=fits(text), completed=done, total=total)


def _unless_unknown(column: Any, value: str, *args: Any) -> Any:
    """A column that shows nothing as long as a task's value is not known."""
    from rich.text import Text

    class Known(column):  # type: ignore[misc]
        def render(self, task: Any) -> Text:
            return Text("") if getattr(task, value) is None else super().render(task)

    return Known(*args)


def print_table(table: Any, optional: Sequence[str] = (), form: str | None = None) -> None:
    """A table on stdout, in a form that fits, where `optional` columns go first; or as markdown, latex or csv."""
    from mergebench.cli import terminal
    from mergebench.evaluation.tables import fitted, sheet

    if form is not None:
        return say_text(sheet.written([sheet.of(table)], form))
    console = terminal.out()
    for part in fitted.fitted(table, console, optional):
        console.print(part)
