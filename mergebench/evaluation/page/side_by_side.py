"""Several results beside each other: what their recipes differ in, what they score, item by item against the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench.errors import RecipeError, RunError, human
from mergebench.evaluation.compare.rivals import before
from mergebench.evaluation.page import curves
from mergebench.evaluation.page.parts import Gallery, Section, Table, cells
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.results import Record, Results
from mergebench.evaluation.tables.flips import difference_sheets
from mergebench.evaluation.tables.layout import NONE, short_names
from mergebench.evaluation.tables.results import Cell, Row, heads_of, legend, rows_of
from mergebench.evaluation.tables.sheet import Sheet

Key = tuple[str, str, str, str]  # of a task: its name, split, metric and direction


def join(runs: Sequence[Sources]) -> Sources:
    """The runs as one evaluation: a model for each of their merges, or, where nothing was merged, for each model; the
    base where all have the same one. `RecipeError` for a run without scores, or without a task that all have."""
    places = [str(run.directory.resolve()) for run in runs]
    twice = next((run.directory for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise RecipeError(f"{twice}: it is named twice", "name each result once")
    for run in runs:
        if run.results is None or not run.results.records:
            hint = "eval, search, and merge with evaluate: write them"
            raise RecipeError(f"{run.directory}: it was not evaluated, and results are compared by their scores", hint)
    common = _common(runs)
    names = short_names(places)
    records: list[Record] = []
    items: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    origins: dict[str, int] = {}
    for number, (run, place) in enumerate(zip(runs, places, strict=True)):
        assert run.results is not None
        models = _shown(run.results)
        labels = short_names(models)
        for model in models:
            name = names[place] if len(models) == 1 else f"{names[place]}: {labels[model]}"
            origins[name] = number
            for record in run.results.records:
                if record.model == model and _key(record) in common:
                    role = "merged" if record.role == "base" else record.role
                    records.append(replace(record, model=name, role=role))
            if model in run.results.made.get("bytes", {}):
                sizes[name] = run.results.made["bytes"][model]
        for task in {key[0] for key in common}:
            known = items.setdefault(task, {})
            for item, asked in run.results.items.get(task, {}).items():
                if known.setdefault(item, asked) != asked:
                    what = f"task '{task}': item '{item}' is another one in {run.directory} than in those before it"
                    raise RunError(what, "measure all on the same data")
    base = _base(runs, common)
    if base and "base" not in origins:
        records = [replace(record, model="base") for record in base] + records
        size = (runs[0].results.made.get("bytes", {}) if runs[0].results else {}).get(base[0].model)
        sizes |= {} if size is None else {"base": size}
    made = {"baseline": next(iter(origins)), "bytes": sizes}
    found = Sources(Path(), Results(made, tuple(records), items), None, None, None)
    return replace(found, runs=tuple(runs), origins=origins)


def sections(sources: Sources) -> Iterator[Section]:
    """The runs as columns: recipes, then scores; scores against size, and against the one parameter that differs."""
    results = sources.results
    assert results is not None
    *about, scores = (Table(sheet.heads, sheet.rows, sheet.legend) for sheet in _columns(sources))
    scores = scores._replace(caption=scores.caption.replace("; bold: the", "; bold with a star: the"))
    yield Section("Side by side", [*about, scores])
    parameter = varied(sources)
    if parameter is not None:
        figures = curves.by_parameter(results, *parameter)
        yield Section(f"Against {parameter[0]}", [Gallery(figures, "Whiskers are the standard error.")])


def tables(sources: Sources) -> list[Sheet]:
    """The same as sheets, then the differences."""
    assert sources.results is not None
    return [*_columns(sources)[::-1], *difference_sheets(sources.results)]


def to_dict(sources: Sources) -> dict[str, Any]:
    """Recipes' differences, scores and comparisons, ready for JSON."""
    from mergebench.evaluation.compare.rivals import documents

    results = sources.results
    assert results is not None
    scores = [{k: v for k, v in vars(record).items() if k != "predictions"} for record in results.records]
    runs = [
        {"name": name, "directory": str(sources.runs[number].directory), "bytes": results.made["bytes"].get(name)}
        for name, number in sources.origins.items()
    ]
    changes = {key: dict(zip(sources.origins, values, strict=True)) for key, values in _changes(sources).items()}
    return {"runs": runs, "recipes": changes, "scores": scores, "comparisons": documents(results)}


def varied(sources: Sources) -> tuple[str, dict[str, float]] | None:
    """The one parameter that differs among three recipes or more, and its value by model; several that always have the
    same value are one."""
    if len(sources.origins) != len(sources.runs) or len(sources.runs) < 3:
        return None
    changes = _changes(sources)
    columns = {tuple(values) for values in changes.values()}
    values = next(iter(columns), ())
    known = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(columns) != 1 or len(known) < len(values) or len(set(known)) < 3:
        return None
    name = next(iter(changes)).rpartition(".")[2] if len(changes) > 1 else next(iter(changes))
    return name.removeprefix("parameters."), dict(zip(sources.origins, known, strict=True))


def _columns(sources: Sources) -> list[Sheet]:
    """Of recipes and of scores; a column for each model."""
    results = sources.results
    assert results is not None
    rows = rows_of(results)
    heads = ["", *(row.model for row in rows)]
    changes = _changes(sources)
    place = {name: number for number, name in enumerate(sources.origins)}

    def listed(values: Sequence[Any]) -> list[str]:
        return [_said(values[place[row.model]]) if row.model in place else NONE for row in rows]

    facts = [(key.removeprefix("parameters."), *listed(values)) for key, values in changes.items()]
    sizes = results.made["bytes"]
    if sizes:
        facts.append(("size", *(human(sizes[row.model]) if row.model in sizes else NONE for row in rows)))
    note = "What the recipes differ in." if changes else "No recipe differs in anything."
    about = Sheet(
        heads, [cells(*fact) for fact in facts], note + " An adapter's size is without its base." * bool(sizes)
    )
    return [about] * bool(facts) + [_scores(results, rows, heads, sources.runs)]


def _scores(results: Results, rows: Sequence[Row], heads: Sequence[str], runs: Sequence[Sources]) -> Sheet:
    """A row for each task, then the means."""
    note = legend(results, bold=True)
    absent = sorted({key[0] for run in runs for key in _keys(run)} - set(results.tasks))
    if absent:
        note += f" Left out, as not all have them: {', '.join(absent)}."
    apart = [
        task for task in results.tasks
        if len({frozenset(record.predictions) for record in results.records if record.task == task}) > 1
    ]  # fmt: skip
    if apart:
        note += f" Measured on other items, so not compared one by one: {', '.join(apart)}."
    body = [[Cell(head), *(row.cells[place] for row in rows)] for place, head in enumerate(heads_of(results))]
    parts: dict[int, tuple[str, ...]] = {place: (head, f"{head} ±") for place, head in enumerate(heads) if place}
    return Sheet(heads, body, note, parts=parts)


def _changes(sources: Sources) -> dict[str, list[Any]]:
    """Keys of the recipes whose values differ, by the columns."""
    recipes = [_recipe(sources.runs[number]) for number in sources.origins.values()]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    listed = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: values for key, values in listed.items() if any(value != values[0] for value in values)}


def _recipe(run: Sources) -> dict[str, Any]:
    """What made a run, flat: `parameters.lambda`; of a search with the values that it chose."""
    search = run.search or {}
    recipe = (search.get("made", {}) if search else run.provenance or {}).get("recipe")
    found = dict(_flat({k: v for k, v in recipe.items() if k != "evaluate"})) if isinstance(recipe, dict) else {}
    best: dict[str, Any] = next(
        (point for point in search.get("points", ()) if point["number"] == search.get("best")), {"values": {}}
    )
    chosen = {f"parameters.{key}" if f"parameters.{key}" in found else key: one for key, one in best["values"].items()}
    return found | chosen


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, dict | list) for one in value)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in parts:
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _said(value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(results: Results) -> list[str]:
    """The models of a run: what was merged; where nothing was, all but the base; or the base alone."""
    roles = {record.model: record.role for record in results.records if record.model not in before(results)}
    merged = [model for model, role in roles.items() if role == "merged"]
    return merged or [model for model, role in roles.items() if role != "base"] or list(roles)


def _key(record: Record) -> Key:
    return record.task, record.split, record.metric, record.direction


def _keys(run: Sources) -> set[Key]:
    """The tasks that every model of a run has."""
    assert run.results is not None
    found = [{_key(r) for r in run.results.records if r.model == model} for model in _shown(run.results)]
    return set.intersection(*found)


def _common(runs: Sequence[Sources]) -> set[Key]:
    found = [_keys(run) for run in runs]
    common = set.intersection(*found)
    if not common:
        listed = "; ".join(
            f"{run.directory} has {', '.join(sorted({key[0] for key in keys})) or 'none'}"
            for run, keys in zip(runs, found, strict=True)
        )
        raise RecipeError(f"no task that all have, of one metric and split: {listed}", "measure them on one suite")
    return common


def _base(runs: Sequence[Sources], common: set[Key]) -> list[Record]:
    """The records of the base, if all runs have the same."""
    found: list[dict[Key, Record]] = []
    for run in runs:
        assert run.results is not None
        records = {_key(r): r for r in run.results.records if r.role == "base" and _key(r) in common}
        found.append(records if run.results.models != _shown(run.results) else {})
    first = found[0]
    alike = all(
        other.keys() == first.keys() == common
        and all(other[key].predictions == record.predictions for key, record in first.items())
        for other in found
    )
    return list(first.values()) if alike else []
