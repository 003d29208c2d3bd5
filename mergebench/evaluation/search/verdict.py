"""What an automatic choice found, in a line that says how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergebench.errors import counted

if TYPE_CHECKING:
    from mergebench.evaluation import Results
    from mergebench.evaluation.compare.flips import Flips
    from mergebench.evaluation.search.history import History

CERTAIN = 0.05  # p below which two models are told apart


def told_apart(old: str, new: str, found: Results) -> Flips | None:
    """A model compared with another over the items of all tasks that count alike; None where one lacks a task."""
    from mergebench.evaluation.compare.comparison import compare

    if not {old, new} <= {*found.models} or found.of(old).keys() != found.of(new).keys():
        return None
    return compare(old, new, found).pooled


def verdict(label: str, single: str, found: Results | None, *, tried: int, why: str, average: str) -> str:
    """The chosen merge against the best input and the plain average on the test items, and how sure that is.

    single: the input that is best on validation. why: why this merge, where it is not the best on validation.
    """
    tail = f"; {counted(tried, 'candidate')} tried" + (f"; {why}" if why else "")
    if found is None:
        return f"{label}, chosen on validation; the suite has no test items to say what it is worth{tail}."
    by = told_apart(single, label, found)
    if by is None:
        return f"{label}: on test it cannot be compared with the best input, {single}, item by item{tail}."
    values = f"{_value(by.new, by, found)} against {_value(by.old, by, found)} of the best input, {single}"
    line = f"{label}: {values}, {_size(by, found)}"
    if by.p is not None and by.p >= CERTAIN:
        line += f": they cannot be told apart, so prefer {single}, which needs no merge"
    elif by.difference < 0:
        line += f": no merge tried is as good as {single}, keep that"
    beside = told_apart(average, label, found) if label != average else None
    if beside is not None:
        line += f"; against the plain average {_size(beside, found)}"
    return f"{line}{tail}."


def edit_verdict(label: str, model: str, names: Sequence[str], found: Results | None, history: History) -> str:
    """What the chosen edit does to the behaviour and elsewhere, on the test items, and how sure that is.

    model: the row of the model before. names: the tasks of the behaviour and of the damage.
    """
    from mergebench.evaluation.compare.comparison import compare
    from mergebench.evaluation.tables.flips import difference_of, p_of, unit_of
    from mergebench.evaluation.tables.layout import number

    front = counted(len(history.front), "point")
    tail = f"chosen from a front of {front}; {counted(len(history.points), 'candidate')} tried"
    best = history.best
    if best is not None and best.number == 0:
        return f"No edit: what is gained of {names[0]} is not worth the damage; {tail}."
    if found is None or not {label, model} <= {*found.models}:
        return f"{label}: the suite has no test items to say what it is worth; {tail}."
    parts = []
    for pair in compare(model, label, found).pairs:
        if pair.task in names:
            by, unit = pair.flips, unit_of(pair.flips, pair.metric)
            size = f"{difference_of(by, unit)}, p {p_of(by.p)}"
            chance = ", beyond chance" if by.p is not None and by.p < CERTAIN else ", not beyond chance"
            better = "" if pair.task != names[0] else chance
            values = f"{number(by.new, unit)} against {number(by.old, unit)}"
            parts.append(f"{pair.task} {values} of the model ({size}{better})")
    return f"{label}: {'; '.join(parts)}; {tail}."


def _value(value: float, by: Flips, found: Results) -> str:
    from mergebench.evaluation.tables.flips import unit_of
    from mergebench.evaluation.tables.layout import SHARES, number

    metric = unit_of(by, found.records[0].metric)
    return number(value, metric) + ("%" if metric in SHARES else "")


def _size(by: Flips, found: Results) -> str:
    """`+2.1 [+0.9, +3.3], p 0.002`."""
    from mergebench.evaluation.tables.flips import difference_of, p_of, unit_of

    return f"{difference_of(by, unit_of(by, found.records[0].metric))}, p {p_of(by.p)}"
