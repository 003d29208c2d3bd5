"""`mergebench results`: what is kept of measurements, and deleting some of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import counted, note, print_table, say, say_json
from mergebench.errors import RecipeError, human

if TYPE_CHECKING:
    from mergebench.evaluation.kept import Kept

SHOWN = 30  # rows of the table


def results(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of results.")] = Path("results"),
    unused: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Only what was not used for this many days.")
    ] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="Only results whose data or model are no longer where they were.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what --unused and --gone select. It is measured again when needed.")
    ] = False,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show the results that are kept: their suites and models, size and last use.

    Example: mergebench results --unused 30 --prune
    """
    from mergebench.evaluation.kept import delete, kept

    selected = unused is not None or gone
    if prune and not selected:
        raise RecipeError("--prune: it does not say which", "--unused DAYS, --gone, or both; --unused 0 is everything")
    found = [one for one in kept(folder) if (unused is None or one.unused(unused)) and (one.gone or not gone)]
    if prune:
        delete(found)
    total = {"results": len(found), "bytes": sum(one.size for one in found)}
    if json_:
        say_json({"folder": str(folder), **total, "pruned": prune, "kept": [_facts(one) for one in found]})
        return
    if selected and not found:
        say(f"nothing to delete in {folder}")
        return
    if found:
        _show(found)
    size = f"{counted(len(found), 'file')}, {human(total['bytes'])}"
    say(f"deleted {size} from {folder}" if prune else f"{size} in {folder}")
    note("to delete them: add --prune", quiet or prune or not selected)


def _show(found: list[Kept]) -> None:
    from rich import box
    from rich.table import Table

    from mergebench.evaluation.tables.layout import literal

    groups: dict[tuple[str, str], list[Kept]] = {}
    for one in found:
        suite = "features of probes" if one.path.is_dir() else one.suite or "–"
        groups.setdefault((suite, one.model), []).append(one)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, side in (
        ("suite", "left"),
        ("model", "left"),
        ("files", "right"),
        ("size", "right"),
        ("last used", "right"),
    ):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for (suite, model), ones in list(groups.items())[:SHOWN]:
        used = datetime.fromtimestamp(max(one.used for one in ones)).strftime("%Y-%m-%d")
        size = human(sum(one.size for one in ones))
        table.add_row(literal(_near(suite)), literal(_near(model)), str(len(ones)), size, used)
    print_table(table)
    if len(groups) > SHOWN:
        say(f"and {len(groups) - SHOWN} more rows, used before these")


def _near(path: str) -> str:
    """A path from here, where it lies below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _facts(one: Kept) -> dict[str, Any]:
    used = datetime.fromtimestamp(one.used).astimezone().isoformat(timespec="seconds")
    about = {"file": str(one.path), "bytes": one.size, "used": used, "suite": one.suite}
    return about | {"model": one.model, "task": one.task, "gone": one.gone}
