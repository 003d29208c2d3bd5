"""What stands at the top: a title, what was measured, what came out."""

from __future__ import annotations

from mergebench.evaluation.results import Results
from mergebench.page import scores, searched
from mergebench.page.sources import Sources


def title(sources: Sources) -> str:
    """The directory's name, and what it is."""
    name = sources.directory.resolve().name
    kinds = (("search", sources.search), ("merge", sources.provenance), ("evaluation", sources.results))
    return f"{name}: {next(kind for kind, found in kinds if found is not None)}"


def what(sources: Sources) -> str:
    """What was merged and measured, on how much, when."""
    said = []
    if sources.search is not None:
        said.append(searched.size(sources.search))
    if sources.provenance is not None:
        recipe = sources.provenance.get("recipe", {})
        count = len(recipe.get("models", []))
        said.append(f"{count} model{'s' * (count != 1)} merged with {recipe.get('merge_method', 'an unknown method')}")
    if sources.results is not None:
        said.append(_measured(sources.results))
    return " · ".join(said)


def findings(sources: Sources) -> list[str]:
    """A sentence each on the search and the table."""
    found = [] if sources.search is None else searched.finding(sources.search)
    if sources.results is not None and sources.results.records:
        found.append(scores.finding(sources.results))
    return found or ["Nothing was measured."]


def _measured(results: Results) -> str:
    models, tasks = len(results.models), len(results.tasks)
    counts = sorted({record.n for record in results.records})
    items = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}" if counts else "no"
    splits = " and ".join(dict.fromkeys(record.split for record in results.records))
    date = str(results.made.get("date", ""))[:10]
    size = f"{models} model{'s' * (models != 1)} on {tasks} task{'s' * (tasks != 1)}"
    return f"{size}, {items} {splits} items a task" + (f", {date}" if date else "")
