"""The command line: parse, call one function, print. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mergebench import __version__
from mergebench.cli import (
    adapters,
    auto,
    cil,
    compare,
    compress,
    diff,
    dimension,
    doctor,
    edit,
    evaluate,
    explain,
    generate,
    init,
    inspect,
    mask,
    merge,
    methods,
    patch,
    plan,
    port,
    probe,
    report,
    results,
    search,
    side,
    statistics,
    task_vector,
    train,
)
from mergebench.cli.complete import Main
from mergebench.cli.help import App
from mergebench.cli.output import say

app = App(
    Main,
    name="mergebench",
    help="Merge, edit, train and measure model checkpoints: exactly, in bounded memory, at the speed of the disk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"mergebench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


MERGE, MEASURE, EDIT, ADAPT, LOOK = "Merge", "Measure", "Edit", "Adapters and training", "Look"

app.command("merge", rich_help_panel=MERGE)(merge.merge)
app.command("plan", rich_help_panel=MERGE)(plan.plan)
app.command("init", rich_help_panel=MERGE)(init.init)
app.command("explain", rich_help_panel=MERGE)(explain.explain)
app.command("search", rich_help_panel=MERGE)(search.search)
app.command("statistics", cls=statistics.StatisticsCommand, was="--model", rich_help_panel=MERGE)(statistics.statistics)
app.command("auto", rich_help_panel=MERGE)(auto.auto)
app.command("task-vector", rich_help_panel=MERGE)(task_vector.task_vector)
app.command("eval", rich_help_panel=MEASURE)(evaluate.evaluate)
app.command("compare", rich_help_panel=MEASURE)(compare.compare)
app.command("report", rich_help_panel=MEASURE)(report.report)
app.command("results", rich_help_panel=MEASURE)(results.results)
app.add_typer(probe.app, name="probe", rich_help_panel=EDIT)
app.command("edit", cls=edit.EditCommand, was="--model", rich_help_panel=EDIT)(edit.edit)
app.add_typer(patch.app, name="patch", rich_help_panel=EDIT)
app.add_typer(adapters.app, name="adapters", rich_help_panel=ADAPT)
app.command("port", rich_help_panel=ADAPT)(port.port)
app.command("train", rich_help_panel=ADAPT)(train.train)
app.command("dimension", rich_help_panel=ADAPT)(dimension.dimension)
app.command("compress", cls=compress.Compress, rich_help_panel=ADAPT)(compress.compress)
app.add_typer(mask.app, name="mask", rich_help_panel=ADAPT)
app.add_typer(side.app, name="side", rich_help_panel=ADAPT)
app.add_typer(cil.app, name="cil", rich_help_panel=ADAPT)
app.command("inspect", rich_help_panel=LOOK)(inspect.inspect)
app.command("diff", rich_help_panel=LOOK)(diff.diff)
app.command("generate", rich_help_panel=LOOK)(generate.generate)
app.command("methods", rich_help_panel=LOOK)(methods.methods)
app.command("doctor", rich_help_panel=LOOK)(doctor.doctor)
