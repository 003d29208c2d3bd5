"""`mergebench search`: a recipe's parameters, chosen on validation tasks and reported on test tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import evaluate
from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json, say_text, search_bar

if TYPE_CHECKING:
    from mergebench.evaluation.search.search import Found

SHOWN = 8  # points in the table, beside the recipe as given


def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    over: Annotated[
        list[str],
        typer.Option(metavar="WHAT", help="lambda, lambda=0.2:1.2, density=0.05/0.1/0.2, weight.*; commas between."),
    ],
    suite: Annotated[Path | None, typer.Option(help="A YAML file of tasks. Default: the recipe's.")] = None,
    budget: Annotated[int, typer.Option(help="Points to try; the first is the recipe as given.")] = 40,
    strategy: Annotated[
        str | None, typer.Option(help="grid, random or cmaes. Default: grid for one or two, cmaes for more.")
    ] = None,
    objective: Annotated[str, typer.Option(help="mean, relative or worst, of the validation tasks.")] = "mean",
    seed: Annotated[int, typer.Option(min=0, help="Of random and cmaes.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where it all goes. Default: searches/<recipe stem>.", file_okay=False)
    ] = None,
    device: opt.Device = "auto",
    results: opt.Results = Path("results"),
    set_: opt.Set = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search parameters of a RECIPE on the validation tasks of a suite, and report the best on its test tasks.

    Example: mergebench search recipe.yaml --over lambda,density --budget 20
    """
    from mergebench.evaluation.search import search as searching
    from mergebench.recipe import load

    quiet = quiet or json_
    loaded = load(recipe, set_ or ())
    for line in loaded.notes:
        note(f"note: {line}", quiet)
    with search_bar(budget, quiet) as (searched, step):
        found = searching.search(
            loaded,
            suite,
            over,
            budget,
            strategy=strategy,
            objective=objective,
            seed=seed,
            out=out,
            device=opt.check_device(device),
            results=results,
            resume=resume,
            overwrite=overwrite,
            searched=searched,
            progress=step,
        )
    _say(found, results, json_, quiet)
    if found.results is not None:
        evaluate.check(found.results)


def _say(found: Found, kept: Path, json_: bool, quiet: bool) -> None:
    """The best points, the test table and whether it was worth it; or all of it as JSON."""
    from mergebench.evaluation import report

    points = found.history.points
    note(f"{found.resumed} of {len(points)} points were there already", quiet or not found.resumed)
    failed = [point for point in points if point.objective is None]
    if failed:
        note(f"{len(failed)} of {len(points)} points failed, the first: {failed[0].error}", quiet)
    files = ["best.yaml", "search.json", "evaluation.json", "evaluation.md", "report.html"]
    note(f"wrote {found.out}/: {', '.join(name for name in files if (found.out / name).is_file())}", quiet)
    if json_:
        say_json(found.to_dict())
        return
    say_text(_table(found))
    if found.results is not None:
        say_text(report(found.results, styled=sys.stdout.isatty()))
        say()
    say(found.verdict())
    say(f"To merge it: mergebench merge {found.out / 'best.yaml'}")


def _table(found: Found) -> str:
    """The best points, and where among them the recipe as given stands."""
    from rich import box
    from rich.table import Table

    from mergebench.evaluation.tables.layout import literal, number, render

    history = found.history
    ranked, metrics = history.ranked, history.metrics
    shares = history.made["objective"] != "mean"
    metric = "accuracy" if shares else next(iter(metrics.values()))
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="On validation:", title_justify="left")
    for name in ("", "", *ranked[0].values, *metrics, history.made["objective"]):
        out.add_column(literal(name), justify="right", overflow="fold")
    for place, point in enumerate(ranked, 1):
        if place <= SHOWN or point.number == 0:
            given = "as given" if point.number == 0 else ""
            values = ["" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
                      for value in point.values.values()]  # fmt: skip
            tasks = [number(value, metrics[task]) for task, value in point.tasks.items()]
            out.add_row(str(place), given, *map(literal, values), *tasks, number(point.objective or 0.0, metric))
    return "\n".join(render(out, "")).strip("\n") + "\n"
