"""Tables of a sequence of tasks, for the terminal and in Markdown: what each method comes to, and how it got there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest

from mergebench.checkpoint.card import escape
from mergebench.evaluation.tables.layout import NONE, number
from mergebench.evaluation.tables.sheet import Cell, Sheet, written
from mergebench.systems.mos.metrics import (
    MOS,
    NAMES,
    SECTIONS,
    Difference,
    Record,
    Runs,
    difference,
    estimate,
    measures,
    runs_of,
)

__all__ = ["markdown", "sheets", "stages", "table"]


AGAINST = "A_B against MOS"


def sheets(records: Iterable[Record]) -> list[Sheet]:
    """The measures of every method, its accuracy task by task, its retrieval. Raises as `table`."""
    runs = runs_of(records)
    return [sheet for sheet in (_measured(runs), _staged(runs), _retrieved(runs)) if sheet.rows]


def table(records: Iterable[Record], *, width: int | None = None, styled: bool = False) -> str:
    """The measures of every method, then its retrieval, as text at most `width` columns wide (None: as it needs).

    `styled`: with a terminal's codes. `RunError` where no run has come to its last task.
    """
    runs = runs_of(records)
    return _text([_measured(runs), _retrieved(runs)], width, styled)


def stages(records: Iterable[Record], *, width: int | None = None, styled: bool = False) -> str:
    """The accuracy on all classes so far after each task, as text."""
    return _text([_staged(runs_of(records))], width, styled)


def markdown(records: Iterable[Record]) -> str:
    """What was found in a sentence, and the same tables, for GitHub."""
    known = list(records)
    return "\n\n".join([escape(_finding(runs_of(known))), written(sheets(known), "markdown")]) + "\n"


def _finding(runs: Runs) -> str:
    """The best method after the last task, and MOS where it is another."""
    last = {name: [run[-1]["accuracy"] for run in by_seed.values()] for name, by_seed in runs.items()}
    top = max(last, key=lambda name: estimate(last[name]).mean)
    said = f"After the last task the best is {NAMES.get(top, top)}: {_estimated(last[top])}% of all test items right"
    return said + (f"; MOS has {_estimated(last[MOS])}%." if MOS in last and top != MOS else ".")


def _measured(runs: Runs) -> Sheet:
    """Ā, A_B, forgetting, and the difference of A_B to that of MOS."""
    found = {name: {seed: measures(run) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    last = {name: {seed: one.last for seed, one in by_seed.items()} for name, by_seed in found.items()}
    differences = {name: difference(values, last[MOS]) for name, values in last.items() if MOS in last and name != MOS}
    rows = {}
    for name, by_seed in found.items():
        columns = zip(*((one.average, one.last, one.forgetting) for one in by_seed.values()), strict=True)
        rows[name] = [_estimated(values) for values in columns]
        rows[name] += [_signed(differences.get(name))] if differences else []
    legend = (
        "In %. Ā: mean over the tasks of the accuracy on all classes so far; A_B: that after the last task; "
        "forgetting: mean over the earlier tasks of the best accuracy each ever had less its last"
    )
    known = [one for one in differences.values() if one is not None]
    if any(one.beyond_noise for one in known):
        legend += (
            "; against MOS: seed by seed [95% interval, Student's t], * where it leaves out 0: without, it may be "
        )
        legend += "noise"
    elif any(one.interval is not None for one in known):
        legend += "; against MOS: seed by seed [95% interval, Student's t]: none leaves out 0, each may be noise"
    elif known:
        legend += "; against MOS: of one seed, so nothing says which differences are noise"
    heads = ["Ā", "A_B", "forgetting", *([AGAINST] if differences else [])]
    return _sheet(heads, rows, f"{legend}. {_seeds(runs)}")


def _staged(runs: Runs) -> Sheet:
    """The accuracy on all classes so far, a column a task."""
    rows = {}
    for name, by_seed in runs.items():
        curves = ([record["accuracy"] for record in run] for run in by_seed.values())
        rows[name] = [_estimated(values) for values in zip(*curves, strict=True)]
    heads = [f"{task} task{'s' if task > 1 else ''}" for task in range(1, 1 + max(map(len, rows.values())))]
    return _sheet(heads, rows, f"Accuracy on all classes so far after each task, in %. {_seeds(runs)}")


def _retrieved(runs: Runs) -> Sheet:
    """How the adapters were found, after the last task, of the methods that looked for them."""
    rows = {}
    for name, by_seed in runs.items():
        found = [run[-1]["retrieval"] for run in by_seed.values()]
        if None in found:
            continue
        steps = [_estimated(values) for values in zip_longest(*(one["steps"] for one in found))]
        shares = [_estimated([one[key] for one in found]) for key in ("cycles", "agreement")]
        rows[name] = [*steps, _estimated([one["evaluations"] for one in found], share=False), *shares]
    most = max((len(row) for row in rows.values()), default=3) - 3
    rows = {name: [*row[:-3], *[NONE] * (most + 3 - len(row)), *row[-3:]] for name, row in rows.items()}
    heads = [*(f"step {step}" for step in range(most)), "evaluations", "cycles", "agreement"]
    legend = (
        "Retrieval after the last task, in %. Step 0: items whose first guess is the adapter of their own task; step "
        "n: the same after n refinements; evaluations: of adapters per item, on average, at most 4; cycles: items "
        "whose guesses repeat; agreement: items whose last adapter predicts its own task. "
    )
    return _sheet(heads, rows, legend + _seeds(runs))


def _estimated(values: Sequence[float | None], *, share: bool = True) -> str:
    """Mean and standard error over seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return NONE
    found = estimate(known)
    mean, error = (None if one is None else _number(one, share) for one in (found.mean, found.stderr))
    return f"{mean}" if error is None else f"{mean} ± {error}"


def _number(value: float, share: bool = True) -> str:
    return number(value, "accuracy") if share else f"{value:.2f}"


def _signed(found: Difference | None) -> str:
    """A difference with its interval and, where that leaves out 0, a star."""
    if found is None:
        return NONE
    ends = [f"{100 * value:+.1f}".replace("-", "−") for value in (found.mean, *(found.interval or ()))]
    return ends[0] + (f" [{ends[1]}, {ends[2]}]" if found.interval else "") + ("*" if found.beyond_noise else "")


def _seeds(runs: Runs) -> str:
    """Over how many seeds and items; said of the smallest where methods differ."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    items = {sum(run[-1]["items_by_task"]) for by_seed in runs.values() for run in by_seed.values()}
    of = f"{max(items):,} test items"
    if len(seeds) < 2:
        return f"One seed, {of}."
    return f"± standard error over {len(seeds)} seeds, each with the same {of}."


def _text(sheets: Sequence[Sheet], width: int | None, styled: bool) -> str:
    lines = [line for sheet in sheets if sheet.rows for line in sheet.terminal(width=width, styled=styled)]
    return "\n".join(lines).strip("\n")


def _sheet(heads: Sequence[str], rows: Mapping[str, Sequence[str]], legend: str) -> Sheet:
    """A table with one row a method, and how to read it; no rows where there is nothing to show."""
    names = list(rows)
    ends = frozenset(place for place, (one, after) in enumerate(pairwise(names)) if _section(one) != _section(after))
    errors = {place: head for place, head in enumerate(heads, 1) if head != AGAINST}
    parts: dict[int, tuple[str, ...]] = {place: (head, f"{head} ±") for place, head in errors.items()}
    cells = [[Cell(NAMES.get(name, name)), *map(_cell, rows[name])] for name in names]
    return Sheet(["method", *heads], cells, legend, 1, ends, parts)


def _cell(text: str) -> Cell:
    return Cell(text, best=text.endswith("*"), parts=tuple(text.split(" ± ")) if text[-1:].isdigit() else None)


def _section(name: str) -> int:
    return next((i for i, section in enumerate(SECTIONS) if name in section), -1)
