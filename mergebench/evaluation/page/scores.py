"""What was measured: the table, each task's bars, all models over all tasks."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import BLUE, GREEN, MARKS, SERIES, SKY, SOFT, Figure
from mergebench.evaluation.page.parts import Gallery, Section, Table, cells
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.results import Record, Results, mean_relatives, mean_values
from mergebench.evaluation.tables.layout import SHARES, number, short_names
from mergebench.evaluation.tables.results import Cell, heads_of, legend, rows_of, value_of

COLOURS = {"base": SOFT, "input": GREEN, "baseline": SKY, "merged": BLUE}
MOST_LINES = 10  # models that lines can be told apart of


def sections(sources: Sources) -> Iterator[Section]:
    """The table, what could not be measured, then what the table looks like."""
    results = sources.results
    if results is None:
        return
    failed = results.made.get("failed") or []
    if failed:
        said = [(one["model"], ", ".join(one["tasks"]), one["error"], one["hint"] or "") for one in failed]
        heads = ["model", "tasks", "error", "way out"]
        yield Section("Not measured", [Table(heads, [cells(*one) for one in said], "What failed.", words=4)])
    if not results.records:
        return
    rows = [[Cell(row.model), Cell(row.role), *map(_starred, row.cells)] for row in rows_of(results)]
    note = legend(results, bold=False)
    if any(cell.best for row in rows for cell in row):
        note = f"{note[:-1]}; bold with a star: the best merge."
    yield Section("Results", [Table(["model", "role", *heads_of(results)], rows, note, words=2)])
    drawn = [_bars(results, task, place) for place, task in enumerate(results.tasks)]
    ways = {record.direction for record in results.records}
    note = "Bars begin at zero; whiskers are the standard error" + ("." if ways == {"higher"} else "; ")
    if "lower" in ways:
        note += "lower is better where the title says so."
    if any(record.relative is not None for record in results.records):
        note += " Dashed: the base. Solid: the task's own fine-tune (hatched)."
    yield Section("Task by task", [Gallery(drawn, note)])
    if len(results.tasks) > 1 and len(results.models) > 1:
        yield Section("Across tasks", [_parallel(results)])


def finding(results: Results) -> list[str]:
    """The table in a sentence."""
    if not results.records:
        return []
    relative, means = mean_relatives(results), mean_values(results)
    is_relative = any(relative.get(model) is not None for model in results.models)
    values = relative if is_relative else means
    roles = {record.model: record.role for record in results.records}
    ways = {record.direction for record in results.records}
    names = short_names(results.models)
    metric = results.records[0].metric

    def said(model: str) -> str:
        value = values[model] or 0.0
        return f"{value:.1%}" if is_relative else f"{number(value, metric)}{' %' * (metric in SHARES)}"

    def best(among: list[str]) -> str:
        return (max if ways == {"higher"} else min)(among, key=lambda model: values[model] or 0.0)

    known = [model for model in results.models if values.get(model) is not None]
    merges = [model for model in known if roles[model] == "merged"]
    rivals = [model for model in known if roles[model] == "baseline"]
    bases = [model for model in known if roles[model] == "base"]
    what = "of what each task's own fine-tune reaches" if is_relative else f"{metric} in the mean"
    if not known:
        return ["Tasks of different metrics have no mean: see the table."]
    if not merges:
        top = best(known)
        return [f"The best mean is that of {names[top]}: {said(top)}{'' if is_relative else f' {metric}'}."]
    top = best(merges)
    others = [f"the base {said(bases[0])}"] if bases else []
    others += [f"the best baseline ({names[best(rivals)]}) {said(best(rivals))}"] if rivals else []
    return [f"{names[top]} has {said(top)} {what}{'; ' if others else ''}{', '.join(others)}."]


def _starred(cell: Cell) -> Cell:
    return Cell(f"{cell.text} ★", True) if cell.best else cell


def _bars(results: Results, task: str, place: int) -> Figure:
    """Base, the task's own fine-tune and every merge; all models where nothing was merged."""
    records = [record for record in results.records if record.task == task]
    names = short_names(results.models)
    own = [record for record in records if record.role == "input" and record.relative == 1.0]
    shown = [record for record in records if record.role in ("base", "baseline", "merged") or record in own]
    if not any(record.role in ("baseline", "merged") for record in records):
        shown = records
    shown.sort(key=lambda record: ("base", "input", "baseline", "merged").index(record.role))
    rows = [(names[r.model], r.value, r.stderr, COLOURS[r.role], value_of(r)) for r in shown]
    marks = [(r.value, "--" if r.role == "base" else "-") for r in shown if r.role == "base" or r in own]
    first = records[0]
    title = f"{task}: {first.metric}" + (" (lower is better)" if first.direction == "lower" else "")
    alt = f"{title}. " + ", ".join(f"{names[r.model]} {value_of(r)}" for r in shown)
    hatched = [place for place, record in enumerate(shown) if record in own]
    most = 1.0 if first.metric in SHARES else None
    return figures.bars(f"task{place}", alt, title, rows, hatched=hatched, marks=marks, most=most)


def _parallel(results: Results) -> Gallery:
    """A line for each model over the tasks; where metrics differ, each task from its worst model to its best."""
    tasks, names = results.tasks, short_names(results.models)
    metrics = {(record.metric, record.direction) for record in results.records}
    one = len(metrics) == 1
    found = {task: [record.value for record in results.records if record.task == task] for task in tasks}

    def height(record: Record) -> float:
        if one:
            return record.value * (100 if record.metric in SHARES else 1)
        low, high = min(found[record.task]), max(found[record.task])
        share = (record.value - low) / (high - low) if high > low else 0.5
        return share if record.direction == "higher" else 1 - share

    inputs = [m for m in results.models if next(iter(results.of(m).values())).role == "input"]
    crowded = len(results.models) > MOST_LINES
    coloured = [m for m in results.models if not (crowded and m in inputs)]
    columns = 2
    shown = len(coloured) + (len(coloured) < len(results.models))
    with figures.plot(270 + 16 * -(-shown // columns)) as (canvas, axes):
        for place, model in enumerate(results.models):
            records = results.of(model)
            role = next(iter(records.values())).role
            xs = [x for x, task in enumerate(tasks) if task in records]
            ys = [height(records[task]) for task in tasks if task in records]
            grey = model not in coloured
            style = {"base": ":", "input": "-", "baseline": "--", "merged": "-"}[role]
            colour = SOFT if grey or role == "base" else BLUE if role == "merged" else SERIES[place % len(SERIES)]
            label = figures.short(names[model]) if not grey else "inputs" if model == inputs[0] else None
            axes.plot(
                xs, ys, label=label, color=colour, linestyle=style, marker=MARKS[place % len(MARKS)], markersize=5,
                linewidth=2.6 if role == "merged" else 1.2, alpha=0.5 if grey else 1, zorder=3 + (role == "merged"),
            )  # fmt: skip
        turned = len(tasks) > 5 or max(map(len, tasks)) > 10
        labels = [figures.short(task, 16) for task in tasks]
        axes.set_xticks(range(len(tasks)), labels, rotation=40 if turned else 0, ha="right" if turned else "center")
        for x in range(len(tasks)):
            axes.axvline(x, color=figures.LINE, linewidth=0.6, zorder=0)
        metric = next(iter(metrics))[0]
        if one:
            axes.set_ylabel(f"{metric} in %" if metric in SHARES else metric)
            if next(iter(metrics))[1] == "lower":
                axes.invert_yaxis()
        else:
            axes.set_yticks([0, 1], ["worst", "best"])
        figures.legend(canvas, columns)
        alt = f"Lines of {len(results.models)} models over {len(tasks)} tasks; the numbers are in the table above."
        drawn = Figure(figures.to_svg(canvas, "parallel"), alt, wide=True)
    scale = "All tasks on one scale, better is up." if one else "Each task from its worst model to its best."
    there = {record.role for record in results.records}
    styles = {"merged": "thick: merged", "baseline": "dashed: baselines", "base": "dotted: the base"}
    key = "; ".join(text for role, text in styles.items() if role in there)
    return Gallery([drawn], f"{scale} {key[:1].upper()}{key[1:]}{'.' if key else ''}".rstrip())
