"""The command line: parse, call one function, print. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mergebench import __version__
from mergebench.cli import (
    adapters,
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
    task_vector,
    train,
)
from mergebench.cli.command import App
from mergebench.cli.output import say

app = App(
    name="mergebench",
    help="Merge, edit and measure model checkpoints: exactly, in bounded memory, at the speed of the disk.",
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


app.command("merge")(merge.merge)
app.command("plan")(plan.plan)
app.command("init")(init.init)
app.command("explain")(explain.explain)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("search")(search.search)
app.command("report")(report.report)
app.command("results")(results.results)
app.add_typer(probe.app, name="probe")
app.command("edit", cls=edit.EditCommand)(edit.edit)
app.add_typer(patch.app, name="patch")
app.add_typer(adapters.app, name="adapters")
app.add_typer(mask.app, name="mask")
app.add_typer(cil.app, name="cil")
app.command("compress", cls=compress.Compress)(compress.compress)
app.add_typer(side.app, name="side")
app.command("train")(train.train)
app.command("dimension")(dimension.dimension)
app.command("port")(port.port)
app.command("task-vector")(task_vector.task_vector)
app.command("inspect")(inspect.inspect)
app.command("diff")(diff.diff)
app.command("generate")(generate.generate)
app.command("methods")(methods.methods)
app.command("doctor")(doctor.doctor)
