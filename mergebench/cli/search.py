"""`mergebench search`: a recipe's parameters, chosen on validation tasks and reported on test tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import complete, evaluate
from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json, say_text, search_bar
from mergebench.cli.points import note_points, points_sheet, say_points

if TYPE_CHECKING:
    from mergebench.evaluation.search.search import Found


def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    over: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="lambda, lambda=0.2:1.2, density=0.05/0.1/0.2, weight.*, first, last, schedule; commas between.",
            autocompletion=complete.dimensions,
        ),
    ],
    suite: Annotated[
        Path | None, typer.Option(metavar="SUITE", help="A YAML file of tasks. Default: the recipe's.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Points to try; the first is the recipe as given.")] = 40,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="grid, random or cmaes. Default: grid for one or two parameters, cmaes for more.",
            autocompletion=complete.words("grid", "random", "cmaes"),
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="mean, relative or worst, of the validation tasks, or a task; A,B for a front.",
            autocompletion=complete.words("mean", "relative", "worst"),
        ),
    ] = "mean",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random and cmaes.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Output directory. Default: searches/ and the recipe's name.", file_okay=False
        ),
    ] = None,
    device: opt.Device = "auto",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    on: opt.On = None,
    results: opt.Results = Path("results"),
    set_: opt.Set = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search for better parameters of a RECIPE on a suite's validation tasks, and report the best on its test tasks.

    Example: mergebench search recipe.yaml --over lambda,density --budget 20
    """
    from mergebench.evaluation.search import search as searching
    from mergebench.recipe import load

    quiet, form = quiet or json_, opt.check_format(format_, json_)
    loaded = load(recipe, set_ or ())
    for line in loaded.notes:
        note(f"note: {line}", quiet)
    note(f"joining the cluster: {on}", quiet or on is None)
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
            memory=opt.parse_size(memory, "--memory"),
            workers=workers,
            on=on,
            results=results,
            resume=resume,
            overwrite=overwrite,
            searched=searched,
            progress=step,
        )
    _say(found, results, json_, quiet, form)
    if found.results is not None:
        evaluate.check(found.results)


def _say(found: Found, kept: Path, json_: bool, quiet: bool, form: str | None) -> None:
    """The best points, the test table and whether it was worth it; or all of it as JSON."""
    from mergebench.evaluation import sheets
    from mergebench.evaluation.tables.sheet import written

    note_points(found.history, found.resumed, "point", quiet)
    files = ["best.yaml", "search.json", "evaluation.json", "evaluation.md", "report.html"]
    note(f"wrote {found.out}/: {', '.join(name for name in files if (found.out / name).is_file())}", quiet)
    if json_:
        say_json(found.to_dict())
        return
    if form is not None:
        tables = [points_sheet(found.history, None), *(sheets(found.results) if found.results is not None else ())]
        say_text(written(tables, form))
        note(found.verdict(), quiet)
        return
    say_points(found.history, found.results)
    say(found.verdict())
    say(f"To merge it: mergebench merge {found.out / 'best.yaml'}")
