"""`mergebench compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import item_bar, note, say_json, say_text, width
from mergebench.errors import GateFailed, RecipeError

if TYPE_CHECKING:
    from mergebench.evaluation import Comparison
    from mergebench.evaluation.compare.verdict import Judgement, Policy


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
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Exit with 4 if the verdict on a policy's limits is BLOCK: docs/evaluation.md."
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
    from mergebench.evaluation.compare.verdict import judge
    from mergebench.evaluation.tables.verdicts import failure, passes

    form = opt.check_format(format_, json_)

    if in_ is not None and suite is not None:
        raise RecipeError("--in and --suite: rows of an evaluation, or models to be measured", "leave one out")
    if split is not None and suite is None:
        raise RecipeError("--split goes with --suite", "files and rows are compared as they are")
    if suite is None:
        found = compare_answers(old, new, in_)
    else:
        found = _measured(suite, old, new, split, opt.check_device(device), results, quiet or json_)
    judgement = judge(found, _policy(found, policy, max_drop, max_nfr))
    gated = any(limit is not None for limit in (policy, max_drop, max_nfr))
    if json_:
        say_json(found.to_dict() | {"gate" if gated else "verdict": judgement.to_dict()})
    else:
        say_text(_text(found, judgement, flips, form))
    if gated and not judgement.passed:
        raise GateFailed(failure(judgement), "--flips N shows more of the lost items, --json all")
    for line in passes(judgement) if gated else ():
        note(line, quiet or json_)


def _policy(found: Comparison, policy: Path | None, max_drop: float | None, max_nfr: float | None) -> Policy:
    from mergebench.evaluation.compare.policy import load_policy
    from mergebench.evaluation.compare.verdict import POINT, Limits, Policy

    if policy is not None:
        for option, value in (("--max-drop", max_drop), ("--max-nfr", max_nfr)):
            if value is not None:
                raise RecipeError(f"{option} and --policy: two places for a limit", f"write it in {policy}")
        return load_policy(policy, found)
    if max_drop is not None and not any(pair.flips.share for pair in found.pairs):
        raise RecipeError("--max-drop: no task has right and wrong answers", "bound what is lost: --max-nfr")
    if max_drop is None and max_nfr is None:
        return Policy()
    return Policy(Limits(None if max_drop is None else max_drop * POINT, max_nfr))


def _text(found: Comparison, judgement: Judgement, flips: int, form: str | None) -> str:
    from mergebench.evaluation.tables import flips as views
    from mergebench.evaluation.tables.sheet import written
    from mergebench.evaluation.tables.verdicts import verdict_sheet

    verdicts = verdict_sheet(judgement)
    if form is None:
        styled = sys.stdout.isatty()
        return views.comparison_report(found, verdicts, items=flips, width=width(), styled=styled)
    more = [views.items_sheet(found, flips)] if flips and any(pair.flipped for pair in found.pairs) else []
    return written([*views.comparison_sheets(found, named=True), verdicts, *more], form)


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
