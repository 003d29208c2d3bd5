"""`mergebench cil run` and `eval`: learn a sequence of tasks with an adapter each, and score its banks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.help import App
from mergebench.cli.output import note, say_json, say_text, was_there, width, work_bar

app = App(help="Learn a growing sequence of tasks, one adapter per task, and measure it.", no_args_is_help=True)


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: backbone, data, tasks.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output directory. Default: banks/ and the config's name.")
    ] = None,
    device: opt.Device = "auto",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Learn the tasks of CONFIG with one adapter per task (MOS), for each seed, and compare MOS with its rivals.

    Example: mergebench cil run config.yaml --out banks/mine
    """
    from mergebench.systems.mos.config import load_config
    from mergebench.systems.mos.run import run_sequence

    quiet, form = quiet or json_, opt.check_format(format_, json_)
    target = out or Path("banks") / config.stem
    loaded = load_config(config)
    with work_bar(quiet) as progress:
        done = run_sequence(
            loaded,
            target,
            device=opt.check_device(device),
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            say=lambda line: note(line, quiet),
        )
    if not was_there(done.already_done, done.out, quiet):
        note(f"wrote {done.out}: banks, results.json, results.md and results.png", quiet)
    if json_:
        say_json({"out": str(done.out), **done.results})
    else:
        _show(done.results["records"], form)


@app.command("eval")
def evaluate(
    banks: Annotated[list[Path], typer.Argument(metavar="BANK", help="Banks, or what cil run wrote.")],
    test: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Items to test on. Default: those that the bank names.")
    ] = None,
    backbone: opt.Backbone = None,
    device: opt.Device = "auto",
    format_: opt.Format = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score banks at every stage, MOS whole and without each of its parts. Banks are only read.

    Example: mergebench cil eval banks/mine
    """
    from mergebench.systems.mos.evaluate import evaluate_banks

    form = opt.check_format(format_, json_)
    with work_bar(quiet or json_) as progress:
        records = evaluate_banks(
            banks, test=test, backbone=backbone, device=opt.check_device(device), progress=progress
        )
    if json_:
        say_json({"banks": [str(bank) for bank in banks], "records": records})
    else:
        _show(records, form)


def _show(records: list[dict[str, object]], form: str | None) -> None:
    from mergebench.evaluation.tables.sheet import written
    from mergebench.systems.mos import report

    if form is not None:
        say_text(written(report.sheets(records), form))
        return
    styled = sys.stdout.isatty()
    say_text(report.stages(records, width=width(), styled=styled) + "\n")
    say_text(report.table(records, width=width(), styled=styled))
