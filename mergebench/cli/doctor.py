"""`mergebench doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.inspect import print_table
from mergebench.cli.progress import check_bar


def doctor(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="METHOD", help="Merge methods. Default: all that are installed.")
    ] = None,
    json_: opt.Json = False,
) -> None:
    """Try the identities that any merge must keep on the installed methods, with small checkpoints.

    One model, or several equal ones, come out as they went in. The order of the models, chunks and workers
    change nothing. Sign ties and negative weights give numbers. What is written is read back. A `-`: the check
    does not apply, and --json says why. Exit code 1 where a method fails.
    """
    from mergebench.doctor import CHECKS, examine

    with check_bar("checking", json_) as progress:
        reports = examine(names or (), progress)
    good = all(report.ok for report in reports)
    if json_:
        found = [
            {
                "method": report.method,
                "package": report.package,
                "ok": report.ok,
                "checks": [finding._asdict() for finding in report.findings],
            }
            for report in reports
        ]
        typer.echo(json.dumps({"ok": good, "methods": found}))
    else:
        from rich.table import Table

        table = Table("method", *CHECKS, box=None, header_style="bold")
        for report in reports:
            table.add_row(report.method, *(finding.mark for finding in report.findings))
        print_table(table)
        for report in reports:
            for finding in report.findings:
                if finding.failed:
                    typer.echo(f"{report.method}: {finding.check}: {finding.why}")
    if not good:
        raise typer.Exit(1)
