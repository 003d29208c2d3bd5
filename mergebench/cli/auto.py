"""`mergebench auto`: a few merge methods tried, the best written, and how sure it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json, search_bar
from mergebench.cli.points import note_points, say_points
from mergebench.errors import RecipeError

if TYPE_CHECKING:
    from mergebench.evaluation.search.auto import Auto


def auto(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="The base, then two or more fine-tunes of it; with --edit one model."),
    ],
    suite: Annotated[
        Path | None,
        typer.Option(metavar="SUITE", help="A YAML file of tasks: validation to choose on, test to report on."),
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Edit the model instead, away from these texts: a text and a label each."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory.", file_okay=False)] = Path("auto"),
    device: opt.Device = "auto",
    memory: opt.Memory = "400MB",
    workers: opt.Workers = None,
    on: opt.On = None,
    results: opt.Results = Path("results"),
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge fine-tunes without a recipe: a few methods tried on a suite's validation tasks, the best measured on test.

    Example: mergebench auto BASE A B C --suite suite.yaml

    With --edit a model is edited: mergebench auto --edit behaviour.jsonl MODEL
    """
    from mergebench import api
    from mergebench.evaluation.search.auto import METHODS, budget
    from mergebench.evaluation.search.auto_edit import EDITS

    if suite is None and edit is None:
        raise RecipeError("--suite: missing", "a merge is chosen on a suite's validation tasks: docs/evaluation.md")
    quiet = quiet or json_
    note(f"joining the cluster: {on}", quiet or on is None)
    note(f"fitting a probe on {models[0]}", quiet or edit is None)
    with search_bar(budget(METHODS) if edit is None else 1 + budget(EDITS), quiet) as (searched, step):
        found = api.auto(
            models[0],
            models[1:],
            suite,
            edit=edit,
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
    _say(found, json_, quiet)


def _say(found: Auto, json_: bool, quiet: bool) -> None:
    for line in found.notes:
        note(f"note: {line}", quiet)
    note_points(found.history, found.resumed, "candidate", quiet)
    note(f"wrote {found.out}/: model, best.yaml, search.json, report.html", quiet)
    if json_:
        say_json(found.to_dict())
        return
    say_points(found.history, found.results)
    say(found.verdict)
    say(f"The checkpoint is {found.model}, its recipe {found.out / 'best.yaml'}")
    if found.history.several:
        say(f"Another point of the front: mergebench merge {found.out}/point-N.yaml")
