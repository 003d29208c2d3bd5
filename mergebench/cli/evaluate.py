"""`mergebench eval`: models side by side on the tasks of a suite; and printing evaluations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import counted, item_bar, note, say_json, say_text, width
from mergebench.errors import RecipeError

if TYPE_CHECKING:
    from mergebench.evaluation import Results


def evaluate(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A YAML file of tasks.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Directories, BASE+ADAPTER, or org/name.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Output directory. Default: evaluations/ and the suite's folder and name.",
            file_okay=False,
        ),
    ] = None,
    split: opt.Split = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model to compare the others with. Default: the base, else the first."),
    ] = None,
    device: opt.Device = "auto",
    on: opt.On = None,
    workers: opt.Workers = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="PART", help="2/8: the second of eight jobs that share --results."),
    ] = None,
    results: opt.Results = Path("results"),
    overwrite: opt.Overwrite = False,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure MODELs side by side on the tasks of a SUITE.

    Example: mergebench eval suite.yaml BASE merged/mine
    """
    from mergebench.evaluation import load_suite, page, save
    from mergebench.evaluation.measure import measure, measure_part
    from mergebench.evaluation.place import check_place, place_of

    opt.check_split(split)
    quiet, form = quiet or json_, opt.check_format(format_, json_)
    loaded, target = load_suite(suite), out or place_of(suite)
    check_place(target, loaded.only(split), overwrite)
    how: dict[str, Any] = {"split": split, "device": opt.check_device(device), "results": results}
    if part is not None and on is not None:
        raise RecipeError("--part and --on: two ways to share the work", "leave one out")
    note(f"joining the cluster: {on}", quiet or on is None)
    with item_bar("evaluating", quiet) as step:
        missing = [] if part is None else measure_part(part, loaded, models, **how, progress=step)
        if not missing:
            found = measure(loaded, models, against=against, **how, on=on, workers=workers, progress=step)
    if missing:
        _say_part(part, missing, json_, quiet)
        return
    target.mkdir(parents=True, exist_ok=True)
    save(found, target)
    page.attempt(target)
    say_results(found, target, results, json_, quiet, form)
    check(found)


def _say_part(part: str | None, missing: list[tuple[str, str]], json_: bool, quiet: bool) -> None:
    """That a part is measured, and what other jobs have not measured yet."""
    if json_:
        say_json({"part": part, "missing": [{"model": model, "task": task} for model, task in missing]})
        return
    first = ", ".join(f"{model} on {task}" for model, task in missing[:3]) + ", …" * (len(missing) > 3)
    note(f"part {part} is measured; {counted(len(missing), 'result')} missing yet: {first}", quiet)


def say_results(found: Results, target: Path, kept: Path, json_: bool, quiet: bool, form: str | None = None) -> None:
    """Print the tables, or everything as JSON, on stdout, and notes for people on stderr."""
    from mergebench.evaluation import document_of

    for line in found.made.get("notes", ()):
        note(f"note: {line}", quiet)
    for line in found.made.get("seen", ()):
        note(f"warning: {line}", quiet)
    known = found.made.get("known", 0)
    note(f"{known} of {len(found.records)} results were in {kept}/ already", quiet or not known)
    shown = (target / "report.html").is_file()
    note(f"warning: no report.html could be written: mergebench report {target} says why", quiet or shown)
    note(f"wrote {target}/evaluation.json, evaluation.md{' and report.html' * shown}", quiet)
    if json_:
        say_json(document_of(found))
    else:
        say_tables(found, form)


def say_tables(found: Results, form: str | None = None) -> None:
    """Print the tables on stdout, for people or in the form of another program."""
    from mergebench.evaluation import report, sheets
    from mergebench.evaluation.tables.sheet import written

    if form is not None:
        say_text(written(sheets(found), form))
    else:
        say_text(report(found, width=width(), styled=sys.stdout.isatty()))


def check(found: Results) -> None:
    """Exit with 1 if a model failed; each failed model is named with its reason."""
    failed = found.made.get("failed", [])
    for one in failed:
        note(f"failed: {one['model']} on {', '.join(one['tasks'])}: {one['error']}")
        note(f"hint: {one['hint']}", not one["hint"])
    if failed:
        raise typer.Exit(1)
