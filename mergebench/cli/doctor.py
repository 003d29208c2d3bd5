"""`mergebench doctor`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.output import check_bar, print_table, say, say_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mergebench.cli.installation import Part
    from mergebench.testing.checks import Report

INSTALL = "install"


def doctor(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD",
            help="Merge methods, or FILE.py:NAME. `install`: the installation alone. Default: the installation, all "
            "methods, adapters, delta kinds and edits.",
            autocompletion=complete.methods,
        ),
    ] = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check the installation, and try the identities that any merge must keep, with small checkpoints.

    Example: mergebench doctor ties

    The installation: torch and its devices, libraries, extras, plug-ins, room on the disks. Then every method, merged
    adapter, delta kind and edit, or the METHODs that are named; below each table stands what its columns check.
    Exit code 1 where something fails.
    """
    from mergebench.cli.installation import BROKEN, examine_installation

    wanted = [name for name in names or () if name != INSTALL]
    parts = [] if wanted and INSTALL not in (names or ()) else examine_installation()
    good = all(part.mark != BROKEN for part in parts)
    found: dict[str, Any] = {"installation": [part._asdict() for part in parts]} if parts else {}
    if parts and not json_:
        _show_installation(parts)
    if wanted or not names:
        if parts and not json_:
            say()
        good = _examine(wanted, found, json_, quiet) and good
    if json_:
        say_json({"ok": good, **found})
    if not good:
        raise typer.Exit(1)


def _examine(names: list[str], found: dict[str, Any], json_: bool, quiet: bool) -> bool:
    """Try methods, or all there is; the reports go into `found`, or are shown. Whether all is well."""
    from mergebench.testing import deltas, doctor_adapters, edits
    from mergebench.testing.doctor import CHECKS, examine

    with check_bar("checking", quiet or json_) as progress:
        reports: dict[str, tuple[list[Report], Mapping[str, Callable[..., None]]]]
        reports = {"method": (examine(names, progress), CHECKS)}
    if not names:
        reports["adapter"] = doctor_adapters.examine_adapters(), doctor_adapters.CHECKS
        reports["delta"] = deltas.examine_deltas(), deltas.CHECKS
        reports["edit"] = edits.examine_edits(), edits.CHECKS
    for what, (tried, checks) in reports.items():
        found[f"{what}s"] = [_facts(what, report) for report in tried]
        if not json_:
            if what != "method":
                say()
            _show(what, checks, tried)
    return all(report.ok for tried, _ in reports.values() for report in tried)


def _facts(what: str, report: Report) -> dict[str, Any]:
    checks = [finding._asdict() for finding in report.findings]
    return {what: report.name, "package": report.package, "ok": report.ok, "checks": checks}


def _show_installation(parts: list[Part]) -> None:
    from rich.table import Column, Table

    table = Table("installation", "", Column(ratio=1), box=None, header_style="bold")
    for part in parts:
        table.add_row(part.name, part.mark, part.found)
    print_table(table)
    for part in parts:
        if part.hint is not None:
            say(f"{part.name}: {part.hint}")


def _show(what: str, checks: Mapping[str, Callable[..., None]], reports: list[Report]) -> None:
    """A table of the reports, what failed, and what the columns mean."""
    from rich.table import Column, Table

    from mergebench.testing.checks import SKIPPED

    table = Table(what, *checks, box=None, header_style="bold")
    for report in reports:
        table.add_row(report.name, *(finding.mark for finding in report.findings))
    print_table(table)
    for report in reports:
        for finding in report.findings:
            if finding.failed:
                say(f"{report.name}: {finding.check}: {finding.why}")
    legend = Table("", Column(ratio=1), box=None, show_header=False)
    for name, check in checks.items():
        legend.add_row(name, " ".join((inspect.getdoc(check) or "").split()))
    if any(finding.mark == SKIPPED for report in reports for finding in report.findings):
        legend.add_row(SKIPPED, "The check does not apply; --json says why.")
    say()
    print_table(legend)
