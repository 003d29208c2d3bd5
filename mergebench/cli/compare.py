"""`mergebench compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import item_bar, note, say_json, say_text, width
from mergebench.errors import GateFailed, RecipeError

if TYPE_CHECKING:
    from mergebench.evaluation import Comparison


def compare(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="A file of predictions, a log, a row of --in, or a model.",
            autocompletion=complete.rows,
        ),
    ],
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="Another one, of the same items.", autocompletion=complete.rows)
    ],
    in_: Annotated[
        Path | None, typer.Option("--in", metavar="DIR", help="An evaluation: OLD and NEW are rows of its table.")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(metavar="SUITE", help="OLD and NEW are models: measure them on a suite.")
    ] = None,
    split: opt.Split = None,
    results: opt.Results = Path("results"),
    device: opt.Device = "auto",
    max_nfr: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0, max=1, help="Exit with 4 if a task's NFR is above this, such as 0.02."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            min=0,
            max=100,
            help="Exit with 4 if a task's accuracy fell by more than this many points, beyond chance.",
        ),
    ] = None,
    flips: Annotated[int, typer.Option(min=0, help="How many flipped items are shown.")] = 10,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare a new model with an old one, item by item: negative flips and a paired test.

    Example: mergebench compare BASE merged/mine --suite suite.yaml --max-nfr 0.02

    OLD and NEW are files of predictions ({"id": 1, "pred": "a", "gold": "b"} a line, or a "score"), logs of lm-eval
    (--log_samples) or inspect, or folders of them, rows of an evaluation (--in merged/mine), or models
    (--suite suite.yaml).
    """
    from mergebench.evaluation.compare.comparison import compare as compare_answers
    from mergebench.evaluation.tables.flips import difference_of

    form = opt.check_format(format_, json_)

    if in_ is not None and suite is not None:
        raise RecipeError("--in and --suite: rows of an evaluation, or models to be measured", "leave one out")
    if split is not None and suite is None:
        raise RecipeError("--split goes with --suite", "files and rows are compared as they are")
    if suite is None:
        found = compare_answers(old, new, in_)
    else:
        found = _measured(suite, old, new, split, opt.check_device(device), results, quiet or json_)
    gate: dict[str, Any] = {}
    failures, passes = [], []
    if max_nfr is not None:
        above = found.above(max_nfr)
        gate |= {"max_nfr": max_nfr, "above": [pair.task for pair in above]}
        named = (f"{p.task} {100 * p.flips.nfr:.1f}% ({len(p.flips.lost)} of {p.flips.n})" for p in above)
        failures += [f"NFR above {100 * max_nfr:g}%: {', '.join(named)}"] if above else []
        passes.append(f"no task's NFR is above {100 * max_nfr:g}%")
    if max_drop is not None:
        if all(pair.flips.both_right is None for pair in found.pairs):
            raise RecipeError("--max-drop: no task has right and wrong answers", "bound what is lost: --max-nfr")
        dropped, most = found.dropped(max_drop / 100), f"{max_drop:g} point{'s' * (max_drop != 1)}"
        gate |= {"max_drop": max_drop, "dropped": [pair.task for pair in dropped]}
        named = (f"{p.task} {difference_of(p.flips, 'accuracy')}" for p in dropped)
        failures += [f"accuracy lower by more than {most}: {', '.join(named)}"] if dropped else []
        passes.append(f"no task's accuracy is lower by more than {most} beyond chance")
    if json_:
        say_json(found.to_dict() | ({"gate": {**gate, "passed": not failures}} if gate else {}))
    else:
        say_text(_text(found, flips, form))
    if failures:
        raise GateFailed("; ".join(failures), "--flips N shows more of the lost items, --json all")
    for line in passes:
        note(f"passed: {line}", quiet or json_)


def _text(found: Comparison, flips: int, form: str | None) -> str:
    from mergebench.evaluation.tables import flips as views
    from mergebench.evaluation.tables.sheet import written

    if form is None:
        return views.comparison_report(found, items=flips, width=width(), styled=sys.stdout.isatty())
    more = [views.items_sheet(found, flips)] if flips and any(pair.flipped for pair in found.pairs) else []
    return written([*views.comparison_sheets(found), *more], form)


def _measured(suite: Path, old: str, new: str, split: str | None, device: str, kept: Path, quiet: bool) -> Comparison:
    from mergebench.deltas.open import open_model
    from mergebench.evaluation.compare.comparison import compare as compare_answers
    from mergebench.evaluation.measure import measure
    from mergebench.recipe.open import short_names

    for model in (old, new):  # a missing model fails before the other is measured
        open_model(model)
    with item_bar("evaluating", quiet) as step:
        found = measure(suite, [old, new], split=split, device=device, results=kept, progress=step)
    first, second = short_names([old, new])
    return compare_answers(first, second, found)
