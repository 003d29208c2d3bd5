"""The top of the page: a title, what was measured, the main findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mergebench.editing.summary import only, sentence
from mergebench.errors import counted
from mergebench.evaluation.page import cards, flipped, scores, searched
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.results import Results
from mergebench.recipe.open import models_of

Writer = Callable[[Any], str | list[str]]


def title(sources: Sources) -> str:
    """The directory's name, and what it is."""
    if sources.runs:
        return " · ".join(sources.origins)
    name = sources.directory.resolve().name
    about = sources.provenance or {}
    made = "edit" if only(about) is not None else "merge" if sources.merged else _command(about)
    kinds = (("search", sources.search), (made, sources.provenance), ("evaluation", sources.results))
    return f"{name}: {next(kind for kind, found in kinds if found is not None)}"


def what(sources: Sources) -> str:
    """What was tried, merged and measured, on how much, when."""
    said = _said(searched.size, sources.search), _said(_merged, sources.provenance), _said(_measured, sources.results)
    return " · ".join(sentence for found in said for sentence in found)


def findings(sources: Sources) -> list[str]:
    """A sentence each on the search, the table and the flips."""
    ways: list[tuple[Writer, Any]] = [(searched.finding, sources.search)]
    ways += [(scores.finding, sources.results), (flipped.finding, sources.results)]
    found = [sentence for way, source in ways for sentence in _said(way, source)]
    if sources.provenance is not None and not sources.merged:
        return [*filter(None, _said(_lead, sources)), *found]
    return found or [*_said(_edited, sources.provenance), "What this does to the model was not measured."]


def _lead(sources: Sources) -> str:
    """What was made: a task vector has no card."""
    recipe = (sources.provenance or {}).get("recipe", {})
    if "task_vector" in recipe:
        return f"What {recipe['task_vector']} adds to {recipe['base_model']}."
    return cards.lead(sources)


def _edited(provenance: Mapping[str, Any]) -> list[str]:
    """How much of the model the edits changed."""
    edits = [edit for edit in provenance.get("edits") or () if not edit.get("reverted")]
    known = [edit for edit in edits if edit.get("share") is not None]
    return [f"{edit['edit'].capitalize()} changed {edit['share']:.2%} of the model's parameters." for edit in known]


def _said(write: Writer, source: Any) -> list[str]:
    """The sentences about a document, if it is present; none for a broken document, whose section shows the error."""
    if source is not None:
        with suppress(Exception):
            found = write(source)
            return found if isinstance(found, list) else [found]
    return []


def _command(provenance: Mapping[str, Any]) -> str:
    """What made a result that no recipe made."""
    recipe = provenance.get("recipe", {})
    made = next((key for key in ("task_vector", "port") if key in recipe), "result")
    return str(provenance.get("command") or made.replace("_", "-"))


def _merged(provenance: Mapping[str, Any]) -> str:
    recipe = provenance.get("recipe", {})
    if "merge_method" not in recipe:
        return f"mergebench {_command(provenance)}"
    count = len(models_of(recipe))
    made = only(provenance) or f"{counted(count, 'model')} merged with {recipe['merge_method']}"
    return ", then ".join([made, *map(sentence, provenance.get("edits") or ())])


def _measured(results: Results) -> str:
    models, tasks = len(results.models), len(results.tasks)
    counts = sorted({record.n for record in results.records})
    items = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "no"
    splits = " and ".join(dict.fromkeys(record.split for record in results.records))
    date = str(results.made.get("date", ""))[:10]
    size = f"{counted(models, 'model')} on {counted(tasks, 'task')}"
    return f"{size}, {items} {splits} items per task" + (f", {date}" if date else "")
