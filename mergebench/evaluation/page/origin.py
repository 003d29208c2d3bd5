"""The origin of the results: recipe, inputs, versions, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from mergebench.errors import counted, human
from mergebench.evaluation.page.card import as_yaml
from mergebench.evaluation.page.parts import Facts, Fold, Part, Section, Table, Verbatim, cells, lasted
from mergebench.evaluation.page.sources import Sources
from mergebench.recipe.open import models_of


def sections(sources: Sources) -> Iterator[Section]:
    """The merge, the evaluation, the search: each that there is."""
    parts: list[Part] = []
    if sources.provenance is not None and sources.merged:
        parts += _merge(sources.provenance)
    if sources.results is not None:
        parts += _evaluation(sources.results.made)
    if sources.search is not None:
        parts.append(Fold("How it was searched", [Verbatim(as_yaml(sources.search.get("made", {})))]))
    if parts:
        yield Section("Provenance" if sources.merged or sources.provenance is None else "Measured", parts)


def _merge(provenance: Mapping[str, Any]) -> list[Part]:
    method, stages = provenance.get("method", {}), provenance.get("stages", {})
    recipe = provenance["recipe"]
    base = [("base", str(recipe["base_model"]))] if recipe.get("base_model") else []
    facts = [
        *base,
        ("models", "\n".join(models_of(recipe))),
        ("method", f"{method.get('name', '')} ({method.get('paper', '')}), scope {method.get('scope', '')}"),
        ("tensors", f"{provenance.get('merged_tensors')} merged, {provenance.get('copied_tensors')} copied"),
        ("sweeps", f"{provenance.get('sweeps')}" + _extra(provenance.get("extra_sweeps"))),
        ("read, written", f"{_size(provenance.get('bytes_read'))}, {_size(provenance.get('bytes_written'))}"),
        ("merging took", f"{lasted(provenance.get('seconds'))}{_stages(stages)}"),
        ("peak memory", _size(provenance.get("peak_memory"))),
        ("versions", _versions({"mergebench": provenance.get("mergebench"), **provenance.get("versions", {})})),
    ]
    if provenance.get("kept"):
        kept = ", ".join(f"{model} {share:.2%}" for model, share in provenance["kept"].items())
        facts.insert(3, ("at or above the thresholds", kept))
    facts += [("note", str(note)) for note in provenance.get("notes", [])]
    files = provenance.get("inputs", [])
    rows = [cells(str(e.get("file")), _size(e.get("size")), *_hash(e)) for e in files]
    inputs = Table(["file", "size", "hash of", "SHA-256"], rows, "Input files.")
    return [
        Facts(facts),
        Fold("Recipe", [Verbatim(as_yaml(recipe))]),
        Fold(counted(len(files), "input file"), [inputs]),
    ]


def _evaluation(made: Mapping[str, Any]) -> list[Part]:
    suite = made.get("suite", {})
    facts = [
        ("suite", str(suite.get("file") or "written in the recipe")),
        ("measured on", f"{made.get('device', 'unknown')} in {lasted(made.get('seconds'))}, {_date(made.get('date'))}"),
        ("measured with", _versions({k: made.get(k) for k in ("mergebench", "torch", "transformers", "python")})),
    ]
    rows = [
        cells(str(task.get("name")), str(task.get("kind")), str(task.get("split")), f"{task.get('n')}", file, digest)
        for task in suite.get("tasks", [])
        for file, digest in task.get("sha256", {}).items()
    ]
    heads = ["task", "kind", "split", "items", "file", "SHA-256"]
    data = Table(heads, rows, "Files the tasks were read from.", words=3, grouped=True)
    return [Facts(facts), *([Fold(f"{len(rows)} files of data", [data])] if rows else [])]


def _hash(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Of the whole file where it was taken, else of the header."""
    whole = entry.get("sha256")
    return ("the file", str(whole)) if whole else ("the header", str(entry.get("header_sha256", "")))


def _stages(stages: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {lasted(seconds)}" for name, seconds in stages.items())
    return f" ({said})" if said else ""


def _date(written: object) -> str:
    """`2026-11-30 19:29 UTC`."""
    with suppress(ValueError):
        return f"{datetime.fromisoformat(str(written)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return "at an unknown time"


def _extra(count: object) -> str:
    return f", {count} more for brackets that missed" if count else ""


def _size(count: object) -> str:
    if not isinstance(count, (int, float)):
        return "unknown"
    return human(count)


def _versions(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)
