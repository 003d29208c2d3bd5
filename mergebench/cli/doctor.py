"""`mergebench doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import check_bar, print_table, say, say_json

if TYPE_CHECKING:
    from mergebench.testing.checks import Report


def doctor(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD",
            help="Merge methods. Default: all that are installed.",
            autocompletion=complete.methods,
        ),
    ] = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Try the identities that any merge must keep on the installed methods, with small checkpoints.

    Example: mergebench doctor ties

    One model, or several equal ones, come out as they went in. The order of the models, chunks and workers
    change nothing. Sign ties and negative weights give numbers. What is written is read back. A `-`: the check
    does not apply, and --json says why. Then (without METHOD) the same for merged adapters of every kind of LoRA:
    one is copied, a sum is the sum of what they do; for every delta kind: any split gives the same bits, the formula
    in float64 the same numbers; for every edit: its patch taken out again gives the model of before. Exit code 1
    where something fails.
    """
    from mergebench.testing import deltas, doctor_adapters, edits
    from mergebench.testing.doctor import CHECKS, examine

    with check_bar("checking", quiet or json_) as progress:
        reports = examine(names or (), progress)
    adapters = [] if names else doctor_adapters.examine_adapters()
    changes = [] if names else deltas.examine_deltas()
    made = [] if names else edits.examine_edits()
    good = all(report.ok for report in [*reports, *adapters, *changes, *made])
    if json_:
        found: dict[str, Any] = {"ok": good, "methods": [_facts("method", report) for report in reports]}
        if adapters:
            found["adapters"] = [_facts("adapter", report) for report in adapters]
            found["deltas"] = [_facts("delta", report) for report in changes]
            found["edits"] = [_facts("edit", report) for report in made]
        say_json(found)
    else:
        _show("method", list(CHECKS), reports)
        if adapters:
            say()
            _show("adapter", list(doctor_adapters.CHECKS), adapters)
            say()
            _show("delta", list(deltas.CHECKS), changes)
            say()
            _show("edit", list(edits.CHECKS), made)
    if not good:
        raise typer.Exit(1)


def _facts(what: str, report: Report) -> dict[str, Any]:
    checks = [finding._asdict() for finding in report.findings]
    return {what: report.name, "package": report.package, "ok": report.ok, "checks": checks}


def _show(what: str, checks: list[str], reports: list[Report]) -> None:
    from rich.table import Table

    table = Table(what, *checks, box=None, header_style="bold")
    for report in reports:
        table.add_row(report.name, *(finding.mark for finding in report.findings))
    print_table(table)
    for report in reports:
        for finding in report.findings:
            if finding.failed:
                say(f"{report.name}: {finding.check}: {finding.why}")
